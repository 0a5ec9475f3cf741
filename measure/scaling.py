"""Does more compute make better images? Trains models of several sizes and patches in the same way, and relates their
distance to real images to the Gflops of a forward pass (DiT, arXiv 2212.09748, figures 7 to 10).

    python -m measure.scaling --quick                    9 models of MNIST in 6 minutes on two CPU cores
    python -m measure.scaling --seeds 0 1 2              12 models, trained longer, and how much they vary
    python -m measure.scaling --rates 2e-3 4e-3 8e-3     does the best learning rate depend on the size?
    python -m measure.scaling --preset paper --dataset folder --data-dir X --vae V      the paper's models, for GPUs

Each model is a run folder in --out. Stop the study at any moment: the same command goes on where it was. Several
processes can share one --out, each with seeds of its own. The same command with all of the seeds then only reports.
"""

from support.commands import Parser, UserError, add_device_flag, pick_device, run, some_path
from support.files import check_output, make_dir, write_atomically
from support.flops import flops
from support.pictures import check_picture, grid
from support.settings import add_flags, given_flags, say_default
from support.sizes import show_time

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
from measure.results import log_plots, save_grids, save_plots, show_mean, table_cells
from measure.score import METRICS, draw_fakes, few, open_judge
from record.checkpoint import averaged_model, load_checkpoint
from train import COMPILE_FROM, train

HEAD = 32  # the width of a head, for sizes such as 4x128
# Samples are drawn without guidance, as in the paper: guidance would hide what a model cannot do
STUDIES = {
    "mnist": dict(sizes=("2x64", "3x96", "4x128", "5x160"), patches=(14, 7, 4), marks=5,
                  recipe=dict(dataset="mnist", steps=3200, guidance=1.0)),
    "quick": dict(sizes=("2x64", "3x96", "4x128"), patches=(14, 7, 4), marks=3,
                  recipe=dict(dataset="mnist", steps=1600, guidance=1.0)),
    "paper": dict(sizes=("S", "B", "L", "XL"), patches=(8, 4, 2), marks=5,
                  recipe=PAPER | dict(dataset="folder", steps=400_000, guidance=1.0, sample_steps=50)),
}
PROBE = 10  # first steps of each model: they show that it can be trained, and how long the study will take
OWN = ("patch_size", "hidden_size", "depth", "num_heads", "seed", "log_every", "sample_every", "checkpoint_every")
SCORE = ("step", "seconds", "scoring", "accuracy", *METRICS)  # the numbers of each score in scores.json
MEASURES = ("parameters", "tokens", "flops", "speed")  # the numbers of each model there
FIGURES = ("accuracy", "frechet", "ratio", "recall")  # of the table
MOVABLE = ("data_dir", "compile", "recompute")  # settings that may change when a study goes on


@dataclasses.dataclass(eq=False)
class Model:
    """A run of the study."""

    size: str
    patch: int
    seed: int
    folder: Path
    config: Config   # or `LatentConfig`; without what the data decide
    marks: list      # the steps at which it is scored
    record: dict     # what is known of it; see `read_record`

    @property
    def kind(self):
        """What runs have in common that differ in the seed alone."""
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
        """The floating-point operations of the training up to `step`. A backward pass takes two forward passes."""
        return 3 * self.record["flops"] * self.config.batch_size * step

    def write(self):
        content = json.dumps(self.record, indent=1).encode()
        write_atomically(self.folder / "scores.json", lambda file: file.write(content))


