"""What to do with a sampler besides drawing from noise: change a picture, complete one, lead from noise to noise.

Each of these shares the signature of `diffusion.from_noise`, and yields what it starts from, then x after each step.
"""

import math

import torch

from diffusion import per_image


def edit(process, sampler, denoise, noise, count, picture, strength):
    """SDEdit (2108.01073, algorithm 1): noises `picture`, like x or (1, C, *size), to a share `strength` of the T
    steps, and denoises it from there. What the noise hides is drawn anew; of 1 that is nearly everything."""
    steps = process.descending_steps(count, strength)
    a, s = steps[0][1]
    x = a * picture + s * noise()
    yield x
    yield from sampler(denoise, x, steps, noise)


def inpaint(process, sampler, denoise, noise, count, picture, known, rounds=4):
    """RePaint (2201.09865, algorithm 1): draws what `picture`, like x or (1, C, *size), is not `known` to be.

    The known pixels are put in after each step, as noisy as x is by then. So they shape the next step, but what was
    drawn beside them did not know them: each step is noised again and repeated, `rounds` times in all.
    known: bool, broadcasts over x. x ends with just these pixels. The rest is drawn from about, not from just, the
    conditional distribution: on Gaussians its mean is closer to the pixels' own mean than it should be.
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
    """Noise on the way from noise a (share 0) to noise b (share 1), both (B, ...), by shares (B,): on a quarter of a
    circle, where it is standard normal all the way. On a straight line it would be weaker midway."""
    angle = per_image(share, a) * (math.pi / 2)
    return angle.cos() * a + angle.sin() * b
