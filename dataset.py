"""A data set as two tensors: every image as uint8 (N, C, H, W) and every label as int64 (N,), held in memory."""

from support.commands import UserError, first_line
from support.folders import Folder, Images, find_classes, training_part
from support.sizes import as_size, demand_memory, show_size

import contextlib
import dataclasses
import hashlib
import http.client
import io
import os
import socket
import sys
import tempfile
import urllib.request
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from config import Config

MNIST_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
ANEW = "move the folder MNIST/raw away to have MNIST downloaded anew"
SPRITES = "https://raw.githubusercontent.com/YingzhenLi/Sprites/3ce4048c5227802bd8f1888e293fd3afdba91c0c"
SHEETS = {  # layers, each on top of those before it: their files, and the first half of each one's SHA-256
    "body": {"0.png": "27d1ac78db37c42f35a20d15c42705ef", "1.png": "1535e9228357b884df80f777a0d1dac1",
             "2.png": "7c241033b4897501cb3721b6c3a9ebfa", "3.png": "055f5aa33fc112d8444b42fce2cf5060",
             "4.png": "57f3b9c510482379aba9a32fc0de7d48", "5.png": "91e49453aeab5ebbb4fd2b4825381289"},
    "bottomwear": {"0.png": "4ec356c488e272fde2d2d0d722b12a80", "1.png": "0674312eaa4ab548f8bb31ef95d7dbd4",
                   "2.png": "3b464feb0d20ff34b0ca2a6d1fd00766", "3.png": "b366e84ea0519d06cf693f51e0ee2f9a",
                   "4.png": "4ed7e7702e4f50b9692c0043be04b729", "5.png": "a5c5e7e33f13fe5ad37b5836a5a74fb0"},
    "topwear": {"0.png": "b917edcf2b3c35d51ef57a6fad67557c", "1.png": "e33c6cb31ed1268a2c0dc73b665b1c9b",
                "2.png": "2b9b8fefa08894b7ea536cd62b86d494", "3.png": "807f5b628592f6747e2814be94359630",
                "4.png": "b51b17878503877e179ce4f9231713bf", "5.png": "1b6049d43f83ebfda857cc405d1936ac"},
    "hair": {"0.png": "e4007b0635a239ad16cdebfe90759349", "1.png": "fa6369f84d3310705df6d8ca8c9d515a",
             "2.png": "1b8046752be7233e829ebe9b11048e17", "3.png": "333783285c5fd94ff434ae5000d2da39",
             "4.png": "24df8e9b291cbd444f6c4d12d35b3d43", "5.png": "4dd471cc20e0b1cf71adcaab01c88598"},
    "shoes": {"1.png": "d56a561616a20a12030d2d40a52eeec6"},
}
CHARACTERS, TRAINING_CHARACTERS = 6**4, 1000  # a character is one sheet of each layer
CELL = 64  # pixels; a sheet has 21 rows of 13 cells
FRAMES = 8  # of an action
ACTIONS = {  # the row of each action seen from the left, below which are those from the front and from the right; and
    "walk": (9, (8, 1, 2, 3, 4, 5, 6, 7)),  # the columns of its 8 frames. Which ones they are, and the split into
    "cast": (1, (0, 1, 2, 3, 4, 5, 4, 6)),  # training and test characters, is as in arXiv 1803.02991
    "slash": (13, (0, 1, 2, 3, 4, 5, 4, 0))}
DIRECTIONS = {"front": 1, "left": 0, "right": 2}


class CannotDownload(UserError):
    """The data are not there and cannot be downloaded; that they are damaged is another matter."""


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


def load_dataset(name, data_dir, train=True, image_size=(), channels=0, ground="black"):
    """Reads the training or the test part of a data set.

    name: mnist or sprites (downloaded into `data_dir` when they are not there), digits, folder, or auto: mnist, and
        where it cannot be had, digits, after saying so on standard error. Only in the default `data_dir`: whoever
        names another one wants what is in it, and when that is not MNIST, auto is a `UserError`.
    image_size: (height, width) to resize the images to, or a number for a square; () or 0 = as they are.
    channels: 1 (grey), 3 (RGB), or 0 = as they are.
    ground: black or white, on which transparent images in folders are laid.

    Returns a `Dataset`. Raises `UserError` when the data cannot be had, is damaged or does not fit into memory.
    """
    image_size = as_size(image_size)
    if name in ("moving", "clips"):
        raise UserError(f"{name} has clips, and only images can be taken here")
    if len(image_size) == 3:
        raise UserError(f"image_size {show_size(image_size)} is of clips, but {name} has images: say height x width, "
                        "or learn from --dataset moving or clips")
    if channels not in (0, 1, 3):
        raise UserError(f"channels is {channels}, but must be 1 (grey), 3 (RGB) or 0 (as the data set has them)")
    if name in ("auto", "mnist") and Path(data_dir) != Path(Config.data_dir):
        check_data_dir(name, Path(data_dir))
    if name == "auto":
        try:
            return load_dataset("mnist", data_dir, train, image_size, channels)
        except CannotDownload as error:
            print(f"{str(error).partition(';')[0]}: using scikit-learn's 8x8 digits instead", file=sys.stderr)
            name = "digits"
    if name == "folder":
        folder = Folder(data_dir, train, image_size, channels, ground)
        return Dataset(name, folder.read_all(), folder.labels, folder.classes, held_out=folder.held_out)
    if name == "sprites":
        frames = read_sprites(Path(data_dir), train, image_size, channels)
        n, kinds, T = frames.shape[:3]
        return Dataset(name, frames.flatten(0, 2), torch.arange(kinds).repeat_interleave(T).repeat(n),
                       [f"{action} {direction}" for action in ACTIONS for direction in DIRECTIONS])
    images, labels = read_mnist(Path(data_dir), train) if name == "mnist" else read_digits(train)
    images = torch.from_numpy(images)[:, None]  # (N, 1, H, W)
    image_size = image_size or tuple(images.shape[2:])
    demand_memory(len(images), channels or 1, image_size)
    if image_size != tuple(images.shape[2:]):
        # All at once, their floats would take four times the memory
        images = torch.cat([resize(part, image_size) for part in images.split(1000)])
    if channels == 3:
        images = images.expand(-1, 3, -1, -1).contiguous()
    return Dataset(name, images, torch.from_numpy(labels).long(), [str(digit) for digit in range(10)])


