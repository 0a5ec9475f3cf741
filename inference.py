"""Draws samples with a trained model: a grid of digits, the strip of their denoising, or its animation."""

from support.commands import Parser, UserError, add_device_flag, pick_device, run, some_path
from support.labels import are_numbers, parse_labels
from support.noise import noise_source
from support.pictures import check_picture, grid, grid_size, save_animation
from support.settings import add_flags, check_names, given_flags, say_default
from support.sizes import batch_that_fits

import argparse
import dataclasses
from collections import deque

import torch
from tqdm import tqdm

from config import Config
from diffusion import from_noise
from record.checkpoint import find_checkpoint, load_model

# Batches are filled up to a multiple of this: the libraries multiply a few rows in another order, and round otherwise.
FULL_BATCH = 16

STRIP, ANIMATION = 11, 61  # images of a strip, of an animation


@torch.no_grad()
def sample(model, config, labels, indices=None, way=from_noise, source=None):
    """Draws one image per label, as the images number `indices` (default: 0, 1, ...) of the seed `config.seed`.

    labels: int64 (B,) on the model's device. How they are drawn (sampler, sample_steps, guidance, eta) is in `config`.
    way: what to do with the sampler, see `diffusion.from_noise`. source: as `noise_source`.
    A generator: yields the noise (B, C, *size) that it starts from, then x after each step; the last one is the images,
    as the network sees them: `config.to_images` shows any of these.
    An image is the same to the last bit whatever the batch that it is drawn in, on one kind of CPU, in one precision.
    """
    B, indices = len(labels), list(indices or range(len(labels)))
    fill = -B % FULL_BATCH
    labels, indices = torch.cat([labels, labels[:1].repeat_interleave(fill, 0)]), indices + indices[:1] * fill
    noise = (source or noise_source)(config.seed, indices, config.input_shape, labels.device, config.sample_steps)
    process = config.build_process()

    def denoise(x, t, without=None):
        return process.denoise(model, x, t, labels, config.guidance, without=without)

    for x in way(process, config.build_sampler(process), denoise, noise, config.sample_steps):
        yield x[:B]


def generate(model, config, labels, indices=None, way=from_noise):
    """The images (B, C, *size), as the network sees them, that `sample` ends with; no earlier state is kept."""
    return deque(sample(model, config, labels, indices, way), maxlen=1).pop()


def draw_batches(model, config, labels, indices=None, batch_size=None, way_of=lambda rows: from_noise,
                 what="images", hidden=None):
    """Draws the images number `indices` (default: 0, 1, ...) of `labels`, int64 (N,), batch by batch, under a bar that
    counts `what`. Yields each batch's rows, int64 (b,), and its images uint8 (b, C, *size), on the CPU.

    batch_size: default: `batch_that_fits`. way_of(rows): the `way` of `sample` for these rows. hidden: no bar.
    """
    device, indices = next(model.parameters()).device, indices or range(len(labels))
    with tqdm(total=len(labels), desc="drawing", unit=f" {what}", leave=False, disable=hidden) as bar:
        for rows in filter(len, torch.arange(len(labels)).split(batch_size or batch_that_fits(config, device))):
            x = generate(model, config, labels[rows].to(device), [indices[row] for row in rows], way_of(rows))
            yield rows, config.to_images(x).cpu()
            bar.update(len(rows))


def load_for_sampling(args, kinds=(Config,)):
    """The model and configuration that `--checkpoint`, `--device` and the flags in `args` ask for. kinds: the classes
    of settings that will do, the fullest last. Sets `args.checkpoint` to the file."""
    args.checkpoint = find_checkpoint(args.checkpoint)
    device, precision = pick_device(args.device), getattr(args, "precision", "auto")
    model, config = load_model(args.checkpoint, device, precision, kinds=kinds)
    given = given_flags(args, kinds[-1])
    config.check_given(given)
    config = dataclasses.replace(config, **{"seed": 0, "precision": precision, **given})
    return model, config.ready(args.checkpoint, device)


def check_count(count, labels):
    """Raises `UserError` unless `count` rows of `labels` can be drawn at once."""
    if not 1 <= count * len(labels) <= 10_000:
        raise UserError(f"--count {count}: draw between 1 and 10,000 images at once; generator.py draws more")


def draw_states(model, config, labels, count, shown=1, **options):
    """Draws `count` rows of `labels` (a list): of all states, the last `shown` that are evenly spaced, as uint8
    (shown, B, C, *size) on the CPU. The rest is not kept. options: further arguments of `sample`."""
    check_count(count, labels)
    y = torch.tensor(labels * count, device=next(model.parameters()).device)
    total = config.sample_steps + 1
    kept = set(torch.linspace(total - 1, 0, min(total, shown)).round().long().tolist())
    states = tqdm(sample(model, config, y, **options), total=total, desc=f"drawing {len(y)} images", unit="step",
                  leave=False, disable=None)
    return torch.stack([config.to_images(x).cpu() for i, x in enumerate(states) if i in kept])


