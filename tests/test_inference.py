from support import noise, pictures
from support.commands import UserError, resolve_precision
from support.labels import parse_labels
from support.noise import noise_source
from support.pictures import check_picture, grid, save_picture
from support.sizes import batch_that_fits

import argparse
import dataclasses
import hashlib
import shutil
import threading
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import ONE_GIGABYTE, REPOSITORY, SHIPPED, assert_refused, flags_of, load, make_checkpoint, size, tile
from PIL import Image, ImageDraw

import generator
import inference
import latent.draw
import train
from config import Config
from dataset import to_uint8
from diffusion import SAMPLERS
from inference import draw, generate, load_for_sampling, sample, sampling_parser
from latent.config import IMAGES, LatentConfig
from measure.classifier import load_classifier
from record.checkpoint import CHECKPOINTS, find_checkpoint, save_checkpoint

SPRITES = REPOSITORY / "weights" / "sprites.pth"
DIGITS = tuple("0123456789")


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
    monkeypatch.setattr("record.checkpoint.CHECKPOINTS", (CHECKPOINTS[0], tmp_path / "shared.pth"))
    code, out, _ = call(inference, "--strip")
    assert code == 0 and out.endswith(f"drawn with {tmp_path / 'shared.pth'}\n")
    assert (tmp_path / "strip.png").exists()
    (tmp_path / "shared.pth").unlink()
    assert_refused(call(inference), "no checkpoint", "train.py")


