"""Other ways to use a sampler than to draw from noise: change a picture, complete one, lead from noise to noise.

`edit` and `inpaint` have the signature of `diffusion.from_noise`: they yield what they start from, then x after each
step.
"""

import math

import torch

from diffusion import per_image


def edit(process, sampler, denoise, noise, count, picture, strength):
    """SDEdit (2108.01073, algorithm 1): noises `picture`, like x or (1, C, *size), up to a share `strength` of the T
    steps, and denoises it from there. What the noise hides is drawn anew; at 1 that is nearly everything."""
    steps = process.descending_steps(count, strength)
    a, s = steps[0][1]
    x = a * picture + s * noise()
    yield x
    yield from sampler(denoise, x, steps, noise)


def inpaint(process, sampler, denoise, noise, count, picture, known, rounds=4):
    """RePaint (2201.09865, algorithm 1): draws the part of `picture`, like x or (1, C, *size), that is not `known`.

    The known pixels are put in after each step, as noisy as x is by then. They shape the next step, but what was drawn
    beside them did not know them. So each step is noised again and repeated, `rounds` times in all.
    known: bool, broadcasts over x. x ends with exactly these pixels. The rest follows the conditional distribution only
    roughly: on Gaussians its mean is too close to the unconditional one.
    """
    steps = process.descending_steps(count)
    (a, s), x = steps[0][1], noise()
    x = torch.where(known, a * picture + s * x, x)
    yield x
    for t, (a, s), (a_after, s_after) in steps:
        for left in reversed(range(rounds)):
            *_, x = sampler(denoise, x, [(t, (a, s), (a_after, s_after))], noise)
            x = torch.where(known, a_after * picture + s_after * noise(), x)
            if left:
                x = a / a_after * x + math.sqrt(s**2 - (a / a_after * s_after) ** 2) * noise()
        yield x


def between(a, b, share):
    """Noise on the way from noise a (share 0) to noise b (share 1), both (B, ...), at B shares. The way is a quarter
    of a circle, on which the noise stays standard normal. On a straight line it would be weaker midway."""
    angle = per_image(torch.as_tensor(share, device=a.device), a) * (math.pi / 2)
    return angle.cos() * a + angle.sin() * b
