"""Draws samples: a grid of digits, the strip of their denoising, or its animation."""

from support.commands import Parser, UserError, add_device_flag, pick_device, run
from support.pictures import grid, save_picture

import dataclasses
import functools
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import build_diffusion, load_model
from config import SAMPLING, add_flags, given_flags
from dataset import to_uint8
from diffusion import SAMPLERS, guided

# The model just trained, else the weights that come with the repository
CHECKPOINTS = (Path("run/model.pth"), Path(__file__).with_name("weights") / "mnist.pth")

# Batches are filled up to a multiple of this: the libraries multiply a few rows in another order, and round otherwise.
FULL_BATCH = 16


def noise_source(seed, indices, shape, device):
    """A function that returns fresh standard normal noise (B, *shape) at each call, one random stream per image:
    what image k gets is a function of (seed, k) alone, whatever else is in its batch."""
    streams = [np.random.Generator(np.random.Philox(key=[seed, k])) for k in indices]

    def noise():
        batch = np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])
        return torch.from_numpy(batch).to(device)

    return noise


@torch.no_grad()
def sample(model, config, labels, indices=None, bound=1.0):
    """Draws one image per label, as the images number `indices` (default: 0, 1, ...) of the seed `config.seed`.

    labels: int64 (B,) on the model's device. How they are drawn (sampler, sample_steps, guidance, eta) is in `config`.
    A generator: yields the noise (B, C, H, W), then x after each step; the last one is the images, in [-1, 1].
    An image is the same to the last bit whatever the batch that it is drawn in, on one kind of CPU, in one precision.
    """
    B, indices = len(labels), list(indices or range(len(labels)))
    fill = -B % FULL_BATCH
    labels, indices = torch.cat([labels, labels[:1].expand(fill)]), indices + indices[:1] * fill
    shape = (config.channels, config.image_size, config.image_size)
    noise = noise_source(config.seed, indices, shape, labels.device)
    sampler = SAMPLERS[config.sampler]
    if config.sampler == "ddim":
        sampler = functools.partial(sampler, eta=config.eta)
    start = noise()
    yield start[:B]
    denoise = guided(model, labels, config.guidance)
    for x in sampler(build_diffusion(config), denoise, start, config.sample_steps, noise, bound):
        yield x[:B]


def find_checkpoint(path):
    """`path`, or when it is None the first of `CHECKPOINTS` that exists."""
    path = path or next((checkpoint for checkpoint in CHECKPOINTS if checkpoint.is_file()), None)
    if path is None:
        raise UserError("no checkpoint: run train.py first, or point --checkpoint at one")
    return path


def parse_labels(words, num_classes):
    """Labels from the command line: 31415 is five digits, 3 14 or 3,14 are two labels."""
    words = [word for part in words for word in part.replace(",", " ").split()]
    if len(words) == 1 and num_classes <= 10:
        words = list(words[0])
    for word in words:
        if not (word.isascii() and word.isdigit() and int(word) < num_classes):
            raise UserError(f"--labels: {word!r} is no label; this model knows 0 to {num_classes - 1}")
    return [int(word) for word in words]


def load_for_sampling(args):
    """The model and configuration that `--checkpoint`, `--device` and the flags in `args` ask for."""
    settings = {"seed": 0, "precision": "auto", **given_flags(args)}
    device = pick_device(args.device)
    model, config = load_model(find_checkpoint(args.checkpoint), device, settings["precision"])
    return model, dataclasses.replace(config, **settings)


def sampling_parser(description):
    """The flags that every command shares which draws from a checkpoint."""
    parser = Parser(description=description)
    parser.add_argument("--checkpoint", help="the model to draw with (default: run/model.pth, else weights/mnist.pth)")
    add_flags(parser, SAMPLING)
    add_device_flag(parser)
    return parser


def main():
    parser = sampling_parser("Draws digits with a trained model. How it draws is up to the flags below; where one is "
                             "not given, to the model's own configuration.")
    parser.add_argument("--labels", nargs="+", help="what to draw: 31415, or a list: 3 1 4 (default: each label)")
    parser.add_argument("--count", type=int, help="how many of each (default: 8, with --strip 1)")
    parser.add_argument("--out", help="the picture to write (default: samples.png, strip.png or samples.gif)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--strip", action="store_true", help="draw the denoising of each image, from left to right")
    kind.add_argument("--gif", action="store_true", help="animate the denoising of the grid")
    args = parser.parse_args()

    model, config = load_for_sampling(args)
    labels = parse_labels(args.labels, config.num_classes) if args.labels else list(range(min(config.num_classes, 10)))
    count = args.count if args.count is not None else 1 if args.strip else 8
    if not 1 <= count * len(labels) <= 10_000:
        raise UserError(f"--count {count}: draw between 1 and 10,000 images at once; generator.py draws more")
    out = args.out or ("strip.png" if args.strip else "samples.gif" if args.gif else "samples.png")

    y = torch.tensor(labels * count, device=next(model.parameters()).device)
    states = tqdm(sample(model, config, y), total=config.sample_steps + 1, desc=f"drawing {len(y)} images", unit="step",
                  leave=False, disable=None)
    if not args.strip and not args.gif:
        *_, x = states
        save_picture(out, grid(to_uint8(x), columns=len(labels)))
    else:
        states = torch.stack([to_uint8(x).cpu() for x in states])  # (steps + 1, B, C, H, W)
        kept = torch.linspace(0, len(states) - 1, min(len(states), 11 if args.strip else 61)).round().long()
        states = states[kept]
        if args.strip:
            save_picture(out, grid(states.transpose(0, 1).flatten(0, 1), columns=len(states)))
        else:
            frames = [grid(state, columns=len(labels)) for state in states]
            save_picture(out, frames[0], save_all=True, append_images=frames[1:], loop=0,
                         duration=[1500 // len(frames)] * (len(frames) - 1) + [2000])
    print(f"{out}: {len(y)} images, {config.sampler} with {config.sample_steps} steps, guidance {config.guidance:g}, "
          f"seed {config.seed}")


if __name__ == "__main__":
    run(main)
