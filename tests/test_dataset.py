from support import folders, image_files, sizes
from support.commands import UserError
from support.folders import has_test_part
from support.image_files import fit, is_grey, list_images, read_clip, read_image
from support.sizes import available_memory

import dataclasses
import gzip
import http.client
import itertools
import os
import pickle
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from conftest import SMALL, small_mnist
from PIL import Image

from dataset import TORCHVISION, Dataset, load_dataset, to_float, to_uint8


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder with a made-up MNIST, whose images are not square."""
    folder = tmp_path_factory.mktemp("mnist")
    for part, count, period in (("train", 300, 241), ("t10k", 210, 251)):
        images = (np.arange(count * 28 * 20, dtype=np.uint32) % period).astype(np.uint8).reshape(count, 28, 20)
        write_idx(folder / f"MNIST/raw/{part}-images-idx3-ubyte", images)
        write_idx(folder / f"MNIST/raw/{part}-labels-idx1-ubyte", np.arange(count) * 7 % period % 10)
    return folder


def write_classes(root, names=("a", "b"), size=(9, 7), count=3, mode="L"):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.new(mode, size, 40 * i + k if mode == "L" else (40 * i + k, 100, 200)).save(root / name / f"{k}.png")
    return root


def tree(folder):
    """All that lies in a folder: names and contents."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in Path(folder).rglob("*")}


@pytest.mark.parametrize("train", [True, False])
def test_mnist_is_what_torchvision_reads(mnist, train):
    data, twin = load_dataset("mnist", mnist, train=train), torchvision.datasets.MNIST(mnist, train=train)
    assert (data.name, data.images.dtype, data.labels.dtype) == ("mnist", torch.uint8, torch.int64)
    assert torch.equal(data.images, twin.data[:, None]) and torch.equal(data.labels, twin.targets)
    assert data.classes == [*"0123456789"]


def test_mnist_comes_with_the_code(tmp_path, monkeypatch):
    """Wherever one is, the very images that all our figures are of."""
    monkeypatch.chdir(tmp_path)
    train, test = load_dataset("mnist"), load_dataset("mnist", train=False)
    assert train.images.shape == (60000, 1, 28, 28) and train.fingerprint == "1c4bb9346033fd0f"
    assert test.images.shape == (10000, 1, 28, 28) and test.fingerprint == "8cfac211b7f94417"


@pytest.mark.parametrize("place", [
    lambda folder, path: (folder / "MNIST" / "raw" / path.name, path.read_bytes()),
    lambda folder, path: (folder / "MNIST" / "raw" / f"{path.name}.gz", gzip.compress(path.read_bytes())),
    lambda folder, path: (folder / path.name, path.read_bytes()),
    lambda folder, path: (folder / f"{path.name}.gz", gzip.compress(path.read_bytes())),
    lambda folder, path: (folder / path.name, gzip.compress(path.read_bytes())),  # a browser kept the name alone
    lambda folder, path: (folder / path.name.replace("-idx", ".idx"), path.read_bytes()),
    lambda folder, path: (folder / f"{path.name.replace('-idx', '.idx')}.gz", gzip.compress(path.read_bytes())),
    lambda folder, path: (folder / path.name / path.name, path.read_bytes()),  # as Kaggle has them
    lambda folder, path: (folder / path.name.replace("-idx", ".idx") / path.name.replace("-idx", ".idx"),
                          path.read_bytes())])
def test_layouts_of_mnist(mnist, tmp_path, place):
    for file in (mnist / "MNIST" / "raw").iterdir():
        path, content = place(tmp_path, file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    for train in (True, False):
        assert load_dataset("mnist", tmp_path, train).fingerprint == load_dataset("mnist", mnist, train).fingerprint


def test_mnist_of_another_size(mnist):
    """Against a triangle filter in double precision, of which every grey is the nearest whole number."""
    data = load_dataset("mnist", mnist, train=False, image_size=(14, 10), channels=3)
    assert data.images.shape == (210, 3, 14, 10) and data.images.is_contiguous()
    assert torch.equal(data.images[:, 0], data.images[:, 1]) and torch.equal(data.images[:, 0], data.images[:, 2])
    rows, columns = (np.clip(1 - abs(np.arange(side)[None] + 0.5 - 2 * (np.arange(side // 2)[:, None] + 0.5)) / 2, 0,
                             None) for side in (28, 20))
    rows, columns = (weights / weights.sum(1, keepdims=True) for weights in (rows, columns))
    originals = load_dataset("mnist", mnist, train=False).images[::19, 0].double().numpy()
    assert abs(rows @ originals @ columns.T - data.images[::19, 0].numpy()).max() < 0.501


@pytest.mark.parametrize("name", ["mnist", "folder"])
@pytest.mark.parametrize("channels", [2, 4, -1])
def test_channels_that_no_image_has(mnist, tmp_path, name, channels):
    folder = write_classes(tmp_path / "own") if name == "folder" else mnist
    with pytest.raises(UserError, match=f"channels is {channels}, but must be 1"):
        load_dataset(name, folder, train=False, channels=channels)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: b"\0\0\x09\x03" + data[4:],
    lambda data: data[:7] + b"\x01" + data[8:], lambda data: data[:10],
    lambda data: data[:4] + bytes(12), lambda data: data[:4] + b"\xff" * 12 + data[16:]])
def test_damaged_mnist_images(mnist, tmp_path, damage, pack):
    good = mnist / "MNIST/raw/t10k-images-idx3-ubyte"
    (tmp_path / good.name).write_bytes(pack(damage(good.read_bytes())))
    with pytest.raises(UserError, match=rf"{good.name} is damaged .*: bring it back, or leave --data-dir out"):
        load_dataset("mnist", tmp_path, train=False)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:5],
                                    lambda data: data[:40] + b"xyz" + data[43:], lambda data: b"\x1f\x8b" + data])
def test_damaged_archives_of_mnist(mnist, tmp_path, damage):
    name = "t10k-images-idx3-ubyte"
    content = damage(gzip.compress((mnist / "MNIST/raw" / name).read_bytes()))
    (tmp_path / f"{name}.gz").write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}\.gz cannot be read .*: bring it back"):
        load_dataset("mnist", tmp_path, train=False)


