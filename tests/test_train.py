from support.commands import UserError

import copy
import csv
import dataclasses
import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (
    SMALL,
    SMALL_DATA,
    TINY,
    assert_refused,
    in_a_process,
    learn,
    same,
    small_mnist,
    train_until,
)
from PIL import Image

import generator
import inference
import measure.score
import train
import video.train_dit
from config import PRESETS, Config
from dataset import Dataset, load_dataset, to_uint8
from diffusion import DDPM
from inference import sample
from latent.config import LatentConfig
from measure.classifier import train_classifier
from record.checkpoint import load_checkpoint
from train import Run, learning_rate, make_batch, start_run
from video.config import ANY, ClipConfig


def data_of(images, labels):
    return Dataset("random", images, labels, [*map(str, range(10))])


def test_from_python(tmp_path):
    """Folders may be a `Path`; a misspelt setting is one line, also of a run that goes on."""
    shutil.copytree(SMALL, tmp_path / "data")
    small = dict(data_dir=tmp_path / "data", image_size=8, hidden_size=32, depth=1, num_heads=2, batch_size=8, steps=2)
    assert train.train(small, tmp_path / "run", device="cpu") == (2, 0)
    assert load_checkpoint(tmp_path / "run" / "model.pth", ANY)["config"].data_dir == str(tmp_path / "data")
    assert LatentConfig(vae=Path("some") / "vae").vae == os.path.join("some", "vae")
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = small | {"data_dir": tmp_path / "elsewhere", "steps": 3}
    assert train.train(moved, str(tmp_path / "run"), resume=True, device=torch.device("cpu")) == (3, 0)
    for resume in (False, True):
        with pytest.raises(UserError, match="'stepz' is no setting here: is 'steps' meant"):
            train.train({"stepz": 3}, tmp_path / ("run" if resume else "new"), resume)
    assert not (tmp_path / "new").exists()


