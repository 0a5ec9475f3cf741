"""Does more compute make better images? Trains models of several sizes and patches alike, and sets their distance to
real images against the Gflops of a forward pass (DiT, arXiv 2212.09748, figures 7 to 10).

    python -m measure.scaling --quick                    9 models of MNIST in 6 minutes on two CPU cores
    python -m measure.scaling --seeds 0 1 2              12 models, longer, and how much they vary
    python -m measure.scaling --rates 2e-3 4e-3 8e-3     does the best learning rate move with the size?
    python -m measure.scaling --preset paper --dataset folder --data-dir X --vae V      the paper's models, for GPUs

Every model is a run folder in --out. Stop the study at any moment: the same command goes on where it was. Several may
work in one --out, each on seeds of its own; one with all the seeds then only reports.
"""

from support.commands import Parser, UserError, add_device_flag, pick_device, run, some_path
from support.files import check_output, make_dir, write_atomically
from support.flops import flops
from support.pictures import check_picture, grid
from support.settings import add_flags, given_flags, say_default
from support.sizes import as_size, show_time

import contextlib
import dataclasses
import io
import itertools
import json
import math
import re
import shlex
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from config import PAPER, PRESETS, Config
from latent.config import LatentConfig
from measure.results import network_calls, save_figure, show_mean
from measure.score import METRICS, draw_fakes, few, open_judge
from record.checkpoint import averaged_model, load_checkpoint
from train import train

HEAD = 32  # the width of a head, for sizes that are named by depth x width
# Drawn without guidance, as in the paper: it would hide what a model cannot do
STUDIES = {
    "mnist": dict(sizes=("2x64", "3x96", "4x128", "5x160"), patches=(14, 7, 4), marks=5,
                  recipe=dict(dataset="mnist", steps=3200, guidance=1.0)),
    "quick": dict(sizes=("2x64", "3x96", "4x128"), patches=(14, 7, 4), marks=3,
                  recipe=dict(dataset="mnist", steps=1600, guidance=1.0)),
    "paper": dict(sizes=("S", "B", "L", "XL"), patches=(8, 4, 2), marks=5,
                  recipe=PAPER | dict(dataset="folder", steps=400_000, guidance=1.0, sample_steps=50)),
}
PROBE = 10  # steps that every model makes first, to see whether it can, and how long all will take
OWN = ("patch_size", "hidden_size", "depth", "num_heads", "seed", "log_every", "sample_every", "checkpoint_every")
SCORE = ("step", "seconds", "scoring", "accuracy", *METRICS)  # what scores.json has of each score
MEASURES = ("parameters", "tokens", "flops", "speed")  # ... and of a model of the first seed
MOVABLE = ("data_dir", "compile", "recompute")  # settings that a study which goes on may change


@dataclasses.dataclass(eq=False)
class Model:
    """A run of the study, and what is known of it."""

    size: str
    patch: int
    seed: int
    folder: Path
    of: type         # its class of settings: `Config`, or `LatentConfig`
    settings: dict   # those that are not the defaults
    marks: list      # the steps at which it is scored
    record: dict     # see `read_record`

    @property
    def config(self):
        """Without what the data decide."""
        return self.of(**self.settings)

    @property
    def kind(self):
        """What runs that differ in the seed alone have in common."""
        return self.size, self.patch, self.config.lr

    @property
    def file(self):
        return self.folder / "model.pth"

    @property
    def scores(self):
        return self.record["scores"]

    @property
    def scored(self):
        """The step of the last score."""
        return self.scores[-1]["step"] if self.scores else 0

    def training_flops(self, step):
        """The operations of the training up to `step`: a backward pass is two forward passes."""
        return 3 * self.record["flops"] * self.config.batch_size * step

    def write(self):
        content = json.dumps(self.record, indent=1).encode()
        write_atomically(self.folder / "scores.json", lambda file: file.write(content))