@pytest.mark.parametrize("labels", [np.arange(210) % 11, np.arange(209) % 10])
def test_labels_of_mnist_that_do_not_fit(mnist, tmp_path, labels):
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels)
    os.link(mnist / "MNIST/raw/t10k-images-idx3-ubyte", tmp_path / "t10k-images-idx3-ubyte")
    with pytest.raises(UserError, match="does not have a label from 0 to 9 for each of its 210 images"):
        load_dataset("mnist", tmp_path, train=False)


def test_mnist_that_is_not_there(mnist, tmp_path):
    """Of four files, the one that is missing is named; what else is there instead, too."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder"):
        load_dataset("mnist", tmp_path / "file")
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=rf"train-images-idx3-ubyte, .* is neither in {folder}/MNIST/raw nor in "):
            load_dataset("mnist", folder)
    for name in ("train-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        os.link(mnist / "MNIST/raw" / name, tmp_path / name)
    for train, name in ((True, "train-labels-idx1-ubyte"), (False, "t10k-images-idx3-ubyte")):
        with pytest.raises(UserError, match=f"^{name}, gzipped or not, is neither"):
            load_dataset("mnist", tmp_path, train)
    for name, place in TORCHVISION.items():
        (tmp_path / name / place).mkdir(parents=True)
        with pytest.raises(UserError, match=f"holds no MNIST, but {name}: --dataset {name}"):
            load_dataset("mnist", tmp_path / name)


@pytest.mark.parametrize("inner", ["", "train"])
def test_folders_of_images_are_recognised(tmp_path, inner):
    write_classes(tmp_path / "own" / inner, names=("cat", "dog", "emu", "fox"), count=1)
    with pytest.raises(UserError, match=r"of images \(cat, dog, emu \.\.\.\): --dataset folder trains on those"):
        load_dataset("mnist", tmp_path / "own")


def test_mnist_beside_folders_of_images(mnist, tmp_path):
    write_classes(tmp_path)
    (tmp_path / "MNIST").symlink_to(mnist / "MNIST")
    assert len(load_dataset("mnist", tmp_path, train=False).images) == 210


def test_no_folder_is_named():
    with pytest.raises(UserError, match="one folder per class with --data-dir"):
        load_dataset("folder")


# Those of torchvision, of its layout, made up


def write_fashion(folder, name="FashionMNIST", count=8):
    """And KMNIST, whose layout is the same. Returns images and labels of the test part."""
    numbers = np.random.default_rng(0)
    for part, size in (("train", count + 3), ("t10k", count)):
        images, labels = numbers.integers(0, 256, (size, 28, 28)), numbers.integers(0, 10, size)
        write_idx(folder / name / f"raw/{part}-images-idx3-ubyte", images)
        write_idx(folder / name / f"raw/{part}-labels-idx1-ubyte", labels)
    return images[:, None], labels


def write_emnist(folder):
    """Its images lie on their side in the files."""
    images, labels = np.random.default_rng(1).integers(0, 256, (9, 28, 28)), np.array([0, 9, 10, 35, 36, 37, 46, 1, 2])
    write_idx(folder / "EMNIST/raw/emnist-balanced-test-images-idx3-ubyte", images.transpose(0, 2, 1))
    write_idx(folder / "EMNIST/raw/emnist-balanced-test-labels-idx1-ubyte", labels)
    return images[:, None], labels


def write_cifar(folder, fine=False):
    """CIFAR-10, or with fine labels CIFAR-100."""
    folder /= "cifar-100-python" if fine else "cifar-10-batches-py"
    folder.mkdir()
    images, labels = np.random.default_rng(2).integers(0, 256, (7, 3072), dtype=np.uint8), [3, 1, 4, 1, 5, 9, 2]
    (folder / ("test" if fine else "test_batch")).write_bytes(pickle.dumps(
        {"data": images, "fine_labels" if fine else "labels": labels}))
    names = {"fine_label_names": [f"f{i}" for i in range(100)]} if fine else {"label_names": [*"abcdefghij"]}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(names))
    return images.reshape(7, 3, 32, 32), np.array(labels)


def write_svhn(folder):
    """Its files call a 0 a 10."""
    images = np.random.default_rng(3).integers(0, 256, (32, 32, 3, 6), dtype=np.uint8)
    scipy.io.savemat(folder / "test_32x32.mat", {"X": images, "y": np.array([[1], [10], [3], [9], [10], [2]])})
    return images.transpose(3, 2, 0, 1), np.array([1, 0, 3, 9, 0, 2])


KNOWN = {"FashionMNIST": (write_fashion, ["T-shirt/top", "Ankle boot"]), "KMNIST": (
    lambda folder: write_fashion(folder, "KMNIST"), ["o", "wo"]), "EMNIST": (write_emnist, ["0", "t"]), "CIFAR10": (
    write_cifar, ["a", "j"]), "CIFAR100": (lambda folder: write_cifar(folder, True), ["f0", "f99"]), "SVHN": (
    write_svhn, ["0", "9"])}


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision takes what is made up for the real files, whose MD5 sums it knows."""
    for module in (torchvision.datasets.cifar, torchvision.datasets.svhn):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5: True)


@pytest.mark.parametrize("name", TORCHVISION)
def test_data_sets_of_torchvision(tmp_path, unchecked, name):
    write, ends = KNOWN[name]
    images, labels = write(tmp_path)
    data = load_dataset(name, tmp_path, train=False)
    assert data.name == name and data.settings["dataset"] == name and data.images.dtype == torch.uint8
    assert np.array_equal(data.images, images) and data.labels.tolist() == labels.tolist()
    assert data.images.is_contiguous() and data.labels.dtype == torch.int64
    assert [data.classes[0], data.classes[-1]] == ends and data.labels.max() < len(data.classes)
    small = load_dataset(name, tmp_path, train=False, image_size=(7, 14), channels=4 - data.shape[0])
    assert small.images.shape == (len(labels), 4 - data.shape[0], 7, 14)


