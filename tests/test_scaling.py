from support.commands import UserError

import dataclasses
import itertools
import json
import signal

import numpy as np
import pytest
from conftest import SMALL, assert_refused, same
from matplotlib.figure import Figure
from PIL import Image

import measure.score
import train
from config import Config
from latent.config import LatentConfig
from measure import results, scaling
from measure.classifier import train_classifier
from measure.scaling import collect, fit, forward_flops, plan, seconds_left
from record.checkpoint import load_checkpoint

FLAGS = ["--data-dir", SMALL, "--image-size", 8, "--models", "1x32", "2x64", "--patches", 8, 4, "--steps", 8,
         "--batch-size", 8, "--count", 20, "--sample-steps", 2, "--device", "cpu"]


@pytest.fixture(autouse=True)
def haste(monkeypatch):
    """What the judge reads with is not the matter here: it has learned next to nothing, at once. Nor are pictures, but
    those that the first test looks at."""
    monkeypatch.setattr(train, "plot_loss", lambda *_: None)
    for name in ("save_plots", "save_grids"):
        monkeypatch.setattr(scaling, name, lambda *args: None)
    monkeypatch.setattr(measure.score, "find_classifier",
                        lambda data, *_: train_classifier(data, epochs=1, batch_size=1000))


def read(folder):
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/scores.json")}


def figures(folder):
    """All that does not depend on how long it took."""
    return {name: [{key: value for key, value in part.items() if key not in ("seconds", "scoring")}
                   for part in record["scores"]] for name, record in read(folder).items()}


def test_the_study(call, tmp_path):
    seeds, original = set(), scaling.draw_fakes
    with pytest.MonkeyPatch.context() as patch:
        for name in ("save_plots", "save_grids"):
            patch.setattr(scaling, name, getattr(results, name))
        patch.setattr(scaling, "draw_fakes", lambda model, config, labels: (
            seeds.add(config.seed), original(model, config, labels))[1])
        check_the_study(call, tmp_path)
    assert seeds == {0}  # the same noise for all
    # Once more: nothing is left to do.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    assert call(scaling, *FLAGS, "--marks", 2, "--seeds", 0, 1, "--out", tmp_path)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")} == before


