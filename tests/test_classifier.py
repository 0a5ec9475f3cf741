"""The classifier of any images, from the command that trains it to the score that finds it again."""

from support.commands import UserError

import dataclasses
import itertools
import math
import os
import signal

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMALL, TINY, assert_refused, same, small_mnist
from PIL import Image

import measure.score
import train as train_script
from config import Config
from dataset import Dataset, load_dataset
from measure import classifier as module
from measure.classifier import (
    WEIGHTS,
    Classifier,
    DigitClassifier,
    accuracy_on,
    augment,
    build_classifier,
    find_classifier,
    load_classifier,
    load_parts,
    save_classifier,
    schedule,
    shift,
    train_classifier,
    where_kept,
)

COLOURS = {"blue": (30, 30, 210), "green": (30, 210, 30), "red banana": (210, 30, 30)}


def square(k, i, size):
    """A square of the k-th colour on noise, uint8 (size, size, 3), another for each i."""
    random = np.random.default_rng(100 * k + i)
    image = random.integers(0, 40, (size, size, 3), dtype=np.uint8)
    top, left = random.integers(0, size // 2, 2)
    image[top:top + size // 2, left:left + size // 2] += np.array([*COLOURS.values()][k], dtype=np.uint8)
    return image


def make_folder(root, count, size=12, start=0):
    for k, name in enumerate(COLOURS):
        (root / name).mkdir(parents=True)
        for i in range(start, start + count):
            Image.fromarray(square(k, i, size)).save(root / name / f"{i:03d}.png")
    return root


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder with 20 images of each of three colours in mine/."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "mine", 20)
    return tmp_path


def as_user(folder):
    """The options of `command` that run it in this folder."""
    return dict(cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)})


FOLDER = ["--dataset", "folder", "--data-dir", "mine"]
MINE, PARTS = (Config(dataset="folder", data_dir=name) for name in ("mine", "parts"))


# The network

@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 9), (3, 32, 32), (3, 64, 40), (4, 100, 33), (3, 256, 256)])
def test_the_network_follows_from_the_images(shape):
    network = Classifier(shape, 7).eval()
    x = torch.randn(3, *shape)
    features = network.features(x)
    assert features.shape == (3, 64) and network(x).shape == (3, 7)
    assert features.min() < 0  # before the ReLU
    torch.testing.assert_close(network.head(features), network(x))
    grid = network.body[0](x).shape[2:]
    assert max(grid) <= 32 and (max(shape[1:]) > 32 or tuple(grid) == shape[1:])


def test_its_file_is_small():
    for shape, classes in (((3, 32, 32), 10), ((3, 64, 64), 9), ((3, 256, 256), 1000)):
        assert sum(weight.numel() for weight in Classifier(shape, classes).state_dict().values()) * 2 < 3e6


def test_which_network():
    assert type(build_classifier("mnist", (1, 28, 28), 10)) is DigitClassifier
    for name, shape in (("mnist", (3, 28, 28)), ("mnist", (1, 8, 8)), ("FashionMNIST", (1, 28, 28)),
                        ("folder", (1, 28, 28))):
        assert type(build_classifier(name, shape, 10)) is Classifier


def test_shifts_keep_what_the_image_shows():
    """Each by its own whole number of pixels, up to an eighth of the side; never mirrored unless that is asked for."""
    images = torch.randint(0, 256, (400, 3, 16, 24), dtype=torch.uint8)
    for flips in (False, True):
        moved = shift(images, torch.Generator().manual_seed(0), flips)
        assert moved.shape == images.shape and moved.dtype == torch.uint8
        found, mirrored = set(), 0
        for image, result in zip(images, moved, strict=True):
            centre = result[:, 2:-2, 3:-3]
            places = [(y, x, way) for y in range(-2, 3) for x in range(-3, 4) for way in ((0, 1) if flips else (0,))
                      if torch.equal((image.flip(2) if way else image)[:, 2 + y:14 + y, 3 + x:21 + x], centre)]
            assert len(places) == 1
            found.add(places[0][:2])
            mirrored += places[0][2]
        assert len(found) == 35 and (150 < mirrored < 250 if flips else not mirrored)


def test_the_border_is_repeated():
    images = torch.arange(8, dtype=torch.uint8).view(1, 1, 1, 8).expand(50, 1, 8, 8)
    rows = {tuple(image[0, 0].tolist()) for image in shift(images, torch.Generator().manual_seed(0))}
    assert rows == {(0, 0, 1, 2, 3, 4, 5, 6), tuple(range(8)), (1, 2, 3, 4, 5, 6, 7, 7)}


