"""Compares samplers, or training runs, by the figures of `measure/score.py`: prints a table and writes plots.

    python -m measure.results samplers --checkpoint weights/mnist.pth   which sampler, how many steps, how much guidance
    python -m measure.results runs run_1min run_3min run_article        quality against training time

Runs that differ in the seed alone become one row: mean and standard deviation.
"""

from support.commands import Parser, UserError, add_device_flag, pick_device, run, some_path
from support.files import make_dir
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

LINES = (":", "--", "-", "-.")  # of the samplers in the plot
COLUMNS = {"seconds": ".0f", "accuracy": ".1%", "frechet": ".3f", "ratio": ".1f", "precision": ".2f", "recall": ".2f",
           "coverage": ".2f"}  # the figures in tables, and their formats


def network_calls(config):
    """How many images the network computes to draw one; guidance doubles the number. Counted while one is drawn."""
    passed = []

    def network(x, t, y):
        passed.append(len(x))
        return x.new_zeros(len(x), config.network_options().get("out_channels", x.shape[1]), *x.shape[2:])

    def zeros(seed, indices, shape, *_):  # in place of noise; one pixel is enough
        return lambda: torch.zeros(len(indices), shape[0], *[1] * len(shape[1:]))

    config = dataclasses.replace(config, channels=config.channels or 1)  # 0 before the data are known
    network.null_label = config.num_classes
    for _ in sample(network, config, torch.zeros(FULL_BATCH, dtype=torch.long), source=zeros):
        pass
    return sum(passed) // FULL_BATCH


def show_mean(values, form):
    """The mean of numbers, and the standard deviation if there are several."""
    spread = f" ± {format(statistics.stdev(values), form)}" if len(values) > 1 else ""
    return format(statistics.mean(values), form) + spread


def table_cells(parts, real, names):
    """Cells of a table: the means over `parts`, dicts of figures, of those called `names`. "ratio" is the Fréchet
    distance over that of `real`, a dict as well."""
    parts = [part | {"ratio": part["frechet"] / real["frechet"]} for part in parts]
    return " | ".join(show_mean([part[name] for part in parts], COLUMNS[name]) for name in names)


def save_figure(figure, path):
    write_figure(figure, path)
    print(f"-> {path}")


def log_plots(x_labels, y_labels, title="", **options):
    """A figure of matplotlib with plots side by side on logarithmic axes, and these plots. options: of
    `Figure.subplots`."""
    from matplotlib.figure import Figure  # here, so that --help does not wait for it
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(3 + 5 * len(x_labels), 5), layout="constrained")
    figure.suptitle(title)
    plots = figure.subplots(1, len(x_labels), squeeze=False, **options)[0]
    for axes, x_label, y_label in zip(plots, x_labels, y_labels, strict=True):
        axes.loglog(nonpositive="mask")
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid(alpha=0.3, which="both")
        for axis in (axes.xaxis, axes.yaxis):  # 0.1, 0.2, 0.5, 1
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    return figure, plots


def save_plots(figure, real, path):
    """Adds the value of real images to each plot of `log_plots`, one of `real`, and a legend. Writes the figure."""
    for axes, value in zip(figure.axes, real, strict=True):
        axes.axhline(value, color="grey", linestyle=":", label="real images")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def plot_quality(title, x_label, curves, real, path):
    """Plots the Fréchet distance and the misread share. curves: {label: (style, [(x, accuracy, frechet), ...])}."""
    figure, (left, right) = log_plots([x_label] * 2, ["Fréchet distance", "misread share"], title)
    for label, (style, points) in curves.items():
        xs, accuracies, distances = zip(*sorted(points), strict=True)
        left.plot(xs, distances, label=label, **style)
        right.plot(xs, [1 - accuracy for accuracy in accuracies], label=label, **style)
    save_plots(figure, [real["frechet"], 1 - real["accuracy"]], path)