def check_the_study(call, tmp_path):
    code, out, err = call(scaling, *FLAGS, "--marks", 2, "--seeds", 0, 1, "--out", tmp_path)
    assert code == 0, err
    records = read(tmp_path)
    assert sorted(records) == sorted(f"{size}_patch{patch}_seed{seed}" for size in ("1x32", "2x64") for patch in (8, 4)
                                     for seed in (0, 1))
    for name, record in records.items():
        content = load_checkpoint(tmp_path / name / "model.pth", (Config,))
        assert content["step"] == 8 and record["settings"]["steps"] == 8
        assert [part["step"] for part in record["scores"]] == ([4, 8] if name.endswith("0") else [8])
        if name.endswith("1"):
            continue
        assert record["parameters"] == sum(p.numel() for p in content["config"].build_model().parameters())
        assert record["tokens"] == (1 if "patch8" in name else 4)
        assert record["flops"] == forward_flops(content["config"])
    # The table, in the order of their Gflops, has the mean and the spread over seeds.
    rows = [row for row in (tmp_path / "scaling.md").read_text().splitlines() if "±" in row]
    names = [row.split(" | ")[:2] for row in rows]
    assert names == [["| 1x32", "8"], ["| 1x32", "4"], ["| 2x64", "8"], ["| 2x64", "4"]]
    distances = np.array([records[f"2x64_patch8_seed{seed}"]["scores"][-1]["frechet"] for seed in (0, 1)])
    assert f"{distances.mean():.3f} ± {distances.std(ddof=1):.3f}" in rows[2] and rows[2] in out
    assert f"| {3 * 8 * 8 * records['2x64_patch8_seed0']['flops'] / 1e12:.3g} |" in rows[2]
    for name in ("gflops.png", "training.png", "samples.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 500, name


def stopped_at(monkeypatch, where, calls):
    """Has Ctrl-C pressed in the `calls`th call of a function, (module, name)."""
    original, left = getattr(*where), [calls]

    def pressed(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **options)

    monkeypatch.setattr(*where, pressed)


def test_a_study_that_is_stopped_anywhere_is_the_same_study(call, tmp_path):
    flags = [*FLAGS, "--models", "1x32", "--marks", 2]
    assert call(scaling, *flags, "--out", tmp_path / "whole")[0] == 0
    # In the first steps, on the way to a score, and while images are drawn for one
    for where, calls in (((train, "descend"), 3), ((train, "descend"), 7), ((scaling, "draw_fakes"), 1)):
        with pytest.MonkeyPatch.context() as patch:
            stopped_at(patch, where, calls)
            code, out, err = call(scaling, *flags, "--out", tmp_path / "parts")
        assert code == 130 and "Traceback" not in err
        assert f"stopped; go on with: python -m measure.scaling {' '.join(map(str, flags))}" in out
    code, _, err = call(scaling, *flags, "--out", tmp_path / "parts")
    assert code == 0, err
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole")
    for name in read(tmp_path / "whole"):
        whole, parts = (load_checkpoint(tmp_path / folder / name / "model.pth", (Config,))
                        for folder in ("whole", "parts"))
        assert same({**whole, "seconds": 0}, {**parts, "seconds": 0}), name


def test_learning_rates(call, tmp_path):
    """The middle patch alone; the usual rate is the run that the study itself has."""
    flags = [*FLAGS, "--patches", 8, 4, 2, "--out", tmp_path]
    assert call(scaling, *flags, "--models", "1x32", "--marks", 1)[0] == 0
    before = (tmp_path / "1x32_patch4_seed0" / "model.pth").stat().st_mtime_ns
    code, out, err = call(scaling, *flags, "--rates", 1e-3, Config.lr)
    assert code == 0, err
    assert (tmp_path / "1x32_patch4_seed0" / "model.pth").stat().st_mtime_ns == before
    records = read(tmp_path)
    assert len(records) == 6 and records["2x64_patch4_seed0_lr0.001"]["settings"]["lr"] == 1e-3
    head, _, *rows = [line for line in (tmp_path / "rates.md").read_text().splitlines() if line.startswith("|")]
    assert head == "| size | 0.001 | 0.004 |"
    for row, size in zip(rows, ("1x32", "2x64"), strict=True):
        distances = [records[f"{size}_patch4_seed0{rate}"]["scores"][-1]["frechet"] for rate in ("_lr0.001", "")]
        cells = [f"**{value:.3f}**" if value == min(distances) else f"{value:.3f}" for value in distances]
        assert row == f"| {size} | {' | '.join(cells)} |" and row in out


@pytest.fixture
def made(monkeypatch, tmp_path):
    """The models of a study of which nothing is done yet, seed by seed, from flags; and its arguments."""
    def make(*flags):
        monkeypatch.setattr("sys.argv", ["scaling", *map(str, flags), "--out", str(tmp_path / "study")])
        args = scaling.parse_args()
        return plan(args), args

    return make


def test_the_models_of_the_presets(made):
    models, _ = made()
    assert len(models) == 12 and len({model.kind for model in models}) == 12
    assert {type(model.config) for model in models} == {Config}  # which inference.py draws
    assert {model.patch for model in models} == {14, 7, 4}
    assert len({dataclasses.replace(model.config, depth=1, hidden_size=4, num_heads=1, patch_size=1)
                for model in models}) == 1  # all else is alike
    sizes = sorted({(m.config.depth, m.config.hidden_size) for m in models})
    assert len(sizes) == 4 and sizes == sorted(sizes, key=lambda size: size[1])
    assert {m.config.hidden_size / m.config.num_heads for m in models} == {32}
    assert models[0].marks == [200, 400, 800, 1600, 3200]
    models, args = made("--quick")
    assert args.preset == "quick" and len(models) == 9 and models[0].marks == [400, 800, 1600]
    models, _ = made("--preset", "paper")
    assert [(m.size, m.patch) for m in models] == [*itertools.product(("S", "B", "L", "XL"), (8, 4, 2))]
    assert {(m.config.steps, m.config.batch_size, m.config.lr) for m in models} == {(400_000, 256, 1e-4)}
    assert {m.config.hidden_size for m in models} == {384, 768, 1024, 1152}
    assert all(m.config.compile for m in models)


def test_flops_of_a_size():
    config = Config(image_size=28, channels=1, num_classes=10, patch_size=4, hidden_size=96, depth=3, num_heads=3)
    D, N, P, d = 96, 49, 16, 3
    block = N * 12 * D * D + 2 * N * N * D + 6 * D * D  # qkv, out and the MLP; attention; the modulation
    assert forward_flops(config) == 2 * (N * P * D + 256 * D + D * D + d * block + 2 * D * D + N * D * P)


def test_the_time_that_is_left(made):
    """From what is known of each kind of model: the scores of one seed hold for the others."""
    models, _ = made(*FLAGS[:-8], "--models", "1x32", "--patches", 4, "--steps", 100, "--marks", 2, "--seeds", 0, 1,
                     "--batch-size", 10, "--count", 30, "--sample-steps", 4)
    todo = [(models[0], 50), (models[0], 100), (models[1], 100)]
    models[0].record["speed"] = 0.3
    assert seconds_left(todo, models) == pytest.approx(200 * 0.3)
    models[0].scores.append({"step": 50, "seconds": 10.0, "scoring": 7.0})
    assert seconds_left(todo[1:], models) == pytest.approx(150 * 0.2 + 2 * 7)


def test_power_law():
    xs = [0.001, 0.01, 0.3]
    slope, start, correlation = fit(xs, [5 * x**-0.4 for x in xs])
    assert (slope, start, correlation) == pytest.approx((-0.4, np.log(5), -1))


def test_models_are_compared_at_the_step_that_all_have(made):
    models, _ = made("--models", "1x32", "--patches", 14, 7, "--seeds", 0, 1)
    for model, steps in zip(models, ([4, 8, 16], [4, 8], [8], []), strict=True):
        model.record["scores"] = [{"step": step, "frechet": step + model.seed} for step in steps]
    assert [part["frechet"] for parts in collect(models).values() for part in parts] == [8, 8]
    models[3].record["scores"] = [{"step": 8, "frechet": 9}]
    assert [[part["frechet"] for part in parts] for parts in collect(models).values()] == [[8, 9], [8, 9]]


def test_the_best_for_their_compute(made):
    models, _ = made("--models", "1x32", "2x64", "--patches", 14, "--batch-size", 10, "--seeds", 0, 1)
    for model, flops, distances in zip(models, (1e9, 4e9) * 2, ([9, 8, 7], [8.5, 6, 5], [1], [1]), strict=True):
        model.record |= {"flops": flops, "scores": [{"step": step, "frechet": distance} for step, distance in zip(
            (100, 200, 800), distances, strict=False)]}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in scaling.make_front(models[:2])[2:]]
    assert rows == [["3", "9.000", "1x32", "14", "100"], ["6", "8.000", "1x32", "14", "200"],
                    ["24", "6.000", "2x64", "14", "200"], ["96", "5.000", "2x64", "14", "800"]]


