"""Draws clips, and makes clips longer.

    python -m video.draw --checkpoint weights/moving.pth --labels 7 --count 1 --out seven.gif
    python -m video.draw --checkpoint weights/moving.pth --labels 7 --extend seven.gif --frames 64 --out long.gif
"""

from support.commands import UserError, run, some_path
from support.image_files import name_of, read_clip
from support.labels import parse_labels
from support.noise import noise_source
from support.sizes import as_size, demand_memory, show_size

import functools

import torch
from tqdm import tqdm

import inference
from dataset import to_float
from inference import check_out, draw_states, drawing_parser, generate, load_for_sampling, sample
from video.config import ClipConfig
from video.given import complete

FRAME = 100  # milliseconds that a clip shows each of its frames
LONGER = ("extend", "before", "between", "loop", "frames")  # flags that make clips longer


def check_flags(config, args):
    """Returns the names of the `LONGER` flags that are given. Raises `UserError` unless all flags go together, and the
    model can do what they ask for."""
    longer = [name for name in LONGER if getattr(args, name) is not None]
    if len(longer) > 1 and (longer[-1] != "frames" or longer[0] in ("between", "loop")):
        raise UserError(f"--{longer[0]} and --{longer[1]} do not go together: do one after the other")
    if longer and not config.given:
        raise UserError(f"--{longer[0]} needs a model that was trained with frames given: "
                        "python -m video.train_dit --given 0.3")
    if "guidance_high" in args and longer not in ([], ["frames"]):
        raise UserError(f"--guidance-high is for clips drawn from noise: with --{longer[0]} all steps are guided")
    if args.frames not in (None, *range(1, 10_001)):
        raise UserError(f"--frames {args.frames}: draw between 1 and 10,000 frames")
    if args.size and longer:
        raise UserError("--size is for clips drawn from noise, and not for given ones")
    if args.size and config.latent_shape:
        raise UserError(f"--size {show_size(args.size)}: this model draws only {show_size(config.image_size)}")
    if args.size and (type(args.size) is not tuple or len(args.size) != 3 or any(
            not 0 < side <= most for side, most in zip(args.size, config.largest, strict=True))):
        raise UserError(f"--size {show_size(args.size)}: this model draws clips of at most "
                        f"{show_size(config.largest)}, frames x height x width")
    return longer


def read_given(path, config, still=False):
    """All frames of a clip, or the one of a picture, in the size and the channels of the model of `config`, floats
    (1, C, T, H, W); and the size of the first frame in the file, (width, height). still: the first frame alone. Raises
    `UserError`."""
    if config.channels not in (1, 3):
        raise UserError(f"{name_of(path)} cannot be brought to a model that draws {config.channels} channels, which "
                        "are no picture")
    clip, size = read_clip(path, config.image_size[-2:], {1: "L", 3: "RGB"}[config.channels], config.ground, still)
    return to_float(clip.movedim(0, 1))[None], size


def draw_window(model, config, y, before, after, number=0):
    """Draws the frames between the clips `before` and `after`, both (B, C, t, H, W), for labels y (B,). The model is
    shown their nearest frames, at most half of its T: it draws (B, C, T / 2, H, W), or more if fewer are given.

    number: of the window; each window has its own noise.
    """
    T = config.input_shape[1]
    most = T // 2 if min(before.shape[2], after.shape[2]) == 0 else T // 4
    before, after = before[:, :, max(0, before.shape[2] - most):], after[:, :, :most]
    new = slice(before.shape[2], T - after.shape[2])
    picture = torch.zeros(len(y), *config.input_shape, device=y.device)
    picture[:, :, :new.start], picture[:, :, new.stop:] = before, after
    known = torch.ones(T, 1, 1, dtype=torch.bool, device=y.device)
    known[new] = False
    way = functools.partial(complete, picture=picture, known=known)
    *_, x = sample(model, config, y, [k + number * 2**32 for k in range(len(y))], way)
    return x[:, :, new]


