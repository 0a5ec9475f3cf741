from support.commands import UserError

import os
import socket
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from dataset import list_images, load_dataset, read_image


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder with the test files of a made-up MNIST of the real size."""
    folder = tmp_path_factory.mktemp("mnist")
    images = np.arange(10000 * 784, dtype=np.uint32).reshape(10000, 28, 28) % 251
    write_idx(folder / "MNIST/raw/t10k-images-idx3-ubyte", images)
    write_idx(folder / "MNIST/raw/t10k-labels-idx1-ubyte", np.arange(10000) % 10)
    return folder


def write_classes(root, names=("a", "b"), size=(9, 7), count=3, mode="L"):
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for k in range(count):
            Image.new(mode, size, 40 * i + k if mode == "L" else (40 * i + k, 100, 200)).save(root / name / f"{k}.png")
    return root


def test_mnist(mnist):
    data = load_dataset("mnist", mnist, train=False)
    assert (data.name, data.images.shape, data.images.dtype) == ("mnist", (10000, 1, 28, 28), torch.uint8)
    assert data.labels.dtype == torch.int64 and torch.equal(data.labels, torch.arange(10000) % 10)
    assert data.images[1, 0, 2, 3] == (784 + 2 * 28 + 3) % 251
    assert load_dataset("auto", mnist, train=False).name == "mnist"


def test_mnist_of_another_size(mnist):
    data = load_dataset("mnist", mnist, train=False, image_size=14, channels=3)
    assert data.images.shape == (10000, 3, 14, 14)
    assert torch.equal(data.images[:, 0], data.images[:, 2])


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: data + b"x", lambda data: b"", lambda data: b"\0\0\x09\x03" + data[4:],
    lambda data: data[:7] + b"\x01" + data[8:], lambda data: data[:10], lambda data: b"\x1f\x8b" + data[2:]])
def test_damaged_mnist_images(mnist, tmp_path, damage):
    good = mnist / "MNIST/raw/t10k-images-idx3-ubyte"
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    (raw / good.name).write_bytes(damage(good.read_bytes()))
    os.link(mnist / "MNIST/raw/t10k-labels-idx1-ubyte", raw / "t10k-labels-idx1-ubyte")
    for name in ("mnist", "auto"):
        with pytest.raises(UserError, match="t10k-images-idx3-ubyte is damaged"):
            load_dataset(name, tmp_path, train=False)


@pytest.mark.parametrize("labels", [np.arange(10000) % 11, np.arange(9999) % 10, np.zeros(0)])
def test_damaged_mnist_labels(mnist, tmp_path, labels):
    raw = tmp_path / "MNIST/raw"
    write_idx(raw / "t10k-labels-idx1-ubyte", labels)
    os.link(mnist / "MNIST/raw/t10k-images-idx3-ubyte", raw / "t10k-images-idx3-ubyte")
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte"):
        load_dataset("mnist", tmp_path, train=False)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_mnist_that_cannot_be_had(tmp_path, no_network):
    with pytest.raises(UserError, match="put train-images-idx3-ubyte") as caught:
        load_dataset("mnist", tmp_path)
    assert str(tmp_path / "MNIST" / "raw") in str(caught.value)


def test_auto_falls_back_to_digits_and_says_so(tmp_path, no_network, capsys):
    data = load_dataset("auto", tmp_path)
    assert data.name == "digits"
    said = capsys.readouterr()
    assert said.out == "" and "8x8 digits instead" in said.err


def test_digits():
    train, test = load_dataset("digits", "nowhere"), load_dataset("digits", "nowhere", train=False)
    assert train.images.shape == (1500, 1, 8, 8) and test.images.shape == (297, 1, 8, 8)
    assert train.images.max() == 255 and train.images.dtype == torch.uint8
    assert train.labels.unique().tolist() == test.labels.unique().tolist() == list(range(10))


def test_folder_of_classes(tmp_path):
    data = load_dataset("folder", write_classes(tmp_path / "own"))
    assert data.images.shape == (6, 1, 7, 7) and data.classes == ["a", "b"]
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.images[:, 0, 3, 3].tolist() == [0, 1, 2, 40, 41, 42]


def test_folder_of_the_article(tmp_path):
    """MNIST/train/<label>/*.png and MNIST/test/<label>/*.png, and labels in the order of numbers."""
    write_classes(tmp_path / "MNIST/train", names=("10", "9", "0"))
    write_classes(tmp_path / "MNIST/test", names=("10", "9", "0"), count=2)
    assert load_dataset("folder", tmp_path / "MNIST").classes == ["0", "9", "10"]
    assert len(load_dataset("folder", tmp_path / "MNIST", train=False).images) == 6


def test_folder_of_colours_and_sizes(tmp_path):
    write_classes(tmp_path / "own", mode="RGB", size=(20, 10))
    Image.new("L", (5, 50), 77).save(tmp_path / "own" / "b" / "a name with späces.PNG")
    data = load_dataset("folder", tmp_path / "own", image_size=8)
    assert data.images.shape == (7, 3, 8, 8)
    assert data.images[0, :, 0, 0].tolist() == [0, 100, 200]
    assert data.images[-1].unique().tolist() == [77]
    assert load_dataset("folder", tmp_path / "own", image_size=8, channels=1).images.shape == (7, 1, 8, 8)


def test_folder_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        load_dataset("folder", tmp_path / "missing")
    with pytest.raises(UserError, match="no images"):
        load_dataset("folder", tmp_path)
    write_classes(tmp_path / "own")
    (tmp_path / "own" / "a" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"1\.png cannot be read as an image"):
        load_dataset("folder", tmp_path / "own")


def test_links_that_lead_nowhere_or_round_in_circles(tmp_path):
    """They are no images and no classes; and a folder may have any name."""
    write_classes(tmp_path / "own", names=("10", "\u00b2", "\u0663"))  # a superscript two, an Arabic three
    folder = tmp_path / "own" / "10"
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "nowhere.png").symlink_to(tmp_path / "nowhere")
    (folder / "up").symlink_to(tmp_path / "own")
    (tmp_path / "own" / "circle").symlink_to(tmp_path / "own" / "circle")
    data = load_dataset("folder", tmp_path / "own")
    assert len(data.images) == 9 and data.classes == ["\u0663", "10", "\u00b2"]


def test_list_images(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "settings.json"):
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


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"GIF89a"])
def test_broken_image_is_named(tmp_path, content):
    (tmp_path / "x y.png").write_bytes(content)
    with pytest.raises(UserError, match=r"x y\.png cannot be read") as caught:
        read_image(tmp_path / "x y.png")
    assert "\n" not in str(caught.value)


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
    data = load_dataset("digits", "")
    images, labels = data.images.clone(), data.labels.clone()
    images[700, 0, 3, 3] += 1
    labels[5] = (labels[5] + 1) % 10
    others = [data._replace(images=images), data._replace(labels=labels), data._replace(classes=[*"1023456789"]),
              data._replace(images=data.images[:-1], labels=data.labels[:-1]),
              data._replace(images=data.images.flip(0), labels=data.labels.flip(0))]
    assert len({other.fingerprint for other in [data, *others]}) == 6
    assert load_dataset("digits", "").fingerprint == data.fingerprint and len(data.fingerprint) == 16