def test_colours_become_grey_as_pillow_has_them(tmp_path, unchecked):
    images, _ = write_cifar(tmp_path)
    grey = load_dataset("CIFAR10", tmp_path, train=False, channels=1).images
    assert grey.shape == (7, 1, 32, 32)
    for image, expected in zip(images, grey[:, 0], strict=True):
        assert np.array_equal(Image.fromarray(image.transpose(1, 2, 0)).convert("L"), expected)


@pytest.fixture
def download(monkeypatch):
    """Stands in for torchvision's network: a function that sets how many of FashionMNIST's files arrive before `error`
    is raised."""
    arriving = [4, None]

    def fetch(url, download_root, filename, md5):
        if not arriving[0]:
            raise arriving[1]
        arriving[0] -= 1
        write_fashion(Path(download_root).parent.parent / "source")
        name = filename.removesuffix(".gz")
        os.replace(Path(download_root).parent.parent / "source/FashionMNIST/raw" / name, Path(download_root) / name)

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", fetch)
    return lambda *what: arriving.__setitem__(slice(None), what)


def test_what_is_not_there_is_downloaded(tmp_path, download, capsys):
    images, _ = write_fashion(tmp_path / "there")
    for _ in range(2):
        data = load_dataset("FashionMNIST", tmp_path / "new" / "folder", train=False)
        assert np.array_equal(data.images, images)
        download(0, AssertionError("it is there"))
    assert capsys.readouterr().err.splitlines() == [f"downloading FashionMNIST into {tmp_path / 'new/folder'} ..."]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "there"]


def test_a_folder_that_gets_a_download_stays_open_to_others(tmp_path, download):
    """The folder that it is downloaded into first is closed to them."""
    tmp_path.chmod(0o755)
    load_dataset("FashionMNIST", tmp_path)
    assert tmp_path.stat().st_mode & 0o777 == 0o755 and (tmp_path / "FashionMNIST" / "raw").is_dir()


@pytest.mark.parametrize("error", [RuntimeError("File not found or corrupted."), OSError(28, "No space left on device"),
                                   http.client.IncompleteRead(b""), KeyboardInterrupt()])
def test_a_download_that_breaks_off_leaves_nothing(tmp_path, download, capsys, error):
    download(3, error)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else UserError) as caught:
        load_dataset("FashionMNIST", tmp_path / "new")
    assert not list(tmp_path.iterdir())
    if not isinstance(error, KeyboardInterrupt):
        assert str(caught.value).startswith(f"FashionMNIST cannot be downloaded into {tmp_path / 'new'} (")
    assert capsys.readouterr().out == ""


def test_damaged_files_of_torchvision_stay(tmp_path, download):
    download(0, AssertionError("nothing must be downloaded"))
    write_fashion(tmp_path)
    path = tmp_path / "FashionMNIST/raw/t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="FashionMNIST is damaged in"):
        load_dataset("FashionMNIST", tmp_path, train=False)
    write_idx(path, np.zeros((5, 28, 28)))
    with pytest.raises(UserError, match=r"FashionMNIST in .* a label from 0 to 9 for each of its 5 images"):
        load_dataset("FashionMNIST", tmp_path, train=False)


def test_folder_of_classes(tmp_path):
    data = load_dataset("folder", write_classes(tmp_path / "own"))
    assert data.images.shape == (6, 1, 7, 7) and data.classes == ["a", "b"] and data.name == "folder"
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1] and data.labels.dtype == torch.int64
    assert data.images[:, 0, 3, 3].tolist() == [0, 1, 2, 40, 41, 42] and data.images.dtype == torch.uint8
    for folder in write_classes(tmp_path / "dots", size=(1, 1)), write_classes(tmp_path / "bars", size=(1, 50)):
        assert load_dataset("folder", folder).images.shape == (6, 1, 1, 1)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 3)])
def test_pixels_are_where_they_were(tmp_path, shape):
    array = np.random.default_rng(0).integers(0, 256, (5, *shape), dtype=np.uint8)
    (tmp_path / "class").mkdir()
    for i in range(5):
        Image.fromarray(array[i]).save(tmp_path / "class" / f"{i}.png")
    images = load_dataset("folder", tmp_path).images
    assert np.array_equal(images.numpy(), array.reshape(5, 8, 8, -1).transpose(0, 3, 1, 2))


def test_folder_of_the_article(tmp_path):
    """MNIST/train/<label>/*.png and MNIST/test/<label>/*.png, and labels in the order of numbers."""
    write_classes(tmp_path / "MNIST/train", names=("10", "9", "0", "B", "a"))
    write_classes(tmp_path / "MNIST/test", names=("9", "10"), count=2)
    train, test = (load_dataset("folder", tmp_path / "MNIST", train=part) for part in (True, False))
    assert train.classes == test.classes == ["0", "9", "10", "B", "a"]
    assert train.images[::3, 0, 0, 0].tolist() == [80, 40, 0, 120, 160]
    assert test.labels.tolist() == [1, 1, 2, 2] and test.images[:, 0, 0, 0].tolist() == [0, 1, 40, 41]
    write_classes(tmp_path / "MNIST/test", names=("11",))
    with pytest.raises(UserError, match=r"test/11 has no counterpart in .*train"):
        load_dataset("folder", tmp_path / "MNIST", train=False)
    write_classes(tmp_path / "half/train")
    with pytest.raises(UserError, match=r"half has no test/, and no class of 10 images or more"):
        load_dataset("folder", tmp_path / "half", train=False)


@pytest.mark.parametrize("inner", ["", "train"])
def test_every_tenth_image_is_held_out_where_there_is_no_test_part(tmp_path, inner):
    """Of each class of ten or more, in their natural order; training says so, and the two parts share none."""
    write_classes(tmp_path / "own" / inner, names=("a",), count=23)
    write_classes(tmp_path / "own" / inner, names=("b",), count=9)
    train, test = (load_dataset("folder", tmp_path / "own", train=part) for part in (True, False))
    assert test.images[:, 0, 0, 0].tolist() == [9, 19] and test.labels.tolist() == [0, 0]
    assert train.images[:, 0, 0, 0].tolist() == [i for i in range(23) if i not in (9, 19)] + [*range(9)]
    assert train.classes == test.classes == ["a", "b"] and train.fingerprint != test.fingerprint
    assert train.summary.endswith("a, b; every tenth image of each class, 2 in all, is held out to test on")
    assert "held out" not in test.summary


