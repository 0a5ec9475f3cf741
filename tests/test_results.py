from support.commands import UserError

import dataclasses
import re

import pytest
import torch
from conftest import REPOSITORY, assert_refused
from matplotlib.figure import Figure
from PIL import Image

import inference
import train
from config import Config
from diffusion import SAMPLERS
from measure import classifier, results
from measure.classifier import load_classifier
from measure.score import Judge, compare, draw_fakes, embed
from record.checkpoint import load_checkpoint, load_model, save_checkpoint
from video.config import ClipConfig

SHAPE = dict(channels=1, num_classes=10, hidden_size=32, depth=1, num_heads=2, sample_steps=2)
CONFIG = Config(dataset="mnist", image_size=28, patch_size=14, **SHAPE)


@pytest.fixture
def checkpoint(monkeypatch, parts, tmp_path):
    """Makes checkpoints of untrained models, in a place where the stand-in digits are MNIST."""
    monkeypatch.setattr(classifier, "load_images", lambda name, data_dir, train, **options: parts[0 if train else 1])

    def checkpoint(name, seconds, **settings):
        config = dataclasses.replace(CONFIG, **settings)
        torch.manual_seed(config.seed)
        model = config.build_model()
        torch.nn.init.normal_(model.final_layer.linear.weight, std=0.3)
        (tmp_path / name).mkdir()
        save_checkpoint(tmp_path / name / "model.pth", config, config.steps, seconds, model.state_dict())
        return tmp_path / name

    return checkpoint


def test_samplers(call, checkpoint, parts, tmp_path):
    path = checkpoint("run", 1.0) / "model.pth"
    code, out, err = call(results, "samplers", "--checkpoint", path, "--samplers", "ddim", "dpm", "--steps", 2, 3,
                          "--guidance", 1, 2, "--count", 100, "--device", "cpu", "--out", tmp_path / "pictures")
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith(("| ddim", "| dpm"))]
    assert [row.split("|")[1:3] for row in rows] == [[" ddim ", " 2 "], [" ddim ", " 3 "], [" dpm ", " 2 "],
                                                    [" dpm ", " 3 "]]
    assert "guidance 1 | guidance 2" in out and "warning: 100 images are few" in out
    # The last row's last cell, done by hand
    model, config = load_model(path, kinds=(Config,))
    labels = torch.arange(100) % 10
    fakes = draw_fakes(model, dataclasses.replace(config, sample_steps=3, guidance=2.0), labels)
    classifier = load_classifier()
    features, probs = embed(classifier, fakes)
    accuracy = (probs.argmax(1) == labels).float().mean().item()
    distance = compare(features, embed(classifier, parts[1].images)[0])["frechet"]
    assert rows[-1].split("|")[-2].strip() == f"{accuracy:.1%}, {distance:.3f}"
    with Image.open(tmp_path / "pictures" / "samplers.png") as image:
        assert image.width > 1000


def test_lines_of_the_plot_are_those_of_the_table(call, checkpoint, tmp_path, monkeypatch):
    seen, original = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (seen.append(figure),
                                                                             original(figure, *args, **options))[1])
    path = checkpoint("run", 1.0) / "model.pth"
    code, out, err = call(results, "samplers", "--checkpoint", path, "--samplers", "ddim", "--steps", 3, 2,
                          "--guidance", 1, 2, "--count", 100, "--out", tmp_path)
    assert code == 0, err
    rows = [row for row in out.splitlines() if row.startswith("| ddim")]
    cells = [[cell.strip().split("%, ") for cell in row.split("|")[3:-1]] for row in rows]
    real = re.search(r"100 real ones: ([0-9.]+)%, ([0-9.]+)", out)
    for axes, part, sign in zip(seen[0].axes, (1, 0), (1, -1), strict=True):  # Fréchet distance, share misread
        lines = {line.get_label(): line.get_xydata() for line in axes.lines}
        expected = [float(real[2 if part else 1]) / (1 if part else 100), *(
            float(cell[part]) / (1 if part else 100) for row in cells[::-1] for cell in row)]
        shown = [lines["real images"][0][1], *(lines[f"ddim, guidance {guidance}"][i][1] for i in range(2)
                                               for guidance in (1, 2))]
        assert shown == pytest.approx([value if sign == 1 else 1 - value for value in expected], abs=1e-3)
        assert [lines[f"ddim, guidance {guidance}"][:, 0].tolist() for guidance in (1, 2)] == [[2, 3], [4, 6]]


def test_a_sampler_is_one_entry_of_one_table(call, checkpoint, tmp_path, monkeypatch):
    """The flags, their help, the table, its picture and the counts of network calls know it."""
    def thrice(denoise, x, steps, noise):
        for t, (a, s), (a_after, s_after) in steps:
            for _ in range(3):
                x_0 = denoise(x, t)
            x = a_after * x_0 + s_after * (x - a * x_0) / s
            yield x

    path = checkpoint("run", 1.0) / "model.pth"
    monkeypatch.setitem(SAMPLERS, "thrice", thrice)
    for command in (train, inference):
        assert re.search(r"--sampler \{[a-z,]*,thrice\}", " ".join(call(command, "--help")[1].split()))
    seen = []
    monkeypatch.setattr(results, "save_figure", lambda figure, path: seen.append(figure))
    code, out, err = call(results, "samplers", "--checkpoint", path, "--steps", 2, "--guidance", 1, 2, "--count", 100,
                          "--out", tmp_path)
    assert code == 0, err
    rows = [re.match(r"\| (\w+) \| 2 \| (.*)", line).groups() for line in out.splitlines() if "| 2 |" in line]
    assert [name for name, _ in rows] == list(SAMPLERS) == ["ddpm", "ddim", "dpm", "heun", "thrice"]
    cells = dict(rows)
    assert cells["thrice"] == cells["ddim"] != cells["heun"]
    calls = {line.get_label(): line.get_xydata()[0, 0] for line in seen[0].axes[0].lines[:-1]}
    assert [calls[f"{name}, guidance {g}"] for g in (1, 2) for name in ("ddim", "heun", "thrice")] == [
        2, 3, 6, 4, 6, 12]
    assert "thrice" in call(inference, "--sampler", "none")[2]


