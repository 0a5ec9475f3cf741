"""A data set as two tensors: every image as uint8 (N, C, H, W) and every label as int64 (N,), held in memory."""

from support.commands import UserError, first_line
from support.folders import Folder, Images, find_classes, training_part
from support.image_files import opened
from support.sizes import as_size, demand_memory, show_size

import contextlib
import dataclasses
import gzip
import hashlib
import itertools
import math
import struct
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from config import TORCHVISION

HERE = Path(__file__).parent  # has MNIST and the sprites
MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
BRING_BACK = "bring it back, or leave --data-dir out to use what comes with the code"
SHEETS = {  # layers, each on top of those before it, and the numbers of their files
    "body": range(6), "bottomwear": range(6), "topwear": range(6), "hair": range(6), "shoes": [1]}
CHARACTERS, TRAINING_CHARACTERS = 6**4, 1000  # a character is one sheet of each layer
CELL, ROWS, COLUMNS = 64, 21, 13  # a cell's pixels; a sheet's cells
FRAMES = 8  # of an action
ACTIONS = {  # the row of each action seen from the left, below which are those from the front and from the right; and
    "walk": (9, (8, 1, 2, 3, 4, 5, 6, 7)),  # the columns of its 8 frames. Which ones they are, and the split into
    "cast": (1, (0, 1, 2, 3, 4, 5, 4, 6)),  # training and test characters, is as in arXiv 1803.02991
    "slash": (13, (0, 1, 2, 3, 4, 5, 4, 0))}
DIRECTIONS = {"front": 1, "left": 0, "right": 2}


@dataclasses.dataclass(frozen=True)
class Dataset(Images):
    """Training asks data for `shape`, `labels`, `classes`, `settings`, `load`, and then for `summary`, `fingerprint`,
    `to` and `x_0`, and for nothing else: latents (latent/cache.py) have these too."""

    name: str
    images: torch.Tensor  # uint8 (N, C, H, W), 0..255
    labels: torch.Tensor
    classes: list[str]
    flips: bool = False   # mirror half of what is learned from, left to right
    held_out: int = 0

    @property
    def shape(self):
        return tuple(self.images.shape[1:])

    @property
    def fingerprint(self):
        """A hash, 16 hexadecimal digits, of the classes' names, the labels and every pixel: of other data, another."""
        digest = hashlib.sha256(repr((self.classes, self.images.shape)).encode())
        for tensor in (self.labels, self.images):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]

    def load(self):
        return self

    def to(self, device):
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def read(self, rows):
        """The images in this slice, uint8 (n, C, H, W)."""
        return self.images[rows]

    def x_0(self, index, part, generator):
        """What a network learns from: the images `index`[`part`], floats (b, C, H, W) in [-1, 1].

        index: int64 (B,), a whole batch. part: a slice of it. generator: draws what else is random, for all of it."""
        x = to_float(self.images[index[part]])
        if self.flips:
            mirrored = torch.rand(len(index), generator=generator, device=index.device) < 0.5
            x = torch.where(mirrored[part].view(-1, 1, 1, 1), x.flip(-1), x)
        return x


def load_dataset(name, data_dir="", train=True, image_size=(), channels=0, ground="black"):
    """Reads the training or the test part of a data set.

    name: mnist, sprites, folder, or one of `TORCHVISION`, which is downloaded into `data_dir` when it is not there.
    data_dir: see `Config`.
    image_size: (height, width) to resize the images to, or a number for a square; () or 0 = as they are.
    channels: 1 (grey), 3 (RGB), or 0 = as they are.
    ground: black or white, on which transparent images in folders are laid.

    Returns a `Dataset`. Raises `UserError` when the data cannot be had, are damaged or do not fit into memory.
    """
    image_size = as_size(image_size)
    if name in ("moving", "clips"):
        raise UserError(f"{name} has clips, and only images can be taken here")
    if len(image_size) == 3:
        raise UserError(f"image_size {show_size(image_size)} is of clips, but {name} has images: say height x width, "
                        "or learn from --dataset moving or clips")
    if channels not in (0, 1, 3):
        raise UserError(f"channels is {channels}, but must be 1 (grey), 3 (RGB) or 0 (as the data set has them)")
    if name == "folder":
        folder = Folder(data_dir, train, image_size, channels, ground)
        return Dataset(name, folder.read_all(), folder.labels, folder.classes, held_out=folder.held_out)
    root = Path(data_dir or HERE)
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is not a folder: point --data-dir at the folder that holds the data set")
    if name == "sprites":
        frames = read_sprites(root, train, image_size, channels)
        n, kinds, T = frames.shape[:3]
        return Dataset(name, frames.flatten(0, 2), torch.arange(kinds).repeat_interleave(T).repeat(n),
                       [f"{action} {direction}" for action in ACTIONS for direction in DIRECTIONS])
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
        classes = list(find_classes(training_part(root))[0])
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


