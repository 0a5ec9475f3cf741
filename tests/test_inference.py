from support import image_files, pictures, sizes
from support.commands import UserError, resolve_precision
from support.pictures import check_picture, grid, save_picture

import argparse
import dataclasses
import functools
import hashlib
import os
import resource
import shutil
import weakref
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, assert_refused
from PIL import Image, ImageDraw

import generator
import inference
import train
from config import Config
from dataset import to_float, to_uint8
from diffusion import from_noise
from edit.ways import edit, inpaint
from inference import (
    batch_that_fits,
    draw,
    find_checkpoint,
    generate,
    load_for_sampling,
    noise_source,
    parse_labels,
    parse_morph,
    sample,
    sampling_parser,
)
from measure.classifier import load_classifier
from record.checkpoint import load_model, save_checkpoint
from video.given import complete

SHIPPED, SPRITES = (REPOSITORY / "weights" / name for name in ("mnist.pth", "sprites.pth"))
DIGITS = tuple("0123456789")


def make_checkpoint(path, seed=0, **settings):
    """An untrained model whose output is not zero."""
    config = Config(**dict(dataset="folder", image_size=8, channels=1, num_classes=10, patch_size=4, hidden_size=16,
                           depth=1, num_heads=2, sample_steps=3) | settings)
    torch.manual_seed(seed)
    model = config.build_model()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    save_checkpoint(path, config, 5, 1.0, model.state_dict())
    return path


def size(path):
    with Image.open(path) as image:
        return image.size, image.mode, getattr(image, "n_frames", 1)


def test_grid_picture(command, trained, tmp_path):
    process = command("inference.py", "--checkpoint", trained / "model.pth", "--out", tmp_path / "a.png")
    assert process.returncode == 0, process.stderr
    assert process.stdout == (f"{tmp_path / 'a.png'}: 80 images, dpm with 3 steps, guidance 1.4, seed 0, drawn with "
                              f"{trained / 'model.pth'}\n")
    assert size(tmp_path / "a.png") == ((2 + 10 * 58, 2 + 8 * 58), "L", 1)


def test_finds_the_model_just_trained(call, trained, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(inference, "--count", 1)
    assert code == 0 and out.endswith("drawn with run/model.pth\n")
    assert size(tmp_path / "samples.png")[0] == (2 + 10 * 58, 2 + 58)
    shutil.move(tmp_path / "run" / "model.pth", tmp_path / "shared.pth")
    monkeypatch.setattr(inference, "CHECKPOINTS", (inference.CHECKPOINTS[0], tmp_path / "shared.pth"))
    code, out, _ = call(inference, "--strip")
    assert code == 0 and out.endswith(f"drawn with {tmp_path / 'shared.pth'}\n")
    assert (tmp_path / "strip.png").exists()
    (tmp_path / "shared.pth").unlink()
    assert_refused(call(inference), "no checkpoint", "train.py")


def test_a_run_folder_is_its_model(call, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(inference, "--checkpoint", trained)
    assert code == 0 and out.endswith(f"drawn with {trained / 'model.pth'}\n")
    assert draw(checkpoint=trained, count=8).tobytes() == Image.open("samples.png").tobytes()
    (tmp_path / "run_1").mkdir()
    assert_refused(call(inference, "--checkpoint", "run_1"), "run_1 holds no model.pth")
    assert_refused(call(inference, "--checkpoint", ""), "--checkpoint is empty")
    assert find_checkpoint() == SHIPPED


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
    (["--labels", "10", "11"], ["'10' is no label", "0 to 9"]), (["--labels", "3x"], ["'3x' is no label"]),
    (["--labels", "-1"], ["'-1' is no label", "0 to 9"]), (["--labels", ""], ["'' is no label", "0 to 9"]),
    (["--labels", " , "], ["'' is no label"]), (["--labels", "3", "cat"], ["'cat' is no label"]),
    (["--labels", "9" * 5000, "1"], ["is no label"]), (["--labels", "²"], ["'²' is no label"]),
    (["--labels"], ["--labels"]), (["--labels", "-1,2"], ["--labels"]), (["--eta", "0.5"], ["--eta", "ddim", "dpm"]),
    (["--count", 0], ["--count 0"]), (["--count", 10**9], ["--count"]), (["--sample-steps", 0], ["sample_steps is 0"]),
    (["--sample-steps", 1001], ["T = 1000"]), (["--guidance", "nan"], ["guidance"]), (["--eta", 2], ["eta is 2"]),
    (["--out", "picture.txt"], ["picture.txt", ".png"]), (["--out", "no/such/a.png"], ["no folder no/such"]),
    (["--out", ""], ["--out", "is empty"]), (["--out", "a.psd"], ["a.psd", "PSD"]), (["--out", "a.bufr"], ["BUFR"]),
    (["--gif", "--out", "a.jpg"], ["a.jpg", "JPEG cannot be animated", ".gif"]), (["--gif", "--out", "a.pdf"], ["PDF"]),
    (["--checkpoint", "none.pth"], ["there is no checkpoint none.pth"]), (["--device", "abc"], ["--device abc"])])
def test_bad_flags(call, trained, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, "sample", None)  # all is found before anything is drawn
    assert_refused(call(inference, "--checkpoint", trained / "model.pth", *flags), *words)
    assert list(tmp_path.iterdir()) == []


def test_picture_in_the_way_of_a_folder(call, trained, tmp_path):
    (tmp_path / "a.png").mkdir()
    (tmp_path / "a.png" / "mine").touch()
    assert_refused(call(inference, "--checkpoint", trained / "model.pth", "--out", tmp_path / "a.png"), "a.png")
    assert (tmp_path / "a.png" / "mine").exists()


def test_help_names_its_flags(call):
    for script in (train, inference, generator):
        code, out, _ = call(script, "--help")
        assert code == 0
        for flag in ("--sampler", "--sample-steps", "--guidance", "--seed", "--device"):
            assert flag in out


def test_help_knows_that_a_model_has_its_own_defaults():
    text = " ".join(sampling_parser("").format_help().split())
    assert text.count("(default: the model's own)") == 7 and "(default: 6)" not in text and "(default: 1.4)" not in text
    assert "seed of everything random (default: 0)" in text


def test_parse_labels():
    assert parse_labels(["31415"], DIGITS) == parse_labels("31415", DIGITS) == [3, 1, 4, 1, 5]
    assert parse_labels(["3", "1"], DIGITS) == parse_labels(["3,1"], DIGITS) == parse_labels([3, 1], DIGITS) == [3, 1]
    assert parse_labels(None, DIGITS) == list(range(10)) and parse_labels(4, DIGITS) == [4]
    thousand = tuple(map(str, range(1000)))
    assert parse_labels(["31"], thousand) == [31]
    assert parse_labels(["207", "360"], thousand) == [207, 360]
    assert parse_labels(None, thousand) == list(range(10))
    assert parse_labels(None, ("cat", "dog")) == [0, 1]
    assert parse_labels(["31"], tuple(f"a{i}" for i in range(40))) == [31]  # two digits only where a digit is a class


def test_labels_by_name():
    names = ("cat", "dog", "great white shark", "1", "a, b")
    assert parse_labels(["dog", "cat", "cat"], names) == parse_labels(["dog,cat , cat"], names) == [1, 0, 0]
    assert parse_labels(["great white shark"], names) == [2]
    assert parse_labels(["great white shark, dog"], names) == [2, 1]
    assert parse_labels(["a, b"], names) == [4]
    assert parse_labels(["0", "1", "2"], names) == [0, 3, 2]  # a class that is called 1 is what 1 asks for
    assert parse_labels(["02"], names) == [0, 2]
    for words in (["cow"], ["great", "white", "shark"], ["5", "0"]):
        with pytest.raises(UserError, match=r"is no label; this model knows 'cat', 'dog', 'great white shark', '1', "):
            parse_labels(words, names)
    with pytest.raises(UserError) as error:
        parse_labels("cow", tuple(f"a{i}" for i in range(1234)))
    assert "'a9' and 1,224 more" in str(error.value) and "'a10'" not in str(error.value)