def size_settings(word):
    """The settings of a size: S, B, L or XL, or depth x width, such as 4x128. Raises `UserError`."""
    if word in STUDIES["paper"]["sizes"]:
        return {name: PRESETS[word][name] for name in ("depth", "hidden_size", "num_heads")}
    match = re.fullmatch("([0-9]{1,3})x([0-9]{1,5})", word)
    if not match or int(match[2]) % HEAD:
        raise UserError(f"--models {word:.40}: must be depth x width with heads of {HEAD}, such as 4x128, or one of "
                        f"{', '.join(STUDIES['paper']['sizes'])}")
    return dict(depth=int(match[1]), hidden_size=int(match[2]), num_heads=int(match[2]) // HEAD)


def plan(args):
    """The models of the study, a list of `Model`, seed by seed. Raises `UserError` for bad settings, and when --out
    holds another study."""
    preset = STUDIES[args.preset]
    recipe = {"lr": Config.lr} | preset["recipe"] | given_flags(args, LatentConfig)
    plain = recipe.keys() <= Config.__dataclass_fields__.keys() and recipe["dataset"] != "sprites"
    of, steps, usual = Config if plain else LatentConfig, recipe["steps"], recipe["lr"]
    sizes, patches, rates = args.models or preset["sizes"], args.patches or preset["patches"], args.rates or [usual]
    patches = patches[len(patches) // 2:][:1] if args.rates else patches
    count = args.marks or (1 if args.rates else preset["marks"])
    models = []
    for seed, size, patch, rate in itertools.product(args.seeds, sizes, patches, rates):
        folder = args.out / (f"{size}_patch{patch}_seed{seed}" + ("" if rate == usual else f"_lr{rate:g}"))
        config = of(**{"compile": steps >= COMPILE_FROM} | recipe | size_settings(size) | dict(
            patch_size=patch, lr=rate, seed=seed, sample_every=steps, checkpoint_every=max(1, steps // 16)))
        marks = sorted({max(1, steps >> i) for i in range(count if seed == args.seeds[0] else 1)})
        models.append(Model(size, patch, seed, folder, config, marks, read_record(folder, config, args.count)))
    return models


def read_record(folder, config, count):
    """The content of scores.json in a run folder, a dict:

        settings   of `Config`, and `count`, the images drawn for a score
        scores     a list of dicts: step, seconds (of training), scoring (seconds), and the figures of `Judge.brief`
    and after the first steps:
        parameters, tokens, flops (of `forward_flops`), and speed (seconds of a step)

    Raises `UserError` when the file is damaged or belongs to another study, or when its model is gone."""
    settings = json.loads(json.dumps(dataclasses.asdict(config) | {"count": count}))
    path = folder / "scores.json"
    if not path.exists():
        return {"settings": settings, "scores": []}
    try:
        record = json.loads(path.read_text())
        old = dict(record["settings"])
        numbers = [score[name] for score in record["scores"] for name in SCORE]
        numbers += [record[name] for name in MEASURES if record.keys() & {*MEASURES}]
        if not all(type(number) in (int, float) for number in numbers):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is damaged: remove {folder}, and it is made anew") from None
    if numbers and not (folder / "model.pth").is_file():
        raise UserError(f"{folder / 'model.pth'} is gone, but {path.name} beside it holds its scores: bring it back, "
                        f"or remove {folder}, and it is made anew")
    differences = [f"{name} {old.get(name)} -> {settings.get(name)}" for name in old | settings
                   if old.get(name) != settings.get(name) and name not in MOVABLE]
    if differences:
        raise UserError(f"{folder} was made with other settings ({', '.join(differences):.150}): choose another --out, "
                        "or remove it")
    return record


def advance(model, until, args):
    """Trains a model up to the step `until`, and shows nothing but the bar. Measures the model after its first steps.
    Ends the command if a signal stops the training."""
    make_dir(model.folder)
    model.write()  # before there is a checkpoint, which another study could otherwise take for its own
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            _, stopped = train(model.config, model.folder, model.file.exists(), args.device, until)
        except UserError as error:
            raise UserError(f"{model.folder.name}: {error}") from None
    if "speed" not in model.record:
        content = load_checkpoint(model.file, (type(model.config),))
        config = content["config"]
        model.record |= {"parameters": sum(weight.numel() for weight in content["ema"].values()),
                         "tokens": math.prod(config.input_shape[1:]) // math.prod(config.patch_size),
                         "flops": forward_flops(config), "speed": content["seconds"] / content["step"]}
        model.write()
    if stopped:
        end(stopped)


def end(signal):
    """Says how to go on with the study, and exits."""
    print(f"stopped; go on with: {shlex.join(['python', '-m', 'measure.scaling', *sys.argv[1:]])}")
    sys.exit(128 + signal)


def forward_flops(config):
    """The floating-point operations of a forward pass of one image. A multiplication and its addition count as two, as
    in torch; the paper's Gflops count them as one."""
    with torch.device("meta"):  # on a CPU torch does not count its own attention
        network, zero = config.build_model().to("meta"), torch.zeros(1, dtype=torch.long)
        x = torch.empty(1, *config.input_shape)
    return flops(lambda: network(x, zero, zero))


def draw(model, labels, device):
    """Draws images of these labels from the model's checkpoint. Returns them and the content of the checkpoint."""
    content = load_checkpoint(model.file, (type(model.config),))
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
    """Estimates how long it takes to train and score `todo`, a list of (model, step) in the order of the work."""
    # What is known of each kind of model, best from the run that is scored last, else from its first steps
    known = {model.kind: model for model in sorted(models, key=lambda model: model.scored) if "speed" in model.record}
    at, left = {}, 0.0
    for model, step in todo:
        like = known[model.kind]
        last = like.scores[-1] if like.scores else {"seconds": like.record["speed"], "step": 1, "scoring": 0}
        left += (step - at.get(model, model.scored)) * last["seconds"] / last["step"] + last["scoring"]
        at[model] = step
    return left


def study(args, models):
    """Trains and scores what is left to do, and reports."""
    judge = open_judge(models[0].config, pick_device(args.device))
    for model in models:
        if model.seed == args.seeds[0] and "speed" not in model.record:
            print(f"{model.folder.name}: the first steps", flush=True)
            advance(model, min(PROBE, model.marks[0]), args)

    # All models to one step, then all to the next: wherever the study is stopped, they can be compared
    todo = sorted(((model, mark) for model in models for mark in model.marks if mark > model.scored),
                  key=lambda item: (args.seeds.index(item[0].seed), item[1]))
    for i, (model, mark) in enumerate(todo):
        print(f"{i + 1} of {len(todo)}: {model.folder.name} to step {mark:,}; about "
              f"{show_time(seconds_left(todo[i:], models))} left in all", flush=True)
        advance(model, mark, args)
        score(model, judge, args.count)
        print(f"  Fréchet distance {model.scores[-1]['frechet']:.3f}, {model.scores[-1]['accuracy']:.1%} read as asked",
              flush=True)
        if i + 1 < len(todo) and todo[i + 1][1] != mark:
            report(args, models, judge)
    report(args, models, judge)


def collect(models):
    """The scores at the last step that all models of the first seed have reached, and the other seeds' if all of their
    models have reached it: a dict from each kind of model to its scores, seed by seed."""
    steps = {seed: set.intersection(*({part["step"] for part in model.scores} for model in models
                                      if model.seed == seed)) for seed in {model.seed for model in models}}
    step = max(steps[models[0].seed])
    return {kind: [next(part for part in model.scores if part["step"] == step) for model in models
                   if model.kind == kind and step in steps[model.seed]]
            for kind in dict.fromkeys(model.kind for model in models)}


def make_table(models, results, real):
    """The lines of a table of the models, by their Gflops."""
    lines = ["| size | patch | tokens | parameters | Gflops | training, TFLOP | training, s | read as asked | Fréchet "
             "| to real | recall |", "|---" * 11 + "|"]
    for model in sorted(models, key=lambda model: model.record["flops"]):
        record, parts = model.record, results[model.kind]
        training = model.training_flops(parts[0]["step"]) / 1e12
        lines.append(f"| {model.size} | {model.patch} | {record['tokens']:,} | {record['parameters']:,} "
                     f"| {record['flops'] / 1e9:.3g} | {training:.3g} "
                     f"| {table_cells(parts, real, ['seconds', *FIGURES])} |")
    return [*lines, f"| real images | | | | | | | {table_cells([real], real, FIGURES)} |"]


def make_front(models):
    """The lines of a table of the best scores for their training compute: no model was better with less."""
    lines, best = ["| training, TFLOP | best Fréchet | size | patch | step |", "|---" * 5 + "|"], math.inf
    for training, distance, *row in sorted((model.training_flops(part["step"]) / 1e12, part["frechet"], model.size,
                                            model.patch, part["step"]) for model in models for part in model.scores):
        if distance < best:
            best = distance
            lines.append("| {:.3g} | {:.3f} | {} | {} | {:,} |".format(training, distance, *row))
    return lines


def make_rates_table(results):
    """The lines of a table of the distance by size and learning rate. The best of each size is bold."""
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
    """Fits the power law y = exp(start) x^slope by least squares of the logarithms. Returns slope, start, and the
    correlation of the logarithms."""
    xs, ys = np.log(xs), np.log(ys)
    return (*np.polyfit(xs, ys, 1), np.corrcoef(xs, ys)[0, 1])


def styles(models):
    """How each model is plotted, a list of dicts: a colour for each size, a marker and a line for each patch."""
    sizes, patches = (list(dict.fromkeys(getattr(model, name) for model in models)) for name in ("size", "patch"))
    return [dict(color=f"C{sizes.index(model.size)}", marker="osD^v"[patches.index(model.patch) % 5], markersize=5,
                 linestyle=("-", "--", ":", "-.")[patches.index(model.patch) % 4],
                 label=f"{model.size}, patch {model.patch}") for model in models]


def plot_law(models, results, real, path):
    """Plots the distance against Gflops (figure 8 of the paper) and against parameters. Returns a line on the laws."""
    units = (("flops", "Gflops", 1e9), ("parameters", "millions of parameters", 1e6))
    figure, plots = log_plots([label for _, label, _ in units], ["Fréchet distance", ""], sharey=True)
    distances, said = [[part["frechet"] for part in results[model.kind]] for model in models], []
    means = list(map(statistics.mean, distances))
    for axes, (name, label, unit) in zip(plots, units, strict=True):
        xs = [model.record[name] / unit for model in models]
        for x, mean, values, style in zip(xs, means, distances, styles(models), strict=True):
            deviation = statistics.stdev(values) if len(values) > 1 else None
            axes.errorbar(x, mean, deviation, capsize=3, **style | {"linestyle": "none"})
        if len(set(xs)) > 1:
            slope, start, correlation = fit(xs, means)
            ends = np.array([min(xs), max(xs)])
            axes.plot(ends, np.exp(start) * ends**slope, color="grey", linewidth=1)
            axes.set_title(f"correlation {correlation:.2f}", fontsize=10)
            said.append(f"of {label} {correlation:.2f} (slope {slope:.2f})")
    save_plots(figure, [real["frechet"]] * 2, path)
    return f"Correlation of the logarithm of the distance with that {', '.join(said)}" if said else ""


def plot_training(models, real, path):
    """Plots the distance against the training compute, a curve for each model (figures 9 and 10)."""
    figure, (axes,) = log_plots(["training compute, TFLOP"], ["Fréchet distance"])
    for model, style in zip(models, styles(models), strict=True):
        axes.plot([model.training_flops(part["step"]) / 1e12 for part in model.scores],
                  [part["frechet"] for part in model.scores], **style)
    save_plots(figure, [real["frechet"]], path)


def show_models(models, judge, path):
    """Writes the same ten images as each model draws them, sizes by patches (figure 7)."""
    labels = torch.arange(10) % judge.num_classes
    save_grids([(f"{model.size}, patch {model.patch}: {model.record['flops'] / 1e9:.3g} Gflops",
                 grid(draw(model, labels, judge.device)[0], columns=5)) for model in models],
               len({model.patch for model in models}), (3.2, 1.7), path)


def report(args, models, judge):
    """Prints a table of what is done so far, and writes it and the plots to the folder of the study."""
    results, firsts = collect(models), [model for model in models if model.seed == models[0].seed]
    real = judge.brief_real(judge.labels(args.count))
    parts = next(iter(results.values()))
    lines = [f"Step {parts[0]['step']:,}, {args.count:,} images for each figure, seeds: {len(parts)}", ""]
    if args.rates:
        lines += make_rates_table(results)
    else:
        lines += [*make_table(firsts, results, real), "", plot_law(firsts, results, real, args.out / "gflops.png"), "",
                  *make_front(firsts)]
        plot_training(firsts, real, args.out / "training.png")
        show_models(firsts, judge, args.out / "samples.png")
    path = args.out / ("rates.md" if args.rates else "scaling.md")
    write_atomically(path, lambda file: file.write("\n".join([*lines, ""]).encode()))
    print(f"-> {path}\n", *lines, *few(args.count, len(judge.test.images)), sep="\n", flush=True)


def parse_args():
    parser = Parser(description="Trains models of several sizes and patches in the same way, and relates their "
                                "distance to real images to their compute. The same command goes on with a study that "
                                "was stopped.")
    parser.add_argument("--preset", choices=STUDIES, default="mnist", help="mnist: four small sizes, for two CPU "
                        "cores; quick: three of them and fewer steps; paper: S, B, L and XL of the paper, for GPUs "
                        "(default: mnist)")
    parser.add_argument("--quick", action="store_const", dest="preset", const="quick", help="short for --preset quick")
    parser.add_argument("--models", nargs="+", metavar="SIZE", help="depth x width, 4x128, or S, B, L, XL (default: "
                        "the preset's)")
    parser.add_argument("--patches", nargs="+", type=int, metavar="N",
                        help="patch sizes, pixels (default: the preset's, 14 7 4 or 8 4 2)")
    parser.add_argument("--rates", nargs="+", type=float, metavar="LR", help="compare these learning rates "
                        "instead: train each size with each of them, at the middle one of the patches")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="train each model with each of "
                        "these seeds (default: 0)")
    parser.add_argument("--marks", type=int, help="number of scores of each model of the first seed: at the last "
                        "step, half of it, a quarter ... (default: the preset's, 5 or 3; with --rates 1)")
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
        study(args, models)
    except KeyboardInterrupt:  # while images are drawn: training catches its own signals
        end(2)


if __name__ == "__main__":
    run(main, memory="--batch-size or --count", alone=True)
