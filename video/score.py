"""Scores clips of one moving digit, or of sprites. Do they show what was asked for, do they stay the same, and do they
move as they should? Beside each figure stands the same figure of real clips of test digits or characters.

    python -m video.score --checkpoint run                              draws clips and scores them
    python -m video.score --checkpoint run_1x --beside run_4x run_16x   the same noise and labels, drawn by other models
"""

from support.commands import UserError, run, some_path
from support.pictures import check_picture, frames_of, grid, save_animation
from support.sizes import show_size

import argparse
import functools
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from dataset import to_float, to_uint8
from inference import draw_batches, load_for_sampling, sampling_parser
from latent.sprites import FRAMES
from measure.classifier import load_classifier
from measure.results import check_alike
from measure.score import nearest, share
from video.config import ClipConfig
from video.draw import FRAME
from video.given import complete
from video.moving import MARGIN, SPEEDS, bounce, centres, load_moving
from video.sprites import SpriteJudge

CROP = 28   # pixels, the sides of what the classifier reads
FAINT = 25  # of 255; darker pixels are background
SHOWN = 5   # clips of each model in an animation
GIVEN = 4   # frames of a real clip that a model continues
FIGURES = {  # {name: (title, format)}
    "frames": ("digit as asked, of all frames", "{:.1%}"),
    "clips": ("digit as asked in every frame, of all clips", "{:.1%}"),
    "constant": ("the same digit in every frame, of all clips", "{:.1%}"),
    "jolt": ("second difference of its place, median, pixels", "{:.3f}"),
    "residual": ("distance from an elastic path, median, pixels", "{:.3f}"),
    "residual_90": ("the same, 90th percentile", "{:.3f}"),
    "speed": ("speeds: Wasserstein-1 to real ones, pixels a frame", "{:.3f}"),
    "direction": ("directions: Wasserstein-1 to real ones, degrees", "{:.1f}"),
    "pace": ("slow or fast as asked, of all clips", "{:.1%}"),  # only of labels that say it
    "vanished": ("frames with less than half of the clip's ink", "{:.1%}"),
    "appeared": ("frames with more than 1.5 times the clip's ink", "{:.1%}"),
    "copies": ("nearer to a training digit than 95 % of real ones", "{:.1%}"),
}


def track(clips):
    """The digit's centre of mass in each frame of clips uint8 (N, 1, T, H, W): rows and columns, (N, T, 2)."""
    seen = torch.where(clips > FAINT, clips, 0)[:, 0]
    return centres(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])


def crop(clips, middles):
    """Cuts CROP x CROP pixels around `middles` (N, T, 2) out of each frame of clips uint8 (N, 1, T, H, W), as in MNIST:
    (N, T, CROP, CROP)."""
    N, _, T = clips.shape[:3]
    windows = F.pad(clips[:, 0], [CROP // 2] * 4).unfold(2, CROP, 1).unfold(3, CROP, 1)  # (N, T, rows, columns, *)
    rows, columns = middles.round().long().unbind(2)
    return windows[torch.arange(N)[:, None], torch.arange(T), rows, columns]


def fit_bounces(x, length, fastest):
    """Fits to each path x (N, T) a point that goes to and fro between 0 and `length` at a constant speed.

    Returns its speed (N,), at most `fastest`, and its squared distances from x, (N, T).
    """
    t = torch.arange(x.shape[1])
    step, pace = length / 44, fastest / 64  # of the coarse search
    way, speed = torch.cartesian_prod(torch.arange(88) * step, torch.arange(65) * pace).T          # (K,) each
    paths = bounce(way[:, None] + speed[:, None] * t, length)                                      # (K, T)
    best = (paths.square().sum(1) - 2 * x @ paths.T).topk(8, largest=False).indices                # (N, 8)
    way, speed, around = way[best], speed[best], torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0])
    for i in range(8):  # each time at half the step
        near_way, near_speed = torch.cartesian_prod(around * step / 2**i, around * pace / 2**i).T  # (25,) each
        ways, speeds = way[..., None] + near_way, (speed[..., None] + near_speed).clamp(0, fastest)  # (N, 8, 25)
        errors = (bounce(ways[..., None] + speeds[..., None] * t, length) - x[:, None, None]).square().sum(-1)
        errors, best = errors.min(-1, keepdim=True)
        way, speed = ways.gather(-1, best)[..., 0], speeds.gather(-1, best)[..., 0]                # (N, 8)
    way, speed = (part.gather(1, errors[..., 0].argmin(1, keepdim=True)) for part in (way, speed))  # (N, 1) each
    return speed[:, 0], (bounce(way + speed * t, length) - x).square()


def fit_paths(places, size):
    """Fits a straight path with elastic bounces to each path (N, T, 2) of a digit in frames of `size` (H, W).

    Returns its speed (N,), pixels a frame, its steepness (N,), an angle of 0 to 90 degrees, and the root of its mean
    squared distance from the places (N,), pixels.
    """
    (down, error_down), (right, error_right) = (
        fit_bounces(places[..., axis] - MARGIN, side - 1 - 2 * MARGIN, 1.6 * SPEEDS["fast"][1] * min(size))
        for axis, side in enumerate(size))
    return torch.hypot(down, right), torch.atan2(down, right).rad2deg(), (error_down + error_right).mean(1).sqrt()