def test_classes_with_names(call, tmp_path):
    """They are asked for by name, and their columns are captioned."""
    path = make_checkpoint(tmp_path / "model.pth", num_classes=2, classes=("cat", "dog"))
    flags = ["--checkpoint", path, "--out", tmp_path / "a.png", "--count", 2]
    assert_refused(call(inference, *flags, "--labels", "cow"), "'cow' is no label", "'cat', 'dog'")
    assert call(inference, *flags, "--labels", "dog", "cat", "dog")[0] == 0
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    model, config = load_model(path)
    plain = np.asarray(grid(to_uint8(generate(model, config, torch.tensor([1, 0, 1] * 2))), 3))
    assert np.array_equal(picture[-len(plain):], plain)
    head = picture[:-len(plain)]
    columns = [head[:, 2 + 58 * i:58 + 58 * i] for i in range(3)]
    assert np.array_equal(columns[0], columns[2]) and not np.array_equal(columns[0], columns[1])
    assert head.max() > 200
    assert call(inference, *flags, "--labels", "1", "0", "1")[0] == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)


def test_out_of_memory_is_one_line(command, tmp_path):
    """10,000 images of 16 channels and 1024 x 1024 pixels do not fit into 16 GB."""
    path = make_checkpoint(tmp_path / "model.pth", image_size=1024, channels=16, patch_size=64)
    process = command("inference.py", "--checkpoint", path, "--count", 1000, "--out", tmp_path / "a.png", preexec_fn=(
        lambda: resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))))
    assert_refused(process, "out of memory: lower --count")


def test_draw_for_a_notebook():
    picture = draw("31415", checkpoint=SHIPPED, device="cpu", guidance=2.0, precision="fp32")
    model, config = load_model(SHIPPED, precision="fp32")
    y = torch.tensor([3, 1, 4, 1, 5])
    again = grid(to_uint8(generate(model, dataclasses.replace(config, guidance=2.0), y)), columns=5)
    assert picture.tobytes() == again.tobytes()
    assert draw([3, 1], count=2, checkpoint=SHIPPED).size == (2 + 2 * 58, 2 + 2 * 58)
    for wrong in (dict(labels="cat"), dict(count=0), dict(steps=3), dict(eta=0.5), dict(checkpoint="none.pth")):
        with pytest.raises(UserError):
            draw(**wrong)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_lines_that_give_tensors_work_as_printed(name, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    lines = (REPOSITORY / name).read_text(encoding="utf-8").splitlines()
    start = lines.index("    import torch")
    found = {}
    exec("\n".join(line.strip() for line in lines[start:lines.index("", start + 4)]), found)
    x = found["x"]
    assert x.shape == (3, 1, 28, 28) and x.dtype == torch.float32 and x.abs().max() <= 1 and x.max() - x.min() > 1.9
    picture = np.asarray(draw([3, 1, 4], checkpoint=SHIPPED))
    for column, image in enumerate(inference.to_images(x, found["config"])):
        assert np.array_equal(tile(picture, 0, column, scale=2), image[0])


def test_a_misspelt_setting_names_the_nearest():
    for wrong, right in (("guidanc", "guidance"), ("sample_step", "sample_steps"), ("labls", "labels"), ("vea", "vae")):
        with pytest.raises(UserError, match=f"'{wrong}' is no setting here: is '{right}' meant"):
            draw("3", checkpoint=SHIPPED, **{wrong: 2})
    with pytest.raises(UserError, match="'xyzzy' is no setting here; there are sampler, sample_steps"):
        draw("3", checkpoint=SHIPPED, xyzzy=2)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_memory_does_not_grow_with_the_steps(monkeypatch, sampler):
    """Of the states that a sampler yields, few are alive at any time."""
    model, config = load_model(SHIPPED)
    original, states, most = inference.SAMPLERS[sampler], weakref.WeakSet(), []

    def watched(*args, **options):
        for x in original(*args, **options):
            states.add(x)
            most.append(len(states))
            yield x

    monkeypatch.setitem(inference.SAMPLERS, sampler, watched)
    config = dataclasses.replace(config, sampler=sampler, sample_steps=12)
    images = generate(model, config, torch.arange(16) % 10)
    assert len(most) == 12 and max(most) <= 2
    assert images.shape == (16, 1, 28, 28)
    del images
    most.clear()
    shown = inference.draw_states(model, config, [3, 1], 8, shown=4)
    assert len(most) == 12 and max(most) <= 2
    assert shown.shape == (4, 16, 1, 28, 28) and shown.dtype == torch.uint8


def test_the_states_shown_are_spaced_evenly_and_in_order(monkeypatch):
    """The first is the noise, and the last one the image, in the strip from left to right, in the animation in time."""
    model, config = load_model(SHIPPED)
    config = dataclasses.replace(config, sample_steps=20)
    states = [to_uint8(x) for x in sample(model, config, torch.tensor([3, 1]))]
    shown = inference.draw_states(model, config, [3, 1], 1, shown=11)
    assert torch.equal(shown, torch.stack(states[::2]))
    assert torch.equal(inference.draw_states(model, config, [3, 1], 1), torch.stack(states[-1:]))


def test_strip_and_animation_go_from_noise_to_image(call, tmp_path):
    model, config = load_model(SHIPPED)
    config = dataclasses.replace(config, sample_steps=4)
    states = [to_uint8(x) for x in sample(model, config, torch.tensor([7, 2]))]
    flags = ["--checkpoint", SHIPPED, "--sample-steps", 4, "--labels", 7, 2, "--count", 1]
    assert call(inference, *flags, "--strip", "--out", tmp_path / "a.png")[0] == 0
    strip = np.asarray(Image.open(tmp_path / "a.png"))
    for row in range(2):
        for column, state in enumerate(states):
            tile = strip[2 + 58 * row:58 + 58 * row:2, 2 + 58 * column:58 + 58 * column:2]
            assert np.array_equal(tile, state[row, 0]), (row, column)
    assert call(inference, *flags, "--gif", "--out", tmp_path / "a.gif")[0] == 0
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 5
        for number, state in enumerate(states):
            animation.seek(number)
            difference = np.asarray(animation.convert("L")).astype(int) - np.asarray(grid(state, columns=2))
            assert np.abs(difference).mean() < 2  # of 255: the colours of a GIF are few


@pytest.mark.parametrize(("ending", "flags"), [("gif", ["--strip"]), ("gif", []), ("webp", ["--gif"]), ("jpg", []),
                                               ("png", ["--gif"]), ("TIFF", [])])
def test_other_formats(call, tmp_path, ending, flags):
    out = tmp_path / f"a.{ending}"
    assert call(inference, "--checkpoint", SHIPPED, "--count", 1, "--sample-steps", 3, "--out", out, *flags)[0] == 0
    assert size(out)[2] == (4 if "--gif" in flags else 1)


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
    # No two pairs of seed and index share their noise, whatever way there is to mix the two numbers
    pairs = [(seed, k) for seed in (0, 1, 2, 2**32, 2**63 - 1) for k in (0, 1, 2, 3)]
    noises = torch.cat([noise_source(seed, [k], (1, 28, 28), "cpu")() for seed, k in pairs]).flatten(1)
    assert (torch.corrcoef(noises) - torch.eye(len(pairs))).abs().max() < 0.2


@pytest.mark.parametrize("shape", [(1, 3, 3), (1, 28, 28)])
def test_noise_drawn_ahead_is_the_noise_of_one_call_after_the_other(shape):
    streams = [np.random.Generator(np.random.Philox(key=[7, k])) for k in (4, 0, 9)]
    expected = [np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams]) for _ in range(30)]
    for calls in (1, 2, 10, 30):
        noise = noise_source(7, [4, 0, 9], shape, "cpu", calls)
        assert all(np.array_equal(noise(), numbers) for numbers in expected), calls
    assert not np.array_equal(expected[0][0], expected[0][1]) and not np.array_equal(expected[0], expected[1])