def test_folder_of_colours_and_sizes(tmp_path):
    write_classes(tmp_path / "own", mode="RGB", size=(20, 10))
    Image.new("L", (5, 50), 77).save(tmp_path / "own" / "b" / "a name with späces.PNG")
    data = load_dataset("folder", tmp_path / "own", image_size=8)
    assert data.images.shape == (7, 3, 8, 8)
    assert data.images[0, :, 0, 0].tolist() == [0, 100, 200]
    assert data.images[-1].unique().tolist() == [77]
    assert load_dataset("folder", tmp_path / "own").images.shape == (7, 3, 10, 10)
    assert load_dataset("folder", tmp_path / "own", image_size=8, channels=1).images.shape == (7, 1, 8, 8)


@pytest.mark.parametrize("odd", range(6))
def test_one_image_of_colour_makes_all_of_colour(tmp_path, odd):
    write_classes(tmp_path / "own")
    assert load_dataset("folder", tmp_path / "own").images.shape[1] == 1
    Image.new("RGB", (9, 7), (1, 2, 3)).save(tmp_path / "own" / "ab"[odd // 3] / f"{odd % 3}.png")
    data = load_dataset("folder", tmp_path / "own")
    assert data.images.shape == (6, 3, 7, 7) and data.images[odd, :, 0, 0].tolist() == [1, 2, 3]


def test_folder_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not a folder"):
        load_dataset("folder", tmp_path / "missing")
    with pytest.raises(UserError, match="no images"):
        load_dataset("folder", tmp_path)
    write_classes(tmp_path / "own")
    for flags in ({}, {"image_size": 4}, {"image_size": 4, "channels": 1}):
        (tmp_path / "own" / "a" / "1.png").write_bytes(b"not a picture")
        with pytest.raises(UserError, match=r"1\.png cannot be read as an image"):
            load_dataset("folder", tmp_path / "own", **flags)
    with pytest.raises(UserError, match=r"1\.png is not a folder"):
        load_dataset("folder", tmp_path / "own" / "a" / "1.png")

    listed = Path.iterdir  # root may list every folder, so a refusal is played
    for refused in ("own", "own/a"):
        def refuse(path, refused=tmp_path / refused):
            if path == refused:
                raise PermissionError(13, "Permission denied", str(path))
            return listed(path)

        monkeypatch.setattr(Path, "iterdir", refuse)
        with pytest.raises(UserError, match=f"{tmp_path / refused} cannot be read: Permission denied"):
            load_dataset("folder", tmp_path / "own")


def test_a_folder_one_level_too_high_is_noticed(tmp_path):
    write_classes(tmp_path / "zip" / "own")
    with pytest.raises(UserError, match=f"lies in {tmp_path}/zip/own, .*: .* point --data-dir at {tmp_path}/zip/own$"):
        load_dataset("folder", tmp_path / "zip")


def test_a_class_is_all_that_lies_below_its_folder(tmp_path, capsys):
    """As torchvision's ImageFolder has it: Tiny ImageNet's class/images/*, Places365's folders of folders."""
    for name, count in (("own/n01/images", 3), ("own/n02/images", 2)):
        write_classes(tmp_path / name, names=("",), count=count)
    data = load_dataset("folder", tmp_path / "own")
    assert data.classes == ["n01", "n02"] and data.labels.tolist() == [0, 0, 0, 1, 1]
    assert capsys.readouterr().err.count("\n") == 1  # the greys: a warning of its own
    write_classes(tmp_path / "own" / "n02", names=("inner/deep",), count=4)
    data = load_dataset("folder", tmp_path / "own")
    assert data.labels.tolist() == [0] * 3 + [1] * 6
    twin = torchvision.datasets.ImageFolder(tmp_path / "own")
    assert [*data.labels.bincount()] == [*torch.tensor(twin.targets).bincount()]
    said = capsys.readouterr().err
    assert f"{tmp_path}/own/n02: what lies in its 2 folders, such as" in said and "is all of class n02" in said


def test_a_flat_folder_is_one_class(tmp_path, capsys):
    for k in (1, 2, 10):
        Image.new("L", (9, 7), 20 * k).save(tmp_path / f"{k}.png")
    data = load_dataset("folder", tmp_path)
    assert data.classes == ["all"] and data.labels.tolist() == [0] * 3
    assert data.images[:, 0, 0, 0].tolist() == [20, 40, 200]
    assert data.summary.endswith("grey, one class: unconditional") and data.settings["num_classes"] == 1
    assert capsys.readouterr().err == ""
    write_classes(tmp_path, names=("b",))
    assert load_dataset("folder", tmp_path).classes == ["b"]
    assert f"{tmp_path}: left out 3 files: 3 classless files" in capsys.readouterr().err


def test_what_is_left_out_is_counted(tmp_path, capsys):
    """Each kind, and the classes that would vanish; the systems' own files and hidden ones are not counted."""
    own = write_classes(tmp_path / "own")
    for name in ("a/1.heic", "a/2.HEIC", "b/3.heic", "b/notes.txt", "b/LICENSE", "a/Thumbs.db", "a/.DS_Store",
                 "b/desktop.ini", "c/4.heic", "a/._0.png", "__MACOSX/a.heic"):
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).touch()
    for name in ("a/broken.png", "b/broken.jpg", "b/broken.txt"):
        (own / name).symlink_to("nowhere")
    os.mkfifo(own / "a" / "pipe.png")
    (own / "d").mkdir()
    assert load_dataset("folder", own).classes == ["a", "b"]
    said = capsys.readouterr().err.splitlines()[0]
    assert said == (f"{own}: left out 10 files: 4 .heic, 3 broken links, 1 .txt, 1 file without an ending, 1 "
                    "special file; and 2 folders, in which it found nothing to read: c, d")
    for name in ("a", "b"):
        for path in (own / name).glob("[0-9].png"):
            path.unlink()
    with pytest.raises(UserError, match=r"no images in .*; it holds 10 files: 4 \.heic, 3 broken links"):
        load_dataset("folder", own)


@pytest.mark.parametrize("ending", ["jfif", "jpe", "avif", "tga", "jp2", "ico", "dib", "pbm", "qoi", "pcx", "apng",
                                    "AVIF", "mpo"])
def test_whatever_pillow_reads_is_read(tmp_path, ending):
    (tmp_path / "a").mkdir()
    kind = {"mpo": "MPO"}.get(ending)
    Image.new("L", (16, 16), 255).save(tmp_path / "x.png")
    Image.open(tmp_path / "x.png").convert("1" if ending == "pbm" else "RGB").save(tmp_path / "a" / f"x.{ending}", kind)
    data = load_dataset("folder", tmp_path)
    assert data.images.shape == (1, 1, 16, 16) and data.images.min() > 250


def test_what_pillow_hands_to_other_programs_is_not_read(tmp_path, monkeypatch):
    """An EPS file would be run by Ghostscript, whatever it is called."""
    from PIL import EpsImagePlugin

    Image.new("RGB", (4, 4)).save(tmp_path / "x.eps")
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)
    assert list_images(tmp_path) == []
    (tmp_path / "x.eps").rename(tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image \(cannot identify"):
        read_image(tmp_path / "x.png")


def test_files_and_classes_are_in_natural_order(tmp_path):
    names = ["class 1", "class 2", "class 10"]
    for i, name in enumerate(names):
        (tmp_path / name).mkdir()
        for k in (1, 2, 10, 9):
            Image.new("L", (4, 4), 80 * i + k).save(tmp_path / name / f"img{k}.png")
    data = load_dataset("folder", tmp_path)
    assert data.classes == names
    assert data.images[:, 0, 0, 0].tolist() == [80 * i + k for i in range(3) for k in (1, 2, 9, 10)]


def test_a_class_may_be_called_train(tmp_path):
    """train/ is a part only where nothing but other parts lies beside it."""
    own = write_classes(tmp_path / "own", names=("plane", "test", "train"))
    assert load_dataset("folder", own).classes == ["plane", "test", "train"] and not has_test_part("folder", own)
    split = write_classes(tmp_path / "split" / "train", names=("plane", "train"))
    (tmp_path / "split" / "notes").mkdir()
    (tmp_path / "split" / "notes" / "x.txt").touch()
    assert load_dataset("folder", tmp_path / "split").classes == ["plane", "train"]
    assert not has_test_part("folder", tmp_path / "split")
    write_classes(tmp_path / "split" / "val", names=("train",), count=2)
    assert load_dataset("folder", tmp_path / "split", train=False).labels.tolist() == [1, 1]
    assert has_test_part("folder", tmp_path / "split") and not has_test_part("folder", split)
    write_classes(tmp_path / "split" / "test", names=("unsorted",))  # as ImageNet's test images, which have no labels
    assert load_dataset("folder", tmp_path / "split", train=False).labels.tolist() == [1, 1]


def test_the_ground_of_transparent_drawings(tmp_path, capsys):
    """Black drawings on transparency are all black on black, which is said."""
    for i, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        for k in range(3):
            image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
            image.putpixel((i, k), (0, 0, 0, 255))
            image.save(tmp_path / name / f"{k}.png")
    black = load_dataset("folder", tmp_path)
    said = capsys.readouterr().err
    assert not black.images.any() and "6 of the images" in said and "levels from 0 to 0" in said
    assert "--ground white" in said
    white = load_dataset("folder", tmp_path, ground="white")
    assert capsys.readouterr().err == "" and white.images.shape == (6, 1, 8, 8)
    assert (white.images == 0).sum() == 6 and white.images[4, 0, 1, 1] == 0 and white.images[4, 0, 0, 0] == 255
    assert len({folders.Folder(tmp_path, ground=ground).fingerprint for ground in ("black", "white")}) == 2


def test_twelve_bits_in_files_of_sixteen_are_noticed(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    values = np.random.default_rng(0).integers(0, 4096, (3, 8, 8), dtype=np.uint16)
    for k in range(3):
        Image.fromarray(values[k]).save(tmp_path / "a" / f"{k}.png")
    load_dataset("folder", tmp_path)
    said = capsys.readouterr().err
    assert "levels from 0 to 16 alone" in said and "16 bits" in said


def test_images_that_are_all_the_same_are_noticed(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    for k in range(3):
        Image.linear_gradient("L").save(tmp_path / "a" / f"{k}.png")
    load_dataset("folder", tmp_path)
    assert "3 of the images" in (said := capsys.readouterr().err) and "are all the same" in said
    Image.radial_gradient("L").save(tmp_path / "a" / "1.png")
    load_dataset("folder", tmp_path)
    assert capsys.readouterr().err == ""


def test_names_that_are_no_text_are_spelt_in_bytes(tmp_path):
    folder = os.fsencode(tmp_path) + b"/\xc4\xe3"  # GBK
    os.mkdir(folder)
    Image.linear_gradient("L").save(os.fsdecode(folder) + "/x.png")
    (name,) = load_dataset("folder", tmp_path).classes
    assert name == r"\xc4\xe3" and name.encode()


def test_a_named_pipe_is_never_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    for read in (read_image, is_grey, read_clip):
        with pytest.raises(UserError, match=r"x\.png cannot be read as an image \(it is no file"):
            read(tmp_path / "x.png")


def test_folders_and_files_that_are_hidden_or_empty(tmp_path):
    write_classes(tmp_path / "own", names=("__MACOSX", ".ipynb_checkpoints", "b", "c"))
    (tmp_path / "own" / "a").mkdir()
    (tmp_path / "own" / "notes").mkdir()
    (tmp_path / "own" / "notes" / "read me.txt").touch()
    (tmp_path / "own" / "b" / "._1.png").write_bytes(b"not a picture")
    data = load_dataset("folder", tmp_path / "own")
    assert data.classes == ["b", "c"] and data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [path.name for path in list_images(tmp_path / "own" / "b")] == ["0.png", "1.png", "2.png"]


def test_links_that_lead_nowhere_or_round_in_circles(tmp_path, capsys):
    """They are no images and no classes; and a folder may have any name."""
    write_classes(tmp_path / "own", names=("10", "\u00b2", "\u0663"))  # a superscript two, an Arabic three
    folder = tmp_path / "own" / "10"
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "nowhere.png").symlink_to(tmp_path / "nowhere")
    (folder / "up").symlink_to(tmp_path / "own")
    (tmp_path / "own" / "circle").symlink_to(tmp_path / "own" / "circle")
    data = load_dataset("folder", tmp_path / "own")
    assert len(data.images) == 9 and data.classes == ["\u0663", "10", "\u00b2"]
    capsys.readouterr()
    (tmp_path / "own" / "self").symlink_to(tmp_path / "own")
    (tmp_path / "own" / "10" / "other").symlink_to(tmp_path / "own" / "\u00b2")
    (tmp_path / "own" / "\u00b2" / "back").symlink_to(tmp_path / "own" / "10")
    (tmp_path / "own" / "above").symlink_to(tmp_path)
    Image.new("L", (9, 7)).save(tmp_path / "else.png")
    data = load_dataset("folder", tmp_path / "own")
    assert len(data.images) == 9 + 6 and data.classes == ["\u0663", "10", "\u00b2"]
    assert "6 circular links, 5 broken links; and 2 folders, in which it found nothing" in capsys.readouterr().err


def test_images_that_do_not_fit(mnist, tmp_path, monkeypatch):
    """They are refused before a pixel is read, at one byte above half of the memory."""
    folder = write_classes(tmp_path / "own", size=(400, 300), mode="RGB")
    for flags, needed, words in (({}, 6 * 3 * 300 * 300, "6 images of 300 x 300 pixels would take 0.00162 GB"),
                                 ({"channels": 1}, 6 * 300 * 300, "--image-size 64"),
                                 ({"image_size": 100}, 6 * 3 * 100 * 100, "--image-size 50")):
        monkeypatch.setattr(sizes, "available_memory", lambda needed=needed: 2 * needed)
        load_dataset("folder", folder, **flags)
        monkeypatch.setattr(sizes, "available_memory", lambda needed=needed: 2 * needed - 1)
        with monkeypatch.context() as patch, pytest.raises(UserError, match=words) as caught:
            patch.setattr(folders, "read_tensor", None)
            load_dataset("folder", folder, **flags)
        assert "more than half of the" in str(caught.value)
    monkeypatch.setattr(sizes, "available_memory", lambda: 1.1e9)
    with pytest.raises(UserError, match=r"210 images of 1000 x 1000 pixels would take 0.63 GB .* the 1.1 GB that are"):
        load_dataset("mnist", mnist, train=False, image_size=1000, channels=3)
    monkeypatch.setattr(sizes, "available_memory", lambda: 2 * 297 * 3 * 9**2)
    load_dataset("mnist", SMALL, train=False, image_size=9, channels=3)
    with pytest.raises(UserError, match="297 images of 10 x 10 "):
        load_dataset("mnist", SMALL, train=False, image_size=10, channels=3)


def test_images_above_the_largest_size(tmp_path):
    folder = write_classes(tmp_path / "own", size=(1100, 1025), count=1)
    with pytest.raises(UserError, match=r"2 images of 1025 x 1025 .* 1024 x 1024 is the largest .*--image-size 64"):
        load_dataset("folder", folder)
    assert load_dataset("folder", folder, image_size=1024).images.shape == (2, 1, 1024, 1024)


def test_available_memory(monkeypatch):
    everything = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_memory() <= everything
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal:  9 kB\nMemAvailable:      123 kB\nCached: 7 kB\n")
    assert available_memory() == 123 * 1024
    monkeypatch.setattr(Path, "read_text", lambda path: "another system's")
    assert available_memory() == everything
    monkeypatch.delattr(os, "sysconf")
    assert available_memory() == float("inf")


@pytest.mark.parametrize("size", [(40, 32), (41, 32), (32, 40), (32, 45), (32, 32)])
def test_squares_are_cut_from_the_centre(size):
    array = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    left, top = (size[0] - 32) // 2, (size[1] - 32) // 2
    exact = array[top:top + 32, left:left + 32]
    assert np.array_equal(fit(Image.fromarray(array), (32, 32)), exact)
    # Against torch's bicubic filter with antialiasing, but where the border is handled in another way
    twin = torch.nn.functional.interpolate(torch.from_numpy(exact).permute(2, 0, 1)[None].double(), size=(12, 12),
                                           mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    assert abs(np.asarray(fit(Image.fromarray(array), (12, 12))) - twin)[2:-2, 2:-2].max() < 1.5


def test_list_images(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "settings.json", ".hidden.png", "._b.png"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_images(tmp_path)] == ["a.JPG", "b.png"]
    with pytest.raises(UserError, match="missing"):
        list_images(tmp_path / "missing")
    with pytest.raises(UserError, match="not a folder"):
        list_images(tmp_path / "notes.txt")


def test_kinds_of_images(tmp_path):
    """A mid grey stays a mid grey, whatever it is stored as; transparent pixels are black."""
    kinds = {"L": Image.new("L", (4, 4), 128), "16": Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)),
             "P": Image.new("L", (4, 4), 128).convert("P"), "RGB": Image.new("RGB", (4, 4), (128, 128, 128)),
             "LA": Image.new("LA", (4, 4), (128, 255)), "RGBA": Image.new("RGBA", (4, 4), (128, 128, 128, 255))}
    for name, image in kinds.items():
        image.save(tmp_path / f"{name}.png")
        assert np.asarray(read_image(tmp_path / f"{name}.png", "L")).tolist() == [[128] * 4] * 4, name
    assert read_image(tmp_path / "16.png").mode == read_image(tmp_path / "LA.png").mode == "L"
    assert read_image(tmp_path / "RGBA.png").mode == "RGB"
    Image.new("RGBA", (4, 4), (255, 255, 255, 0)).save(tmp_path / "clear.png")
    assert not np.asarray(read_image(tmp_path / "clear.png", "L")).any()
    Image.new("CMYK", (4, 4)).save(tmp_path / "cmyk.jpg")
    assert read_image(tmp_path / "cmyk.jpg").mode == "RGB"


@pytest.mark.parametrize(("name", "mode", "grey"), [
    ("x.png", "1", True), ("x.png", "L", True), ("x.png", "LA", True), ("x.png", "I;16", True), ("x.tif", "I", True),
    ("x.tif", "F", True), ("x.tif", "I;16B", True), ("x.png", "RGB", False), ("x.png", "RGBA", False),
    ("x.png", "P", False), ("x.jpg", "CMYK", False)])
def test_what_is_grey_as_the_header_says(tmp_path, name, mode, grey):
    Image.new(mode, (4, 4)).save(tmp_path / name)
    assert read_image(tmp_path / name).mode == ("L" if grey else "RGB")
    assert is_grey(tmp_path / name)  # by its content


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.jpg", "x.avif", "x.png"])
def test_what_is_grey_by_content(tmp_path, name):
    """Where the header says colour: GIFs and WebPs have no grey, and lossy formats round a level away."""
    grey = Image.radial_gradient("L").resize((64, 48)).convert("RGB")
    grey.save(tmp_path / name)
    assert is_grey(tmp_path / name) and np.asarray(read_image(tmp_path / name)).ndim == 3
    grey.paste((200, 100, 100), (0, 0, 8, 8))
    grey.save(tmp_path / name)
    assert not is_grey(tmp_path / name)


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_sixteen_bits(tmp_path, dtype):
    """All of 0..65535 is scaled to 0..255, whatever it holds; a PGM's of 16 bits, which PIL reads as 32, too."""
    values = np.random.default_rng(0).permutation(65536).reshape(256, 256)
    for array in values, values // 257:
        Image.fromarray(array.astype(dtype)).save(tmp_path / "x.tif")
        Image.fromarray(array.astype("<u2")).save(tmp_path / "x.png")
        (tmp_path / "x.pgm").write_bytes(b"P5 256 256 65535\n" + array.astype(">u2").tobytes())
        for name in ("x.tif", "x.png", "x.pgm"):
            assert abs(np.asarray(read_image(tmp_path / name)) - array / 65535 * 255).max() < 0.501, name


@pytest.mark.parametrize(("values", "greys"), [
    (np.float32([0, 0.25, 0.5, 1]), [0, 64, 128, 255]), (np.float32([0, 0.5, 1, 1.1]), [0, 0, 1, 1]),
    (np.float32([0, 64.4, 64.6, 255]), [0, 64, 65, 255]), (np.float32([-5, 0.5, 200, 1e9]), [0, 0, 200, 255]),
    (np.float32([-0.1, 0, 1, 1]), [0, 0, 1, 1]), (np.int32([0, 1, 64, 255]), [0, 1, 64, 255]),
    (np.int32([-9, 0, 3, 200]), [0, 0, 3, 200]), (np.int32([0, 256, 25700, 65535]), [0, 1, 100, 255]),
    (np.int32([-9, 0, 10**6, -2**31]), [0, 0, 255, 0])])
def test_greys_of_four_bytes(tmp_path, values, greys):
    Image.fromarray(values.reshape(2, 2)).save(tmp_path / "x.tif")
    assert np.asarray(read_image(tmp_path / "x.tif")).ravel().tolist() == greys
    assert np.asarray(read_image(tmp_path / "x.tif", "RGB"))[..., 1].ravel().tolist() == greys


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_no_numbers(tmp_path, value):
    Image.fromarray(np.float32([[0, value], [1, 1]])).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match=r"x\.tif cannot be read .* NaN or infinite"):
        read_image(tmp_path / "x.tif")


def test_transparency_is_laid_on_black(tmp_path):
    for mode, pixel, grey in (("RGBA", (200, 200, 200, 128), 100), ("LA", (200, 128), 100), ("LA", (200, 0), 0)):
        Image.new(mode, (2, 2), pixel).save(tmp_path / "x.png")
        assert np.unique(read_image(tmp_path / "x.png", "L")).tolist() == [grey]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([10, 20, 30, 255, 255, 255])
    palette.save(tmp_path / "x.png", transparency=1)
    assert not np.asarray(read_image(tmp_path / "x.png")).any()


ORIENTED = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.swapaxes(0, 1),
            6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}