def size_settings(word):
    """The settings of a size: of one of the paper's, or of depth x width, such as 4x128. Raises `UserError`."""
    if word in STUDIES["paper"]["sizes"]:
        return {name: PRESETS[word][name] for name in ("depth", "hidden_size", "num_heads")}
    match = re.fullmatch("([0-9]{1,3})x([0-9]{1,5})", word)
    if not match or int(match[2]) % HEAD:
        raise UserError(f"--models {word:.40}: must be depth x width with heads of {HEAD}, such as 4x128, or one of "
                        f"{', '.join(STUDIES['paper']['sizes'])}")
    return dict(depth=int(match[1]), hidden_size=int(match[2]), num_heads=int(match[2]) // HEAD)


def plan(args):
    """The models of the study, a list of `Model`, seed by seed. Raises `UserError` for settings that are none, and
    where --out holds another study."""
    study = STUDIES[args.preset]
    recipe = study["recipe"] | given_flags(args, LatentConfig)
    alone = recipe.keys() - Config.__dataclass_fields__.keys() or recipe["dataset"] == "sprites"
    of, usual = LatentConfig if alone else Config, recipe.get("lr", Config.lr)
    sizes, patches, rates = args.models or study["sizes"], args.patches or study["patches"], args.rates or [usual]
    patches = patches[len(patches) // 2:][:1] if args.rates else patches
    count = args.marks or (1 if args.rates else study["marks"])
    models = []
    for seed, size, patch, rate in itertools.product(args.seeds, sizes, patches, rates):
        folder = args.out / (f"{size}_patch{patch}_seed{seed}" + ("" if rate == usual else f"_lr{rate:g}"))
        steps = recipe["steps"]
        settings = recipe | size_settings(size) | dict(patch_size=as_size(patch), lr=rate, seed=seed,
                                                       sample_every=steps, checkpoint_every=max(1, steps // 16))
        marks = sorted({max(1, steps >> i) for i in range(count if seed == args.seeds[0] else 1)})
        record = read_record(folder, of(**settings), args.count)
        models.append(Model(size, patch, seed, folder, of, settings, marks, record))
    return models


def read_record(folder, config, count):
    """What scores.json in the run folder holds, a dict:

        settings             what all was made with: those of `Config` and `count`, the images of a score
        scores               a dict for each: step, seconds (of training), scoring (seconds), and those of `Judge.brief`
    After the first steps of the first seed, also:
        parameters, tokens   of the model
        flops                of its `forward_flops`
        speed                the seconds of a step

    Raises `UserError` when the file is damaged or of another study, or its model is gone."""
    settings = json.loads(json.dumps(dataclasses.asdict(config) | {"count": count}))
    path = folder / "scores.json"
    if not path.exists():
        return {"settings": settings, "scores": []}
    try:
        record = json.loads(path.read_text())
        old = dict(record["settings"])
        numbers = [score[name] for score in record["scores"] for name in SCORE]
        if record.keys() & {*MEASURES}:
            numbers += [record[name] for name in MEASURES]
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: remove {folder}, and it is made anew") from None
    if numbers and not (folder / "model.pth").is_file():
        raise UserError(f"{folder / 'model.pth'} is gone, whose scores {path.name} beside it holds: bring it back, or "
                        f"remove {folder}, and it is made anew")
    differences = [f"{name} {old.get(name)} -> {settings.get(name)}" for name in old | settings
                   if old.get(name) != settings.get(name) and name not in MOVABLE]
    if differences:
        raise UserError(f"{folder} was made with other settings ({', '.join(differences):.150}): choose another --out, "
                        "or remove it")
    return record


def advance(model, until, args):
    """Trains a model up to the step `until`, and says nothing but its bar. Returns the number of the signal that ended
    it sooner, or 0."""
    make_dir(model.folder)
    model.write()  # before there is a checkpoint that could be taken for another study's
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return train(model.settings, model.folder, model.file.exists(), args.device, until, of=model.of)[1]
        except UserError as error:
            raise UserError(f"{model.folder.name}: {error}") from None


def probe(model, args):
    """Makes the first steps of a model, and takes its measures. Returns as `advance`."""
    stopped = advance(model, min(PROBE, model.marks[0]), args)
    content = load_checkpoint(model.file, (model.of,))
    config = content["config"]
    model.record |= {"parameters": sum(weight.numel() for weight in content["ema"].values()),
                     "tokens": math.prod(config.input_shape[1:]) // math.prod(config.patch_size),
                     "flops": forward_flops(config), "speed": content["seconds"] / content["step"]}
    model.write()
    return stopped


def forward_flops(config):
    """The floating-point operations of a forward pass of one image. As torch counts, a multiplication and the addition
    to it are two; the paper's Gflops count them as one."""
    with torch.device("meta"):  # on a CPU torch does not count its own attention
        network, zero = config.build_model().to("meta"), torch.zeros(1, dtype=torch.long)
        x = torch.empty(1, *config.input_shape)
    return flops(lambda: network(x, zero, zero))


def draw(model, labels, device):
    """The images of these labels that the model's checkpoint draws, and the content of that checkpoint."""
    content = load_checkpoint(model.file, (model.of,))
    fakes = draw_fakes(averaged_model(content, device), dataclasses.replace(content["config"], seed=0), labels)
    return fakes, content


def score(model, judge, count):
    """Scores the model's checkpoint."""
    began = time.monotonic()
    labels = judge.labels(count)
    fakes, content = draw(model, labels, judge.device)
    model.scores.append({"step": content["step"], "seconds": content["seconds"], **judge.brief(fakes, labels),
                         "scoring": time.monotonic() - began})
    model.write()


def seconds_left(todo, models):
    """How long the scores `todo`, a list of (model, step) in the order of the work, will take, training included."""
    # The best that is known of each kind: of a run that is scored, else of its first steps
    known = {model.kind: model for model in sorted(models, key=lambda model: model.scored) if "speed" in model.record}
    at, left = {}, 0.0
    for model, step in todo:
        like = known.get(model.kind)
        if like is None:
            continue
        last = like.scores[-1] if like.scores else None
        speed = last["seconds"] / last["step"] if last else like.record["speed"]
        # A forward pass takes a third of a step
        drawing = speed / 3 * network_calls(model.config) * model.record["settings"]["count"] / model.config.batch_size
        left += (step - at.get(model, model.scored)) * speed + (last["scoring"] if last else drawing)
        at[model] = step
    return left


def study(args, models):
    """Trains and scores what is not done yet, and reports. Returns the number of the signal that ended it, or 0."""
    judge = open_judge(models[0].config, pick_device(args.device))
    for model in models:
        if model.seed == args.seeds[0] and "speed" not in model.record:
            print(f"{model.folder.name}: the first steps", flush=True)
            stopped = probe(model, args)
            if stopped:
                return stopped

    # All models to one step, then all to the next: wherever it is stopped, they can be compared.
    todo = sorted(((model, mark) for model in models for mark in model.marks if mark > model.scored),
                  key=lambda item: (args.seeds.index(item[0].seed), item[1]))
    for i, (model, mark) in enumerate(todo):
        print(f"{i + 1} of {len(todo)}: {model.folder.name} to step {mark:,}; about "
              f"{show_time(seconds_left(todo[i:], models))} left in all", flush=True)
        stopped = advance(model, mark, args)
        if stopped:
            return stopped
        if model.scored < mark:
            score(model, judge, args.count)
        print(f"  Fréchet distance {model.scores[-1]['frechet']:.3f}, {model.scores[-1]['accuracy']:.1%} read as asked",
              flush=True)
        if i + 1 < len(todo) and todo[i + 1][1] != mark:
            report(args, models, judge)
    report(args, models, judge)
    return 0


def collect(models):
    """The figures of the last step that all models of the first seed have reached, and of the other seeds whose models
    all have as well: a dict from each kind of model to a list of scores, seed by seed."""
    steps = {seed: set.intersection(*({part["step"] for part in model.scores} for model in models
                                      if model.seed == seed)) for seed in {model.seed for model in models}}
    step = max(steps[models[0].seed])
    return {kind: [next(part for part in model.scores if part["step"] == step) for model in models
                   if model.kind == kind and step in steps[model.seed]]
            for kind in dict.fromkeys(model.kind for model in models)}


def make_table(models, results, real):
    """The lines of a table of all models, in the order of their Gflops."""
    lines = ["| size | patch | tokens | parameters | Gflops | training, TFLOP | training, s | read as asked | Fréchet "
             "| to real | recall |", "|---" * 11 + "|"]
    firsts = {model.kind: model for model in reversed(models)}
    for kind, parts in sorted(results.items(), key=lambda item: firsts[item[0]].record["flops"]):
        record, training = firsts[kind].record, firsts[kind].training_flops(parts[0]["step"])
        values = {name: [part[name] for part in parts] for name in parts[0]}
        values["ratio"] = [distance / real["frechet"] for distance in values["frechet"]]
        columns = {"seconds": ".0f", "accuracy": ".1%", "frechet": ".3f", "ratio": ".1f", "recall": ".2f"}
        cells = [show_mean(values[name], form) for name, form in columns.items()]
        lines.append(f"| {kind[0]} | {kind[1]} | {record['tokens']:,} | {record['parameters']:,} "
                     f"| {record['flops'] / 1e9:.3g} | {training / 1e12:.3g} | {' | '.join(cells)} |")
    lines.append(f"| real images | | | | | | | {real['accuracy']:.1%} | {real['frechet']:.3f} | 1.0 "
                 f"| {real['recall']:.2f} |")
    return lines


def make_front(models):
    """The lines of a table of the best scores for their training compute: no model was better with less."""
    points = sorted((model.training_flops(part["step"]), part["frechet"], model.size, model.patch, part["step"])
                    for model in models if model.seed == models[0].seed for part in model.scores)
    lines, best = ["| training, TFLOP | best Fréchet | size | patch | step |", "|---" * 5 + "|"], math.inf
    for training, distance, size, patch, step in points:
        if distance < best:
            best = distance
            lines.append(f"| {training / 1e12:.3g} | {distance:.3f} | {size} | {patch} | {step:,} |")
    return lines


def make_rates_table(results):
    """The lines of a table of the distance, size by learning rate; the best of each size is bold."""
    rates = sorted({rate for *_, rate in results})
    lines = ["| size |" + "".join(f" {rate:g} |" for rate in rates), "|---" * (len(rates) + 1) + "|"]
    for size, patch in dict.fromkeys(kind[:2] for kind in results):
        distances = [[part["frechet"] for part in results[size, patch, rate]] for rate in rates]
        best = min(map(statistics.mean, distances))
        cells = [f"**{show_mean(values, '.3f')}**" if statistics.mean(values) == best else show_mean(values, ".3f")
                 for values in distances]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return lines


def fit(xs, ys):
    """The power law y = exp(start) x^slope by least squares of the logarithms: slope, start, and their correlation."""
    xs, ys = np.log(xs), np.log(ys)
    return (*np.polyfit(xs, ys, 1), np.corrcoef(xs, ys)[0, 1])


def plot(title, x_labels, models, real, path, draw):
    """Writes a figure of the distance against each of `x_labels`: `draw(axes, i, model, style)` draws one model, of the
    first seed, into plot i; what it returns is said above it."""
    from matplotlib.figure import Figure  # here, so that --help does not wait for it
    from matplotlib.ticker import LogLocator, NullFormatter

    sizes, patches = (list(dict.fromkeys(getattr(model, name) for model in models)) for name in ("size", "patch"))
    figure = Figure(figsize=(3 + 5 * len(x_labels), 5), layout="constrained")
    figure.suptitle(title)
    for i, axes in enumerate(figure.subplots(1, len(x_labels), sharey=True, squeeze=False)[0]):
        axes.set(xscale="log", yscale="log", xlabel=x_labels[i], ylabel="" if i else "Fréchet distance")
        for model in models:
            if model.seed == models[0].seed:
                patch = patches.index(model.patch)
                draw(axes, i, model, dict(color=f"C{sizes.index(model.size)}", marker="osD^v"[patch % 5], markersize=5,
                                          linestyle=("-", "--", ":", "-.")[patch % 4],
                                          label=f"{model.size}, patch {model.patch}"))
        axes.axhline(real["frechet"], color="grey", linestyle=":", label="real images")
        axes.grid(alpha=0.3, which="both")
        for axis in (axes.xaxis, axes.yaxis):  # 0.1, 0.2, 0.5, 1
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    save_figure(figure, path)


def plot_law(models, results, real, path):
    """Distance against Gflops (figure 8 of the paper), and against parameters. Returns a line that says the law."""
    units = {"flops": ("Gflops", 1e9), "parameters": ("millions of parameters", 1e6)}
    means = {kind: statistics.mean(part["frechet"] for part in parts) for kind, parts in results.items()}
    firsts = {model.kind: model.record for model in reversed(models)}
    xs = [np.array([firsts[kind][name] / unit for kind in results]) for name, (_, unit) in units.items()]
    laws = [fit(x, list(means.values())) if len(set(x)) > 1 else None for x in xs]

    def draw(axes, i, model, style):
        name = list(units)[i]
        distances = [part["frechet"] for part in results[model.kind]]
        error = statistics.stdev(distances) if len(distances) > 1 else None
        axes.errorbar(model.record[name] / units[name][1], means[model.kind], error, capsize=3,
                      **style | {"linestyle": "none"})
        if model is models[0] and laws[i]:
            slope, start, correlation = laws[i]
            ends = np.array([xs[i].min(), xs[i].max()])
            axes.plot(ends, np.exp(start) * ends**slope, color="grey", linewidth=1)
            axes.set_title(f"correlation {correlation:.2f}", fontsize=10)

    plot("", [label for label, _ in units.values()], models, real, path, draw)
    said = [f"of {label} {law[2]:.2f} (slope {law[0]:.2f})"
            for law, (label, _) in zip(laws, units.values(), strict=True) if law]
    return f"Correlation of the logarithm of the distance with that {', '.join(said)}" if said else ""


def plot_training(models, real, path):
    """Distance against training compute, a curve for each model of the first seed (figures 9 and 10)."""
    def draw(axes, _, model, style):
        axes.plot([model.training_flops(part["step"]) / 1e12 for part in model.scores],
                  [part["frechet"] for part in model.scores], **style)

    plot("", ["training compute, TFLOP"], models, real, path, draw)


def show_models(models, num_classes, device, path):
    """The same ten images of every model of the first seed, sizes by patches (figure 7)."""
    from matplotlib.figure import Figure

    models = [model for model in models if model.seed == models[0].seed]
    columns = len({model.patch for model in models})
    rows = len(models) // columns
    figure = Figure(figsize=(3.2 * columns, 1.7 * rows), layout="constrained")
    for axes, model in zip(figure.subplots(rows, columns, squeeze=False).flat, models, strict=True):
        fakes, _ = draw(model, torch.arange(10) % num_classes, device)
        axes.imshow(grid(fakes, columns=5), cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{model.size}, patch {model.patch}: {model.record['flops'] / 1e9:.3g} Gflops", fontsize=8)
        axes.axis("off")
    save_figure(figure, path)


def report(args, models, judge):
    """Prints the table of what is done so far, and leaves it and the pictures in the folder of the study."""
    results = collect(models)
    real = judge.brief_real(judge.labels(args.count))
    parts = next(iter(results.values()))
    lines = [f"Step {parts[0]['step']:,}, {args.count:,} images for each figure, seeds: {len(parts)}", ""]
    lines += make_rates_table(results) if args.rates else make_table(models, results, real)
    if not args.rates:
        lines += ["", plot_law(models, results, real, args.out / "gflops.png"), "", *make_front(models)]
        plot_training(models, real, args.out / "training.png")
        show_models(models, judge.num_classes, judge.device, args.out / "samples.png")
    path = args.out / ("rates.md" if args.rates else "scaling.md")
    write_atomically(path, lambda file: file.write("\n".join([*lines, ""]).encode()))
    print(f"-> {path}\n", *lines, *few(args.count, len(judge.test.images)), sep="\n", flush=True)


def parse_args():
    parser = Parser(description="Trains models of several sizes and patches alike, and sets their distance to real "
                                "images against their compute. The same command goes on with a study that was stopped.")
    parser.add_argument("--preset", choices=STUDIES, default="mnist", help="mnist: four small sizes, for two CPU "
                        "cores; quick: three of them, and fewer steps; paper: S, B, L and XL of the paper, for GPUs "
                        "(default: mnist)")
    parser.add_argument("--quick", action="store_const", dest="preset", const="quick",
                        help="the same as --preset quick")
    parser.add_argument("--models", nargs="+", metavar="SIZE", help="depth x width, 4x128, or S, B, L, XL (default: "
                        "the preset's)")
    parser.add_argument("--patches", nargs="+", type=int, metavar="N",
                        help="(default: the preset's: 14 7 4 or 8 4 2)")
    parser.add_argument("--rates", nargs="+", type=float, metavar="LR", help="instead, train each size at each of "
                        "these learning rates, with the middle one of the patches")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="(default: 0)")
    parser.add_argument("--marks", type=int, help="how often a model of the first seed is scored: at the last step, "
                        "half of it, a quarter ... (default: the preset's, 5 or 3; with --rates 1)")
    parser.add_argument("--count", type=int, default=2000, help="images drawn for each score (default: 2000)")
    parser.add_argument("--out", type=some_path, default=Path("scaling"), help="folder of the study (default: scaling)")
    add_flags(parser.add_argument_group("settings of every run, as of train.py"),
              LatentConfig, [field.name for field in dataclasses.fields(LatentConfig) if field.name not in OWN])
    say_default(parser, ["dataset", "steps", "guidance"], "the preset's")
    add_device_flag(parser)
    args = parser.parse_args()
    if not 10 <= args.count <= 100_000 or args.marks not in (None, *range(1, 21)):
        raise UserError("--count must lie between 10 and 100,000, and --marks between 1 and 20")
    if any(len(set(words)) < len(words) for words in (args.seeds, args.models, args.patches, args.rates) if words):
        raise UserError("a size, patch, learning rate or seed that is named twice would count as two: name each once")
    return args


def main():
    args = parse_args()
    models = plan(args)
    make_dir(args.out)
    for name in () if args.rates else ("gflops.png", "training.png", "samples.png"):
        check_picture(args.out / name)
    check_output(args.out / ("rates.md" if args.rates else "scaling.md"), b" images for each figure, seeds: ")
    try:
        stopped = study(args, models)
    except KeyboardInterrupt:  # outside of training, which ends itself
        stopped = 2
    if stopped:
        print(f"stopped; go on with: {shlex.join(['python', '-m', 'measure.scaling', *sys.argv[1:]])}")
        sys.exit(128 + stopped)


if __name__ == "__main__":
    run(main, memory="--batch-size or --count", alone=True)