def test_noise_is_drawn_ahead_only_when_more_is_asked_for(monkeypatch):
    class Counting(np.random.Generator):
        def standard_normal(self, *args, out=None, **options):
            drawn.append(len(out))
            return super().standard_normal(*args, out=out, **options)

    monkeypatch.setattr(np.random, "Generator", Counting)
    model, config = load_model(SHIPPED)
    for sampler, steps, blocks in (("dpm", 8, [1]), ("ddim", 8, [1]), ("ddpm", 8, [1, 7]), ("ddpm", 20, [1, 8, 8, 3])):
        drawn = []
        generate(model, dataclasses.replace(config, sampler=sampler, sample_steps=steps), torch.zeros(16).long())
        assert drawn == [size for size in blocks for _ in range(16)], sampler
    drawn = []
    noise = noise_source(0, range(2), (3, 1024, 1024), "cpu", 50)  # large ones: not many at once
    noise(), noise()
    assert drawn == [1, 1, 2, 2]


def test_guidance_eta_seed_and_steps_reach_the_sampler(monkeypatch):
    asked = []

    def sampler(denoise, x, steps, noise, eta=None):
        asked.append((len(steps), eta))
        yield denoise(x, 500)

    model, config = load_model(SHIPPED, precision="fp32")
    monkeypatch.setitem(inference.SAMPLERS, "ddim", sampler)
    y = torch.arange(16) % 10
    config = dataclasses.replace(config, sampler="ddim", eta=0.3, sample_steps=7, seed=5, guidance=3.0)
    x = noise_source(5, range(16), (1, 28, 28), "cpu")()
    t, null = torch.full((16,), 500), torch.full((16,), 10)
    expected = (model(x, t, null) + 3 * (model(x, t, y) - model(x, t, null))).clamp(-1, 1)
    torch.testing.assert_close(generate(model, config, y), expected, rtol=1e-3, atol=1e-3)
    assert asked == [(7, 0.3)]


def test_states(trained):
    """The noise first, then every step; the last one within the range of images."""
    model, config = load_model(trained / "model.pth")
    states = list(sample(model, config, torch.arange(4)))
    assert len(states) == config.sample_steps + 1
    assert torch.equal(states[0], noise_source(0, range(4), (1, 8, 8), "cpu")())
    assert states[-1].abs().max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 1.2])
def test_the_shipped_weights_draw_what_they_are_asked_for(guidance):
    """Read by the classifier that comes with the repository, which has never seen a drawn digit. The weights that were
    drawn as noise, or digits beside those asked for, would be at 10 %."""
    model, config = load_model(SHIPPED)
    labels = torch.arange(300) % 10
    images = generate(model, dataclasses.replace(config, guidance=guidance), labels)
    assert images.min() >= -1 and images.max() <= 1
    assert (load_classifier()(images).argmax(dim=1) == labels).float().mean() > (0.94 if guidance == 1 else 0.97)


def test_batches_fit_into_memory(monkeypatch):
    small = Config(image_size=28, channels=1, num_classes=10, patch_size=7)
    large = Config(image_size=32, channels=4, num_classes=1000, patch_size=2, hidden_size=1152, depth=28, num_heads=16)
    assert batch_that_fits(small, torch.device("cpu")) == 512
    assert 8 < batch_that_fits(large, torch.device("cpu")) < 100
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ({0: 4e9, 1: 64e9}[device.index], 80e9))
    few, many = (batch_that_fits(large, torch.device("cuda", index)) for index in (0, 1))
    assert many == pytest.approx(16 * few, rel=0.05) and few < 100
    assert batch_that_fits(small, torch.device("cuda", 1)) == 4096
    huge = Config(image_size=1024, channels=16, num_classes=10, patch_size=4, hidden_size=4096)
    assert batch_that_fits(huge, torch.device("cpu")) == 1


def test_to_uint8():
    assert to_uint8(torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0])).tolist() == [0, 0, 128, 255, 255]


def test_grid():
    images = torch.tensor([10, 20, 30], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 28, 28)
    picture = np.asarray(grid(images, columns=2))
    assert picture.shape == (2 + 2 * 58, 2 + 2 * 58)
    assert picture[2, 2] == 10 and picture[2, 60] == 20 and picture[60, 2] == 30 and picture[60, 60] == 0
    assert not picture[:2].any() and not picture[58:60].any()
    assert grid(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), columns=1).mode == "RGB"


def test_plain_grids_have_stayed_what_they_were():
    images = torch.arange(6 * 28 * 28).view(6, 1, 28, 28).byte()
    digest = hashlib.sha256(grid(images, columns=3).tobytes()).hexdigest()
    assert digest == "5a0ea2d22f95f8901eee92b675646a18ec277164d3042aa89845d28500406a42"
    assert grid(images, 3, captions=()).tobytes() == grid(images, 3).tobytes()


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 16])
def test_grids_of_any_number_of_channels(channels):
    images = torch.arange(1, channels + 1, dtype=torch.uint8).view(1, channels, 1, 1).expand(1, channels, 28, 28)
    pixel = grid(images, columns=1).getpixel((30, 30))
    assert pixel == {1: 1, 2: (1, 2, 0)}.get(channels, (1, 2, 3))


def test_captions_stay_within_their_column():
    images = torch.zeros(3, 3, 28, 28, dtype=torch.uint8)
    names = ["a", "a name that is far too long for it", "a\nb \N{CJK UNIFIED IDEOGRAPH-732B}\udcff"]
    picture = np.asarray(grid(images, 3, captions=names))
    gap = picture[:, [0, 1, 58, 59, 116, 117, 174, 175]]
    assert not gap.any() and all(picture[:, left:left + 56].any() for left in (2, 60, 118))
    assert not picture[pictures.LINE:].any()  # nor does it reach into the images
    assert grid(images, 3, captions=["i"] * 3).size == (2 + 3 * 58, pictures.LINE + 2 + 58)
    draw = ImageDraw.Draw(Image.new("L", (1, 1)))
    cut = picture[:, 60:116].any(axis=(0, 2)).nonzero()[0].max()
    assert 40 < cut <= 56 < draw.textlength(names[1])


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_pictures_that_cannot_be_written(tmp_path):
    save_picture(tmp_path / "a.PNG", Image.new("L", (2, 2)))
    wide = Image.new("L", (70_000, 1))
    for name in ("a.gif", "a.jpg", "a.webp"):  # their sizes end at 65,535, or at 16,383
        with pytest.raises(UserError, match="cannot be written") as error:
            save_picture(tmp_path / name, wide)
        assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.PNG"]
    for ending in sorted(Image.registered_extensions()):  # none gets past the check and fails after the work
        try:
            check_picture(tmp_path / f"b{ending}")
        except UserError:
            continue
        for mode in ("L", "RGB"):
            save_picture(tmp_path / f"b{ending}", Image.new(mode, (60, 60)))


def tile(picture, row, column, scale=7, side=56):
    """An image of a grid of 8 x 8 ones, each of its pixels once."""
    top, left = 2 + (side + 2) * row, 2 + (side + 2) * column
    return np.asarray(picture)[top:top + side:scale, left:left + side:scale]