def draw_longer(model, config, labels, count, args):
    """Draws `count` rows of `labels` as the flags `LONGER` ask for: clips uint8 (B, C, frames, H, W), on the CPU. They
    contain the given frames, in the size of the model."""
    y, T = torch.tensor(labels * count, device=next(model.parameters()).device), config.image_size[0]
    given = [read_given(path, config)[0] for path in (args.extend, args.before, *(args.between or ()), args.loop)
             if path is not None]
    most = max(args.frames or 0, T + sum(clip.shape[2] for clip in given))
    demand_memory(len(y) * most, 4 * config.channels, config.image_size[1:], "lower --count or --frames")
    clips = [config.from_images(clip.to(y.device)).expand(len(y), -1, -1, -1, -1) for clip in given]
    x, *more = clips or [generate(model, config, y)]
    none, total, number = x[:, :, :0], args.frames or x.shape[2] + T // 2, 0
    if args.between or args.loop:
        x = torch.cat([x, draw_window(model, config, y, x, (more or [x])[0]), *more], dim=2)
        total = x.shape[2]
    with tqdm(total=total, initial=x.shape[2], desc=f"drawing {len(y)} clips", unit=" frames", leave=False,
              disable=None) as bar:
        while x.shape[2] < total:
            number += 1
            if args.before is not None:
                x = torch.cat([draw_window(model, config, y, none, x, number), x], dim=2)
            else:
                x = torch.cat([x, draw_window(model, config, y, x, none, number)], dim=2)
            bar.update(x.shape[2] - bar.n)
    return config.to_images(x[:, :, -total:] if args.before is not None else x[:, :, :total]).cpu()


def save_clips(args, clips, config, labels):
    """Writes clips uint8 (B, C, T, H, W) to `--out`, as an animation, or with --strip their frames side by side."""
    views = clips.movedim(2, 0)
    inference.save_views(args, views, config, labels, [FRAME] * len(views))
    what = f"{len(clips)} clips of {len(views)} frames" if len(views) > 1 else f"{len(clips)} images"
    inference.say_drawn(args, config, what)


# For a notebook: the frames of each clip side by side
draw = functools.partial(inference.draw, of=ClipConfig, show=lambda clips, *_: inference.strips(clips.movedim(2, 0)))


def main():
    parser = drawing_parser("Draws clips with a trained model, and makes clips longer. Settings that are not given "
                            "here are the model's own.", ClipConfig, "1",
                            "draw the frames of each clip, from left to right",
                            "animate the clips, as without this flag")
    parser.add_argument("--size", type=as_size, default=(), metavar="TxHxW", help="draw clips of another size, which "
                        "the model has learned (video.train_dit --sizes)")
    for name, count, metavar, text in (
            ("extend", None, "CLIP", "draw how this clip, or picture, goes on"),
            ("before", None, "CLIP", "draw what happens before this clip"),
            ("between", 2, ("CLIP", "CLIP"), "draw the way from the first clip to the second"),
            ("loop", None, "CLIP", "draw the way from the end of this clip to its beginning")):
        parser.add_argument(f"--{name}", type=some_path, nargs=count, metavar=metavar, help=text)
    parser.add_argument("--frames", type=int, help="length of the clips, frames; it may exceed the length trained on")
    args = parser.parse_args()
    model, config = load_for_sampling(args, (ClipConfig,))
    longer = check_flags(config, args)
    args.count, labels = 1 if args.count is None else args.count, parse_labels(args.labels, config.class_names)
    frames = args.frames or (args.size or config.image_size)[0]
    inputs = [args.extend, args.before, *(args.between or ()), args.loop]
    check_out(args, config, labels, frames, frames > 1 and not args.strip, inputs, args.size)

    def source(seed, indices, shape, *rest):
        return noise_source(seed, indices, (shape[0], *(args.size or shape[1:])), *rest)

    clips = draw_longer(model, config, labels, args.count, args) if longer else (
        draw_states(model, config, labels, args.count, source=source)[-1])
    save_clips(args, clips, config, labels)


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
