"""Sets samplers, or runs, side by side as `measure/score.py` measures them: a table, and pictures of it.

    python -m measure.results samplers --checkpoint weights/mnist.pth   which sampler, how many steps, how much guidance
    python -m measure.results runs run_1min run_3min run_article   quality against training time; runs that differ
                                                                   in the seed alone: mean and deviation
"""

from support.commands import Parser, UserError, add_device_flag, pick_device, run, some_path
from support.files import make_dir
from support.noise import noise_source
from support.pictures import check_picture, grid, write_figure
from support.settings import add_flags, say_default

import dataclasses
import itertools
import math
import os
import statistics
from pathlib import Path

import torch

from config import Config
from diffusion import SAMPLERS
from inference import FULL_BATCH, sample
from latent.config import IMAGES
from measure.score import draw_fakes, few, open_judge
from record.checkpoint import averaged_model, find_checkpoint, load_checkpoint

LINES = (":", "--", "-", "-.")  # of the plot, for the samplers in turn


def network_calls(config):
    """How often one image passes through the network, with guidance twice as often. Counted while one is drawn."""
    passed = []

    def network(x, t, y):
        passed.append(len(x))
        return x.new_zeros(len(x), config.network_options().get("out_channels", x.shape[1]), *x.shape[2:])

    def one_pixel(seed, indices, shape, *rest):
        return noise_source(seed, indices, (shape[0], *[1] * len(shape[1:])), *rest)

    config = dataclasses.replace(config, channels=config.channels or 1)  # before the data have said how many
    network.null_label = config.num_classes
    for _ in sample(network, config, torch.zeros(FULL_BATCH, dtype=torch.long), source=one_pixel):
        pass
    return sum(passed) // FULL_BATCH


def show_mean(values, form):
    """The mean of numbers, and the standard deviation of several."""
    spread = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
    return format(statistics.mean(values), form) + spread


def save_figure(figure, path):
    write_figure(figure, path)
    print(f"-> {path}")


def plot(title, x_label, curves, real):
    """A figure of accuracy and Fréchet distance: `curves` is {label: (style, [(x, accuracy, frechet)])}."""
    from matplotlib.figure import Figure  # here, so that --help does not wait for it

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    for axes, name, y_label in ((left, "frechet", "Fréchet distance"), (right, "accuracy", "misread share")):
        axes.set(xlabel=x_label, ylabel=y_label, xscale="log")
        axes.set_yscale("log", nonpositive="mask")
        value = real[name] if name == "frechet" else 1 - real[name]
        axes.axhline(value, color="grey", linestyle=":", label="real images")
        for label, (style, points) in curves.items():
            xs, accuracies, distances = zip(*sorted(points), strict=True)
            axes.plot(xs, distances if name == "frechet" else [1 - a for a in accuracies], label=label, **style)
        axes.grid(alpha=0.3, which="both")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def settings(args, config):
    """The `Config` of each cell of the table of samplers, row by row. Raises `UserError` for one that is none."""
    return [[dataclasses.replace(config, seed=0, eta=0.0, sampler=sampler, sample_steps=steps, guidance=guidance)
             for guidance in args.guidance] for sampler, steps in itertools.product(args.samplers, args.steps)]


def samplers(args, judge, real):
    """The table of sampler x steps x guidance for one model."""
    content = load_checkpoint(args.paths[0], IMAGES)
    model, config = averaged_model(content, judge.device), content["config"]
    rows, labels = settings(args, config), judge.labels(args.count)
    print("read as asked, Fréchet distance\n")
    print("| sampler | steps |" + "".join(f" guidance {guidance:g} |" for guidance in args.guidance))
    print("|---|---|" + "---|" * len(args.guidance))
    curves = {}
    for row in rows:
        cells = []
        for i, setting in enumerate(row):
            figures = judge.brief(draw_fakes(model, setting, labels), labels)
            cells.append(f" {figures['accuracy']:.1%}, {figures['frechet']:.3f} |")
            line = LINES[list(SAMPLERS).index(setting.sampler) % len(LINES)]
            style = {"color": f"C{i}", "marker": ".", "linestyle": line}
            _, points = curves.setdefault(f"{setting.sampler}, guidance {setting.guidance:g}", (style, []))
            points.append((network_calls(setting), figures["accuracy"], figures["frechet"]))
        print(f"| {setting.sampler} | {setting.sample_steps} |" + "".join(cells), flush=True)
    save_figure(plot(str(args.paths[0]), "network calls per image", curves, real), args.out / "samplers.png")