@pytest.fixture
def small(tmp_path):
    """A checkpoint, and a picture and a mask for it, black where the picture is known."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "picture.png")
    Image.fromarray(rng.choice(np.array([0, 255], np.uint8), (8, 8))).save(tmp_path / "mask.png")
    return make_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_what_is_known_is_kept_to_the_last_bit(call, small, tmp_path, sampler):
    flags = ["--checkpoint", small, "--inpaint", tmp_path / "picture.png", "--mask", tmp_path / "mask.png",
             "--sampler", sampler, "--out", tmp_path / "a.png"]
    code, _, err = call(inference, *flags, "--labels", 3, 5, "--count", 2)
    assert code == 0, err
    drawn = [tile(Image.open(tmp_path / "a.png"), *place) for place in ((0, 0), (0, 1), (1, 0), (1, 1))]
    picture, mask = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("picture", "mask"))
    for image in drawn:
        assert np.array_equal(image[mask == 0], picture[mask == 0])
        assert not np.array_equal(image[mask == 255], picture[mask == 255])
    assert len({image.tobytes() for image in drawn}) == 4
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)


def test_a_model_of_images_reads_one_frame_of_a_clip(call, small, tmp_path, monkeypatch):
    frames = [Image.new("L", (8, 8), 9 * i) for i in range(20)]
    frames[0].save(tmp_path / "long.gif", save_all=True, append_images=frames[1:], duration=100)
    original, read = image_files.convert, []
    monkeypatch.setattr(image_files, "convert", lambda *of: read.append(of) or original(*of))
    monkeypatch.setattr(sizes, "available_memory", lambda: 2 * 64)  # what one takes
    code, _, err = call(inference, "--checkpoint", small, "--edit", tmp_path / "long.gif", "--labels", 3, "--out",
                        tmp_path / "a.png")
    assert code == 0 and len(read) == 1, err


def test_what_is_given_is_measured_and_a_pipe_is_not_opened(call, small, tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty").mkdir()
    for name, words in (("pipe.png", "it is no file"), ("empty", "holds no images")):
        assert_refused(call(inference, "--checkpoint", small, "--edit", tmp_path / name), name, words)
    make_checkpoint(tmp_path / "clips.pth", **CLIPS)
    flags = ["--checkpoint", tmp_path / "clips.pth", "--labels", 3, 7, "--count", 5, "--out", tmp_path / "a.gif"]
    for more, count in ((["--frames", 12], 2 * 5 * 12), (["--extend", save_clip(tmp_path / "a.png", *range(9))], 130)):
        monkeypatch.setattr(sizes, "available_memory", lambda count=count: 2 * count * 4 * 64 - 1)
        assert_refused(call(inference, *flags, *more), f"{count} images of 8 x 8", "lower --count or --frames")
        monkeypatch.setattr(sizes, "available_memory", lambda: 2 * 130 * 4 * 64)
        code, _, err = call(inference, *flags, *more)
        assert code == 0, err


def test_transparency_is_laid_on_the_model_s_ground(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.save(tmp_path / "x.png")
    for ground, value in (("black", -1), ("white", 1)):
        _, config = load_model(make_checkpoint(tmp_path / "model.pth", ground=ground))
        picture, _ = inference.read_picture(tmp_path / "x.png", config)
        assert picture.unique().tolist() == [value]


def test_masks_of_another_size_and_pictures_of_any(call, small, tmp_path):
    """The picture is cropped at its centre; the mask, stretched over it, as well."""
    Image.new("RGBA", (40, 16), (200, 200, 200, 255)).save(tmp_path / "wide.webp", lossless=True)
    Image.new("L", (5, 1)).save(tmp_path / "mask.png")
    mask = Image.open(tmp_path / "mask.png")
    mask.putpixel((2, 0), 255)  # the middle fifth: half of the square in the middle
    mask.save(tmp_path / "mask.png")
    assert call(inference, "--checkpoint", small, "--inpaint", tmp_path / "wide.webp", "--mask", tmp_path / "mask.png",
                "--labels", 3, "--count", 1, "--out", tmp_path / "a.png")[0] == 0
    image = tile(Image.open(tmp_path / "a.png"), 0, 0)
    assert (image[:, [0, 1, 6, 7]] == 200).all() and not (image[:, 2:6] == 200).all(axis=0).any()


@pytest.mark.parametrize("kind", ["edit", "inpaint", "morph"])
@pytest.mark.parametrize("settings", [dict(channels=3, image_size=(8, 12), patch_size=(4, 6), num_classes=2,
                                           classes=("cat: big", "dog")), {}, dict(process="ddpm", T=10)])
def test_every_model_edits_completes_and_morphs(call, tmp_path, kind, settings):
    """Colour, not square, with names, or small; from a photo, as grid, strip and animation."""
    path = make_checkpoint(tmp_path / "model.pth", **settings)
    Image.effect_noise((50, 30), 90).convert("CMYK").save(tmp_path / "photo.jpg")
    Image.linear_gradient("L").save(tmp_path / "mask.gif")
    names = load_model(path)[1].class_names
    flags = {"edit": ["--edit", tmp_path / "photo.jpg", "--labels", *names[:2]],
             "inpaint": ["--inpaint", tmp_path / "photo.jpg", "--mask", tmp_path / "mask.gif", "--count", 1],
             "morph": ["--morph", ":".join(names[:2]), "--to-seed", 9]}
    for more, name in (([], "a.png"), (["--strip"], "b.png"), (["--gif", "--sample-steps", 9], "c.gif")):
        code, _, err = call(inference, "--checkpoint", path, *flags[kind], *more, "--out", tmp_path / name)
        assert code == 0, err
    assert size(tmp_path / "a.png")[1] == ("RGB" if settings.get("channels") else "L")
    steps = 7 if kind == "edit" and "T" in settings else 9  # of 10 there are no more within the default strength
    assert size(tmp_path / "c.gif")[2] == (58 if kind == "morph" else steps + 1)


def test_an_edited_or_completed_image_is_a_function_of_seed_and_index():
    model, config = load_model(SHIPPED)
    picture, known = torch.rand(1, 1, 28, 28) * 2 - 1, torch.arange(28).view(1, 1, 1, 28) < 14
    labels = torch.arange(20) % 10
    for sampler, way in (("ddpm", functools.partial(edit, picture=picture, strength=0.5)),
                         ("dpm", functools.partial(inpaint, picture=picture, known=known))):
        config = dataclasses.replace(config, sampler=sampler, sample_steps=3)
        *_, together = sample(model, config, labels, way=way)
        for indices in ([5], [17, 2, 9]):
            *_, drawn = sample(model, config, labels[indices], indices, way=way)
            assert torch.equal(drawn, together[indices]), indices


def test_the_more_strength_the_more_changes(call, tmp_path):
    digit = tile(draw(3, checkpoint=SHIPPED), 0, 0, scale=2)
    Image.fromarray(digit).save(tmp_path / "three.png")
    changes = []
    for strength in (0.001, 0.4, 0.7, 1):
        assert call(inference, "--checkpoint", SHIPPED, "--edit", tmp_path / "three.png", "--labels", 7, "--count", 8,
                    "--strength", strength, "--out", tmp_path / "a.png")[0] == 0
        drawn = [tile(Image.open(tmp_path / "a.png"), row, 0, scale=2) for row in range(8)]
        changes.append(np.abs(np.subtract(drawn, digit, dtype=float)).mean())
    assert changes == sorted(changes) and changes[0] < 2 and changes[1] < 20 < changes[3]


@pytest.mark.parametrize("sampler", ["dpm", "ddpm"])
def test_a_morph_leads_from_one_draw_to_another(call, tmp_path, sampler):
    """Its ends are what is drawn without it; rows do not depend on how many there are."""
    flags = ["--checkpoint", SHIPPED, "--sampler", sampler, "--sample-steps", 4, "--out", tmp_path / "a.png"]

    def drawn(*more):
        code, _, err = call(inference, *flags, *more)
        assert code == 0, err
        return np.asarray(Image.open(tmp_path / "a.png"))

    def row(picture, number, columns):
        return [tile(picture, number, column, scale=2) for column in columns]

    first, last, other = (drawn("--labels", *flags, "--count", 2) for flags in ((3,), (8,), (8, "--seed", 7)))
    labels, both, one = drawn("--morph", "3:8", "--count", 2), drawn("--morph", "3:8", "--to-seed", 7, "--count", 2), (
        drawn("--morph", "3:8", "--count", 1))
    for k in range(2):
        for morph, end in ((labels, last), (both, other)):
            ends = [*row(first, k, [0]), *row(end, k, [0])]
            assert np.abs(np.subtract(row(morph, k, [0, 10]), ends, dtype=float)).mean() < 1
        steps = np.abs(np.diff(np.array(row(both, k, range(11)), dtype=float), axis=0)).mean(axis=(1, 2))
        assert steps.min() > 0 and steps.max() < np.abs(np.subtract(*row(both, k, (0, 10)), dtype=float)).mean()
    assert np.array_equal(row(one, 0, range(11)), row(labels, 0, range(11)))


def test_a_morph_is_animated_there_and_back(call, small, tmp_path):
    assert call(inference, "--checkpoint", small, "--morph", "3:3", "--to-seed", 1, "--gif", "--count", 12,
                "--out", tmp_path / "a.gif")[0] == 0
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.size == (2 + 10 * 58, 2 + 2 * 58)
        frames, times = [], []
        for number in range(animation.n_frames):
            animation.seek(number)
            frames.append(np.asarray(animation.convert("L")))
            times.append(animation.info["duration"])
    assert times == [1000, *[60] * 28] * 2  # milliseconds
    model, config = load_model(small)
    first = np.asarray(grid(to_uint8(generate(model, config, torch.full((12,), 3))), 10), dtype=float)
    assert np.abs(first - frames[0]).mean() < 3
    assert len(frames) == 58 and all(np.array_equal(frames[i], frames[-i]) for i in range(1, 29))
    assert not np.array_equal(frames[0], frames[len(frames) // 2])


@pytest.mark.parametrize(("flags", "words"), [
    (["--edit", "picture.png", "--morph", "3:8"], ["--edit and --morph"]),
    (["--edit", "picture.png", "--inpaint", "picture.png", "--mask", "mask.png"], ["--edit and --inpaint"]),
    (["--mask", "mask.png"], ["--mask is for --inpaint"]), (["--inpaint", "picture.png"], ["--inpaint needs --mask"]),
    (["--strength", 0.5], ["--strength is for --edit"]), (["--to-seed", 5], ["--to-seed is for --morph"]),
    (["--edit", "picture.png", "--mask", "mask.png"], ["--mask is for --inpaint"]),
    *[(["--edit", "picture.png", "--strength", strength], [f"--strength {strength}", "0", "1"])
      for strength in (0, 1.01, "nan")],
    (["--edit", "none.png"], ["none.png cannot be read", "No such file"]), (["--edit", ""], ["--edit", "is empty"]),
    (["--edit", "damaged.png"], ["damaged.png cannot be read"]),
    (["--inpaint", "picture.png", "--mask", "damaged.png"], ["damaged.png cannot be read"]),
    (["--inpaint", "picture.png", "--mask", "black.png"], ["black.png is black all over"]),
    (["--inpaint", "picture.png", "--mask", "white.png"], ["white.png is white all over"]),
    (["--edit", "picture.png", "--labels", "cat"], ["'cat' is no label"]),
    (["--morph", "3:8", "--labels", 3], ["leave --labels out"]), (["--morph", "3"], ["'3'", "3:8"]),
    *[(["--morph", words], ["two labels", "0 to 9"]) for words in ("", ":", "3:", "3:cat", "31:8", "3:8:1", "3:10")],
    (["--morph", "3:3"], ["leads nowhere", "--to-seed"]), (["--morph", "3:8", "--to-seed", -1], ["--to-seed -1"]),
    *[(["--morph", "3:8", "--to-seed", seed, *more], ["another seed"]) for seed, *more in ((4, "--seed", 4), (0,))],
    (["--morph", "3:8", "--count", 1000], ["--count 1000"]),
])
def test_bad_changes(call, small, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.png").write_bytes((tmp_path / "picture.png").read_bytes()[:60])
    for colour in ("black", "white"):
        Image.new("L", (9, 9), colour).save(f"{colour}.png")
    assert_refused(call(inference, "--checkpoint", small, *flags), *words)
    assert not list(tmp_path.glob("s*.png"))


def test_latents_are_no_picture(call, small, tmp_path):
    flags = ["--checkpoint", make_checkpoint(tmp_path / "latent.pth", channels=4)]
    assert_refused(call(inference, *flags, "--edit", tmp_path / "picture.png"), "4 channels", "no picture")
    assert call(inference, *flags, "--morph", "3:8", "--out", tmp_path / "a.png")[0] == 0


def test_a_morph_of_names_with_colons():
    names = ("a", "b", "a:b", "c:")
    assert parse_morph("a:b", names) == [0, 1]
    assert parse_morph("a:b:b", names) == [2, 1] and parse_morph("b:a:b", names) == [1, 2]
    assert parse_morph("c::a", names) == [3, 0] and parse_morph("0:3", names) == [0, 3]


def test_draw_changes_pictures_too(small, tmp_path):
    flags = dict(checkpoint=small, device="cpu")
    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    assert draw("37", edit=picture, strength=0.5, **flags).size == (2 + 2 * 58, 2 + 58)
    assert draw([3], edit=picture, **flags).tobytes() != draw([3], **flags).tobytes()
    completed, known = tile(draw(3, inpaint=picture, mask=mask, **flags), 0, 0), np.asarray(Image.open(mask)) == 0
    assert np.array_equal(completed[known], np.asarray(Image.open(picture))[known])
    assert draw(morph="3:8", count=2, to_seed=9, **flags).size == (2 + 11 * 58, 2 + 2 * 58)
    # From Python, what lies in a file may come as it is.
    pictures = [Image.open(path).copy() for path in (picture, mask)]
    for one, other in (pictures, [np.asarray(image.convert("RGB")) for image in pictures]):
        kept = one.copy()
        assert draw([3], edit=one, **flags).tobytes() == draw([3], edit=str(picture), **flags).tobytes()
        assert draw(3, inpaint=one, mask=other, **flags).tobytes() == draw(3, inpaint=picture, mask=mask,
                                                                           **flags).tobytes()
        assert np.array_equal(one, kept)  # it is the caller's
    exif = Image.Exif()
    exif[0x112] = 6  # to be shown turned
    pictures[0].crop((0, 0, 8, 4)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert draw([3], edit=turned, **flags).tobytes() == draw([3], edit=tmp_path / "turned.png", **flags).tobytes()
        assert turned.size == (8, 4)
    for wrong in ([1, 2], np.zeros((2, 3, 4, 5), np.uint8), np.zeros((4, 4), np.complex64)):
        with pytest.raises(UserError, match="the picture cannot be read as an image"):
            draw([3], edit=wrong, **flags)
    with pytest.raises(UserError, match="the picture is white all over"):
        draw([3], inpaint=picture, mask=np.full((9, 9), 255, np.uint8), **flags)
    for wrong in (dict(mask=mask), dict(edit=picture, morph="3:8"), dict(morph="3:8", labels="3")):
        with pytest.raises(UserError):
            draw(**wrong, **flags)


CLIPS = dict(image_size=(4, 8, 8), patch_size=(2, 4, 4))


def test_clips_are_animated(call, tmp_path, monkeypatch):
    """As a GIF, of which the strip has the frames side by side, each to the last bit."""
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", make_checkpoint(tmp_path / "clips.pth", **CLIPS), "--labels", "31"]
    code, out, _ = call(inference, *flags)
    assert code == 0 and out.startswith("samples.gif: 2 clips of 4 frames, dpm with 3 steps")
    assert size("samples.gif")[::2] == ((2 + 2 * 58, 2 + 58), 4)
    assert call(inference, *flags, "--count", 3)[0] == 0
    assert size("samples.gif")[::2] == ((2 + 2 * 58, 2 + 3 * 58), 4)
    with Image.open("samples.gif") as image:
        assert image.info["duration"] == 100 and image.info["loop"] == 0
    assert call(inference, *flags, "--strip")[0] == 0
    assert size("strip.png") == ((2 + 4 * 58, 2 + 2 * 58), "L", 1)
    assert call(inference, *flags, "--count", 1, "--out", "one.png")[0] == 0
    with Image.open("strip.png") as strip, Image.open("one.png") as clip:
        for i in range(4):
            clip.seek(i)
            for row in range(2):
                frame = clip.crop((58 * row, 0, 58 * row + 58, 58))
                assert strip.crop((58 * i, 58 * row, 58 * i + 58, 58 * row + 58)).tobytes() == frame.tobytes()
    code, _, err = call(inference, *flags, "--out", "a.jpg")
    assert_refused((code, "", err), "JPEG cannot be animated")
    assert draw("31", checkpoint="clips.pth").tobytes() == draw("31", checkpoint="clips.pth").tobytes()
    assert draw("3", checkpoint="clips.pth").size == (2 + 4 * 58, 2 + 58)
    assert call(inference, "--checkpoint", "clips.pth", "--morph", "3:8", "--count", 1, "--out", "m.gif")[0] == 0
    assert size("m.gif")[::2] == ((2 + 11 * 58, 2 + 58), 4)


def test_a_clip_is_a_function_of_seed_and_index(tmp_path):
    model, config = load_model(make_checkpoint(tmp_path / "clips.pth", **CLIPS))
    labels = torch.arange(20) % 10
    clips = generate(model, config, labels)
    assert clips.shape == (20, 1, 4, 8, 8) and clips.std() > 0.1
    assert deque(sample(model, config, labels, size=(2, 4, 8)), maxlen=1).pop().shape == (20, 1, 2, 4, 8)
    for index in ([0], [19], [3, 17], [*range(5, 20)]):
        assert torch.equal(generate(model, config, labels[index], index), clips[index])


def test_a_clip_is_edited(call, tmp_path, monkeypatch):
    """From its first frames; what its mask keeps stays in every frame."""
    monkeypatch.chdir(tmp_path)
    checkpoint = make_checkpoint(tmp_path / "clips.pth", **CLIPS)
    frames = [Image.fromarray(np.full((8, 8), 50 * i, np.uint8)) for i in range(5)]
    frames[0].save("five.gif", save_all=True, append_images=frames[1:], duration=40)
    frames[0].save("three.gif", save_all=True, append_images=frames[1:3], duration=40)
    _, config = load_model(checkpoint)
    picture, _ = inference.read_picture("five.gif", config)
    assert torch.equal(to_uint8(picture)[0, 0, :, 0, 0], torch.tensor([0, 50, 100, 150], dtype=torch.uint8))
    flags = ["--checkpoint", checkpoint, "--labels", 7, "--count", 1, "--out", "new.png"]
    assert call(inference, *flags, "--edit", "five.gif", "--strength", 0.1)[0] == 0
    assert size("new.png")[2] == 4
    assert_refused(call(inference, *flags, "--edit", "three.gif"), "three.gif has 3 frames", "clips of 4")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 4, 8, 8))
    mask.save("mask.png")
    assert call(inference, *flags, "--inpaint", "five.gif", "--mask", "mask.png")[0] == 0
    with Image.open("new.png") as clip:
        for i in range(4):
            clip.seek(i)
            assert set(clip.convert("L").crop((2, 2, 58, 30)).tobytes()) == {50 * i}


def save_clip(path, *greys):
    frames = [Image.fromarray(np.full((8, 8), grey, np.uint8)) for grey in greys]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


def drawn_frames(path):
    """The grey of the first image's upper left corner in each frame of an animation."""
    with Image.open(path) as image:
        greys = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            greys += [image.convert("L").getpixel((3, 3))] * round(image.info.get("duration", 100) / 100)
        return greys