def test_curves_are_those_of_the_scores(made, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(scaling, "save_plots", lambda figure, real, path: seen.append(figure))
    models, _ = made("--models", "1x32", "2x64", "--patches", 14, 7, "--batch-size", 10, "--seeds", 0, 1)
    for i, model in enumerate(models):
        model.record |= {"flops": 10.0**(9 + i % 4), "parameters": 10**6 * (i % 4 + 1), "scores": [
            {"step": step, "frechet": 100 / step / (i % 4 + 1) + model.seed} for step in ([10, 20] if i < 4 else [20])]}
    line = scaling.plot_law(models[:4], collect(models), {"frechet": 0.1}, tmp_path)
    scaling.plot_training(models[:4], {"frechet": 0.1}, tmp_path)
    law, training = seen
    assert all(isinstance(figure, Figure) for figure in seen)
    points = [container.lines[0].get_xydata()[0].tolist() for container in law.axes[0].containers]
    assert points == [pytest.approx([10.0**i, 5 / (i + 1) + 0.5]) for i in range(4)]
    curves = {line.get_label(): line.get_xydata().tolist() for line in training.axes[0].lines}
    assert curves["2x64, patch 14"] == [pytest.approx([3 * 10 * step * 0.1, 100 / step / 3]) for step in (10, 20)]
    correlation = np.corrcoef(np.arange(4), np.log([5 / (i + 1) + 0.5 for i in range(4)]))[0, 1]
    assert f"that of Gflops {correlation:.2f}" in line


@pytest.mark.parametrize(("flags", "words"), [
    (["--models", "4x100"], ["--models 4x100", "4x128"]), (["--models", "big"], ["--models big"]),
    (["--patches", 3], ["patch_size 3 does not divide image_size 8"]), (["--seeds", -1], ["seed is -1"]),
    (["--seeds", 1, 1], ["named twice"]), (["--count", 5], ["--count"]), (["--marks", 0], ["--marks"]),
    (["--rates", "nan"], ["lr is nan"]), (["--out", "/dev/null/x"], ["/dev/null/x"]),
    (["--dataset", "folder", "--data-dir", "/nowhere"], ["/nowhere is not a folder"])])
def test_mistakes(call, tmp_path, flags, words):
    assert_refused(call(scaling, *FLAGS, "--out", tmp_path, *flags), *words)


def test_another_study_in_the_folder(call, tmp_path):
    flags = [*FLAGS, "--models", "1x32", "--patches", 8, "--marks", 1, "--out", tmp_path]
    with pytest.MonkeyPatch.context() as patch:
        stopped_at(patch, (train, "descend"), 10)  # the second step of the second seed
        assert call(scaling, *flags, "--seeds", 0, 1)[0] == 130
    assert_refused(call(scaling, *flags, "--seeds", 1, "--steps", 9), "seed1 was made with", "steps 8 -> 9")
    assert call(scaling, *flags)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    for more, words in ((["--steps", 9], "steps 8 -> 9"), (["--count", 30], "count 20 -> 30"),
                        (["--lr-decay", "linear"], "lr_decay sqrt -> linear")):
        assert_refused(call(scaling, *flags, *more), "1x32_patch8_seed0 was made with other settings", words)
    assert {path: path.read_bytes() for path in tmp_path.glob("*/*")} == before
    file = tmp_path / "1x32_patch8_seed0" / "scores.json"
    whole = json.loads(file.read_text())
    damaged = [{key: value for key, value in whole.items() if key != gone} for gone in ("settings", "scores", "flops")]
    damaged += [whole | {"speed": "0.1"}, whole | {"tokens": None}, whole | {"scores": 3}, whole | {"scores": ["step"]}]
    for name, value in whole["scores"][0].items():
        damaged += [whole | {"scores": [whole["scores"][0] | {name: str(value)}]},
                    whole | {"scores": [{key: value for key, value in whole["scores"][0].items() if key != name}]}]
    for content in ("", "[]", '{"settings": 3, "scores": []}', file.read_text()[:-20], "[" * 100_000,
                    '{"settings": ' * 50_000, *map(json.dumps, damaged)):
        file.write_text(content)
        assert_refused(call(scaling, *flags), "scores.json is damaged: remove", "1x32_patch8_seed0")
    assert len(damaged) > 20


def test_a_scored_model_that_is_gone(call, tmp_path):
    """It is not trained anew: its scores would be of another."""
    flags = [*FLAGS, "--models", "1x32", "--patches", 8, "--marks", 1, "--out", tmp_path]
    assert call(scaling, *flags)[0] == 0
    model = tmp_path / "1x32_patch8_seed0" / "model.pth"
    model.unlink()
    assert_refused(call(scaling, *flags), model, "is gone", f"remove {model.parent}, and it is made anew")
    assert not model.exists()


def test_the_table_by_hand(made):
    """Two sizes of two seeds, of known figures; the larger one, which comes first, is named last."""
    models, _ = made("--models", "2x64", "1x32", "--patches", 7, "--batch-size", 10, "--seeds", 0, 1)
    known = {("2x64", 0): (4e9, [2.0]), ("2x64", 1): (4e9, [3.0]), ("1x32", 0): (1e9, [6.0]), ("1x32", 1): (1e9, [6.5])}
    for model in models:
        flops, distances = known[model.size, model.seed]
        model.record |= {"flops": flops, "parameters": int(flops / 1000), "tokens": 16, "scores": [
            dict(step=500, seconds=90.0 + 20 * model.seed, accuracy=0.5, frechet=distance, recall=0.25)
            for distance in distances]}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in scaling.make_table(
        models[:2], collect(models), {"accuracy": 0.995, "frechet": 0.5, "recall": 0.875})]
    assert rows[0] == ["size", "patch", "tokens", "parameters", "Gflops", "training, TFLOP", "training, s",
                       "read as asked", "Fréchet", "to real", "recall"]
    assert rows[2:] == [
        ["1x32", "7", "16", "1,000,000", "1", "15", "100 ± 14", "50.0% ± 0.0%", "6.250 ± 0.354", "12.5 ± 0.7",
         "0.25 ± 0.00"],
        ["2x64", "7", "16", "4,000,000", "4", "60", "100 ± 14", "50.0% ± 0.0%", "2.500 ± 0.707", "5.0 ± 1.4",
         "0.25 ± 0.00"],
        ["real images", "", "", "", "", "", "", "99.5%", "0.500", "1.0", "0.88"]]