def runs(args, judge, real):
    """Quality against training time, and images of the runs side by side."""
    from matplotlib.figure import Figure

    labels, alike = judge.labels(args.count), {}  # runs that differ in nothing but the seed
    for path in args.paths:
        content = load_checkpoint(path, IMAGES)
        config = dataclasses.replace(content["config"], seed=0)
        fakes = draw_fakes(averaged_model(content, judge.device), config, labels)
        alike.setdefault(dataclasses.replace(config, data_dir=""), []).append(
            judge.brief(fakes, labels) | {"seconds": content["seconds"], "fakes": fakes[:40]})

    columns = {"seconds": ".0f", "accuracy": ".1%", "frechet": ".3f", "ratio": ".1f", "precision": ".2f",
               "recall": ".2f", "coverage": ".2f"}
    print("| run | calls per image | training, s | read as asked | Fréchet | to real | precision | recall | coverage |")
    print("|---|---|---|---|---|---|---|---|---|")
    curves, rows = {}, sorted(alike.items(), key=lambda item: (item[0].process, item[0].steps))
    for config, results in rows:
        cells = []
        for name, form in columns.items():
            values = [result["frechet"] / real["frechet"] if name == "ratio" else result[name] for result in results]
            cells.append(show_mean(values, form))
        tokens = math.prod(config.input_shape[1:]) // math.prod(config.patch_size)
        network = f"{config.process}, {config.depth} blocks, {tokens} tokens of {config.hidden_size}"
        print(f"| {network}, {config.steps:,} steps | {network_calls(config)} | {' | '.join(cells)} |")
        point = (statistics.mean(result[name] for result in results) for name in ("seconds", "accuracy", "frechet"))
        curves.setdefault(network, ({"marker": "o"}, []))[1].append(tuple(point))
    cells = [format(real[name], form) for name, form in columns.items() if name in real]
    print(f"| real images | | | {' | '.join(cells)} |")
    save_figure(plot(f"{args.count:,} images", "training time, s", curves, real), args.out / "runs.png")

    figure = Figure(figsize=(8, 1.15 * len(rows)), layout="constrained")
    for axes, (config, results) in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        axes.imshow(grid(results[0]["fakes"], columns=20), cmap="gray")
        axes.set_title(f"{config.process}, {config.steps:,} steps in {results[0]['seconds']:.0f} s: Fréchet distance "
                       f"{results[0]['frechet']:.2f}", fontsize=9)
        axes.axis("off")
    save_figure(figure, args.out / "runs_digits.png")


def check_alike(configs):
    """Raises `UserError` unless all these are of the same images."""
    kinds = {(config.dataset, config.channels, *config.image_size, config.class_names) for config in configs}
    if len(kinds) > 1:
        shown = sorted(f"{dataset} {'x'.join(map(str, shape))}, {len(names)} classes"
                       for dataset, *shape, names in kinds)
        raise UserError(f"runs of several kinds of images do not compare: {'; '.join(shown):.150}")
    places = sorted({os.path.realpath(config.data_dir) for config in configs})
    if len(places) > 1:
        raise UserError(f"the runs had their images from several folders, {', '.join(places):.150}: name the one to "
                        "score them against with --data-dir")


def main():
    parser = Parser(description="Sets samplers, or runs, side by side: a table, and pictures of it.")
    what = parser.add_subparsers(dest="what", required=True)
    for name, help in (("samplers", "sampler x steps x guidance of one model: samplers.png"),
                       ("runs", "quality against training time of several runs: runs.png, runs_digits.png")):
        part = what.add_parser(name, help=help, description=help)
        if name == "runs":
            part.add_argument("runs", nargs="+", type=some_path, help="run folders or checkpoints")
        else:
            part.add_argument("--checkpoint", type=some_path, help="the model to draw with (default: run/model.pth, "
                              "else weights/mnist.pth)")
            part.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="(default: all)")
            part.add_argument("--steps", nargs="+", type=int, default=[3, 4, 5, 6, 8, 10, 20],
                              help="(default: 3 4 5 6 8 10 20)")
            part.add_argument("--guidance", nargs="+", type=float, default=[1, 1.3, 1.5, 2],
                              help="(default: 1 1.3 1.5 2)")
        part.add_argument("--count", type=int, default=2000, help="images drawn for each figure (default: 2000)")
        add_flags(part, Config, ["data_dir"])
        say_default(part, ["data_dir"], "as in training")
        part.add_argument("--out", type=some_path, default=Path("images"),
                          help="folder for the pictures (default: images)")
        add_device_flag(part)
    args = parser.parse_args()
    if not 10 <= args.count <= 10_000:
        raise UserError(f"--count {args.count}: must lie between 10 and 10,000")
    data_dir = {"data_dir": args.data_dir} if "data_dir" in args else {}
    Config(**data_dir)  # it knows what that may be
    names = ["samplers.png"] if args.what == "samplers" else ["runs.png", "runs_digits.png"]
    args.paths = [find_checkpoint(path) for path in (args.runs if args.what == "runs" else [args.checkpoint])]
    make_dir(args.out)
    for name in names:
        check_picture(args.out / name)
    if len(set(map(os.path.realpath, args.paths))) < len(args.paths):
        raise UserError("a run that is named twice would count as two: name each once")
    configs = [dataclasses.replace(load_checkpoint(path, IMAGES)["config"], **data_dir) for path in args.paths]
    check_alike(configs)
    if args.what == "samplers":
        settings(args, configs[0])  # before the work
    judge = open_judge(configs[0], pick_device(args.device))
    real = judge.brief_real(judge.labels(args.count)) | {"ratio": 1.0}
    print(f"{args.count:,} images for each figure; {min(args.count, len(judge.train.images)):,} real ones: "
          f"{real['accuracy']:.1%}, {real['frechet']:.3f}")
    (samplers if args.what == "samplers" else runs)(args, judge, real)
    for line in few(args.count, len(judge.test.images)):
        print(line)


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