def save_grids(pictures, columns, size, path):
    """Writes PIL images with titles, a list of (title, image), row by row as one figure. size: width and height of each
    in inches."""
    from matplotlib.figure import Figure

    rows = -(-len(pictures) // columns)
    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    for axes, (title, picture) in zip(figure.subplots(rows, columns, squeeze=False).flat, pictures, strict=True):
        axes.imshow(picture, cmap="gray", vmin=0, vmax=255)
        axes.set_title(title, fontsize=8)
        axes.axis("off")
    save_figure(figure, path)


def settings(args, config):
    """The `Config` of each cell in the table of samplers, row by row. Raises `UserError` for bad values."""
    return [[dataclasses.replace(config, seed=0, eta=0.0, sampler=sampler, sample_steps=steps, guidance=guidance)
             for guidance in args.guidance] for sampler, steps in itertools.product(args.samplers, args.steps)]


def samplers(args, judge, real):
    """The table of sampler x steps x guidance for one model."""
    content = load_checkpoint(args.paths[0], IMAGES)
    model, labels, curves = averaged_model(content, judge.device), judge.labels(args.count), {}
    print("read as asked, Fréchet distance\n")
    print("| sampler | steps |" + "".join(f" guidance {guidance:g} |" for guidance in args.guidance))
    print("|---|---|" + "---|" * len(args.guidance))
    for row in settings(args, content["config"]):
        cells = []
        for i, setting in enumerate(row):
            figures = judge.brief(draw_fakes(model, setting, labels), labels)
            cells.append(f" {figures['accuracy']:.1%}, {figures['frechet']:.3f} |")
            line = LINES[list(SAMPLERS).index(setting.sampler) % len(LINES)]
            _, points = curves.setdefault(f"{setting.sampler}, guidance {setting.guidance:g}", (
                {"color": f"C{i}", "marker": ".", "linestyle": line}, []))
            points.append((network_calls(setting), figures["accuracy"], figures["frechet"]))
        print(f"| {setting.sampler} | {setting.sample_steps} |" + "".join(cells), flush=True)
    plot_quality(str(args.paths[0]), "network calls per image", curves, real, args.out / "samplers.png")


def runs(args, judge, real):
    """The table of runs, their quality against training time, and images of each."""
    labels, alike = judge.labels(args.count), {}  # runs that differ in the seed alone
    for path in args.paths:
        content = load_checkpoint(path, IMAGES)
        config = dataclasses.replace(content["config"], seed=0)
        fakes = draw_fakes(averaged_model(content, judge.device), config, labels)
        alike.setdefault(dataclasses.replace(config, data_dir=""), []).append(
            judge.brief(fakes, labels) | {"seconds": content["seconds"], "fakes": fakes[:40]})

    print("| run | calls per image | training, s | read as asked | Fréchet | to real | precision | recall | coverage |")
    print("|---|---|---|---|---|---|---|---|---|")
    curves, pictures = {}, []
    for config, results in sorted(alike.items(), key=lambda item: (item[0].process, item[0].steps)):
        tokens = math.prod(config.input_shape[1:]) // math.prod(config.patch_size)
        network = f"{config.process}, {config.depth} blocks, {tokens} tokens of {config.hidden_size}"
        print(f"| {network}, {config.steps:,} steps | {network_calls(config)} "
              f"| {table_cells(results, real, COLUMNS)} |")
        point = (statistics.mean(result[name] for result in results) for name in ("seconds", "accuracy", "frechet"))
        curves.setdefault(network, ({"marker": "o"}, []))[1].append(tuple(point))
        pictures.append((f"{config.process}, {config.steps:,} steps in {results[0]['seconds']:.0f} s: Fréchet distance "
                         f"{results[0]['frechet']:.2f}", grid(results[0]["fakes"], columns=20)))
    print(f"| real images | | | {table_cells([real], real, [*COLUMNS][1:])} |")
    plot_quality(f"{args.count:,} images", "training time, s", curves, real, args.out / "runs.png")
    save_grids(pictures, 1, (8, 1.15), args.out / "runs_digits.png")


def check_alike(configs):
    """Raises `UserError` unless these models all draw the same images, and have them from one folder."""
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
    parser = Parser(description="Compares samplers, or training runs, in a table and in plots.")
    what = parser.add_subparsers(dest="what", required=True)
    for name, help in (("samplers", "compare samplers, steps and guidance of one model: samplers.png"),
                       ("runs", "compare quality and training time of several runs: runs.png, runs_digits.png")):
        part = what.add_parser(name, help=help, description=help)
        if name == "runs":
            part.add_argument("runs", nargs="+", type=some_path, help="run folders or checkpoints")
        else:
            part.add_argument("--checkpoint", type=some_path, help="the model to draw with (default: run/model.pth, "
                              "else weights/mnist.pth)")
            part.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="which to "
                              "compare (default: all)")
            part.add_argument("--steps", nargs="+", type=int, default=[3, 4, 5, 6, 8, 10, 20],
                              help="numbers of steps to compare (default: 3 4 5 6 8 10 20)")
            part.add_argument("--guidance", nargs="+", type=float, default=[1, 1.3, 1.5, 2],
                              help="guidance scales to compare (default: 1 1.3 1.5 2)")
        part.add_argument("--count", type=int, default=2000, help="images drawn for each figure (default: 2000)")
        add_flags(part, Config, ["data_dir"])
        say_default(part, ["data_dir"], "as in training")
        part.add_argument("--out", type=some_path, default=Path("images"),
                          help="folder for the plots (default: images)")
        add_device_flag(part)
    args = parser.parse_args()
    if not 10 <= args.count <= 10_000:
        raise UserError(f"--count {args.count}: must lie between 10 and 10,000")
    data_dir = {"data_dir": args.data_dir} if "data_dir" in args else {}
    args.paths = [find_checkpoint(path) for path in (args.runs if args.what == "runs" else [args.checkpoint])]
    make_dir(args.out)
    for name in ["samplers.png"] if args.what == "samplers" else ["runs.png", "runs_digits.png"]:
        check_picture(args.out / name)
    if len(set(map(os.path.realpath, args.paths))) < len(args.paths):
        raise UserError("a run that is named twice would count as two: name each once")
    configs = [dataclasses.replace(load_checkpoint(path, IMAGES)["config"], **data_dir) for path in args.paths]
    check_alike(configs)
    if args.what == "samplers":
        settings(args, configs[0])  # before the work
    judge = open_judge(configs[0], pick_device(args.device))
    real = judge.brief_real(judge.labels(args.count))
    print(f"{args.count:,} images for each figure; {min(args.count, len(judge.train.images)):,} real ones: "
          f"{real['accuracy']:.1%}, {real['frechet']:.3f}")
    (samplers if args.what == "samplers" else runs)(args, judge, real)
    for line in few(args.count, len(judge.test.images)):
        print(line)


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
