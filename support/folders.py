"""Folders of images, one folder per class."""

from support.commands import UserError
from support.image_files import fit, is_grey, list_images, opened, read_image, to_tensor, visible
from support.sizes import as_size, demand_memory

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm


class Images:
    """Labelled images of one shape, in memory (`Dataset`) or in files (`Folder`)."""

    name: str             # "mnist", "digits", "sprites" or "folder"
    shape: tuple          # (C, H, W) of an image
    labels: torch.Tensor  # int64 (N,), 0..num_classes - 1
    classes: list[str]    # the name of each class

    @property
    def settings(self):
        """The fields of `Config` that the data decide, a dict."""
        C, *size = self.shape
        return dict(dataset=self.name, image_size=tuple(size), channels=C, num_classes=len(self.classes),
                    classes=tuple(self.classes))

    @property
    def summary(self):
        """What they are, in one line."""
        C, height, width = self.shape
        colour = {1: "grey", 3: "colour"}.get(C, f"{C} channels")
        return (f"{self.name}: {len(self.labels):,} images of {height} x {width}, {colour}, classes "
                f"{', '.join(self.classes[:10])}{' ...' if len(self.classes) > 10 else ''}")

    def at(self, size):
        """The same in another size, where there are several."""
        raise UserError(f"{self.name} has images of one size: leave --sizes out")


class Folder(Images):
    """A folder of images, one folder per class, as files that are not read yet; see `load_dataset`.

    Every image is brought to one size ((): a square, the first one's shorter side), cropped at its centre, with
    `channels` channels (0: 1 if all images are grey, else 3). Raises `UserError`.
    """

    name = "folder"

    def __init__(self, root, train=True, image_size=(), channels=0):
        self.root = Path(root)
        found, self.classes = list_classes(self.root, train)
        labelled = [(file, label) for label, name in enumerate(self.classes) for file in found.get(name, ())]
        self.files, labels = zip(*labelled, strict=True)
        self.labels = torch.tensor(labels)
        if not image_size:
            with opened(self.files[0]) as image:
                image_size = as_size(min(image.size))
        channels = channels or (1 if all(map(is_grey, self.files)) else 3)
        self.shape = (channels, *image_size)

    @property
    def fingerprint(self):
        """A hash, 16 hexadecimal digits, of the files' names, sizes and times, and of the images' shape."""
        digest = hashlib.sha256(repr((self.classes, self.shape)).encode())
        for file in self.files:
            state = file.stat()
            digest.update(repr((file.relative_to(self.root).as_posix(), state.st_size, state.st_mtime_ns)).encode())
        return digest.hexdigest()[:16]

    def read(self, rows):
        """The images in this slice, uint8 (n, C, H, W)."""
        C, *size = self.shape
        with ThreadPoolExecutor() as pool:  # Pillow lets other threads run while it decodes
            return torch.stack(list(pool.map(
                lambda file: to_tensor(fit(read_image(file, "L" if C == 1 else "RGB"), size)), self.files[rows])))

    def read_all(self):
        """All images, uint8 (N, C, H, W)."""
        N, block = len(self.files), 256
        demand_memory(N, self.shape[0], self.shape[1:])
        images = torch.empty(N, *self.shape, dtype=torch.uint8)
        with tqdm(total=N, desc=f"reading {self.root}", leave=False, disable=None) as bar:
            for start in range(0, N, block):
                images[start:start + block] = self.read(slice(start, start + block))
                bar.update(len(images[start:start + block]))
        return images


def list_classes(root, train):
    """The images of a part of `root`, which holds train/<class>/* and test/<class>/*, as in the article, or <class>/*:
    a dict from the names of classes to lists of files, and the names of all classes. Raises `UserError`."""
    part = training_part(root)
    found = find_classes(part)
    names = list(found)
    if not train and part != root:
        part = root / "test"
        if not part.is_dir():
            raise UserError(f"{root} holds train/ but no test/: put the images to test on into {part}/<class>/")
        found = find_classes(part)
        strange = [name for name in found if name not in names]
        if strange:
            raise UserError(f"{part / strange[0]} has no counterpart in {root / 'train'}: both need the same classes")
    return found, names


def has_test_part(name, data_dir):
    """Whether the data set called `name` has images to test on: all have, but folders without train/ and test/."""
    return name != "folder" or all((Path(data_dir) / part).is_dir() for part in ("train", "test"))


def training_part(root):
    """What holds the folders of the classes to learn from: `root`, or its train/. Raises `UserError`."""
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: point --data-dir at a folder that holds one folder per class")
    return root / "train" if (root / "train").is_dir() else root


def in_order(found):
    """The classes of `found`, a dict from names to lists of files, that have any: numbers in order, then words."""
    names = sorted((name for name, files in found.items() if files),
                   key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    return {name: found[name] for name in names}


def find_classes(folder):
    """The images of each class: a dict from the names of the folders in `folder` that hold any, `in_order`, to lists of
    files. Raises `UserError` when there are none, or images lie deeper."""
    found = {path.name: list_images(path) for path in visible(folder) if path.is_dir()}
    for name, images in found.items():
        for deeper in () if images else visible(folder / name):
            if deeper.is_dir() and list_images(deeper):
                raise UserError(f"{deeper} holds images, but {folder / name} does not: move them up into {folder}"
                                f"/<class>/, or point --data-dir at {folder / name}")
    found = in_order(found)
    if not found:
        raise UserError(f"no images in {folder}/<class>/: it must hold one folder per class, with images in each"
                        + (f"; those in {folder} itself have no class" if list_images(folder) else ""))
    return found
