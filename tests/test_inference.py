from support.commands import resolve_precision
from support.pictures import grid

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_refused
from PIL import Image

import inference
from checkpoint import load_model
from dataset import to_uint8
from inference import load_for_sampling, noise_source, parse_labels, sample, sampling_parser


def size(path):
    with Image.open(path) as image:
        return image.size, image.mode, getattr(image, "n_frames", 1)


def test_grid_picture(command, trained, tmp_path):
    process = command("inference.py", "--checkpoint", trained / "model.pth", "--out", tmp_path / "a.png")
    assert process.returncode == 0, process.stderr
    assert f"{tmp_path / 'a.png'}: 80 images, dpm with 3 steps, guidance 1.4, seed 0" in process.stdout
    assert size(tmp_path / "a.png") == ((2 + 10 * 58, 2 + 8 * 58), "L", 1)


def test_finds_the_model_just_trained(command, call, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    assert command("inference.py", "--count", 1, cwd=tmp_path).returncode == 0
    assert size(tmp_path / "samples.png")[0] == (2 + 10 * 58, 2 + 58)
    monkeypatch.chdir(tmp_path)
    shutil.move(tmp_path / "run" / "model.pth", tmp_path / "shared.pth")
    monkeypatch.setattr(inference, "CHECKPOINTS", (inference.CHECKPOINTS[0], tmp_path / "shared.pth"))
    assert call(inference, "--strip")[0] == 0
    assert (tmp_path / "strip.png").exists()
    (tmp_path / "shared.pth").unlink()
    assert_refused(call(inference), "no checkpoint", "train.py")


@pytest.mark.parametrize("content", [b"", b"random bytes", b"half"])
def test_checkpoint_that_is_none(call, trained, tmp_path, content):
    whole = (trained / "model.pth").read_bytes()
    (tmp_path / "bad.pth").write_bytes(whole[:len(whole) // 2] if content == b"half" else content)
    assert_refused(call(inference, "--checkpoint", tmp_path / "bad.pth", "--out", tmp_path / "a.png"), "bad.pth")
    assert not (tmp_path / "a.png").exists()


def test_same_seed_same_picture(call, trained, tmp_path):
    def draw(*flags):
        code, _, err = call(inference, "--checkpoint", trained / "model.pth", "--out", tmp_path / "a.png", *flags)
        assert code == 0, err
        return (tmp_path / "a.png").read_bytes()

    assert draw() == draw()
    assert draw("--seed", 1) != draw()
    assert len({draw("--sampler", name) for name in ("ddpm", "ddim", "dpm")}) == 3
    assert draw("--sampler", "ddim", "--eta", 0.5) != draw("--sampler", "ddim")
    assert draw("--guidance", 0) != draw("--guidance", 1)
    assert draw("--sample-steps", 5) != draw()


def test_labels_and_count(call, trained, tmp_path):
    flags = ["--checkpoint", trained / "model.pth", "--out", tmp_path / "a.png"]
    assert call(inference, *flags, "--labels", "31415", "--count", 2)[0] == 0
    assert size(tmp_path / "a.png")[0] == (2 + 5 * 58, 2 + 2 * 58)
    assert call(inference, *flags, "--labels", 3, 1, "--strip")[0] == 0
    assert size(tmp_path / "a.png")[0] == (2 + 4 * 58, 2 + 2 * 58)  # the noise and three steps


def test_gif(call, trained, tmp_path):
    assert call(inference, "--checkpoint", trained / "model.pth", "--gif", "--out", tmp_path / "a.gif",
                "--sampler", "ddpm", "--sample-steps", 100)[0] == 0
    assert size(tmp_path / "a.gif")[0] == (2 + 10 * 58, 2 + 8 * 58)
    assert 50 < size(tmp_path / "a.gif")[2] <= 61


@pytest.mark.parametrize(("flags", "words"), [
    (["--labels", "10", "11"], ["'10' is no label", "0 to 9"]), (["--labels", "3x"], ["'x' is no label"]),
    (["--labels", "-1"], ["no label"]),
    (["--count", 0], ["--count 0"]), (["--count", 10**9], ["--count"]), (["--sample-steps", 0], ["sample_steps is 0"]),
    (["--sample-steps", 1001], ["T = 1000"]), (["--guidance", "nan"], ["guidance"]), (["--eta", 2], ["eta is 2"]),
    (["--out", "picture.txt"], ["picture.txt", ".png"]), (["--out", "no/such/folder/a.png"], ["cannot be written"]),
    (["--checkpoint", "none.pth"], ["there is no checkpoint none.pth"]), (["--device", "abc"], ["--device abc"])])
def test_bad_flags(call, trained, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(inference, "--checkpoint", trained / "model.pth", *flags), *words)
    assert list(tmp_path.iterdir()) == []


def test_picture_in_the_way_of_a_folder(call, trained, tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "a.png" / "mine").touch()
    assert_refused(call(inference, "--checkpoint", trained / "model.pth", "--out", tmp_path / "a.png"), "a.png")
    assert (tmp_path / "a.png" / "mine").exists()


def test_help_is_quick_and_names_its_flags(command):
    for script in ("train.py", "inference.py", "generator.py"):
        process = command(script, "--help")
        assert process.returncode == 0
        for flag in ("--sampler", "--sample-steps", "--guidance", "--seed", "--device"):
            assert flag in process.stdout


def test_parse_labels():
    assert parse_labels(["31415"], 10) == [3, 1, 4, 1, 5]
    assert parse_labels(["3", "1"], 10) == parse_labels(["3,1"], 10) == [3, 1]
    assert parse_labels(["31"], 1000) == [31]
    assert parse_labels(["207", "360"], 1000) == [207, 360]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("sampler", "precision"), [("ddpm", "fp32"), ("dpm", "fp32"), ("dpm", "bf16")])
def test_an_image_is_a_function_of_seed_and_index(threads, sampler, precision):
    """To the last bit, whatever the batch and the order."""
    model, config = load_model(REPOSITORY / "weights" / "mnist.pth", precision=precision)
    config = dataclasses.replace(config, sampler=sampler, sample_steps=3)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    labels = torch.arange(40) % 10
    *_, together = sample(model, config, labels)
    *_, backwards = sample(model, config, labels.flip(0), list(range(39, -1, -1)))
    assert torch.equal(together, backwards.flip(0))
    for indices in ([5], [5, 6, 7], list(range(16)), list(range(17)), [30, 2, 17, 9, 21]):
        *_, drawn = sample(model, config, labels[indices], indices)
        assert torch.equal(drawn, together[indices]), indices
    torch.set_num_threads(before)


def test_bf16_draws_what_fp32_draws():
    labels = torch.arange(40) % 10
    drawn = []
    for precision in ("fp32", "bf16"):
        model, config = load_model(REPOSITORY / "weights" / "mnist.pth", precision=precision)
        *_, x = sample(model, config, labels)
        assert x.dtype == torch.float32
        drawn.append(to_uint8(x).float())
    difference = (drawn[0] - drawn[1]).abs().mean(dim=(1, 2, 3))
    assert 0 < difference.mean() < 1 and difference.max() < 4  # of 255; two digits are at about 40


def test_draws_in_the_precision_asked_for_or_the_quicker_one():
    quicker = resolve_precision("auto", torch.device("cpu"))
    for given, wanted in (([], quicker), (["--precision", "bf16"], "bf16"), (["--precision", "fp32"], "fp32")):
        words = ["--checkpoint", str(REPOSITORY / "weights" / "mnist.pth"), "--device", "cpu", *given]
        model, _ = load_for_sampling(sampling_parser("").parse_args(words))
        assert next(model.parameters()).dtype == (torch.bfloat16 if wanted == "bf16" else torch.float32)


def test_noise_is_standard_normal_and_fresh():
    noise = noise_source(0, range(50), (1, 28, 28), "cpu")
    first, second = noise(), noise()
    assert first.dtype == torch.float32
    for batch in (first, second):
        assert batch.mean().item() == pytest.approx(0, abs=0.02)
        assert batch.std().item() == pytest.approx(1, abs=0.02)
    vectors = torch.cat([first, second]).flatten(1)
    correlation = torch.corrcoef(vectors) - torch.eye(100)
    assert correlation.abs().max() < 0.2
    assert not torch.equal(noise_source(1, [0], (1, 28, 28), "cpu")(), first[:1])


def test_states(trained):
    """The noise first, then every step; the last one within the range of images."""
    model, config = load_model(trained / "model.pth")
    states = list(sample(model, config, torch.arange(4)))
    assert len(states) == config.sample_steps + 1
    assert torch.equal(states[0], noise_source(0, range(4), (1, 8, 8), "cpu")())
    assert states[-1].abs().max() <= 1


def test_to_uint8():
    assert to_uint8(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0])).tolist() == [0, 0, 128, 255, 255]


def test_grid():
    images = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 28, 28)
    picture = np.asarray(grid(images, columns=2))
    assert picture.shape == (2 + 2 * 58, 2 + 2 * 58)
    assert picture[2, 2] == 10 and picture[2, 60] == 20 and picture[60, 2] == 30 and picture[60, 60] == 0
    assert not picture[:2].any() and not picture[58:60].any()
    assert grid(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), columns=1).mode == "RGB"