def test_a_run_folder_is_its_model(call, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(inference, "--checkpoint", trained, "--device", "cpu")
    assert code == 0 and out.endswith(f"drawn with {trained / 'model.pth'}\n")
    assert draw(checkpoint=trained, count=8, device="cpu").tobytes() == Image.open("samples.png").tobytes()
    (tmp_path / "run_1").mkdir()
    assert_refused(call(inference, "--checkpoint", "run_1"), "run_1 holds no model.pth")
    assert_refused(call(inference, "--checkpoint", ""), "--checkpoint: is empty")
    assert find_checkpoint() == SHIPPED


@pytest.mark.parametrize("content", [b"", b"random bytes", b"half"])
def test_checkpoint_that_is_none(call, trained, tmp_path, content):
    whole = (trained / "model.pth").read_bytes()
    (tmp_path / "bad.pth").write_bytes(whole[:len(whole) // 2] if content == b"half" else content)
    assert_refused(call(inference, "--checkpoint", tmp_path / "bad.pth", "--out", tmp_path / "a.png"), "bad.pth")
    assert not (tmp_path / "a.png").exists()


def test_same_seed_same_picture(call, trained, tmp_path):
    def draw(*flags):
        code, _, err = call(inference, "--checkpoint", trained / "model.pth", "--out", tmp_path / "a.png", "--device",
                            "cpu", *flags)
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
    (["--sample-steps", 1001], ["T = 1000"]), (["--guidance", "nan"], ["guidance"]),
    (["--sampler", "ddim", "--eta", 2], ["eta is 2"]),
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
    for script in (train, inference, generator, latent.draw):
        code, out, _ = call(script, "--help")
        assert code == 0
        for flag in ("--sampler", "--sample-steps", "--guidance", "--seed", "--device"):
            assert flag in out


def test_help_knows_that_a_model_has_its_own_defaults():
    text = " ".join(sampling_parser("").format_help().split())
    assert text.count("(default: the model's own)") == 4 and "(default: 6)" not in text and "(default: 1.4)" not in text
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
    flags = ["--checkpoint", path, "--out", tmp_path / "a.png", "--count", 2, "--device", "cpu"]
    assert_refused(call(inference, *flags, "--labels", "cow"), "'cow' is no label", "'cat', 'dog'")
    assert call(inference, *flags, "--labels", "dog", "cat", "dog")[0] == 0
    picture = np.asarray(Image.open(tmp_path / "a.png"))
    model, config = load(path)
    plain = np.asarray(grid(to_uint8(generate(model, config, torch.tensor([1, 0, 1] * 2))), 3))
    assert np.array_equal(picture[-len(plain):], plain)
    head = picture[:-len(plain)]
    columns = [head[:, 2 + 58 * i:58 + 58 * i] for i in range(3)]
    assert np.array_equal(columns[0], columns[2]) and not np.array_equal(columns[0], columns[1])
    assert head.max() > 200
    assert call(inference, *flags, "--labels", "1", "0", "1")[0] == 0
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)


def test_out_of_memory_is_one_line(command, tmp_path):
    """The noise of 20 images of 16 channels and 1024 x 1024 pixels does not fit into a gigabyte; their picture does."""
    path = make_checkpoint(tmp_path / "model.pth", image_size=1024, channels=16, patch_size=64)
    process = command("inference.py", "--checkpoint", path, "--labels", *range(4), "--count", 5, "--device", "cpu",
                      "--out", tmp_path / "a.png", prepare=ONE_GIGABYTE)
    assert_refused(process, "out of memory: lower --count")


def test_draw_for_a_notebook():
    picture = draw("31415", checkpoint=SHIPPED, device="cpu", guidance=2.0, precision="fp32")
    model, config = load(SHIPPED, precision="fp32")
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
    found = {}
    for page in (Path("latent") / name, Path(name)):
        lines = page.read_text(encoding="utf-8").splitlines()
        start = lines.index("    import torch")
        exec("\n".join(line.strip() for line in lines[start:lines.index("", start + 5)]), found)
    assert found["images"].shape == (3, 3, 64, 64) and found["images"].dtype == torch.uint8
    x = found["x"]
    assert x.shape == (3, 1, 28, 28) and x.dtype == torch.float32 and x.abs().max() <= 1 and x.max() - x.min() > 1.9
    picture = np.asarray(draw([3, 1, 4], checkpoint=SHIPPED, device="cpu"))
    for column, image in enumerate(found["config"].to_images(x)):
        assert np.array_equal(tile(picture, 0, column, scale=2), image[0])


def test_a_misspelt_setting_names_the_nearest():
    for wrong, right in (("guidanc", "guidance"), ("sample_step", "sample_steps"), ("labls", "labels"),
                         ("smapler", "sampler")):
        with pytest.raises(UserError, match=f"'{wrong}' is no setting here: is '{right}' meant"):
            draw("3", checkpoint=SHIPPED, **{wrong: 2})
    with pytest.raises(UserError, match="'xyzzy' is no setting here; there are sampler, sample_steps"):
        draw("3", checkpoint=SHIPPED, xyzzy=2)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_memory_does_not_grow_with_the_steps(monkeypatch, sampler):
    """Of the states that a sampler yields, few are alive at any time."""
    model, config = load(SHIPPED)
    original, states, most = SAMPLERS[sampler], weakref.WeakSet(), []

    def watched(*args, **options):
        for x in original(*args, **options):
            states.add(x)
            most.append(len(states))
            yield x

    monkeypatch.setitem(SAMPLERS, sampler, watched)
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
    model, config = load(SHIPPED)
    config = dataclasses.replace(config, sample_steps=20)
    states = [to_uint8(x) for x in sample(model, config, torch.tensor([3, 1]))]
    shown = inference.draw_states(model, config, [3, 1], 1, shown=11)
    assert torch.equal(shown, torch.stack(states[::2]))
    assert torch.equal(inference.draw_states(model, config, [3, 1], 1), torch.stack(states[-1:]))


def test_strip_and_animation_go_from_noise_to_image(call, tmp_path):
    model, config = load(SHIPPED)
    config = dataclasses.replace(config, sample_steps=4)
    states = [to_uint8(x) for x in sample(model, config, torch.tensor([7, 2]))]
    flags = ["--checkpoint", SHIPPED, "--sample-steps", 4, "--labels", 7, 2, "--count", 1, "--device", "cpu"]
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
    model, config = load(SHIPPED, precision=precision)
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
        model, config = load(SHIPPED, precision=precision)
        *_, x = sample(model, config, labels)
        assert x.dtype == torch.float32
        drawn.append(to_uint8(x).float())
    difference = (drawn[0] - drawn[1]).abs().mean(dim=(1, 2, 3))
    assert 0 < difference.mean() < 1 and difference.max() < 4  # of 255; two digits are at about 40


def test_draws_in_the_precision_asked_for_or_the_quicker_one():
    quicker = resolve_precision("auto", torch.device("cpu"))
    for given, wanted in (([], quicker), (["--precision", "bf16"], "bf16"), (["--precision", "fp32"], "fp32")):
        words = ["--checkpoint", str(SHIPPED), "--device", "cpu", *given]
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


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_draw_the_same_noise(threads, monkeypatch):
    """Each its share of the images, and of no image a part; by none but this one where there is little to do."""
    workers, before = set(), torch.get_num_threads()

    class Watched(np.random.Generator):
        def standard_normal(self, *args, **options):
            workers.add(threading.get_ident())
            return super().standard_normal(*args, **options)

    keys = [(seed, k) for seed in (0, 2**63 - 1) for k in (5, 2**32 + 1, 0)] + [(1, 1)]
    expected = np.stack([np.random.Generator(np.random.Philox(key=key)).standard_normal((2, 3, 4), dtype=np.float32)
                         for key in keys])
    monkeypatch.setattr(np.random, "Generator", Watched)
    monkeypatch.setattr(noise, "WORTH", 40)
    numbers = np.empty((7, 2, 3, 4), np.float32)
    torch.set_num_threads(threads)
    try:
        noise.fill_with_noise([noise.random_stream(*key) for key in keys], numbers)
        assert np.array_equal(numbers, expected) and (threading.get_ident() in workers) == (threads == 1)
        workers.clear()
        noise.fill_with_noise([noise.random_stream(*key) for key in keys[:3]], numbers[:3])
        assert np.array_equal(numbers[:3], expected[:3]) and workers == {threading.get_ident()}
    finally:
        torch.set_num_threads(before)


def test_noise_is_drawn_ahead_only_when_more_is_asked_for(monkeypatch):
    class Counting(np.random.Generator):
        def standard_normal(self, *args, out=None, **options):
            drawn.append(len(out))
            return super().standard_normal(*args, out=out, **options)

    monkeypatch.setattr(np.random, "Generator", Counting)
    model, config = load(SHIPPED)
    for sampler, steps, blocks in (("dpm", 8, [1]), ("ddim", 8, [1]), ("ddpm", 8, [1, 7]), ("ddpm", 20, [1, 8, 8, 3])):
        drawn = []
        generate(model, dataclasses.replace(config, sampler=sampler, sample_steps=steps), torch.zeros(16).long())
        assert drawn == [size for size in blocks for _ in range(16)], sampler
    drawn = []
    noise = noise_source(0, range(2), (3, 1024, 1024), "cpu", 50)  # large ones: not many at once
    noise(), noise()
    assert drawn == [1, 1, 2, 2]


def test_each_flag_reaches_the_drawing(call, tmp_path, monkeypatch):
    """What is drawn of a run folder's model, how, and what is written; without flags, as the model has it."""
    asked = dict(sampler="ddim", sample_steps=4, guidance=3.0, eta=0.5, seed=7, precision="bf16")
    assert flags_of(inference) == {*asked, "checkpoint", "device", "labels", "count", "out", "strip", "gif"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    make_checkpoint(Path("own/model.pth"), guidance=1.5, sampler="heun", sample_steps=20)
    seen, original = [], inference.pick_device
    monkeypatch.setattr(inference, "pick_device", lambda name: seen.append(name) or original("cpu"))

    def sample(model, config, labels):
        seen.extend([config, next(model.parameters()).dtype, labels.tolist()])
        for step in range(config.sample_steps + 1):
            yield torch.full((len(labels), *config.input_shape), 2 * step / config.sample_steps - 1)

    def drawn(*flags):
        seen.clear()
        code, out, err = call(inference, "--checkpoint", "own", *flags)
        assert code == 0, err
        return *seen, out

    monkeypatch.setattr(inference, "sample", sample)
    words = [word for name, value in asked.items() for word in (f"--{name.replace('_', '-')}", value)]
    words += ["--device", "cpu", "--labels", 3, 1, "--count", 5, "--out", "x.png"]
    device, config, dtype, labels, out = drawn(*words)
    assert {name: getattr(config, name) for name in asked} == asked and device == "cpu" and dtype == torch.bfloat16
    assert labels == [3, 1] * 5 and size("x.png") == ((2 + 2 * 58, 2 + 5 * 58), "L", 1)
    assert out == ("x.png: 10 images, ddim with 4 steps, guidance 3, seed 7, drawn with own/model.pth\n")
    device, config, _, labels, _ = drawn()
    assert (config.sampler, config.sample_steps, config.guidance, config.seed, device) == ("heun", 20, 1.5, 0, None)
    assert labels == [*range(10)] * 8 and size("samples.png") == ((2 + 10 * 58, 2 + 8 * 58), "L", 1)
    assert drawn("--strip", "--labels", 4)[3] == [4] and size("strip.png") == ((2 + 11 * 58, 2 + 58), "L", 1)
    greys = np.asarray(Image.open("strip.png"))[30, 30::58]
    assert greys.tolist() == pytest.approx([25.5 * step for step in range(11)], abs=1)  # even, from noise to image
    assert drawn("--gif", "--labels", 4, "--count", 2)[3] == [4, 4]
    with Image.open("samples.gif") as image:
        times = []
        for frame in range(image.n_frames):
            image.seek(frame)
            times.append(image.info["duration"])
    assert image.size == (2 + 58, 2 + 2 * 58) and times == [70] * 20 + [2000]  # 1,500 / 21, in hundredths of a second


def test_guidance_eta_seed_and_steps_reach_the_sampler(monkeypatch):
    asked = []

    def sampler(denoise, x, steps, noise, eta=None):
        asked.append((len(steps), eta))
        yield denoise(x, 500)

    model, config = load(SHIPPED, precision="fp32")
    monkeypatch.setitem(SAMPLERS, "ddim", sampler)
    y = torch.arange(16) % 10
    config = dataclasses.replace(config, sampler="ddim", eta=0.3, sample_steps=7, seed=5, guidance=3.0)
    x = noise_source(5, range(16), (1, 28, 28), "cpu")()
    t, null = torch.full((16,), 500), torch.full((16,), 10)
    expected = (model(x, t, null) + 3 * (model(x, t, y) - model(x, t, null))).clamp(-1, 1)
    torch.testing.assert_close(generate(model, config, y), expected, rtol=1e-3, atol=1e-3)
    assert asked == [(7, 0.3)]


def test_states(trained):
    """The noise first, then every step; the last one within the range of images."""
    model, config = load(trained / "model.pth")
    states = list(sample(model, config, torch.arange(4)))
    assert len(states) == config.sample_steps + 1
    assert torch.equal(states[0], noise_source(0, range(4), (1, 8, 8), "cpu")())
    assert states[-1].abs().max() <= 1


@pytest.mark.parametrize("guidance", [1.0, 1.2])
def test_the_shipped_weights_draw_what_they_are_asked_for(guidance):
    """Read by the classifier that comes with the repository, which has never seen a drawn digit. The weights that were
    drawn as noise, or digits beside those asked for, would be at 10 %."""
    model, config = load(SHIPPED)
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
    # Attention that stores its weights takes the most memory of many tokens: 4 bytes for each pair and head, twice
    thin = Config(image_size=64, channels=1, num_classes=10, patch_size=1, hidden_size=32, num_heads=8)
    most = 32e9 / (4 * 2 * 4096**2 * 8)
    assert 0.95 * most < batch_that_fits(thin, torch.device("cuda", 1)) < most
    huge = Config(image_size=1024, channels=16, num_classes=10, patch_size=4, hidden_size=4096)
    assert batch_that_fits(huge, torch.device("cpu")) == 1


def test_what_a_model_is_drawn_with(tmp_path):
    """Its own settings, and those that are asked for, of each kind that will do; not the seed of its training."""
    for of in (Config, LatentConfig):
        config = of(image_size=8, channels=1, num_classes=2, patch_size=4, hidden_size=8, depth=1, num_heads=2, seed=5,
                    guidance=3.0, sample_steps=2)
        path = tmp_path / f"{of.kind}.pth"
        save_checkpoint(path, config, 0, 0.0, config.build_model().state_dict())

    def loaded(name, **flags):
        args = argparse.Namespace(checkpoint=tmp_path / name, device="cpu", **flags)
        return load_for_sampling(args, IMAGES)

    model, config = loaded("images.pth")
    assert (config.seed, config.guidance, config.sample_steps) == (0, 3.0, 2)
    assert [x.shape for x in sample(model, config, torch.tensor([1, 0, 1]))] == [(3, 1, 8, 8)] * 3
    assert loaded("images.pth", seed=7, guidance=1.0)[1] == dataclasses.replace(config, seed=7, guidance=1.0)
    assert loaded("latents.pth", spacing="linspace")[1].spacing == "linspace"
    with pytest.raises(UserError, match="--spacing says nothing to a model of images"):
        loaded("images.pth", spacing="linspace")


def test_at_most_ten_thousand_are_drawn_at_once():
    """All labels together."""
    for count, labels in ((1000, [*range(10)]), (10_000, [3]), (1, [3])):
        inference.check_count(count, labels)
    for count, labels in ((1001, [*range(10)]), (10_001, [3]), (0, [3]), (-1, [3])):
        with pytest.raises(UserError, match=f"--count {count}: draw between 1 and 10,000 images at once"):
            inference.check_count(count, labels)


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
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):  # which is no fault of the format
        patch.setattr(Image, "new", mock.Mock(side_effect=MemoryError))
        check_picture(tmp_path / "b.png")
    for ending in sorted(Image.registered_extensions()):  # none gets past the check and fails after the work
        try:
            check_picture(tmp_path / f"b{ending}")
        except UserError:
            continue
        for mode in ("L", "RGB"):
            save_picture(tmp_path / f"b{ending}", Image.new(mode, (60, 60)))


def test_the_sprites_that_come_with_the_repository(call, tmp_path, monkeypatch):
    """From any folder: a character in the middle of each picture, seen from the side that was asked for."""
    monkeypatch.chdir(tmp_path)
    args = sampling_parser("", LatentConfig).parse_args(["--checkpoint", str(SPRITES), "--precision", "fp32",
                                                             "--device", "cpu"])
    model, config = load_for_sampling(args, IMAGES)
    names = [config.class_names.index(name) for name in ("walk front", "walk left", "walk right")]
    images = config.to_images(generate(model, config, torch.tensor(names * 8))).float()
    assert images.shape == (24, 3, 64, 64) and images[:, :, :, :12].mean() < 8 < 60 < images[:, :, 30:50, 28:36].mean()
    front, left, right = (images[i::3].mean(dim=0) for i in range(3))
    asymmetry = [(view - view.flip(2)).abs().mean() for view in (front, left, right)]
    assert asymmetry[0] < 0.7 * min(asymmetry[1:])
    assert (left.flip(2) - right).abs().mean() < 0.7 * (left - right).abs().mean()
    assert call(latent.draw, "--checkpoint", SPRITES, "--labels", "walk left", "--count", 2)[0] == 0
    with Image.open("samples.png") as picture:
        assert picture.mode == "RGB"
    assert sum(path.stat().st_size for path in [SPRITES, *(SPRITES.parent / "vae_sprites").iterdir()]) < 3.1e6


@pytest.mark.parametrize(("flags", "words"), [
    (["--labels", "7", "--count", 1200, "--out", "a.jpg"], "JPEG, 60 x 69,602 pixels"),
    (["--labels", "7", "--count", 300, "--out", "a.webp"], "WEBP, 60 x 17,402 pixels"),
    (["--labels", "7", "--strip", "--count", 300, "--out", "a.webp"], "WEBP, 640 x 17,402 pixels")])
def test_a_picture_too_large_for_its_format_is_refused_before_the_work(call, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, "sample", None)
    assert_refused(call(inference, "--checkpoint", SHIPPED, *flags), words)
    assert not any(tmp_path.iterdir())


def test_a_caption_of_a_megabyte_is_cut():
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    assert grid(images, 1, captions=["x" * 2**20]).tobytes() == grid(images, 1, captions=["x" * 900]).tobytes()