def read_torchvision(name, root, train):
    """A data set of `TORCHVISION` as images uint8 (N, C, H, W), labels (N,) and names of classes, from torchvision's
    files in `root`. When they are not there, they are downloaded: unless all of them come, nothing stays."""
    from torchvision import datasets  # here: it takes a second that no other path needs

    options = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
    options |= {"split": "balanced"} if name == "EMNIST" else {}
    trouble = "is damaged in"
    try:
        try:
            data = getattr(datasets, name)(root, **options)
        except RuntimeError as error:
            if "not found" not in str(error):
                raise
            print(f"downloading {name} into {root} ...", file=sys.stderr)
            trouble = "cannot be downloaded into"
            above = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
            with tempfile.TemporaryDirectory(dir=above) as whole:
                data = getattr(datasets, name)(whole, download=True, **options)
                for path in filter(Path.is_file, sorted(Path(whole).rglob("*"))):
                    target = root / path.relative_to(whole)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(target)
    except Exception as error:  # torchvision raises nearly anything when files are damaged, or do not come
        raise UserError(f"{name} {trouble} {root} ({first_line(error):.150})") from None
    images = torch.as_tensor(data.data)
    if name == "EMNIST":
        images = images.mT  # its files hold rows as columns
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2) if "CIFAR" in name else images
    labels = torch.as_tensor(data.labels if name == "SVHN" else data.targets)
    return images.contiguous(), labels, list(getattr(data, "classes", "0123456789"))


def read_sprites(data_dir, train, image_size=(), channels=0):
    """The sprites of arXiv 1803.02991: game characters in colour, made of sheets that artists of the Liberated Pixel
    Cup drew (CC-BY-SA 3.0 or GPL 3.0).

    Each of 1,296 characters is another choice of body, bottomwear, topwear and hair. 1,000 are to train; the others, to
    test, are made of the same parts, but no choice of the four occurs in both.
    Returns frames uint8 (characters, 9, 8, C, H, W): 3 actions from 3 directions, as `ACTIONS` and `DIRECTIONS` order
    them, in 8 frames, of which two pairs in each slash and one in each cast are the same. Of all images, 1.4 %
    belong to two classes: under some tops, a cast and a slash begin alike.
    Raises `UserError` when the sheets cannot be had, are damaged or do not fit into memory.
    """
    order = split_characters(train)
    kinds, T, size = len(ACTIONS) * len(DIRECTIONS), FRAMES, image_size or (CELL, CELL)
    demand_memory(len(order) * kinds * T, channels or 3, size)
    folder = next((folder for folder in (data_dir / "Sprites", data_dir) if (folder / "body").is_dir()), None)
    if not folder:
        raise UserError(f"{data_dir} does not hold the sprites: leave --data-dir out to use those that come with the "
                        "code")
    layers = [[cut_sheet(folder / layer / f"{k}.png") for k in numbers] for layer, numbers in SHEETS.items()]
    frames = torch.empty(len(order), kinds, T, channels or 3, *size, dtype=torch.uint8)
    place = {number: i for i, number in enumerate(order.tolist())}
    characters = dress(Image.new("RGBA", layers[0][0].size, "black"), layers)
    for number, image in enumerate(tqdm(characters, "making sprites", CHARACTERS, leave=False, disable=None)):
        if number in place:
            cells = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
            cells = cells.view(kinds * T, CELL, CELL, -1).permute(0, 3, 1, 2)  # (72, C, 64, 64)
            frames[place[number]] = resize(cells, size).unflatten(0, (kinds, T))
    return frames


def split_characters(train):
    """The numbers of the characters to train or to test, as arXiv 1803.02991 split and ordered them."""
    order = np.random.RandomState(423).permutation(CHARACTERS)
    return order[:TRAINING_CHARACTERS] if train else order[TRAINING_CHARACTERS:]


def dress(below, layers):
    """The image `below` (PIL, RGBA) under each choice of one image a layer, the last layer's choice changing first."""
    if not layers:
        yield below
        return
    for image in layers[0]:
        yield from dress(Image.alpha_composite(below, image), layers[1:])


def cut_sheet(path):
    """The 72 cells of a sheet that are frames, one below the other, as a PIL image of 64 x 4,608 pixels, RGBA."""
    with opened(path) as image:
        sheet = np.asarray(image.convert("RGBA"))
    if sheet.shape != (ROWS * CELL, COLUMNS * CELL, 4):
        raise UserError(f"{path} is of {sheet.shape[1]} x {sheet.shape[0]} pixels, but a sheet of sprites has "
                        f"{COLUMNS * CELL} x {ROWS * CELL}: {BRING_BACK}")
    cells = sheet.reshape(ROWS, CELL, COLUMNS, CELL, 4).swapaxes(1, 2)  # (rows, columns, 64, 64, 4)
    chosen = [cells[row + below, columns] for row, columns in ACTIONS.values() for below in DIRECTIONS.values()]
    return Image.fromarray(np.concatenate(chosen).reshape(-1, CELL, 4))


def recolour(images, channels):
    """Images uint8 (N, C, H, W) with 1 channel, which weighs colours as Pillow does, or 3."""
    if images.shape[1] > channels:
        weights = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)
        return ((images.int() * weights).sum(1, keepdim=True) + 2**15 >> 16).byte()
    return images.expand(-1, channels, -1, -1)


def resize(images, size):
    """Images uint8 (N, C, H, W) in another size, (height, width)."""
    if images.shape[2:] == tuple(size):
        return images
    return torch.nn.functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True,
                                           align_corners=False).round().byte()


BOUND = 1.0  # to_float's images lie in [-BOUND, BOUND]


def to_float(images):
    """Images at rest, uint8 0..255, as the model sees them: floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Images from floats in [-1, 1] (what lies outside is cut off) to uint8 0..255."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()