def test_run_folder(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        "index.html", "log.csv", "loss.png", "model.pth", "samples_000006.png"]
    with (trained / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["2", "4", "6"]
    assert list(rows[0]) == ["step", "loss", "loss_t0-249", "loss_t250-499", "loss_t500-749", "loss_t750-999", "lr"]
    assert 0.1 < float(rows[2]["loss"]) < float(rows[0]["loss"]) < 20
    with Image.open(trained / "samples_000006.png") as image:
        assert image.mode == "L" and image.width > 10 * 8 * 5
    content = load_checkpoint(trained / "model.pth", ANY)
    assert content["step"] == 6 and content["config"].patch_size == (2, 2) and content["config"].num_classes == 10


def test_says_what_it_does(command, tmp_path):
    process = command("train.py", *TINY, "--steps", 2, "--run-dir", tmp_path / "run")
    assert process.returncode == 0
    for word in ("cpu", "mnist", "1,500 images", "parameters", "steps 0 to 2", str(tmp_path / "run")):
        assert word in process.stdout
    assert "images/s" in process.stderr


def test_resumed_run_is_the_same_run(call, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert call(train, *TINY, "--steps", 9, "--run-dir", whole)[0] == 0
    flags = [*TINY, "--steps", 9, "--run-dir", parts]
    # A checkpoint in the midst of a log window, and a row logged after it, as a killed run leaves them
    train_until(call, flags, 3)
    with (parts / "log.csv").open("a") as file:
        file.write("4,9,9,9,9,9,9\n")
    assert call(train, *flags, "--resume")[0] == 0
    assert (whole / "log.csv").read_text() == (parts / "log.csv").read_text()
    a, b = load_checkpoint(whole / "model.pth", ANY), load_checkpoint(parts / "model.pth", ANY)
    for part in ("model", "ema", "optimizers", "window", "step", "config"):
        assert same(a[part], b[part]), part
    assert (whole / "samples_000009.png").read_bytes() == (parts / "samples_000009.png").read_bytes()


def test_a_run_in_pieces_is_the_same_run(tmp_path):
    """That end neither where a row of the log is due nor where a checkpoint is."""
    settings = dict(**SMALL_DATA, hidden_size=32, depth=1, num_heads=2, sample_steps=3, batch_size=8, warmup=2,
                    log_every=2, steps=8)
    assert train.train(settings, tmp_path / "whole", device="cpu") == (8, 0)
    for until, reached in ((3, 3), (2, 3), (5, 5), (None, 8)):
        assert train.train(settings, tmp_path / "parts", until != 3, "cpu", until=until) == (reached, 0)
        assert load_checkpoint(tmp_path / "parts" / "model.pth", ANY)["step"] == reached
    whole, parts = (load_checkpoint(tmp_path / name / "model.pth", ANY) for name in ("whole", "parts"))
    assert same({**whole, "seconds": 0}, {**parts, "seconds": 0})
    for name in ("log.csv", "samples_000008.png"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_ctrl_c_saves_and_says_how_to_go_on(call, tmp_path):
    out = train_until(call, [*TINY, "--steps", 9, "--run-dir", tmp_path / "run"], 4)
    assert "stopped after step 4" in out and "--resume" in out
    assert load_checkpoint(tmp_path / "run" / "model.pth", ANY)["step"] == 4


def test_ctrl_c_within_the_sample_grid_does_not_wait_for_it(call, tmp_path, monkeypatch):
    """Nor is the grid lost: the resumed run is the same run, and writes it."""
    flags = [*TINY, "--steps", 6, "--sample-every", 4, "--sample-steps", 500]
    original, states = train.sample, []

    def pressed(*args):
        for i, state in enumerate(original(*args)):
            if i == 2:
                signal.raise_signal(signal.SIGINT)
            states.append(i)
            yield state

    run, whole = tmp_path / "run", tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(train, "sample", pressed)
        assert call(train, *flags, "--run-dir", run)[0] == 130
    assert states == [0, 1, 2] and load_checkpoint(run / "model.pth", ANY)["step"] == 5
    assert call(train, *flags, "--run-dir", run, "--resume", "--sample-steps", 3)[0] == 0
    assert call(train, *flags, "--run-dir", whole, "--sample-steps", 3)[0] == 0
    a, b = (load_checkpoint(folder / "model.pth", ANY) for folder in (run, whole))
    for part in ("model", "ema", "optimizers", "window", "step"):
        assert same(a[part], b[part]), part


@pytest.mark.parametrize("missing", [["samples_000006.png"], ["samples_000006.png", "loss.png"],
                                     ["loss.png", "index.html"]])
def test_a_run_that_was_killed_before_its_last_picture_gets_it(call, trained, tmp_path, missing):
    run = shutil.copytree(trained, tmp_path / "run")
    for name in missing:
        (run / name).unlink()
    before = (run / "model.pth").read_bytes()
    code, out, _ = call(train, *TINY, "--steps", 6, "--run-dir", run, "--resume")
    assert code == 0 and "draw with" in out
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in trained.iterdir())
    assert (run / "samples_000006.png").read_bytes() == (trained / "samples_000006.png").read_bytes()
    assert "samples_000006.png" in (run / "index.html").read_text()
    assert (run / "model.pth").read_bytes() == before


def test_the_time_of_a_resumed_run_goes_on(call, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    content = torch.load(run / "model.pth", weights_only=True)
    torch.save(content | {"seconds": 1e6}, run / "model.pth")
    code, out, _ = call(train, *TINY, "--steps", 7, "--run-dir", run, "--resume")
    assert code == 0 and load_checkpoint(run / "model.pth", ANY)["seconds"] >= 1e6 and "trained in 1000" in out


def test_says_how_to_draw_with_what_was_trained(call, tmp_path, monkeypatch):
    """With the checkpoint's name, but for the run folder in which inference.py looks by itself."""
    monkeypatch.chdir(tmp_path)
    for folder, command in (("run", "inference.py"), ("my run", "inference.py --checkpoint 'my run/model.pth'")):
        code, out, _ = call(train, *TINY, "--steps", 1, "--run-dir", folder)
        assert code == 0 and out.endswith(f"draw with: python {command}\n")
        assert call(inference, *shlex.split(command)[1:], "--count", 1)[0] == 0


def test_flags_override_the_preset(call, tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "S", dict(loss="l1", process="ddpm", steps=2, lr=0.125, hidden_size=64))
    assert call(train, "--preset", "S", *TINY, "--steps", 1, "--lr", 0.5, "--run-dir", tmp_path / "run")[0] == 0
    config = load_checkpoint(tmp_path / "run" / "model.pth", ANY)["config"]
    assert (config.loss, config.process, config.steps, config.lr, config.hidden_size) == ("l1", "ddpm", 1, 0.5, 32)


def test_deeper_networks_resume(call, tmp_path):
    """Muon's states come in the order of shapes, not of weights."""
    flags = [*TINY, "--depth", 3, "--run-dir", tmp_path / "run"]
    assert call(train, *flags, "--steps", 2)[0] == 0
    code, _, err = call(train, *flags, "--steps", 3, "--resume")
    assert code == 0, err


def test_images_that_are_not_square(call, tmp_path):
    """They are trained on, resumed and drawn."""
    flags = [*TINY, "--image-size", "12x8", "--run-dir", tmp_path / "run"]
    code, out, _ = call(train, *flags, "--steps", 2)
    assert code == 0 and "images of 12 x 8" in out and "16 tokens" in out
    assert call(train, *flags, "--steps", 3, "--resume")[0] == 0
    config = load_checkpoint(tmp_path / "run" / "model.pth", ANY)["config"]
    assert (config.image_size, config.patch_size) == ((12, 8), (3, 2))
    out = tmp_path / "a.png"
    assert call(inference, "--checkpoint", tmp_path / "run", "--labels", 3, 1, "--count", 1, "--out", out)[0] == 0
    with Image.open(out) as image:
        assert image.size == (2 + 2 * (8 * 5 + 2), 2 + 12 * 5 + 2)
    assert_refused(call(train, *TINY, "--image-size", "12x9", "--run-dir", tmp_path / "b"), "[1, 3, 9]", "12x8")


def write_class(folder, greys):
    folder.mkdir(parents=True)
    for i, grey in enumerate(greys):
        Image.new("L", (8, 8), grey).save(folder / f"{i}.png")


def remove_image(data):
    (data / "cats" / "1.png").unlink()


def replace_image(data):
    Image.new("L", (8, 8), 99).save(data / "cats" / "1.png")


def swap_classes(data):
    (data / "cats").rename(data / "x")
    (data / "dogs").rename(data / "cats")
    (data / "x").rename(data / "dogs")


def rename_class(data):
    (data / "dogs").rename(data / "eels")


def one_class_more(data):
    write_class(data / "eels", [7])


def one_class_fewer(data):
    shutil.rmtree(data / "dogs")


@pytest.mark.parametrize("change", [remove_image, replace_image, swap_classes, rename_class, one_class_more,
                                    one_class_fewer])
def test_a_run_is_not_resumed_on_other_data(call, tmp_path, change):
    data, run = tmp_path / "data", tmp_path / "run"
    write_class(data / "cats", [10, 20, 30])
    write_class(data / "dogs", [110, 120, 130])
    flags = [*TINY, "--dataset", "folder", "--data-dir", data, "--run-dir", run]
    assert call(train, *flags, "--steps", 2)[0] == 0
    assert load_checkpoint(run / "model.pth", ANY)["config"].classes == ("cats", "dogs")
    assert call(train, *flags, "--steps", 3, "--resume")[0] == 0
    moved = data.rename(tmp_path / "moved")  # where it lies does not matter
    assert call(train, *flags, "--steps", 4, "--resume", "--data-dir", moved)[0] == 0
    change(moved)
    before = (run / "model.pth").read_bytes()
    assert_refused(call(train, *flags, "--steps", 5, "--resume", "--data-dir", moved), "other data", "model.pth")
    assert (run / "model.pth").read_bytes() == before


def test_resume_takes_the_command_of_the_first_run(call, tmp_path):
    """What was left to the machine (`auto`, 0) stays as it was resolved then."""
    flags = [*TINY, "--precision", "auto", "--image-size", 0, "--channels", 0, "--patch-size", 0, "--steps", 6,
             "--run-dir", tmp_path / "run"]
    out = train_until(call, flags, 3)
    words = shlex.split(out.split("go on with: ")[1])
    assert words[0] == "python" and "auto" in words
    code, _, err = call(train, *words[2:])
    assert code == 0, err
    assert load_checkpoint(tmp_path / "run" / "model.pth", ANY)["step"] == 6


def test_from_a_notebook(tmp_path, monkeypatch):
    """The same run as the command's; what goes wrong is an exception."""
    config = Config(**SMALL_DATA, hidden_size=32, depth=1, num_heads=2, sample_steps=3, batch_size=8, steps=4,
                    log_every=2)
    before = signal.getsignal(signal.SIGINT)
    assert train.train(config, tmp_path / "run", device="cpu") == (4, 0)
    assert signal.getsignal(signal.SIGINT) == before
    with pytest.raises(UserError, match="exists"):
        train.train(config, tmp_path / "run")
    assert train.train({"steps": 5}, tmp_path / "run", resume=True, device="cpu") == (5, 0)
    with pytest.raises(UserError, match=r"lr 0\.004 -> 0\.5"):
        train.train(dataclasses.replace(config, lr=0.5), tmp_path / "run", resume=True)


def test_a_trained_model_is_never_overwritten(call, trained):
    before = (trained / "model.pth").read_bytes()
    assert_refused(call(train, *TINY, "--steps", 7, "--run-dir", trained), "model.pth exists", "--resume")
    assert_refused(call(train, *TINY, "--run-dir", trained, "--resume", "--steps", 5), "--steps")
    assert_refused(call(train, *TINY, "--run-dir", trained, "--resume", "--steps", 8, "--lr", 0.1, "--seed", 1),
                   "lr 0.004 -> 0.1", "seed 0 -> 1")
    assert (trained / "model.pth").read_bytes() == before


@pytest.mark.parametrize("log_every", [2, 100])
def test_a_loss_that_is_not_finite_stops_the_run(call, tmp_path, monkeypatch, log_every):
    """At the next row of the log, or else before the next checkpoint."""
    run = tmp_path / "run"
    original = train.take_step

    def explode(*args):
        return original(*args) * (float("nan") if args[1] == 4 else 1)

    monkeypatch.setattr(train, "take_step", explode)
    result = call(train, *TINY, "--steps", 8, "--checkpoint-every", 3, "--log-every", log_every, "--run-dir", run)
    assert_refused(result, "not finite at step 6", "learning rate", "model.pth, step 3")
    assert load_checkpoint(run / "model.pth", ANY)["step"] == 3


def test_weights_that_are_not_finite_are_not_saved(call, tmp_path, monkeypatch):
    """The loss of a step is finite, but the weights after it are not."""
    run = tmp_path / "run"
    original = train.take_step

    def explode(run, step, *args):
        losses = original(run, step, *args)
        if step == 5:
            torch.nn.init.constant_(run.model.final_layer.linear.bias, float("nan"))
            torch.nn.init.constant_(run.ema.final_layer.linear.bias, float("nan"))
        return losses

    monkeypatch.setattr(train, "take_step", explode)
    result = call(train, *TINY, "--steps", 8, "--checkpoint-every", 3, "--run-dir", run)
    assert_refused(result, "weights are not finite at step 6", "model.pth, step 3")
    assert load_checkpoint(run / "model.pth", ANY)["step"] == 3


def test_mnist_that_is_not_there(call, tmp_path):
    assert_refused(call(train, "--data-dir", tmp_path, "--run-dir", tmp_path / "run"), tmp_path / "MNIST" / "raw",
                   "train-images-idx3-ubyte", "leave --data-dir out")
    assert not (tmp_path / "MNIST").exists()


def test_own_folder_of_images(call, tmp_path):
    for name in ("cats", "dogs"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(3):
            image = Image.merge("RGB", [Image.effect_noise((30, 20), 60) for _ in range(3)])
            image.save(tmp_path / "own" / name / f"{i}.png")
    flags = [*TINY, "--dataset", "folder", "--data-dir", tmp_path / "own", "--image-size", 16, "--run-dir",
             tmp_path / "run", "--steps", 2]
    code, out, _ = call(train, *flags)
    assert code == 0 and "6 images of 16 x 16, colour, classes cats, dogs" in out
    with Image.open(tmp_path / "run" / "samples_000002.png") as image:
        assert image.mode == "RGB"


@pytest.mark.parametrize(("flags", "words"), [
    (["--patch-size", 3], ["patch_size 3 does not divide image_size 8", "1, 2, 4, 8"]),
    (["--image-size", 10], ["--patch-size"]),
    (["--steps", 0], ["steps is 0"]), (["--lr", "nan"], ["lr"]), (["--batch-size", -1], ["batch_size is -1"]),
    (["--hidden-size", 30], ["hidden_size 30"]), (["--sample-steps", 5000], ["sample_steps"]),
    (["--device", "nonsense"], ["--device nonsense"]), (["--resume"], ["there is no checkpoint"]),
    (["--dataset", "folder", "--data-dir", "/nowhere"], ["/nowhere is not a folder"])])
def test_bad_flags(call, tmp_path, flags, words):
    assert_refused(call(train, *TINY, "--run-dir", tmp_path / "run", *flags), *words)
    assert not (tmp_path / "run" / "model.pth").exists()


def test_run_dir_that_cannot_be_written(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert_refused(call(train, *TINY, "--run-dir", tmp_path / "file"), tmp_path / "file", "cannot be written")
    assert_refused(call(train, *TINY, "--run-dir", tmp_path / "file" / "run"), "cannot be written")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_picture_that_cannot_be_written_ends_no_run(call, tmp_path, monkeypatch):
    """Else the steps since the last checkpoint were lost with it."""
    run = tmp_path / "run"
    original = train.take_step

    def blocked(*args):
        for name in ("samples_000002.png", "index.html", "loss.png"):
            (run / name).mkdir(exist_ok=True)
        return original(*args)

    monkeypatch.setattr(train, "take_step", blocked)
    code, out, err = call(train, *TINY, "--steps", 3, "--sample-every", 2, "--run-dir", run)
    assert code == 0 and "trained in" in out and load_checkpoint(run / "model.pth", ANY)["step"] == 3
    assert [line.split(" cannot")[0] for line in err.splitlines() if line.startswith("warning:")] == [
        f"warning: {run / name}" for name in ("samples_000002.png", *["loss.png", "index.html"] * 2)]


def test_flags_that_do_not_exist(command, call):
    assert_refused(command("train.py", "--dataset", "mnits"), "invalid choice: 'mnits'", "--help")
    assert_refused(call(train, "--no-such-flag", 1), "--no-such-flag")
    assert_refused(call(train, "--steps", "many"), "--steps", "many")


def test_what_a_step_draws_depends_on_seed_and_step_alone():
    images, labels = torch.randint(0, 256, (50, 1, 8, 8), dtype=torch.uint8), torch.arange(50) % 10
    config = Config(batch_size=16, num_classes=10)
    first = make_batch(data_of(images, labels), DDPM(), config, 5)
    torch.rand(100)
    assert same(first, make_batch(data_of(images, labels), DDPM(), config, 5))
    others = [make_batch(data_of(images, labels), DDPM(), config, 6),
              make_batch(data_of(images, labels), DDPM(), Config(seed=1, batch_size=16), 5)]
    assert not any(same(first[3], other[3]) or same(first[2], other[2]) for other in others)


def test_batch():
    """Ranges, uniform times, labels that belong to their images, and labels dropped one by one."""
    labels = torch.arange(1000) % 10
    images = (labels * 25).byte().view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    config = Config(batch_size=20_000, num_classes=10, label_dropout=0.1)
    x_0, y, t, noise = make_batch(data_of(images, labels), DDPM(), config, 0)
    assert x_0.shape == noise.shape == (20_000, 1, 2, 2) and x_0.min() == -1 and x_0.max() <= 1
    assert t.min() == 0 and t.max() == 999 and t.float().mean().item() == pytest.approx(499.5, abs=8)
    dropped = y == 10
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert torch.equal(((x_0[:, 0, 0, 0] + 1) * 127.5 / 25).round().long()[~dropped], y[~dropped])
    # Each image as it is, and as often as any other
    images, config = torch.randint(0, 256, (5, 1, 3, 4), dtype=torch.uint8), Config(batch_size=20_000, label_dropout=0)
    drawn, y, *_ = make_batch(data_of(images, torch.arange(5)), DDPM(), config, 0)
    assert torch.equal(drawn, images[y].float() / 127.5 - 1)
    assert y.bincount().tolist() == pytest.approx([4000] * 5, rel=0.06)
    assert noise.mean().item() == pytest.approx(0, abs=0.02) and noise.std().item() == pytest.approx(1, abs=0.02)


def test_learning_rate():
    for decay, middle in (("constant", 1.0), ("linear", 0.5), ("sqrt", 0.5**0.5)):
        config = Config(steps=1000, warmup=9, lr=2.0, lr_decay=decay)
        assert learning_rate(config, 0) == pytest.approx(0.2, rel=0.01)
        assert learning_rate(config, 500) == pytest.approx(2 * middle)
    assert learning_rate(Config(steps=10_000, lr=2.0, lr_decay="sqrt"), 9_999) == pytest.approx(0.02)


def test_step_trains_and_averages():
    config = Config(image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=1, num_heads=2,
                    batch_size=8, warmup=0, ema_decay=0.9)
    model, ema = config.build_model(), config.build_model()
    ema.load_state_dict(model.state_dict())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters())
    diffusion = config.build_process()
    data = data_of(torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8), torch.arange(9))
    batch = make_batch(data, diffusion, config, 999)
    losses, t = learn(Run(config, model, model, ema, [optimizer], diffusion), data, step=999)
    assert torch.equal(t, batch[2])
    assert losses.shape == (8,) and not losses.requires_grad
    target = diffusion.target(batch[0], batch[3])
    scale = diffusion.error_scale[batch[2]]
    torch.testing.assert_close(losses, target.square().mean(dim=(1, 2, 3)) * scale**2)  # untrained, it answers zero
    changed = model.state_dict()["final_layer.linear.weight"]
    assert changed.any()
    for name, old in before.items():
        torch.testing.assert_close(ema.state_dict()[name], 0.9 * old + 0.1 * model.state_dict()[name])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_each_step_goes_down_the_gradient_of_its_batch(precision):
    """Of the mean of its losses, at the weights as they have become; nothing is left of the step before."""
    config = Config(image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=1, num_heads=2,
                    batch_size=8, grad_clip=0.0, lr=0.5, lr_decay="constant", warmup=0)
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    model, process = config.build_model(), config.build_process()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    worker = copy.deepcopy(model).to(kind) if precision == "bf16" else model
    run = Run(config, model, worker, copy.deepcopy(model), [torch.optim.SGD(model.parameters(), lr=0.0)], process)
    data = data_of(torch.randint(0, 256, (99, 1, 8, 8), dtype=torch.uint8), torch.arange(99) % 10)
    for step in range(3):
        twin, before = copy.deepcopy(run.model).to(kind), run.weights.clone()
        x_0, y, t, noise = make_batch(data, process, config, step)
        process.losses(twin, x_0, t, y, noise, config.loss).mean().backward()
        gradient = torch.cat([weight.grad.flatten() for weight in twin.parameters()]).float()
        learn(run, data, step)
        assert gradient.norm() > 0.1
        torch.testing.assert_close((before - run.weights) / 0.5, gradient, rtol=1e-3, atol=1e-4)
        assert torch.equal(torch.cat([weight.flatten() for weight in model.parameters()]), run.weights)


def test_processes_share_a_batch_and_its_gradient(monkeypatch):
    """Each takes its part of the images, and the mean of their gradients is that of one process."""
    config = Config(image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=1, num_heads=2,
                    batch_size=7, grad_clip=0.0)
    data, found = data_of(torch.randint(0, 256, (99, 1, 8, 8), dtype=torch.uint8), torch.arange(99) % 10), []
    model = config.build_model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    optimizer = SimpleNamespace(param_groups=[], zero_grad=model.zero_grad, step=lambda: found.append(
        torch.cat([weight.grad.flatten() for weight in model.parameters()])))
    run = Run(config, model, model, copy.deepcopy(model), [optimizer], config.build_process())
    losses = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        monkeypatch.setattr(train.parallel, "RANK", rank)
        monkeypatch.setattr(train.parallel, "WORLD", world)
        losses.append(learn(run, data, 5)[0])
    assert [len(part) for part in losses] == [7, 3, 4]
    torch.testing.assert_close(torch.cat(losses[1:]), losses[0])
    torch.testing.assert_close((found[1] + found[2]) / 2, found[0])


def test_bf16_gradients_are_those_of_fp32():
    """The copy in bfloat16 gives the loss and the gradients of the weights themselves, to bfloat16's rounding."""
    config = Config(image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=2, num_heads=2,
                    batch_size=64, grad_clip=0.0, lr=0.0)
    diffusion = config.build_process()
    images = torch.randint(0, 256, (99, 1, 8, 8), dtype=torch.uint8)
    data, gradients = data_of(images, torch.arange(99) % 10), []

    class Recorder(torch.optim.SGD):
        def step(self):
            gradients.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))

    model = config.build_model()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    losses = []
    for worker in (model, copy.deepcopy(model).bfloat16()):
        ema = copy.deepcopy(model)
        run = Run(config, model, worker, ema, [Recorder(model.parameters())], diffusion)
        losses.append(learn(run, data, 0)[0])
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0)
    assert losses[1].dtype == gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999
    assert gradients[1].norm().item() == pytest.approx(gradients[0].norm().item(), rel=0.01)