SLOPE = np.indices((8, 12))[0] + 2 * np.indices((8, 12))[1]  # so that no picture is a mirror image of itself


def save_frames(path, *greys):
    """Frames of 12 x 8 pixels that all differ."""
    frames = [Image.fromarray((grey + SLOPE).astype(np.uint8)) for grey in greys]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


@pytest.fixture
def shown(monkeypatch):
    """Stands in for `sample`: returns the list of what it was asked for, and draws frames of one grey each, `new`."""
    calls = []

    def sample(model, config, labels, indices=None, way=from_noise, source=None, size=()):
        B, shape = len(labels), (config.input_shape[0], *(size or config.input_shape[1:]))
        bound = getattr(way, "keywords", {})
        calls.append(SimpleNamespace(model=model, config=config, labels=labels.tolist(), indices=indices, size=size,
                                     source=source, way=getattr(way, "func", way), shape=shape, **bound))
        x = torch.zeros(B, *shape)
        if len(shape) == 4:
            drawn = torch.tensor([[new(len(calls), k, i) for i in range(shape[1])] for k in range(B)])
            x = x + to_float(drawn)[:, None, :, None, None]
        x = torch.where(bound["known"], bound["picture"][:B], x) if "known" in bound else x
        yield from [x] * (config.sample_steps + 1)

    monkeypatch.setattr(inference, "sample", sample)
    return calls