@pytest.mark.parametrize(("settings", "calls"), [
    (dict(sampler="dpm", sample_steps=6, guidance=1.4), 12), (dict(sampler="ddpm", sample_steps=9, guidance=0.0), 9),
    (dict(sampler="heun", sample_steps=6), 11), (dict(sampler="heun", sample_steps=1, guidance=3.0), 2),
    (dict(process="ddpm", variance="learned", sampler="ddpm", sample_steps=3, image_size="8x28x14",
          patch_size="4x14x7"), 3)])
def test_network_calls_are_counted(settings, calls):
    config = ClipConfig(**SHAPE | {"guidance": 1.0} | settings) if "variance" in settings else dataclasses.replace(
        CONFIG, **{"guidance": 1.0} | settings)
    assert results.network_calls(config) == calls


def test_runs(call, checkpoint, tmp_path):
    folders = [checkpoint("a", 10.0, steps=5), checkpoint("b", 20.0, steps=5, seed=1), checkpoint("c", 99.0, steps=50)]
    code, out, err = call(results, "runs", *folders, "--count", 100, "--out", tmp_path)
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.startswith("| flow")]
    assert "5 steps | 4 | 15 ± 7 |" in rows[0] and rows[0].count("±") == 7  # two seeds, one row
    assert "50 steps | 4 | 99 |" in rows[1] and "±" not in rows[1]
    assert re.search(r"\| real images \| \| \| .*%", out)
    for name in ("runs.png", "runs_digits.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width > 500


def test_the_data_may_have_moved(call, checkpoint, tmp_path, monkeypatch):
    def watched(config, device):
        raise UserError(f"the images are in {config.data_dir}, to be read by {device}")

    path = checkpoint("run", 1.0, data_dir="before")
    monkeypatch.setattr(results, "open_judge", watched)
    flags = ["--count", 10, "--out", tmp_path, "--data-dir", "now", "--device", "cpu"]
    for what in (["samplers", "--checkpoint", path], ["runs", path]):
        assert_refused(call(results, *what, *flags), "the images are in now, to be read by cpu")


def test_mistakes(call, checkpoint, tmp_path, monkeypatch):
    path = checkpoint("run", 1.0)
    monkeypatch.setattr(results, "open_judge", None)  # they are found before the work
    assert_refused(call(results, "runs", tmp_path / "none", "--out", tmp_path), "none")
    assert_refused(call(results, "runs", path, "--count", 5, "--out", tmp_path), "--count 5")
    assert_refused(call(results, "runs", path, path / "model.pth", "--out", tmp_path), "named twice")
    assert_refused(call(results, "samplers", "--checkpoint", path / "model.pth", "--steps", 0, "--count", 10,
                        "--out", tmp_path), "sample_steps is 0")
    assert_refused(call(results), "what")


def test_other_images_are_refused(call, checkpoint, tmp_path):
    path = checkpoint("run", 1.0, num_classes=7)
    assert_refused(call(results, "runs", path, "--count", 10, "--out", tmp_path), "knows 7 classes", "have 10")
    small = checkpoint("small", 1.0, dataset="mnist", image_size=8, patch_size=4)
    assert_refused(call(results, "runs", checkpoint("mnist", 1.0), small, "--count", 10, "--out", tmp_path),
                   "several kinds of images", "mnist 1x28x28, 10 classes; mnist 1x8x8")
    moved = checkpoint("moved", 1.0, data_dir="elsewhere")
    assert_refused(call(results, "runs", tmp_path / "mnist", moved, "--count", 10, "--out", tmp_path),
                   "several folders", "elsewhere", "--data-dir")
    (tmp_path / "runs.png").mkdir()
    assert_refused(call(results, "runs", tmp_path / "mnist", "--out", tmp_path), "runs.png", "folder")


def test_a_run_of_the_table_has_the_figures_of_the_score(call, checkpoint, parts, tmp_path):
    """Each in its own column."""
    path = REPOSITORY / "weights" / "mnist.pth"
    code, out, err = call(results, "runs", path, "--count", 100, "--device", "cpu", "--out", tmp_path)
    assert code == 0, err
    judge = Judge(parts[0], parts[1], load_classifier())
    result = judge.score(draw_fakes(*load_model(path, kinds=(Config,)), judge.labels(100)), judge.labels(100))
    cells = [[cell.strip() for cell in row.split("|")[1:-1]] for row in out.splitlines() if row.startswith("| ")]
    head, run, real = cells
    assert head == ["run", "calls per image", "training, s", "read as asked", "Fréchet", "to real", "precision",
                    "recall", "coverage"]
    for row, part, ratio in ((run, "fake", f"{result['ratio']:.1f}"), (real, "real", "1.0")):
        part = result[part]
        assert row[3:] == [f"{part['accuracy']:.1%}", f"{part['frechet']:.3f}", ratio, f"{part['precision']:.2f}",
                           f"{part['recall']:.2f}", f"{part['coverage']:.2f}"]
    assert run[1:3] == ["16", f"{load_checkpoint(path, (Config,))['seconds']:.0f}"] and len(set(real[6:])) == 3
    assert judge.brief_real(torch.arange(100) % 10) == {name: result["real"][name] for name in (
        "frechet", "precision", "recall", "density", "coverage", "accuracy")}