def test_compiled_network_learns_the_same(monkeypatch):
    """Captured and differentiated as a whole, as a compiler gets it; what the compiler makes of that is `test_compile`
    of test_settings.py."""
    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: original(self, backend="aot_eager"))
    trained = []
    for compiled in (False, True):
        config = Config(image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=1, num_heads=2,
                        batch_size=16, precision="fp32", compile=compiled, optimizer="adamw", warmup=0, lr=1e-3)
        torch.manual_seed(0)
        run = start_run(config, torch.device("cpu"))
        for parameter in run.model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        images = torch.randint(0, 256, (99, 1, 8, 8), dtype=torch.uint8)
        for step in range(3):
            losses, _ = learn(run, data_of(images, torch.arange(99) % 10), step)
        assert (run.worker._compiled_call_impl is not None) == compiled
        trained.append((losses, run.model.state_dict()))
    torch.testing.assert_close(trained[0], trained[1], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("settings", "compiled"), [
    ({}, False), ({"steps": 9_999}, False), ({"steps": 10_000}, True), ({"steps": 10_000, "compile": False}, False),
    ({"steps": 2, "compile": True}, True)])
def test_long_runs_are_compiled_unless_told_otherwise(settings, compiled):
    assert train.configure(settings, None, False, Config)[0].compile == compiled