def new(window, k, i):
    """The grey of frame i of clip k, of 2, in the window that the stand-in for `sample` draws as its first, 1, ..."""
    return 130 + 16 * (window - 1) + 8 * k + i


def greys_of(frames):
    """Frames uint8 (T, 8, 12) as numbers: of those of `save_frames` and of those newly drawn their grey."""
    for frame in frames:
        assert (frame == frame[0, 0]).all() or (frame - frame[0, 0] == SLOPE).all()
    return frames[:, 0, 0].tolist()


WIDE = dict(image_size=(8, 8, 12), patch_size=(2, 4, 4))
A, B = [30, 40, 50, 60, 70, 80, 90, 100, 110, 120], [200, 205, 210, 215, 220]  # of more frames than the model, of fewer


def drawn(window, *frames):
    return [(window, i) for i in frames]


@pytest.mark.parametrize("given", [0.0, 0.5])
@pytest.mark.parametrize(("flags", "windows", "clip"), [
    ("--extend a.png --frames 20", [(A[-4:], 4, []), (drawn(1, 4, 5, 6, 7), 4, []), (drawn(2, 4, 5, 6, 7), 4, [])],
     [*A, *drawn(1, 4, 5, 6, 7), *drawn(2, 4, 5, 6, 7), *drawn(3, 4, 5)]),
    ("--extend a.png", [(A[-4:], 4, [])], [*A, *drawn(1, 4, 5, 6, 7)]),
    ("--extend one.png --frames 7", [([70], 7, [])], [70, *drawn(1, 1, 2, 3, 4, 5, 6)]),
    ("--before a.png --frames 20", [([], 4, A[:4]), ([], 4, drawn(1, 0, 1, 2, 3)), ([], 4, drawn(2, 0, 1, 2, 3))],
     [*drawn(3, 2, 3), *drawn(2, 0, 1, 2, 3), *drawn(1, 0, 1, 2, 3), *A]),
    ("--between a.png b.png", [(A[-2:], 4, B[:2])], [*A, *drawn(1, 2, 3, 4, 5), *B]),
    ("--between b.png one.png", [(B[-2:], 5, [70])], [*B, *drawn(1, 2, 3, 4, 5, 6), 70]),
    ("--loop a.png", [(A[-2:], 4, A[:2])], [*A, *drawn(1, 2, 3, 4, 5)]),
    ("--frames 14", [([], 8, []), (drawn(1, 4, 5, 6, 7), 4, []), (drawn(2, 4, 5, 6, 7), 4, [])],
     [*drawn(1, *range(8)), *drawn(2, 4, 5, 6, 7), *drawn(3, 4, 5)])])
