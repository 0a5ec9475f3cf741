"""Frames that are given: a network is shown them clean in training, and draws the other frames of a clip."""

import torch

from diffusion import per_image


def given_frames(B, T, share, generator):
    """A random mask of clean frames for this share of B clips of T, bool (B, 1, T, 1, 1): the first, the last, both
    ends or any, equally often; between one frame and all but one."""
    device = generator.device
    count, kind, chosen = torch.rand(3, B, generator=generator, device=device)
    any_order = torch.rand(B, T, generator=generator, device=device).argsort(dim=1)                    # (B, T)
    place = torch.arange(T, device=device).expand(B, T)
    both = torch.minimum(2 * place, 2 * (T - 1 - place) + 1)  # from the ends inwards
    orders = torch.stack([place, T - 1 - place, both, any_order], dim=1)                               # (B, 4, T)
    ranks = orders[torch.arange(B, device=device), (4 * kind).long()]                                  # (B, T)
    count = (1 + ((T - 1) * count).long()).clamp(max=T - 1) * (chosen < share)
    return (ranks < count[:, None])[:, None, :, None, None]


def losses(process, model, x_0, t, y, noise, known, loss="l2", motion=0.0):
    """`Process.losses` of a network that is shown what is `known` without noise, and need not predict it (RaMViD,
    2206.07696). known: bool, broadcasts over x_0; some of each clip is not known.

    motion: the weight of a second term, the squares (l1: sizes) of the error's differences from frame to frame. With it
        errors become alike in all frames, and motion even (the gradient difference loss of 1511.05440, in time).
    """
    x_t, _ = process.forward_add_noise(x_0, t, noise)
    output = model(torch.where(known, x_0, x_t), t, y)
    error = per_image(process.error_scale[t], x_0) * (output - process.target(x_0, noise))
    error = error.masked_fill(known, 0)
    measure = torch.abs if loss == "l1" else torch.square
    losses = measure(error).flatten(1).mean(dim=1)
    if motion:
        losses = losses + motion * measure(error.diff(dim=2)).flatten(1).sum(dim=1) / error[0].numel()
    return losses / (~known).flatten(1).float().mean(dim=1)


def complete(process, sampler, denoise, noise, count, picture, known):
    """Draws the part of `picture` that is not `known`, with a network that has learned to (RaMViD, 2206.07696): it sees
    what is known without noise. x ends with exactly what is known. Guidance leads to what follows from the label and
    what is known, away from what the network draws where neither is said: what is known is then noisy as all of x is
    (2502.06764).

    picture: one for each x, (B, C, *size), but not for those that fill the batch up; or one for all. known: bool,
    broadcasts over x.
    """
    def put_in(x):
        return torch.where(known, picture, x)

    x = noise()
    picture = torch.cat([picture, picture[:1].expand(len(x) - len(picture), *picture.shape[1:])])
    yield put_in(x)
    steps = process.descending_steps(count)
    yield from map(put_in, sampler(lambda x, t: put_in(denoise(put_in(x), t, without=x)), x, steps, noise))