WITHOUT_A_COMPILER = "import torch._inductor.config; torch._inductor.config.cpp.cxx = ('none',)"


def test_without_a_compiler_it_trains_all_the_same(command, tmp_path):
    process = command("train.py", *TINY, "--steps", 2, "--compile", "--run-dir", tmp_path / "run", env=os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}, prepare=WITHOUT_A_COMPILER)
    assert process.returncode == 0, process.stderr
    assert "warning: nothing can be compiled here" in process.stderr and "Traceback" not in process.stderr
    assert "compiled" not in process.stdout
    assert not load_checkpoint(tmp_path / "run" / "model.pth", ANY)["config"].compile


def test_overfits_a_handful_of_digits():
    """A tiny model learns ten digits by heart, and draws the right one for each label."""
    data = small_mnist()
    first = torch.stack([(data.labels == digit).nonzero()[0, 0] for digit in range(10)])
    images, labels = data.images[first], data.labels[first]
    config = Config(image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=64, depth=2, num_heads=4,
                    batch_size=64, steps=400, lr=4e-3, warmup=20, ema_decay=0.98, guidance=1.0, sample_steps=20)
    model, ema = config.build_model(), config.build_model()
    ema.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), fused=True)
    run, data = Run(config, model, model, ema, [optimizer], config.build_process()), data_of(images, labels)
    for step in range(config.steps):
        learn(run, data, step)
    *_, drawn = sample(ema, config, labels.repeat(3))
    distances = torch.cdist(to_uint8(drawn).flatten(1).float(), images.flatten(1).float())
    assert (distances.argmin(1) == labels.repeat(3)).float().mean() > 0.9
    assert distances.min(1).values.median() < 8 * 40  # of 64 pixels: 40 of 255 grey levels each, root mean square