def test_what_the_network_is_shown(call, tmp_path, monkeypatch, shown, flags, windows, clip, given):
    """The frames next to those that it draws, in their places, of each clip its own; the window slides along."""
    monkeypatch.chdir(tmp_path)
    checkpoint = make_checkpoint("clips.pth", **WIDE, given=given)
    for name, greys in (("a", A), ("b", B), ("one", [70])):
        save_frames(f"{name}.png", *greys)
    code, out, err = call(inference, "--checkpoint", checkpoint, *flags.split(), "--labels", 7, 3, "--count", 1,
                          "--out", "out.png")
    assert code == 0 and f"2 clips of {len(clip)} frames" in out, err

    def expected(frames, k):
        return [new(frame[0], k, frame[1]) if isinstance(frame, tuple) else frame for frame in frames]

    first = flags.startswith(("--extend", "--before", "--frames"))  # those joined have window 0
    for number, (seen, (before, missing, after)) in enumerate(zip(shown, windows, strict=True), 1):
        assert seen.labels == [7, 3] and seen.config.sample_steps == 3
        if not (before or after):  # the clip that --frames alone begins with
            assert seen.way is from_noise and seen.indices is None
            continue
        window = number - (1 if flags.startswith("--frames") else 0) if first else 0
        assert seen.way is (complete if given else inpaint) and seen.indices == [window * 2**32, window * 2**32 + 1]
        known = seen.known.expand(8, 1, 1).flatten().tolist()
        assert known == [True] * len(before) + [False] * missing + [True] * len(after)
        assert seen.picture.shape == (16, 1, 8, 8, 12)  # as many as `sample` fills a batch up to
        for k in range(2):
            frames = to_uint8(seen.picture[k, 0]).numpy().astype(int)
            assert greys_of(frames[known]) == expected([*before, *after], k)
    with Image.open("out.png") as picture:
        for k in range(2):
            frames = []
            for number in range(picture.n_frames):
                picture.seek(number)
                frames.append(np.asarray(picture, dtype=int)[2:58:7, 2 + 86 * k:86 + 86 * k:7])
            assert greys_of(np.stack(frames)) == expected(clip, k)


def save_wide(path, pixels):
    """A picture of 24 x 8 pixels whose middle half, which is what a model of 12 x 8 sees, is `pixels`."""
    frame = np.random.default_rng(0).integers(0, 256, (8, 24)).astype(np.uint8)
    frame[:, 6:18] = pixels
    Image.fromarray(frame).save(path)


@pytest.mark.parametrize(("settings", "flags", "strength", "steps"), [
    ({}, [], 0.7, 3), ({}, ["--strength", 0.5], 0.5, 3), (dict(T=10, sample_steps=8), ["--strength", 0.3], 0.3, 3)])
def test_what_is_edited(call, tmp_path, shown, settings, flags, strength, steps):
    save_wide(tmp_path / "wide.png", SLOPE)
    checkpoint = make_checkpoint(tmp_path / "m.pth", image_size=(8, 12), **settings)
    code, out, err = call(inference, "--checkpoint", checkpoint, "--edit", tmp_path / "wide.png", *flags, "--labels", 7,
                          3, "--count", 2, "--out", tmp_path / "a.png")
    assert code == 0 and f"with {steps} steps" in out, err
    seen, = shown
    assert (seen.way, seen.strength, seen.labels, seen.config.sample_steps) == (edit, strength, [7, 3, 7, 3], steps)
    assert np.array_equal(to_uint8(seen.picture)[0, 0], SLOPE) and len(seen.picture) == 1