def wasserstein(a, b):
    """The Wasserstein-1 distance between two sets of numbers (N,) and (M,)."""
    shares = (torch.arange(1000) + 0.5) / 1000
    return (a.quantile(shares) - b.quantile(shares)).abs().mean().item()


def make_real(data, count, seed):
    """`count` clips of a `Moving`: uint8 (N, 1, T, H, W), and their labels."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(data.labels), (count,), generator=generator)
    return to_uint8(data.x_0(index, slice(None), generator)), data.labels[index]


class Judge:
    """Scores clips of one moving digit against real ones, with a network that reads digits.

    train, test: clips of the training and of the test digits, each a `Moving` of one digit a clip. classifier: a
    `DigitClassifier`. count: how many real clips to look at.
    """

    def __init__(self, train, test, classifier, count=1000):
        self.train, self.test, self.classifier = train.images[:-1, None], test, classifier
        self.digits = torch.tensor([int(name.split()[0]) for name in test.classes])  # of each class
        paces = [name.partition(" ")[2] for name in test.classes]
        self.paces = torch.tensor([SPEEDS.get(pace, (0, 1)) for pace in paces])  # the lowest and highest of each class
        self.figures = {name: of for name, of in FIGURES.items() if name != "pace" or all(paces)}
        self.real = self.look(make_real(test, count, 0)[0])
        near, reads = self.real["near"], self.real["reads"].mode().values
        self.limits = torch.stack([near[reads == digit].quantile(0.05) for digit in range(10)])

    def real_clips(self, count, size):
        """`count` real clips, and their labels. They are not those that clips are scored against."""
        return make_real(self.test, count, 1)

    @torch.inference_mode()
    def look(self, clips):
        """What is seen in clips uint8 (N, 1, T, H, W), before any figure: a dict of tensors."""
        places = track(clips)
        frames = crop(clips, places)
        reads = [self.classifier(to_float(part[:, None])).argmax(1) for part in frames.flatten(0, 1).split(500)]
        near, _ = nearest(frames.float().mean(1).round().byte()[:, None], self.train)
        speed, direction, residual = fit_paths(places, clips.shape[3:])
        ink = torch.where(clips > FAINT, clips, 0)[:, 0].sum((2, 3), dtype=torch.float)                # (N, T)
        return dict(reads=torch.cat(reads).view(ink.shape), places=places, near=near, speed=speed, direction=direction,
                    residual=residual, ink=ink)

    def score(self, clips, labels):
        """The `FIGURES` of clips uint8 (N, 1, T, H, W) that should show `labels`, a dict of floats."""
        seen = self.look(clips)
        reads, places, residual = seen["reads"], seen["places"], seen["residual"]
        right, digit = reads == self.digits[labels][:, None], reads.mode().values
        ink = seen["ink"] / seen["ink"].median(1, keepdim=True).values.clamp(min=1)
        least, most = self.paces[labels].T
        pace = seen["speed"] / min(clips.shape[3:])
        return {"frames": share(right), "clips": share(right.all(1)), "constant": share((reads == reads[:, :1]).all(1)),
                "jolt": places.diff(n=2, dim=1).norm(dim=2).median().item(),
                "residual": residual.median().item(), "residual_90": residual.quantile(0.9).item(),
                **{name: wasserstein(seen[name], self.real[name]) for name in ("speed", "direction")},
                "pace": share((least <= pace) & (pace <= most)),
                "vanished": share(ink < 0.5), "appeared": share(ink > 1.5),
                "copies": share(seen["near"] < self.limits[digit])}


def draw(model, config, labels, pictures=None, known=None):
    """Draws the clips number 0, 1, ... of the configuration's seed for `labels`: uint8 (N, C, T, H, W), on the CPU.

    pictures: clips in [-1, 1] (N, C, T, H, W) to complete; their frames `known`, bool (T, 1, 1), are kept.
    """
    device = next(model.parameters()).device
    ways = {} if pictures is None else {"way_of": lambda rows: functools.partial(
        complete, picture=pictures[rows].to(device), known=known.to(device))}
    return torch.cat([clips for _, clips in draw_batches(model, config, labels, what="clips", **ways)])


def shown_by_vae(config, clips, device):
    """Real clips uint8 (N, C, T, H, W) as a model of latents would draw them; those of pixels stay as they are."""
    parts = (config.from_images(to_float(part.to(device))) for part in clips.split(16))
    return torch.cat([config.to_images(part).cpu() for part in parts])


def follow(model, config, clips, labels, given):
    """Continues the first `given` frames of real clips uint8 (N, 1, T, H, W). Returns the median distance of the digit
    from its real place in each frame (T,), pixels, and the same of a digit that stays where it was last."""
    known = (torch.arange(clips.shape[2]) < given)[:, None, None]
    places, drawn = track(clips), track(draw(model, config, labels, to_float(clips), known))
    return [(places - other).norm(dim=2).median(0).values for other in (drawn, places[:, given - 1:given])]


def report(figures, columns):
    """The table of `figures` to print. columns: {heading: what `Judge.score` returns}."""
    lines = [" " * 56 + "".join(f"  {heading:>9}" for heading in columns)]
    for name, (title, form) in figures.items():
        cells = (f"  {form.format(column[name]):>{max(9, len(heading))}}" for heading, column in columns.items())
        lines.append(f"{title:56}" + "".join(cells))
    return "\n".join(lines)


def report_continuations(errors, count, given):
    """The table to print of what `follow` returns for `count` real clips. errors: {title: (T,)}."""
    width, T = max(18, *map(len, errors)), len(next(iter(errors.values())))
    lines = [f"\n{given} frames given, the others drawn: pixels from the real place, median of {count} clips",
             f"{'frame':{width}}" + "".join(f"{frame:6d}" for frame in range(given + 1, T + 1))]
    return "\n".join(lines + [f"{title:{width}}" + "".join(f"{error:6.2f}" for error in row[given:].tolist())
                              for title, row in errors.items()])


def load_models(args):
    """The models of `--checkpoint` and `--beside`, {name: (model, configuration)}. Raises `UserError` when they draw
    different things."""
    models = {}
    for path in (args.checkpoint, *args.beside):
        one = argparse.Namespace(**vars(args) | {"checkpoint": path})
        found = load_for_sampling(one, (ClipConfig,))
        path = Path(one.checkpoint).absolute()
        name = path.parent.name if path.name == "model.pth" else path.stem
        if name in models:
            raise UserError(f"two models are called {name}: name each once, or another folder")
        models[name] = found
    check_alike([config for _, config in models.values()])
    return models


def open_judge(config):
    """What scores the clips of a configuration. Raises `UserError` for clips that cannot be scored."""
    if config.dataset == "moving" and config.digits == 1 and config.image_size[0] > 2:
        return Judge(*(load_moving(config, train) for train in (True, False)), load_classifier())
    if config.dataset == "sprites" and config.image_size[:-2] == (FRAMES,):
        return SpriteJudge(config.data_dir, config.channels)
    raise UserError("only clips of one moving digit (--dataset moving, --digits 1), three frames at least, and of "
                    f"sprites (--dataset sprites --image-size {FRAMES}x64x64) can be scored, and this model draws "
                    f"{config.dataset} of {show_size(config.image_size)}")


def main():
    parser = sampling_parser("Draws clips of one moving digit, or of sprites, and scores them beside real clips of "
                             "test digits or characters: do they show what was asked for in all frames, and do they "
                             "move as they should?", ClipConfig)
    parser.add_argument("--count", type=int, default=500, help="clips to draw, as many of each label (default: 500)")
    parser.add_argument("--beside", type=some_path, nargs="+", default=[], metavar="RUN", help="more models, run "
                        "folders or files, which draw from the same noise and labels")
    parser.add_argument("--out", type=some_path,
                        help=f"write an animation of the first {SHOWN} clips, a column for each model")
    parser.add_argument("--data-dir", type=some_path, default=argparse.SUPPRESS,
                        help="where MNIST/ or Sprites/ is (default: as in training)")
    args = parser.parse_args()
    if not 20 <= args.count <= 100_000:
        raise UserError(f"--count {args.count}: must lie between 20 and 100,000")
    if args.out is not None:
        check_picture(args.out, animated=True)
    models = load_models(args)
    model, config = next(iter(models.values()))
    judge, given = open_judge(config), min(GIVEN, config.image_size[0] - 1)
    real, asked = judge.real_clips(args.count, config.image_size[1:])
    real = shown_by_vae(config, real, next(model.parameters()).device)
    labels, columns, errors, first = torch.arange(args.count) % config.num_classes, {}, {}, []
    for name, (model, config) in models.items():
        began = time.monotonic()
        clips = draw(model, config, labels)
        speed = args.count / (time.monotonic() - began)
        print(f"{name}: {args.count} clips of {' x '.join(map(str, config.image_size))}, {config.sampler}, "
              f"{config.sample_steps} steps, guidance {config.guidance:g}, seed {config.seed}; {speed:.1f} clips/s")
        title = name if len(models) > 1 else "drawn"
        columns[title] = judge.score(clips, labels)
        first.append(clips[:SHOWN])
        if config.dataset == "moving" and not config.given:
            print(f"{name} continues no clips: it was trained without frames given (python -m video.train_dit --given "
                  "0.3)")
        elif config.dataset == "moving":
            errors[title], stays = follow(model, config, real[:128], asked[:128], given)
    print(report(judge.figures, columns | {"real": judge.score(real, asked)}))
    if errors:
        print(report_continuations(errors | {"as the last given": stays}, min(128, args.count), given))
    if args.out is not None:
        views = frames_of(torch.stack(first, dim=1).flatten(0, 1))
        save_animation(args.out, [grid(view, len(models), captions=[*models]) for view in views], FRAME)
        print(f"-> {args.out}")


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