def test_every_preset_takes_a_step():
    """The step of each preset, at its own objective, on a model cut down to a size for a test. A GPU can replay it: it
    is one function at all steps, of tensors."""
    clips = [(ClipConfig, video.train_dit, (4, 8, 8), preset) for preset in video.config.PRESETS.values()]
    for of, command, size, preset in [*((Config, train, (8, 8), preset) for preset in PRESETS.values()), *clips]:
        config = of(**{**preset, "image_size": size, "channels": 1, "num_classes": 10,
                       "patch_size": (2,) * len(size), "hidden_size": 32, "depth": 1, "num_heads": 2,
                       "batch_size": 4})
        model = config.build_model()
        ema = config.build_model()
        diffusion, optimizer = config.build_process(), torch.optim.AdamW(model.parameters())
        data = data_of(torch.zeros(3, 1, *size, dtype=torch.uint8), torch.arange(3))
        run = Run(config, model, model, ema, [optimizer], diffusion)
        losses, _ = learn(run, data, 0, command)
        assert losses.isfinite().all()
        (function, batch, _), (other, *_) = (command.prepare(run, data, step) for step in (1, 2))
        assert function is other and all(type(part) is torch.Tensor for part in batch)


def test_unwritable_while_training(call, tmp_path, monkeypatch):
    """A disk that fills up while training: one line, and the last good checkpoint is whole."""
    run = tmp_path / "run"
    original, calls = torch.save, []

    def full_disk(content, file):
        calls.append(1)
        if len(calls) > 1:
            file.write(b"half")
            raise OSError(28, os.strerror(28))
        original(content, file)

    monkeypatch.setattr(torch, "save", full_disk)
    assert_refused(call(train, *TINY, "--steps", 8, "--checkpoint-every", 3, "--run-dir", run), "No space left")
    assert load_checkpoint(run / "model.pth", ANY)["step"] == 3
    assert sorted(path.name for path in run.iterdir()) == ["log.csv", "model.pth"]