@pytest.mark.parametrize("clip", [False, True])
def test_what_is_completed(call, tmp_path, shown, clip):
    """Known is what is black, in every frame; the mask, not half as large as the picture, is stretched over it."""
    settings = WIDE if clip else dict(image_size=(8, 12))
    save_wide(tmp_path / "wide.png", SLOPE)
    save_frames(tmp_path / "ten.png", *A)
    mask = np.random.default_rng(1).integers(0, 256, (8, 12)).astype(np.uint8)
    save_wide(tmp_path / "mask.png", mask)
    with Image.open(tmp_path / "mask.png") as image:
        image.resize((48, 16), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    if clip:
        Image.fromarray(mask).save(tmp_path / "mask.png")
    code, _, err = call(inference, "--checkpoint", make_checkpoint(tmp_path / "m.pth", **settings), "--inpaint",
                        tmp_path / ("ten.png" if clip else "wide.png"), "--mask", tmp_path / "mask.png", "--labels", 7,
                        3, "--count", 1, "--out", tmp_path / "a.png")
    assert code == 0, err
    seen, = shown
    assert (seen.way, seen.labels, hasattr(seen, "rounds")) == (inpaint, [7, 3], False)
    known = seen.known.expand(seen.picture.shape)[0, 0]
    assert torch.equal(known, torch.from_numpy(mask < 128).expand_as(known)) and seen.known.dtype == torch.bool
    frames = to_uint8(seen.picture)[0, 0].numpy().astype(int)
    assert greys_of(frames) == A[:8] if clip else np.array_equal(frames, SLOPE)


def test_what_is_known_of_latents():
    """Those of which all pixels are."""
    class Mean:
        def encode(self, x):
            return F.avg_pool2d(x, 4).repeat(1, 2, 1, 1), None

    config = Config(**dict(image_size=(8, 12), channels=1, num_classes=2, vae="x", latent_shape=(2, 2, 3), clamp=False,
                           latent_mean=(0.0,), latent_std=(1.0,), patch_size=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "find_vae", lambda *_: Mean())
        known = torch.ones(1, 1, 8, 12, dtype=torch.bool)
        known[0, 0, 3, 4] = known[0, 0, 4:, 8:] = False
        latents, of = inference.from_images(torch.rand(1, 1, 8, 12), config, known)
    assert latents.shape == (1, 2, 2, 3) and of.dtype == torch.bool
    assert of[0, 0].tolist() == [[True, False, True], [True, True, False]]


def test_what_a_morph_is_made_of(call, tmp_path, shown):
    """The embeddings lie evenly between those of the two labels, from the first to the second; each row has the noise
    of an image of --seed, and goes from there to that of --to-seed on a quarter of a circle."""
    checkpoint = make_checkpoint(tmp_path / "m.pth", image_size=(8, 12))
    table = load_model(checkpoint, precision="fp32")[0].label_embedding.weight
    flags = ["--checkpoint", checkpoint, "--morph", "3:8", "--count", 2, "--seed", 5, "--precision", "fp32", "--out",
             tmp_path / "a.png"]
    for more in ([], ["--to-seed", 9]):
        assert call(inference, *flags, *more)[0] == 0
    share = torch.arange(11)[:, None] / 10
    for seen, to_seed in zip(shown, (5, 9), strict=True):
        assert seen.labels == [*range(11)] * 2 and seen.way is from_noise and seen.model.null_label == 11
        rows = seen.model.label_embedding.weight
        torch.testing.assert_close(rows[:11], (1 - share) * table[3] + share * table[8])
        assert torch.equal(rows[[0, 10, 11]], table[[3, 8, 10]])
        here, there = (noise_source(seed, [0, 1], (1, 8, 12), "cpu")() for seed in (5, to_seed))
        found = seen.source(seen.config.seed, list(range(22)), (1, 8, 12), "cpu")().unflatten(0, (2, 11))
        angles = (torch.arange(11) / 10 * np.pi / 2).view(11, 1, 1, 1)
        for k in range(2):
            way = here[k] if to_seed == 5 else angles.cos() * here[k] + angles.sin() * there[k]
            torch.testing.assert_close(found[k], way.expand(11, -1, -1, -1))


def test_size_and_count_reach_the_sampler(call, tmp_path, shown):
    checkpoint = make_checkpoint(tmp_path / "m.pth", **WIDE, sizes=((2, 8, 4), (4, 16, 8)))
    for asked, shape in ((None, (1, 8, 8, 12)), ("2x8x4", (1, 2, 8, 4)), ("4x16x8", (1, 4, 16, 8))):
        code, out, _ = call(inference, "--checkpoint", checkpoint, "--labels", 7, 3, "--count", 3,
                            *(["--size", asked] if asked else []), "--out", tmp_path / "a.png")
        assert code == 0 and f"6 clips of {shape[1]} frames" in out
        assert shown[-1].shape == shape and shown[-1].labels == [7, 3] * 3
        assert size(tmp_path / "a.png")[0] == tuple(2 + n * (m * round(56 / shape[2]) + 2)
                                                   for n, m in ((2, shape[3]), (3, shape[2])))


@pytest.mark.parametrize("given", [0.0, 0.5])
def test_longer_clips(call, tmp_path, monkeypatch, given):
    """What is given stays as it is, in its place; a model that has not learned from given frames repaints."""
    monkeypatch.chdir(tmp_path)
    checkpoint = make_checkpoint(tmp_path / "clips.pth", **CLIPS, given=given)
    a, b = save_clip("a.png", 10, 20, 30, 40, 50, 60), save_clip("b.png", 200, 210, 220)
    flags = ["--checkpoint", checkpoint, "--labels", 7, "--count", 1, "--out", "new.png"]

    def draw(*more):
        code, out, err = call(inference, *flags, *more)
        assert code == 0, err
        frames = drawn_frames("new.png")
        assert f"1 clips of {len(frames)} frames" in out
        return frames

    greys, others = [10, 20, 30, 40, 50, 60], [200, 210, 220]
    assert draw("--extend", a)[:6] == greys and len(draw("--extend", a)) == 8
    assert len(draw("--extend", a, "--frames", 13)) == 13 and draw("--extend", a, "--frames", 13)[:6] == greys
    assert draw("--extend", a, "--frames", 13)[:8] == draw("--extend", a)  # the window slides on
    assert draw("--before", a)[-6:] == greys and draw("--before", a, "--frames", 11)[-6:] == greys
    assert draw("--before", a) != draw("--extend", a)
    found = draw("--between", a, b)
    assert found[:6] == greys and found[-3:] == others and len(found) == 6 + 2 + 3
    found = draw("--loop", a)
    assert found[:6] == greys and len(found) == 8
    assert len(draw("--frames", 9)) == 9 and draw("--frames", 9)[:4] == draw()
    save_clip("one.png", 90)
    assert draw("--extend", "one.png")[0] == 90 and len(draw("--extend", "one.png", "--frames", 6)) == 6


def test_longer_clips_are_a_function_of_seed_and_index(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, config = load_model(make_checkpoint(tmp_path / "clips.pth", **CLIPS, given=0.5))
    args = argparse.Namespace(extend=save_clip("a.png", 10, 20, 30), before=None, between=None, loop=None, frames=11)
    clips = inference.draw_longer(model, config, [3, 7], 10, args)
    assert clips.shape == (20, 1, 11, 8, 8)
    assert torch.equal(inference.draw_longer(model, config, [3, 7], 1, args), clips[:2])
    assert (clips[0] != clips[2]).any()
    assert len({clips[0, :, i:i + 2].numpy().tobytes() for i in (3, 5, 7, 9)}) == 4  # each window has noise of its own


@pytest.mark.parametrize(("flags", "words"), [
    (["--extend", "a.png", "--loop", "a.png"], ["--extend and --loop"]), (["--extend", "no.gif"], ["no.gif"]),
    (["--edit", "a.png", "--before", "a.png"], ["--edit and --before"]), (["--frames", 0], ["--frames"]),
    (["--loop", "a.png", "--frames", 9], ["--frames"]), (["--between", "a.png"], ["--between"]),
    (["--frames", 99999], ["10,000 frames"]), (["--extend", "a.png", "--size", "2x8x8"], ["--size"])])
def test_bad_flags_of_longer_clips(call, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    save_clip("a.png", 10, 20, 30)
    make_checkpoint(tmp_path / "clips.pth", **CLIPS)
    assert_refused(call(inference, "--checkpoint", "clips.pth", *flags), *words)
    make_checkpoint(tmp_path / "images.pth")
    assert_refused(call(inference, "--checkpoint", "images.pth", "--frames", 9), "for clips", "draws images")


def test_the_sprites_that_come_with_the_repository(call, tmp_path, monkeypatch):
    """From any folder: a character in the middle of each picture, seen from the side that was asked for."""
    monkeypatch.chdir(tmp_path)
    model, config = load_model(SPRITES, precision="fp32")
    config = dataclasses.replace(config, vae=str(SPRITES.parent / config.vae))
    names = [config.class_names.index(name) for name in ("walk front", "walk left", "walk right")]
    images = inference.to_images(inference.generate(model, config, torch.tensor(names * 8)), config).float()
    assert images.shape == (24, 3, 64, 64) and images[:, :, :, :12].mean() < 8 < 60 < images[:, :, 30:50, 28:36].mean()
    front, left, right = (images[i::3].mean(dim=0) for i in range(3))
    asymmetry = [(view - view.flip(2)).abs().mean() for view in (front, left, right)]
    assert asymmetry[0] < 0.7 * min(asymmetry[1:])
    assert (left.flip(2) - right).abs().mean() < 0.7 * (left - right).abs().mean()
    assert call(inference, "--checkpoint", SPRITES, "--labels", "walk left", "--count", 2)[0] == 0
    with Image.open("samples.png") as picture:
        assert picture.mode == "RGB"
    assert sum(path.stat().st_size for path in [SPRITES, *(SPRITES.parent / "vae_sprites").iterdir()]) < 3.1e6


@pytest.mark.parametrize(("flags", "words"), [
    (["--labels", "7", "--count", 1200, "--out", "a.jpg"], "JPEG, 60 x 69,602 pixels"),
    (["--labels", "7", "--count", 300, "--out", "a.webp"], "WEBP, 60 x 17,402 pixels"),
    (["--labels", "7", "--strip", "--count", 300, "--out", "a.webp"], "WEBP, 640 x 17,402 pixels"),
    (["--morph", "3:8", "--count", 300, "--out", "a.webp"], "WEBP, 640 x 17,402 pixels"),
    (["--morph", "3:8", "--count", 3000, "--gif", "--out", "a.webp"], "--count 3000: draw between")])
def test_a_picture_too_large_for_its_format_is_refused_before_the_work(call, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, "sample", None)
    assert_refused(call(inference, "--checkpoint", REPOSITORY / "weights" / "mnist.pth", *flags), words)
    assert not any(tmp_path.iterdir())


def test_a_caption_of_a_megabyte_is_cut():
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    assert grid(images, 1, captions=["x" * 2**20]).tobytes() == grid(images, 1, captions=["x" * 900]).tobytes()