@pytest.mark.parametrize("orientation", ORIENTED)
@pytest.mark.parametrize(("name", "mode"), [*((name, "RGB") for name in ("x.png", "x.jpg", "x.webp", "x.tif")),
                                            ("x.jpg", "L"), ("x.tif", "L"), ("x.tif", "I;16"), ("x.tif", "F")])
def test_photographs_are_turned_upright(tmp_path, orientation, name, mode):
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(3, 2) * 50, 16, 0), 16, 1)
    stored = {"RGB": np.stack([array] * 3, 2), "I;16": array.astype(np.uint16) * 257, "F": array.astype(np.float32)}
    Image.fromarray(stored.get(mode, array)).save(tmp_path / name, exif=exif, quality=100)
    read = np.asarray(read_image(tmp_path / name, "L")).astype(int)
    exact = ORIENTED[orientation](array)
    assert read.shape == exact.shape and abs(read - exact).max() < 5


@pytest.mark.parametrize(("tail", "turned"), [
    (b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHIHHHHIIIQQ", 0x112, 3, 1, 6, 0, 0x10e, 5, 1, 26, 0, 0, 0), True),
    (b"nonsense" * 8, False)])
def test_damaged_exif_data_are_no_damaged_image(tmp_path, tail, turned):
    """The first says how to turn the image, and has a description that is a number."""
    for name in ("x.png", "x.jpg", "x.webp"):
        Image.new("RGB", (6, 4)).save(tmp_path / name, exif=b"Exif\0\0" + tail)
        assert read_image(tmp_path / name).size == ((4, 6) if turned else (6, 4))


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"P5 0 0 255\n"])
def test_broken_image_is_named(tmp_path, content):
    (tmp_path / "x y.png").write_bytes(content)
    for read in (read_image, is_grey):
        with pytest.raises(UserError, match=r"x y\.png cannot be read") as caught:
            read(tmp_path / "x y.png")
        assert "\n" not in str(caught.value) and str(caught.value).count("x y.png") == 1