def check_data_dir(name, data_dir):
    """Raises `UserError` when `data_dir`, named by the user, does not hold MNIST and is not meant to get it."""
    if holds_mnist(data_dir / "MNIST" / "raw"):
        return
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"{data_dir} is not a folder: point --data-dir at the folder that holds MNIST/raw")
    classes = []
    with contextlib.suppress(UserError):
        classes = list(find_classes(training_part(data_dir))[0])
    if classes:
        raise UserError(f"{data_dir} holds no MNIST/raw, but folders of images ({', '.join(classes[:3])}"
                        f"{' ...' if len(classes) > 3 else ''}): --dataset folder trains on those")
    if name == "auto":
        raise UserError(f"{data_dir} holds no MNIST/raw: point --data-dir at the folder that does, download MNIST into "
                        "this one with --dataset mnist, or train on folders of images with --dataset folder")


def holds_mnist(raw):
    """Whether `raw` holds any of MNIST's four files, unpacked or not."""
    return any((raw / f"{name}{ending}").exists() for name in MNIST_FILES for ending in ("", ".gz"))


def read_mnist(data_dir, train):
    """MNIST as arrays, images (N, 28, 28) and labels (N,), from torchvision's layout `data_dir`/MNIST/raw."""
    raw = data_dir / "MNIST" / "raw"
    files = [raw / name for name in MNIST_FILES[slice(0, 2) if train else slice(2, 4)]]
    missing = next((file.name for file in files if not file.is_file()), None)
    if missing and holds_mnist(raw):  # a download would write over the others
        remedy = "unpack it (gunzip)" if (raw / f"{missing}.gz").exists() else "put it there"
        raise UserError(f"{missing} is missing in {raw}: {remedy}, or {ANEW}")
    if missing:
        download_mnist(data_dir)
    images, labels = read_idx(files[0], (60000 if train else 10000, 28, 28)), read_idx(files[1], None)
    if len(labels) != len(images) or labels.max() > 9:
        raise UserError(f"{files[1]} does not hold {len(images)} labels from 0 to 9: {ANEW}")
    return images, labels


@contextlib.contextmanager
def new_folder(path):
    """Makes a folder for the block. Of it and those above that it had to make, what is empty at the end goes away."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()  # none but an empty one


def download_mnist(data_dir):
    """Downloads MNIST through torchvision, which checks the files' MD5 sums. Unless all of it came, nothing stays."""
    from torchvision.datasets import MNIST  # imported here: it takes a second that no other path needs

    raw = data_dir / "MNIST" / "raw"
    print(f"downloading MNIST into {data_dir / 'MNIST'} ...", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # a network that swallows packets must not hang the first run
    try:
        with new_folder(raw), tempfile.TemporaryDirectory(dir=raw) as temporary:
            with contextlib.redirect_stdout(io.StringIO()):  # it prints every mirror that fails
                whole = Path(MNIST(temporary, download=True).raw_folder)
            for name in MNIST_FILES:
                os.replace(whole / name, raw / name)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None)
        raise CannotDownload(f"MNIST is not in {raw} and cannot be downloaded{f' ({reason})' if reason else ''}; put "
                             f"{', '.join(MNIST_FILES[:3])} and {MNIST_FILES[3]} there, or point --data-dir at the "
                             "folder that holds MNIST/raw") from None
    finally:
        socket.setdefaulttimeout(timeout)


