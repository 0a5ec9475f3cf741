"""A data set as two tensors: every image as uint8 (N, C, H, W) and every label as int64 (N,), held in memory."""

from support.commands import UserError, first_line
from support.files import fingerprint
from support.folders import Folder, Images, find_classes, parts_of
from support.image_files import recolour, resize
from support.sizes import as_size, demand_memory, pick, where_it_fits
from support.torchvision_data import TORCHVISION, read_torchvision

import contextlib
import dataclasses
import gzip
import itertools
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent  # has MNIST
MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BRING_BACK = "bring it back, or leave --data-dir out to use what comes with the code"


@dataclasses.dataclass(frozen=True)
class Dataset(Images):
    """Training asks data for `shape`, `labels`, `classes`, `settings`, `load`, and then for `summary`, `fingerprint`,
    `to` and `x_0`, and for nothing else."""

    name: str
    images: torch.Tensor  # uint8 (N, C, H, W), 0..255
    labels: torch.Tensor
    classes: list[str]
    flips: bool = False   # mirror half of the training images, left to right
    held_out: int = 0

    @property
    def shape(self):
        return tuple(self.images.shape[1:])

    @property
    def fingerprint(self):
        """A hash (16 hexadecimal digits) of the classes' names, the labels and every pixel."""
        return fingerprint(repr((self.classes, self.images.shape)), self.labels, self.images)

    def load(self):
        return self

    def to(self, device):
        return dataclasses.replace(self, images=where_it_fits(self.images, device), labels=self.labels.to(device))

    def read(self, rows):
        """The images in this slice, uint8 (n, C, H, W)."""
        return self.images[rows]

    def x_0(self, index, part, generator):
        """What a network learns from: the images `index`[`part`], floats (b, C, H, W) in [-1, 1].

        index: int64 (B,), a whole batch. part: a slice of it. generator: draws what else is random, for all of it."""
        x = to_float(pick(self.images, index[part]))
        if self.flips:
            mirrored = torch.rand(len(index), generator=generator, device=index.device) < 0.5
            x = torch.where(mirrored[part].view(-1, 1, 1, 1), x.flip(-1), x)
        return x


def load_dataset(name, data_dir="", train=True, image_size=(), channels=0, ground="black"):
    """Reads the training or the test part of a data set.

    name: mnist, folder, or one of `TORCHVISION`, which is downloaded into `data_dir` when it is not there.
    data_dir: see `Config`.
    image_size: (height, width) to resize the images to, or a number for a square; () or 0 = as they are.
    channels: 1 (grey), 3 (RGB), or 0 = as they are.
    ground: background of transparent images in folders, black or white.

    Returns a `Dataset`. Raises `UserError` when the data cannot be had, are damaged or do not fit into memory.
    """
    image_size = as_size(image_size)
    if channels not in (0, 1, 3):
        raise UserError(f"channels is {channels}, but must be 1 (grey), 3 (RGB) or 0 (as the data set has them)")
    if name == "folder":
        folder = Folder(data_dir, train, image_size, channels, ground)
        return Dataset(name, folder.read_all(), folder.labels, folder.classes, held_out=folder.held_out)
    root = Path(data_dir or HERE)
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is not a folder: point --data-dir at the folder that holds the data set")
    images, labels, classes = read_mnist(root, train) if name == "mnist" else read_torchvision(name, root, train)
    if len(labels) != len(images) or not len(labels) or labels.max() >= len(classes):
        raise UserError(f"{name} in {root} does not have a label from 0 to {len(classes) - 1} for each of its "
                        f"{len(images):,} images: bring the right files back")
    image_size, channels = image_size or tuple(images.shape[2:]), channels or images.shape[1]
    demand_memory(len(images), channels, image_size)
    if (channels, *image_size) != tuple(images.shape[1:]):  # in parts: the floats of all would take much memory
        images = torch.cat([resize(recolour(part, channels), image_size) for part in images.split(1000)])
    return Dataset(name, images, labels.long(), classes)


def read_mnist(root, train):
    """MNIST as images uint8 (N, 1, H, W), labels (N,) and names of classes, from IDX files in `root`/MNIST/raw, as
    torchvision has them, or in `root` itself."""
    images, labels = (read_idx(find_idx(root, name), dims)
                      for name, dims in zip(MNIST_FILES[slice(0, 2) if train else slice(2, 4)], (3, 1), strict=True))
    return images[:, None], labels, [*"0123456789"]


def find_idx(root, name):
    """The file of MNIST called `name`, gzipped or not, in any of the spellings in use. Raises `UserError`."""
    for folder, spelling, ending in itertools.product(
            (root / "MNIST" / "raw", root), (name, name.replace("-idx", ".idx")), ("", ".gz")):
        path = folder / (spelling + ending)
        path = path / path.name if path.is_dir() else path  # as Kaggle has them
        if path.is_file():
            return path
    for other, place in TORCHVISION.items():
        if (root / place).exists():
            raise UserError(f"{root} holds no MNIST, but {other}: --dataset {other} trains on that")
    classes = []
    with contextlib.suppress(UserError):
        classes = list(find_classes(parts_of(root)[0])[0])
    if classes:
        raise UserError(f"{root} holds no MNIST, but folders of images ({', '.join(classes[:3])}"
                        f"{' ...' if len(classes) > 3 else ''}): --dataset folder trains on those")
    raise UserError(f"{name}, gzipped or not, is neither in {root / 'MNIST' / 'raw'} nor in {root}: put it there, or "
                    "leave --data-dir out to use the MNIST that comes with the code")


def read_idx(path, dims):
    """An IDX file of bytes, gzipped or not, as a tensor of so many dimensions. Raises `UserError`."""
    try:
        data = path.read_bytes()
        data = bytearray(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({first_line(error):.100}): {BRING_BACK}") from None
    header = 4 + 4 * dims
    sizes = struct.unpack(f">{dims}I", data[4:header]) if len(data) >= header else ()
    if data[:4] != bytes([0, 0, 8, dims]) or len(data) != header + math.prod(sizes) or not all(sizes):
        raise UserError(f"{path} is damaged (not the IDX file that it should be): {BRING_BACK}")
    return torch.tensor(np.frombuffer(data, np.uint8, offset=header)).view(sizes)


def to_float(images):
    """Images at rest, uint8 0..255, as the model sees them: floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Images from floats in [-1, 1] (what lies outside is cut off) to uint8 0..255."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()