# What a run has learned, read by its nearest neighbours


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A run of the command that has learned a small MNIST."""
    run = tmp_path_factory.mktemp("learned") / "run"
    flags = ["--data-dir", SMALL, "--image-size", "8", "--hidden-size", "48", "--depth", "2", "--steps", "600",
             "--lr", "0.006", "--precision", "fp32", "--device", "cpu", "--run-dir", run]
    process = in_a_process("train.py", *flags)
    assert process.returncode == 0, process.stderr
    return run


@pytest.fixture(scope="module")
def read():
    """What greys 0..255 (N, 8, 8) show: what the nearest of all images of MNIST does, by their pixels."""
    known = load_dataset("mnist", image_size=8)
    images, labels = known.images.flatten(1).float(), known.labels

    def read(greys):
        greys = torch.from_numpy(np.asarray(greys, dtype=np.float32)).flatten(1)
        return labels[torch.cdist(greys, images).argmin(1)].tolist()

    return read


def alike(a, b):
    """The share of labels that are the same in two lists."""
    return np.mean([x == y for x, y in zip(a, b, strict=True)])


def tiles(path, columns):
    """The images (N, 8, 8) of a grid, row by row, each of which is enlarged by 7."""
    picture = np.asarray(Image.open(path))[2:, 2:]
    return [picture[top:top + 56:7, left:left + 56:7] for top in range(0, picture.shape[0], 58)
            for left in range(0, 58 * columns, 58)]


@pytest.mark.parametrize(("flags", "share"), [([], 0.85), (["--guidance", 1], 0.68)])
def test_what_was_learned_is_in_the_files_that_generator_writes(call, learned, read, tmp_path, flags, share):
    """With guidance and without, each file shows the digit that its name says; so do the real ones."""
    code, _, err = call(generator, "--checkpoint", learned, "--count", 100, "--batch-size", 30, *flags,
                        "--device", "cpu", "--real", tmp_path / "real", "--fake", tmp_path / "fake")
    assert code == 0, err
    for name, least in (("real", 0.99), ("fake", share)):
        paths = sorted((tmp_path / name).glob("*.png"))
        asked = [int(path.stem[7:]) for path in paths]
        assert len(paths) == 100 and len({*asked}) == 10
        assert alike(read([np.asarray(Image.open(path)) for path in paths]), asked) >= least


def test_what_was_learned_is_drawn_when_asked_for(call, learned, read, tmp_path):
    """In the grids of inference.py and of training, and at the end of a strip."""
    flags = ["--checkpoint", learned, "--device", "cpu", "--out", tmp_path / "a.png"]
    assert call(inference, *flags, "--labels", "31415", "--count", 8)[0] == 0
    assert alike(read(tiles(tmp_path / "a.png", 5)), [3, 1, 4, 1, 5] * 8) > 0.84
    assert call(inference, *flags, "--labels", 2, 7, 9, 0, 6, "--strip")[0] == 0
    assert alike(read(tiles(tmp_path / "a.png", 7)[6::7]), [2, 7, 9, 0, 6]) > 0.7
    assert alike(read(tiles(learned / "samples_000600.png", 10)), [*range(10)] * 6) > 0.87


def test_what_was_learned_is_scored(call, learned, monkeypatch):
    monkeypatch.setattr(measure.score, "find_classifier", lambda data, *_: train_classifier(data, epochs=12))
    code, out, err = call(measure.score, "--checkpoint", learned, "--count", 200, "--device", "cpu")
    assert code == 0, err
    assert float(re.search(r"read as asked for +([0-9.]+)", out)[1]) > 0.8
    assert {row.split()[0]: int(row.split()[1]) for row in out.splitlines() if re.match(r" {4}[0-9] ", row)} == {
        str(digit): 20 for digit in range(10)}


def test_what_draws_is_the_average(call, learned, read, tmp_path):
    """Without the raw weights it draws as well, without the average it does not."""
    content = torch.load(learned / "model.pth", weights_only=True)
    assert not same(content["model"], content["ema"])
    for gone, other in (("model", "ema"), ("ema", "model")):
        noise = {name: torch.randn_like(value) * value.std() for name, value in content[gone].items()}
        torch.save(content | {gone: noise}, tmp_path / "model.pth")
        assert call(inference, "--checkpoint", tmp_path, "--device", "cpu", "--out", tmp_path / "a.png")[0] == 0
        share = alike(read(tiles(tmp_path / "a.png", 10)), [*range(10)] * 8)
        assert share > 0.85 if other == "ema" else share < 0.4


def test_grids_are_drawn_with_the_average(tmp_path):
    """From the same noise, one column for each label."""
    config = Config(dataset="mnist", num_classes=3, channels=1, image_size=8, patch_size=2, hidden_size=32, depth=1,
                    num_heads=2, sample_steps=2)
    run = train.start_run(config, torch.device("cpu"))
    for network, seed in ((run.model, 1), (run.ema, 2)):
        torch.manual_seed(seed)
        for weight in network.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    pictures = {}
    for name, network in (("seen", None), ("average", run.ema), ("raw", run.model)):
        path = tmp_path / f"{name}.png"
        train.show(dataclasses.replace(run, ema=network) if network else run, path, lambda: False)
        pictures[name] = path.read_bytes()
    assert pictures["seen"] == pictures["average"] != pictures["raw"]


def test_a_config_resumes_what_it_began(tmp_path):
    """What the data have filled in is no other setting."""
    config = Config(**SMALL_DATA, hidden_size=32, depth=1, num_heads=2, sample_steps=3, batch_size=8, steps=4)
    assert train.train(config, tmp_path, device="cpu", until=3) == (3, 0)
    assert train.train(config, tmp_path, device="cpu", resume=True) == (4, 0)
    for change in (dict(num_classes=7), dict(classes=tuple("abcdefghij"), num_classes=10)):
        with pytest.raises(UserError, match="cannot be resumed with other settings"):
            train.train(dataclasses.replace(config, **change), tmp_path, device="cpu", resume=True)


@pytest.mark.parametrize("until", [0, -1, 5])
def test_until_lies_within_the_run(tmp_path, until):
    with pytest.raises(UserError, match=f"until={until}: must lie between 1 and the run's 4 steps"):
        train.train({**SMALL_DATA, "steps": 4}, tmp_path / "run", device="cpu", until=until)
    assert not (tmp_path / "run").exists()


def test_a_size_that_does_fit_is_named_height_first():
    """Of images and of latents, whose patches are counted in latents."""
    data = SimpleNamespace(settings=dict(image_size=(10, 23), num_classes=2, channels=1))
    with pytest.raises(UserError, match=r"image_size 10x23 .* --patch-size to one of .*10.*23.* --image-size to 8x24"):
        Config().resolve(data)


def test_the_commands_it_prints_take_a_folder_that_looks_like_a_flag(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(train, *TINY, "--steps", 1, "--run-dir=-x")
    assert code == 0 and "python inference.py --checkpoint=-x/model.pth" in out
    page = (tmp_path / "-x" / "index.html").read_text()
    assert "python train.py --run-dir=-x --resume" in page and "python inference.py --checkpoint=-x<" in page
    assert call(inference, "--checkpoint=-x/model.pth", "--count", 1)[0] == 0
