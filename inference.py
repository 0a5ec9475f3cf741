"""Draws samples: a grid of digits, the strip of their denoising, or its animation."""

from support.commands import Parser, UserError, add_device_flag, pick_device, run
from support.pictures import check_picture, grid, save_picture

import argparse
import dataclasses
import functools
import itertools
import math
import re
from collections import deque
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import load_model
from config import SAMPLING, add_flags, given_flags
from dataset import BOUND, to_uint8
from diffusion import SAMPLERS, build_process
from latent.vae import load_vae

# The model just trained, else the weights that come with the repository
CHECKPOINTS = (Path("run/model.pth"), Path(__file__).with_name("weights") / "mnist.pth")

# Batches are filled up to a multiple of this: the libraries multiply a few rows in another order, and round otherwise.
FULL_BATCH = 16


def noise_source(seed, indices, shape, device, calls=1):
    """A function that returns fresh standard normal noise (B, *shape) at each call, one random stream per image:
    what image k gets is a function of (seed, k) alone, whatever else is in its batch.

    calls: how many may come. Only what is not first is drawn ahead, since most samplers ask for no more.
    """
    streams = [np.random.Generator(np.random.Philox(key=[seed, k])) for k in indices]
    ahead = max(1, min(8, 2**24 // (len(streams) * math.prod(shape))))  # at most 64 MB

    def noises():
        for done in itertools.chain([0], itertools.count(1, ahead)):
            block = torch.empty(len(streams), min(ahead, max(1, calls - done)) if done else 1, *shape,
                                pin_memory=torch.device(device).type == "cuda")
            for stream, numbers in zip(streams, block.numpy(), strict=True):
                stream.standard_normal(out=numbers, dtype=np.float32)
            for noise in block.to(device, non_blocking=True).unbind(1):
                yield noise.contiguous()

    return functools.partial(next, noises())


@torch.no_grad()
def sample(model, config, labels, indices=None):
    """Draws one image per label, as the images number `indices` (default: 0, 1, ...) of the seed `config.seed`.

    labels: int64 (B,) on the model's device. How they are drawn (sampler, sample_steps, guidance, eta) is in `config`.
    A generator: yields the noise (B, C, H, W), then x after each step; the last one is the images, in [-1, 1], or their
    latents: `to_images` shows either.
    An image is the same to the last bit whatever the batch that it is drawn in, on one kind of CPU, in one precision.
    """
    B, indices = len(labels), list(indices or range(len(labels)))
    fill = -B % FULL_BATCH
    labels, indices = torch.cat([labels, labels[:1].expand(fill)]), indices + indices[:1] * fill
    noise = noise_source(config.seed, indices, config.input_shape, labels.device, config.sample_steps)
    process, bound = build_process(config), BOUND if config.clamp else math.inf
    steps = process.descending_steps(config.sample_steps, config.spacing)
    options = {"ddim": {"eta": config.eta}, "ddpm": {"spread": lambda: process.spread}}.get(config.sampler, {})

    def denoise(x, t):
        return process.denoise(model, x, t, labels, config.guidance, bound, config.guided_channels)

    start = noise()
    yield start[:B]
    for x in SAMPLERS[config.sampler](denoise, start, steps, noise, **options):
        yield x[:B]


def generate(model, config, labels, indices=None):
    """The images float (B, C, H, W) in [-1, 1] that `sample` ends with; no earlier state is kept."""
    return deque(sample(model, config, labels, indices), maxlen=1).pop()


def to_images(x, config):
    """Images uint8 (B, C, H, W) of a state x of `sample`: of latents, through their VAE. The one way to see a state."""
    return to_uint8(find_vae(config, x.device).decode(x) if config.latent_shape else x)


def find_vae(config, device):
    """The `VAE` whose latents a configuration is of, with the statistics that the model has learned with. Raises
    `UserError` when it is not there or is another one."""
    return open_vae(config.vae, config.vae_hash, (config.channels, *config.image_size), config.latent_shape,
                    config.latent_mean, config.latent_std, device)


@functools.lru_cache(maxsize=1)
def open_vae(name, fingerprint, shape, latent_shape, mean, std, device):
    if not name:
        raise UserError("this model draws latents: name the VAE that makes images of them with --vae FOLDER")
    vae = load_vae(name, device)
    made = (vae.settings["out_channels"], *(side * vae.factor for side in latent_shape[1:]))
    if (vae.settings["latent_channels"], made) != (latent_shape[0], shape):
        raise UserError(f"{name} makes images {made} out of latents of {vae.settings['latent_channels']} channels, but "
                        f"this model's are images {shape} out of latents {latent_shape}")
    if fingerprint not in ("", vae.fingerprint):
        raise UserError(f"{name} is another VAE than the one whose latents this model has learned: its encoder has the "
                        f"hash {vae.fingerprint}, not {fingerprint:.16}")
    vae.normalize_by(mean, std)
    return vae


def batch_that_fits(config, device):
    """How many images to draw at once: an estimate, on the safe side, of what half of a GPU's free memory, or 2 GB of
    any other, holds; at most 4,096 on a GPU, and elsewhere 500, beyond which nothing gets quicker."""
    tokens = math.prod(config.input_shape[1:]) // math.prod(config.patch_size)
    # What a block keeps for a token: qkv, its output and the MLP's two, in fp32; with guidance for two images
    floats = 2 * tokens * config.hidden_size * (8 + 2 * config.mlp_ratio)
    floats += 2 * tokens**2 * config.num_heads  # where attention has no kernel of its own
    floats += 20 * math.prod(config.input_shape)  # the states, and noise drawn ahead
    free, most = (torch.cuda.mem_get_info(device)[0] / 2, 4096) if device.type == "cuda" else (2e9, 500)
    return int(min(max(free / (4 * floats), 1), most))


def find_checkpoint(path=None):
    """The file of a checkpoint: `path`, or model.pth in it when it is a run folder; None: the first of `CHECKPOINTS`
    that exists. Raises `UserError` when there is none."""
    if path is None:
        path = next((checkpoint for checkpoint in CHECKPOINTS if checkpoint.is_file()), None)
        if path is None:
            raise UserError("no checkpoint: run train.py first, or point --checkpoint at one")
    if not str(path):
        raise UserError("--checkpoint is empty: name a checkpoint or a run folder, or leave it out")
    if Path(path).is_dir():
        path = Path(path) / "model.pth"
        if not path.is_file():
            raise UserError(f"{path.parent} holds no model.pth: point --checkpoint at a checkpoint or a run folder")
    return path


def parse_labels(words, names):
    """The labels that `words` (a list, or one) ask for, each by a class's name or its number, a list of ints.

    31415 is five digits, 3 14 or 3,14 are two labels. None: each label, but at most 10.
    names: of the classes. Raises `UserError` for what is neither.
    """
    if words is None:
        return list(range(min(len(names), 10)))
    known = {name: label for label, name in reversed([*enumerate(names)])}
    parts = []
    for word in map(str, [words] if isinstance(words, (str, int)) else words):
        for part in [word] if word in known else word.split(","):
            parts += [part.strip()] if part.strip() in known else part.split()
    if len(parts) == 1 and len(names) <= 10 and parts[0] not in known and parts[0].isdecimal():
        parts = list(parts[0])
    labels = [known.get(part, int(part) if re.fullmatch("[0-9]{1,9}", part) else len(names)) for part in parts or [""]]
    for part, label in zip(parts or [""], labels, strict=True):
        if label >= len(names):
            raise UserError(f"--labels: {part!r:.40} is no label; this model knows {list_names(names)}")
    return labels


def list_names(names):
    """What a model knows, in a few words."""
    if are_numbers(names):
        return f"0 to {len(names) - 1}"
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f"{', '.join(f'{name!r:.30}' for name in names[:10])}{more} (or their numbers, from 0)"


def are_numbers(names):
    """Whether the classes have no names but their numbers."""
    return tuple(names) == tuple(map(str, range(len(names))))


def load_for_sampling(args):
    """The model and configuration that `--checkpoint`, `--device` and the flags in `args` ask for; sets
    `args.checkpoint` to the file."""
    settings = {"seed": 0, "precision": "auto", **given_flags(args)}
    args.checkpoint = find_checkpoint(args.checkpoint)
    device = pick_device(args.device)
    model, config = load_model(args.checkpoint, device, settings["precision"])
    if "vae" in settings and not config.latent_shape:
        raise UserError(f"{args.checkpoint} draws images without a VAE: leave --vae out")
    beside = Path(args.checkpoint).parent / config.vae  # where weights are shared, their VAE is
    if config.vae and not Path(config.vae).exists() and beside.is_dir():
        settings = {"vae": str(beside), **settings}
    config = dataclasses.replace(config, **settings)
    if config.latent_shape:
        find_vae(config, device)
    if settings.get("eta") and config.sampler != "ddim":
        raise UserError(f"--eta is the noise of the ddim sampler, but this draws with {config.sampler}: "
                        "add --sampler ddim, or leave --eta out")
    return model, config


def draw_states(model, config, labels, count, shown=1):
    """Draws `count` rows of `labels` (a list): of all states, the last `shown` that are evenly spaced, as uint8
    (shown, B, C, H, W) on the CPU. The rest is not kept."""
    if not 1 <= count * len(labels) <= 10_000:
        raise UserError(f"--count {count}: draw between 1 and 10,000 images at once; generator.py draws more")
    y = torch.tensor(labels * count, device=next(model.parameters()).device)
    total = config.sample_steps + 1
    kept = set(torch.linspace(total - 1, 0, min(total, shown)).round().long().tolist())
    states = tqdm(sample(model, config, y), total=total, desc=f"drawing {len(y)} images", unit="step", leave=False,
                  disable=None)
    return torch.stack([to_images(x, config).cpu() for i, x in enumerate(states) if i in kept])


def label_grid(images, config, labels):
    """The grid of images uint8 (B, C, H, W) whose columns show `labels`, with their names where they have any."""
    names = config.class_names
    return grid(images, len(labels), captions=() if are_numbers(names) else [names[label] for label in labels])


def draw(labels=None, count=1, checkpoint=None, device=None, **settings):
    """A grid of images for a notebook, a PIL image: draw("31415"), draw([3, 1, 4], count=2, guidance=2.0).

    labels: as `parse_labels` takes them. count: how many of each. checkpoint, device and settings (sampler,
    sample_steps, guidance, eta, seed, precision ...): as the flags of these names. Raises `UserError`.
    """
    if settings.keys() - {*SAMPLING, "vae"}:
        raise UserError(f"draw knows {', '.join(SAMPLING)} and vae, but not "
                        f"{', '.join(settings.keys() - {*SAMPLING, 'vae'})}")
    model, config = load_for_sampling(argparse.Namespace(checkpoint=checkpoint, device=device, **settings))
    labels = parse_labels(labels, config.class_names)
    return label_grid(draw_states(model, config, labels, count)[-1], config, labels)


def say_default(parser, names, default):
    """Has --help name another default of these flags than the one that `Config` has."""
    for action in parser._actions:
        if action.dest in names:
            action.help = f"{action.help.rpartition(' (default')[0]} (default: {default})"


def sampling_parser(description):
    """The flags that every command shares which draws from a checkpoint."""
    parser = Parser(description=description)
    parser.add_argument("--checkpoint", help="the model to draw with, a file or a run folder (default: run/model.pth, "
                        "else weights/mnist.pth)")
    add_flags(parser, SAMPLING)
    say_default(parser, set(SAMPLING) - {"seed", "precision"}, "the model's own")
    parser.add_argument("--vae", default=argparse.SUPPRESS, help="of a model that draws latents, the VAE that makes "
                        "images of them: a folder, or a name on the Hugging Face hub (default: where the model's own "
                        "was when it was made)")
    add_device_flag(parser)
    return parser


def main():
    parser = sampling_parser("Draws digits with a trained model. How it draws is up to the flags below; where one is "
                             "not given, to the model's own configuration.")
    parser.add_argument("--labels", nargs="+", help="what to draw, names or numbers: 31415, or a list: 3 1 4, cat dog "
                        "(default: each label)")
    parser.add_argument("--count", type=int, help="how many of each (default: 8, with --strip 1)")
    parser.add_argument("--out", help="the picture to write (default: samples.png, strip.png or samples.gif)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--strip", action="store_true", help="draw the denoising of each image, from left to right")
    kind.add_argument("--gif", action="store_true", help="animate the denoising of the grid")
    args = parser.parse_args()
    out = args.out if args.out is not None else (
        "strip.png" if args.strip else "samples.gif" if args.gif else "samples.png")
    check_picture(out, animated=args.gif)

    model, config = load_for_sampling(args)
    labels = parse_labels(args.labels, config.class_names)
    count = args.count if args.count is not None else 1 if args.strip else 8
    states = draw_states(model, config, labels, count, 11 if args.strip else 61 if args.gif else 1)
    if args.strip:
        save_picture(out, grid(states.transpose(0, 1).flatten(0, 1), columns=len(states)))
    else:
        frames = [label_grid(state, config, labels) for state in states]
        options = dict(save_all=True, append_images=frames[1:], loop=0,
                       duration=[1500 // len(frames)] * (len(frames) - 1) + [2000]) if args.gif else {}
        save_picture(out, frames[0], **options)
    print(f"{out}: {states.shape[1]} images, {config.sampler} with {config.sample_steps} steps, guidance "
          f"{config.guidance:g}, seed {config.seed}, drawn with {args.checkpoint}")


if __name__ == "__main__":
    run(main, memory="--count")