def test_each_flag_reaches_the_training(call, tmp_path, monkeypatch):
    def watched(*args):
        seen.append(args)
        raise UserError("that will do")

    seen = []
    monkeypatch.setattr(scaling, "train", watched)
    assert_refused(call(scaling, *FLAGS, "--models", "2x64", "--patches", 4, "--seeds", 3, "--latents", tmp_path / "z",
                        "--marks", 1, "--lr-decay", "linear", "--label-dropout", 0.3, "--out", tmp_path),
                   "2x64_patch4_seed3: that will do")
    (config, folder, resume, device, until), = seen
    assert (folder, resume, device, until) == (tmp_path / "2x64_patch4_seed3", False, "cpu", 8)
    assert type(config) is LatentConfig and not config.compile
    assert config.latents == str(tmp_path / "z")
    assert (config.depth, config.hidden_size, config.num_heads, config.patch_size, config.seed) == (2, 64, 2, (4, 4), 3)
    assert (config.lr_decay, config.label_dropout, config.steps, config.guidance) == ("linear", 0.3, 8, 1.0)


def test_times_in_words():
    assert [scaling.show_time(seconds) for seconds in (0, 39.6, 89, 91, 5940, 6000, 7500, 36_000)] == [
        "0 s", "40 s", "89 s", "2 min", "99 min", "1 h 40 min", "2 h 05 min", "10 h 00 min"]


def test_what_a_study_says_on_the_way(call, tmp_path, monkeypatch):
    """What is to do, how long all that is left will take, and what came out."""
    monkeypatch.setattr(scaling, "seconds_left", lambda todo, models: 3600.0 * len(todo))
    code, out, err = call(scaling, *FLAGS, "--models", "1x32", "--patches", 8, "--marks", 2, "--out", tmp_path)
    assert code == 0, err
    first, last = read(tmp_path)["1x32_patch8_seed0"]["scores"]
    lines = out.splitlines()
    for place, (score, step, left) in enumerate(((first, 4, "2 h 00 min"), (last, 8, "60 min"))):
        line = lines.index(f"{place + 1} of 2: 1x32_patch8_seed0 to step {step}; about {left} left in all")
        assert lines[line + 1] == f"  Fréchet distance {score['frechet']:.3f}, {score['accuracy']:.1%} read as asked"