@pytest.mark.parametrize(("count", "steps"), [(20, 1000), (1000, 1000), (50_000, 3900), (80_000, 5000),
                                              (1_280_000, 10_000)])
def test_few_images_come_more_often(count, steps):
    data = Dataset("folder", torch.empty(count, 3, 1, 1, dtype=torch.uint8), None, ["a", "b"])
    epochs, batch_size = schedule(data)
    assert batch_size >= 2 and steps <= epochs * (count // batch_size) < 1.2 * steps + 100


def test_mirrored_images_are_learned_only_where_asked_for(monkeypatch):
    seen, images = [], torch.zeros(8, 3, 8, 8, dtype=torch.uint8)
    monkeypatch.setattr(module, "shift", lambda images, generator, flips: seen.append(flips) or images)
    data = Dataset("folder", images, torch.arange(8) % 2, ["a", "b"])
    for flips in (False, True):
        train_classifier(data, epochs=1, flips=flips)
    assert set(seen[:len(seen) // 2]) == {False} and set(seen[len(seen) // 2:]) == {True}


# Its data

def test_what_has_no_test_part_has_some_held_out(here, capsys):
    train, test = load_parts(MINE)
    assert train.fingerprint == load_dataset("folder", "mine").fingerprint  # train.py learns just the same ones
    assert torch.equal(train.images, load_dataset("folder", "mine").images)
    for data, places in ((train, [i for i in range(20) if i not in (9, 19)]), (test, [9, 19])):
        assert data.labels.tolist() == [k for k in range(3) for _ in places]
        for image, (k, i) in zip(data.images, itertools.product(range(3), places), strict=True):
            assert np.array_equal(image.permute(1, 2, 0), square(k, i, 12))
    assert "mine has no test/: every tenth image of each class, 6 in all" in capsys.readouterr().err
    assert train.summary.endswith("; every tenth image of each class, 6 in all, is held out to test on")
    make_folder(here / "parts" / "train", 3)
    with pytest.raises(UserError, match="no test/, and no class of 10"):
        load_parts(PARTS)


def test_training_says_what_it_holds_out(call, here):
    code, out, err = call(train_script, *TINY, *FOLDER, "--image-size", 12, "--steps", 2, "--patch-size", 4)
    assert code == 0, err
    assert "data      folder: 54 images of 12 x 12, colour" in out and "each class, 6 in all, is held out" in out
    make_folder(here / "few", 9)
    out = call(train_script, *TINY, *FOLDER[:2], "--data-dir", "few", "--steps", 2, "--run-dir", "b")[1]
    assert "27 images" in out and "held out" not in out  # too few to do without any
    assert load_dataset("folder", "few").summary.endswith("red banana")


def test_a_test_part_that_is_there_is_taken(here, capsys):
    make_folder(here / "parts" / "train", 3)
    make_folder(here / "parts" / "test", 2, size=16, start=50)
    train, test = load_parts(PARTS)
    assert train.images.shape == (9, 3, 12, 12) and test.images.shape == (6, 3, 12, 12)  # of one size
    assert capsys.readouterr().err == ""
    assert [len(part.images) for part in load_parts(Config(data_dir=SMALL))] == [1500, 297]


# The commands

def test_it_is_trained_and_found_again(command, call, here):
    process = command("measure.classifier", *FOLDER, "--epochs", 20, "--device", "cpu", **as_user(here))
    assert process.returncode == 0, process.stderr
    name, = os.listdir("classifiers")
    assert name == f"folder-{load_dataset('folder', 'mine').fingerprint}.pth"
    assert process.stdout.startswith(f"classifiers/{name}: reads 100.00% of 6 test images right")
    assert "every tenth" in process.stderr and "images/s" in process.stderr
    os.mkdir("fakes")
    for i in range(30):
        Image.fromarray(square(i % 3, 50 + i, 12)).save(f"fakes/{i:06d}_{i % 3}.png")
    process = command("measure.score", "--images", "fakes", *FOLDER, "--pictures", "pictures", **as_user(here))
    assert process.returncode == 0, process.stderr
    rows = {line[:30].strip(): line[30:].split() for line in process.stdout.splitlines()}
    assert rows["30 images"] == ["fake", "real"] and rows["read as asked for"] == ["1.000", "1.000"]
    assert "red banana      10          1.000" in process.stdout
    for picture in ("nearest.png", "worst.png"):
        with Image.open(here / "pictures" / picture) as image:
            assert image.mode == "RGB"

    # Other images, other classifier: one pixel is enough
    Image.fromarray(square(0, 0, 12) ^ 1).save("mine/blue/000.png")
    assert_refused(call(measure.score, "--images", "fakes", *FOLDER), "no classifier has learned these 54 images",
                   "python -m measure.classifier --dataset folder --data-dir mine --image-size 12 --channels 3")
    other = where_kept(load_dataset("folder", "mine"))
    os.replace(f"classifiers/{name}", other)
    assert_refused(call(measure.score, "--images", "fakes", *FOLDER), "reads other images of 'folder', not these")
    other.write_bytes(other.read_bytes()[:-1000])
    assert_refused(call(measure.score, "--images", "fakes", *FOLDER), other, "cut short")


def test_each_flag_reaches_the_training(call, here, monkeypatch):
    seen = {}

    def watched(data, epochs, **options):
        seen.update(options, data=data, epochs=epochs)
        return Classifier(data.shape, 3).eval()

    monkeypatch.setattr(module, "train_classifier", watched)
    code, out, err = call(module, *FOLDER, "--image-size", "6x8", "--channels", 1, "--flips", "--seed", 5, "--epochs",
                          2, "--device", "cpu", "--out", "x.pth")
    assert code == 0 and out.startswith("x.pth: reads"), err
    assert seen.pop("data").shape == (1, 6, 8) and not (here / "classifiers").exists()
    assert seen == dict(epochs=2, flips=True, seed=5, device=torch.device("cpu"))
    assert torch.load("x.pth", weights_only=True)["shape"] == [1, 6, 8]


def test_digits_are_turned_scaled_and_shifted(monkeypatch):
    """By 10 degrees, a tenth and a 14th of the side at the most: where each pixel comes from."""
    monkeypatch.setattr(torch, "rand", lambda *size, **options: torch.ones(size))
    across = (torch.arange(29.0) * 2 + 1) / 29 - 1
    x, y = across.expand(29, 29), across[:, None].expand(29, 29)
    found = augment(torch.stack([x, y])[:, None], None)[:, 0]
    cos, sin = (1.1 * function(math.radians(10)) for function in (math.cos, math.sin))
    inner = slice(9, 20)
    for part, wanted in zip(found, (cos * x - sin * y + 1 / 7, sin * x + cos * y + 1 / 7), strict=True):
        torch.testing.assert_close(part[inner, inner], wanted[inner, inner], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "smoothing"), [("mnist", 0), ("folder", 0.1)])
def test_the_labels_of_what_are_no_digits_are_smoothed(name, smoothing, monkeypatch):
    """And what is random at a step follows from the seed."""
    seen, seeds, loss = set(), [], module.F.cross_entropy
    monkeypatch.setattr(module.F, "cross_entropy", lambda *args, **options: (
        seen.add(options["label_smoothing"]), loss(*args, **options))[1])
    for change in ("augment", "shift"):
        original = getattr(module, change)
        monkeypatch.setattr(module, change, lambda x, generator, *rest, original=original: (
            seeds.append(generator.initial_seed()), original(x, generator, *rest))[1])
    data = Dataset(name, torch.zeros(20, 1, 28, 28, dtype=torch.uint8), torch.arange(20) % 10, [*"0123456789"])
    train_classifier(data, epochs=1, seed=5)
    assert seen == {smoothing} and {*seeds} == {5}


def test_all_images_are_read():
    """More than are read at once."""
    class Zero(torch.nn.Linear):
        shape = (1, 2, 2)

        def features(self, x):
            return x.flatten(1)

        def head(self, x):
            return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)

    data = Dataset("", torch.zeros(750, 1, 2, 2, dtype=torch.uint8), (torch.arange(750) >= 600).long(), ["a", "b"])
    assert accuracy_on(Zero(1, 1), data) == pytest.approx(0.8)


def test_what_is_random_follows_from_the_seed():
    data = Dataset("folder", torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8), torch.arange(20) % 2, ["a", "b"])
    first, again, other = (train_classifier(data, epochs=1, seed=seed).head[1].weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_label_that_is_none(call, here):
    save_classifier(here / "x.pth", Classifier((3, 12, 12), 3), load_dataset("folder", "mine"), 0.0)
    (here / "classifiers").mkdir()
    fingerprint = load_dataset("folder", "mine").fingerprint
    save_classifier(here / "classifiers" / f"folder-{fingerprint}.pth", Classifier((3, 12, 12), 3),
                    load_dataset("folder", "mine"), 0.0)
    for i in range(10):
        Image.fromarray(square(0, i, 12)).save(here / f"IMG_{i + 1}.png")
    assert_refused(call(measure.score, "--images", here, *FOLDER), "ends in _10", "labels of folder are 0 to 2")
    assert_refused(call(measure.score, "--images", here), "12 x 12 pixels", "--dataset")


def test_ctrl_c_leaves_nothing(call, here, monkeypatch):
    monkeypatch.setattr(module, "shift", lambda *args: signal.raise_signal(signal.SIGINT))
    code, out, err = call(module, *FOLDER)
    assert code == 130 and out == "" and err.endswith("stopped\n") and "Traceback" not in err
    assert os.listdir("classifiers") == []


def test_bad_flags(call, here):
    assert_refused(call(module, *FOLDER, "--epochs", 0), "--epochs 0")
    assert_refused(call(module, *FOLDER, "--channels", 2), "channels is 2")
    assert_refused(call(module, "--dataset", "folder", "--data-dir", "none"), "none is not a folder")
    for name in ("green", "blue"):
        for i in range(20):
            os.remove(f"mine/{name}/{i:03d}.png")
    assert_refused(call(module, *FOLDER), "holds one class, 'red banana'")


def test_that_of_small_digits_is_kept_too(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, test = load_parts(Config(data_dir=SMALL, image_size=8))
    with pytest.raises(UserError, match=rf"classifier --dataset mnist --data-dir {SMALL} --image-size 8 --channels 1"):
        find_classifier(train, SMALL)
    code, out, err = call(module, "--data-dir", SMALL, "--image-size", 8, "--epochs", 3, "--device", "cpu")
    assert code == 0, err
    assert out.startswith(f"classifiers/mnist-{train.fingerprint}.pth: reads")
    assert f"{accuracy_on(find_classifier(train, SMALL), test):.2%} of 297" in out


def test_other_images_of_the_same_shape_are_not_read_as_digits(tmp_path, monkeypatch):
    """MNIST's classifier knows nothing of FashionMNIST, though its images have the same shape."""
    monkeypatch.chdir(tmp_path)
    data = dataclasses.replace(load_dataset("mnist", SMALL), name="FashionMNIST")
    assert where_kept(data) != WEIGHTS
    with pytest.raises(UserError, match="--dataset FashionMNIST"):
        find_classifier(data, "")


def test_the_file_of_mnist_comes_with_the_repository(parts, tmp_path):
    assert where_kept(load_dataset("mnist")) == WEIGHTS
    assert where_kept(load_dataset("mnist", channels=3)) != WEIGHTS
    data = small_mnist(image_size=28)
    assert where_kept(data) != WEIGHTS  # whose training must not write over it
    assert same(find_classifier(data, SMALL).state_dict(), load_classifier().state_dict())
    old = load_classifier(fingerprint="any")  # the file does not say of which images it is
    save_classifier(tmp_path / "new.pth", old, parts[0], 0.5)
    new = load_classifier(tmp_path / "new.pth", fingerprint=parts[0].fingerprint)
    assert all(torch.equal(a, b) for a, b in zip(old.state_dict().values(), new.state_dict().values(), strict=True))
    with pytest.raises(UserError, match="reads other images of 'mnist'"):
        load_classifier(tmp_path / "new.pth", fingerprint="those")


def test_files_that_claim_the_impossible(here):
    data = load_dataset("folder", "mine")
    path = here / "x.pth"
    save_classifier(path, Classifier((3, 12, 12), 3), data, 0.5)
    load_classifier(path, "folder", data.fingerprint)
    content = torch.load(path, weights_only=True)
    state = content["state_dict"]
    name = next(iter(state))
    for change in (dict(shape=[3, 12]), dict(shape=[3, 12, 10**9]), dict(shape=None), dict(classes=["a"]),
                   dict(classes=None), dict(state_dict={**state, name: state[name] * float("nan")}),
                   dict(state_dict={**state, "more": state[name]}), dict(dataset="mnist"), dict(format="x")):
        torch.save(content | change, path)
        with pytest.raises(UserError, match=r"x\.pth"):
            load_classifier(path, "folder", data.fingerprint)
    for shape in ([3, 12, 1025], [3, 1025, 12], [17, 12, 12], [3, 0, 12]):
        torch.save(content | dict(shape=shape), path)
        with pytest.raises(UserError, match="impossible shape"):
            load_classifier(path, "folder", data.fingerprint)


def test_what_has_learned_nothing_is_not_kept(here):
    network = Classifier((3, 12, 12), 3)
    torch.nn.init.constant_(network.head[1].bias, float("inf"))
    with pytest.raises(UserError, match="not all finite"):
        save_classifier(here / "x.pth", network, load_dataset("folder", "mine"), 0.5)
    assert not (here / "x.pth").exists()