def label_grid(images, config, labels):
    """The grid of images uint8 (B, C, H, W) whose columns show `labels`, with their names if they have any."""
    names = config.class_names
    return grid(images, len(labels), captions=() if are_numbers(names) else [names[label] for label in labels])


def strips(views):
    """A picture with a row for each image of the views uint8 (V, B, C, H, W): how it looks in one after the other."""
    return grid(views.transpose(0, 1).flatten(0, 1), columns=len(views))


def draw(labels=None, count=1, checkpoint=None, device=None, of=Config, show=label_grid, **settings):
    """A grid of images for a notebook, a PIL image: draw("31415"), draw([3, 1, 4], count=2, guidance=2.0).

    labels: as `parse_labels` takes them. count: how many of each. settings: as the flags of these names (sampler,
    sample_steps, guidance, eta, seed, precision). of: the class of the checkpoint's settings. show: makes the picture,
    as `label_grid` does. Raises `UserError`.
    """
    check_names(settings, [*of.SAMPLING, "labels", "count", "checkpoint", "device"])
    model, config = load_for_sampling(argparse.Namespace(checkpoint=checkpoint, device=device, **settings), (of,))
    labels = parse_labels(labels, config.class_names)
    return show(draw_states(model, config, labels, count)[-1], config, labels)


def sampling_parser(description, of=Config, names=None):
    """The flags of every command that draws from a checkpoint. names: of the settings among them (default:
    `of.SAMPLING`)."""
    parser = Parser(description=description)
    parser.add_argument("--checkpoint", type=some_path, help="the model to draw with, a file or a run folder (default: "
                        "run/model.pth, else weights/mnist.pth)")
    add_flags(parser, of, names or of.SAMPLING)
    say_default(parser, set(of.SAMPLING) - {"seed", "precision"}, "the model's own")
    add_device_flag(parser)
    return parser


def drawing_parser(description, of=Config, count="8; with --strip 1",
                   strip="draw the denoising of each image, from left to right",
                   gif="animate the denoising of the grid"):
    """The flags of every command that draws pictures; what its help says of these three."""
    parser = sampling_parser(description, of)
    parser.add_argument("--labels", nargs="+", help="what to draw, names or numbers: 31415, or a list: 3 1 4, cat dog "
                        "(default: each label)")
    parser.add_argument("--count", type=int, help=f"how many of each (default: {count})")
    parser.add_argument("--out", type=some_path,
                        help="the picture to write (default: samples.png, strip.png or samples.gif)")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--strip", action="store_true", help=strip)
    kind.add_argument("--gif", action="store_true", help=gif)
    return parser


def check_out(args, config, labels, views, animated, inputs=(), size=(), grid=None):
    """Names the picture to write where `--out` does not. Finds out before the work whether it may be written, and
    whether its format holds a picture as large as that of so many views: else `UserError`.

    inputs: files that are read. size: of an image, instead of the model's own. grid: (columns, rows), instead of those
    of `save_views`.
    """
    check_count(args.count, labels)
    args.out = args.out or ("strip.png" if args.strip else "samples.gif" if animated else "samples.png")
    columns, rows = grid or ((views, len(labels) * args.count) if args.strip else (len(labels), args.count))
    size, _ = grid_size(columns * rows, *(size or config.image_size)[-2:], columns,
                        captions=() if are_numbers(config.class_names) else config.class_names)
    check_picture(args.out, animated, [args.checkpoint, *inputs], size if max(size) > 10_000 else (64, 64))


def save_views(args, views, config, labels, durations):
    """Writes the views uint8 (V, B, C, H, W) of samples as `--out`: as strips, or one grid after the other, each shown
    for so many milliseconds."""
    pictures = [strips(views)] if args.strip else [label_grid(view, config, labels) for view in views]
    save_animation(args.out, pictures, durations[:len(pictures)])


def say_drawn(args, config, what):
    print(f"{args.out}: {what}, {config.sampler} with {config.sample_steps} steps, guidance {config.guidance:g}, seed "
          f"{config.seed}, drawn with {args.checkpoint}")


def main(of=Config):
    args = drawing_parser("Draws images with a trained model. Settings that are not given here are the model's own.",
                          of).parse_args()
    args.count = (1 if args.strip else 8) if args.count is None else args.count
    model, config = load_for_sampling(args, (of,))
    labels, shown = parse_labels(args.labels, config.class_names), STRIP if args.strip else ANIMATION if args.gif else 1
    check_out(args, config, labels, shown, args.gif)
    states = draw_states(model, config, labels, args.count, shown)
    save_views(args, states, config, labels, [1500 // len(states)] * (len(states) - 1) + [2000])
    say_drawn(args, config, f"{states.shape[1]} images")


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