def test_an_image_that_breaks_the_library_is_named_too(tmp_path, monkeypatch):
    Image.new("L", (4, 4)).save(tmp_path / "x.tif")

    def load(image):
        raise error

    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", load)
    error = TypeError("'float' object cannot be interpreted as an integer")
    with pytest.raises(UserError, match=r"x\.tif cannot be read as an image \('float'"):
        read_image(tmp_path / "x.tif")
    error = MemoryError()
    with pytest.raises(MemoryError):
        read_image(tmp_path / "x.tif")


def test_truncated_image_is_named(tmp_path):
    Image.effect_noise((64, 64), 50).save(tmp_path / "half.png")
    data = (tmp_path / "half.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[:len(data) // 2])
    with pytest.raises(UserError, match=r"half\.png cannot be read"):
        read_image(tmp_path / "half.png")


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("L", (64, 64)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match=r"bomb\.png cannot be read"):
        read_image(tmp_path / "bomb.png")


def test_fingerprint_is_of_names_labels_and_pixels():
    data = small_mnist()
    images, labels = data.images.clone(), data.labels.clone()
    images[700, 0, 3, 3] += 1
    labels[5] = (labels[5] + 1) % 10
    others = [dataclasses.replace(data, **change) for change in (
        dict(images=images), dict(labels=labels), dict(classes=[*"1023456789"]),
        dict(images=data.images[:-1], labels=data.labels[:-1]),
        dict(images=data.images.flip(0), labels=data.labels.flip(0)))]
    assert len({other.fingerprint for other in [data, *others]}) == 6
    assert small_mnist().fingerprint == data.fingerprint and len(data.fingerprint) == 16


def test_fingerprint_of_folders(tmp_path):
    def fingerprint():
        return load_dataset("folder", tmp_path / "own").fingerprint

    root = write_classes(tmp_path / "own")
    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    for old, new in (("a", "z"), ("b", "a"), ("z", "b")):  # the last of these steps swaps the classes' names
        (root / old).rename(root / new)
        seen.append(fingerprint())
    Image.new("L", (9, 7), 99).save(root / "a" / "1.png")
    seen.append(fingerprint())
    (root / "a" / "1.png").unlink()
    seen.append(fingerprint())
    assert len(set(seen)) == 6


def test_fingerprint_does_not_depend_on_strides():
    data = small_mnist(channels=3)
    strided = dataclasses.replace(data, images=data.images.to(memory_format=torch.channels_last),
                            labels=data.labels.repeat_interleave(2)[::2])
    assert strided.images.stride() != data.images.stride() and strided.labels.stride() != data.labels.stride()
    assert strided.fingerprint == data.fingerprint
    assert dataclasses.replace(data, images=data.images.transpose(2, 3)).fingerprint != data.fingerprint


def test_pixels_become_floats_and_pixels_again():
    pixels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(pixels)
    assert torch.allclose(floats, torch.linspace(-1, 1, 256), atol=1e-6, rtol=0) and floats.dtype == torch.float32
    assert torch.equal(to_uint8(floats), pixels)
    for shift in (-0.0038, 0.0038):  # a little less than half a pixel
        assert torch.equal(to_uint8(floats + shift), pixels)
    assert to_uint8(torch.tensor([-9.0, -1.01, 1.01, 9.0])).tolist() == [0, 0, 255, 255]


@pytest.mark.parametrize(("source", "size", "box"), [
    ((30, 20), (10, 20), (0, 2, 30, 17)), ((30, 20), (20, 10), (10, 0, 20, 20)), ((30, 20), (20, 30), (0, 0, 30, 20))])
def test_other_shapes_are_cut_from_the_centre(source, size, box):
    """Source and box in PIL's order, width first; size is (height, width)."""
    image = Image.effect_noise(source, 80)
    expected = image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    assert np.abs(np.asarray(fit(image, size), dtype=int) - np.asarray(expected)).max() <= 12  # by half a pixel at most
    assert fit(image, size).size == (size[1], size[0])


def test_every_size_fits_into_every_image():
    for width, height in itertools.product((1, 3, 7, 31), repeat=2):
        image = Image.new("L", (width, height), 9)
        for size in itertools.product((1, 3, 11, 28), repeat=2):
            assert np.unique(np.asarray(fit(image, size))).tolist() == [9]


def test_data_that_are_not_square(tmp_path):
    assert small_mnist(image_size=(12, 8)).images.shape == (1500, 1, 12, 8)
    write_classes(tmp_path / "own", mode="RGB", size=(20, 10))
    assert load_dataset("folder", tmp_path / "own", image_size=(8, 16)).images.shape == (6, 3, 8, 16)


def test_half_are_mirrored():
    """Of the images that may be, each by chance of its own."""
    images = torch.tensor([[0, 255]], dtype=torch.uint8).expand(1, 1, 1, 2)
    data = Dataset("", images, torch.zeros(1, dtype=torch.int64), ["a"], flips=True)
    x = data.x_0(torch.zeros(4000, dtype=torch.int64), slice(None), torch.Generator().manual_seed(0))
    assert 0.47 < (x[:, 0, 0, 0] == 1).float().mean() < 0.53


def test_previews_and_layers_are_no_frames():
    assert image_files.is_image(Path("a.mpo"))
    for kind, count in (("MPO", 1), ("PSD", 1), ("GIF", 3)):
        assert image_files.frame_count(SimpleNamespace(format=kind, n_frames=3)) == count