def read_idx(file, shape):
    """An uncompressed IDX file of bytes as an array; `shape` is what its header must say (None: any one dimension)."""
    data = np.fromfile(file, dtype=np.uint8)
    dims = 1 if shape is None else len(shape)
    header = 4 + 4 * dims
    sizes = tuple(int(n) for n in data[4:header].view(">u4")) if len(data) >= header else ()
    if bytes(data[:4]) != bytes([0, 0, 8, dims]) or sizes != (shape or sizes) or len(data) != header + np.prod(sizes):
        raise UserError(f"{file} is damaged (not the IDX file that it should be): {ANEW}")
    return data[header:].reshape(sizes)


def read_digits(train):
    """scikit-learn's handwritten digits as arrays, images (N, 8, 8) and labels (N,): 1,500 to train, 297 to test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)  # its grey levels are 0..16
    part = slice(0, 1500) if train else slice(1500, None)
    return images[part], digits.target[part]


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
    folder = find_sprites(data_dir)
    layers = [[cut_sheet(folder / layer / name, checksum) for name, checksum in sheets.items()]
              for layer, sheets in SHEETS.items()]
    frames = torch.empty(len(order), kinds, T, channels or 3, *size, dtype=torch.uint8)
    place = {number: i for i, number in enumerate(order.tolist())}
    characters = dress(Image.new("RGBA", layers[0][0].size, "black"), layers)
    for number, image in enumerate(tqdm(characters, "making sprites", CHARACTERS, leave=False, disable=None)):
        if number in place:
            cells = torch.from_numpy(np.array(image.convert("L" if channels == 1 else "RGB")))
            cells = cells.view(kinds * T, CELL, CELL, -1).permute(0, 3, 1, 2)  # (72, C, 64, 64)
            cells = cells if size == (CELL, CELL) else resize(cells, size)
            frames[place[number]] = cells.unflatten(0, (kinds, T))
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


def cut_sheet(path, checksum):
    """The 72 cells of a sheet that are frames, one below the other, as a PIL image of 64 x 4,608 pixels, RGBA."""
    content = path.read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(checksum):
        raise UserError(f"{path} is damaged, or not the sheet that it should be: bring that back, or move "
                        f"{path.parent.parent} away to have the sheets downloaded anew")
    with Image.open(io.BytesIO(content)) as image:
        sheet = np.asarray(image.convert("RGBA"))
    cells = sheet.reshape(-1, CELL, sheet.shape[1] // CELL, CELL, 4).swapaxes(1, 2)  # (rows, columns, 64, 64, 4)
    chosen = [cells[row + below, columns] for row, columns in ACTIONS.values() for below in DIRECTIONS.values()]
    return Image.fromarray(np.concatenate(chosen).reshape(-1, CELL, 4))


def find_sprites(data_dir):
    """The folder of the sheets: `data_dir`/Sprites, which gets them when they are nowhere, or `data_dir` itself."""
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"{data_dir} is not a folder: point --data-dir at the folder that holds (or gets) Sprites/")
    folder = data_dir / "Sprites"
    if not folder.exists() and (data_dir / "body" / "0.png").exists():  # a clone of the repository
        folder = data_dir
    files = [folder / layer / name for layer, sheets in SHEETS.items() for name in sheets]
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        download_sprites(folder)
    elif missing:
        raise UserError(f"{missing[0]} is missing: put it there, or move {folder} away to have the sheets downloaded "
                        "anew")
    return folder


def download_sprites(folder):
    """Downloads the sheets into a new `folder`. Unless all of them came, nothing stays."""
    print(f"downloading sprites by artists of the Liberated Pixel Cup (CC-BY-SA 3.0 or GPL 3.0) into {folder} ...",
          file=sys.stderr)
    try:
        with new_folder(folder.parent), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            whole = Path(temporary) / folder.name
            names = [(f"{layer}/{name}", checksum) for layer, sheets in SHEETS.items()
                     for name, checksum in sheets.items()]
            for name, checksum in tqdm(names, leave=False, disable=None):
                with urllib.request.urlopen(f"{SPRITES}/{name}", timeout=10) as response:
                    content = response.read()
                if not hashlib.sha256(content).hexdigest().startswith(checksum):
                    raise OSError(None, f"{name} came damaged")
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                (whole / name).write_bytes(content)
            os.replace(whole, folder)
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)  # urllib's, of which the system's error is one
        reason = getattr(reason, "strerror", None) or first_line(reason)
        raise CannotDownload(f"the sprites are not in {folder} and cannot be downloaded ({reason}); put a copy of "
                             "https://github.com/YingzhenLi/Sprites there, or point --data-dir at one") from None


def resize(images, size):
    """Images uint8 (N, C, H, W) in another size, (height, width)."""
    return torch.nn.functional.interpolate(images.float(), size=size, mode="bilinear", antialias=True,
                                           align_corners=False).round().byte()


BOUND = 1.0  # to_float's images lie in [-BOUND, BOUND]


def to_float(images):
    """Images at rest, uint8 0..255, as the model sees them: floats in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """Images from floats in [-1, 1] (what lies outside is cut off) to uint8 0..255."""
    return ((x + 1) * 127.5).round().clamp(0, 255).byte()
