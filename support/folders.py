"""Folders of images, one folder per class."""

from support import parallel
from support.commands import UserError
from support.files import fingerprint
from support.image_files import is_grey, is_image, list_files, opened, read_tensor, say_left_out, show_left_out, walk
from support.sizes import as_size, demand_memory

import collections
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

TESTS = ("test", "val", "valid", "validation")  # folders of images to test on, beside train/
TENTH = 10  # one image in so many of each class is held out if there is no folder to test on
ONE = "all"  # the class of images that lie in no class's folder
LOOKED_AT = 16  # images, spread over all, that `warn_of_alike` sees
NARROW = 64  # images should have more of the 256 levels than this


class Images:
    """Labelled images of one shape, in memory (`Dataset`) or in files (`Folder`)."""

    name: str             # "mnist", "sprites", "folder" ...
    shape: tuple          # (C, H, W) of an image
    labels: torch.Tensor  # int64 (N,), 0..num_classes - 1
    classes: list[str]    # the name of each class
    held_out: int = 0     # how many more are kept to test on

    @property
    def settings(self):
        """The fields of `Config` that the data decide, a dict."""
        C, *size = self.shape
        return dict(dataset=self.name, image_size=tuple(size), channels=C, num_classes=len(self.classes),
                    classes=tuple(self.classes))

    @property
    def summary(self):
        """The images in one line."""
        C, height, width = self.shape
        colour = {1: "grey", 3: "colour"}.get(C, f"{C} channels")
        classes = "one class: unconditional" if len(self.classes) == 1 else (
            f"classes {', '.join(self.classes[:10])}{' ...' if len(self.classes) > 10 else ''}")
        return (f"{self.name}: {len(self.labels):,} images of {height} x {width}, {colour}, {classes}"
                + (f"; every tenth image of each class, {self.held_out:,} in all, is held out to test on"
                   if self.held_out else ""))


class Folder(Images):
    """A folder of images, one folder per class, as files that are not read yet; see `load_dataset`.

    Every image is cropped at its centre and brought to one size ((): a square, the first one's shorter side). It has
    `channels` channels (0: 1 if all images are grey, else 3), and transparency is laid on the colour `ground`. Without
    a part to test on, every tenth image of each class is held out of training, for tests. Raises `UserError`.
    """

    name = "folder"

    def __init__(self, root, train=True, image_size=(), channels=0, ground="black"):
        self.root, self.ground = folder_of_classes(root), ground
        tested = has_test_part(self.name, self.root)
        found, self.classes = list_classes(self.root, train or not tested)
        if not tested:
            self.held_out = sum(len(files) // TENTH for files in found.values()) if train else 0
            found = {name: [file for i, file in enumerate(files) if (i % TENTH < TENTH - 1) == train]
                     for name, files in found.items()}
            if not any(found.values()):
                raise UserError(f"{root} has no test/, and no class of {TENTH} images or more to hold some out of")
        labelled = [(file, label) for label, name in enumerate(self.classes) for file in found.get(name, ())]
        self.files, labels = zip(*labelled, strict=True)
        self.labels = torch.tensor(labels)
        self.find_shape(image_size, channels)

    def find_shape(self, image_size, channels):
        """Sets `shape`: as the arguments say, else as the files have it."""
        if not image_size:
            with opened(self.files[0]) as image:
                image_size = as_size(min(image.size))
        channels = channels or (1 if all(is_grey(file, self.ground) for file in self.files) else 3)
        self.shape = (channels, *image_size)

    @property
    def fingerprint(self):
        """A hash (16 hexadecimal digits) of the files' names, sizes and times, and of the images' shape."""
        states = [(file.relative_to(self.root).as_posix(), file.stat()) for file in self.files]
        return fingerprint(repr((self.classes, self.shape)), self.ground.removeprefix("black"),
                           *(repr((name, state.st_size, state.st_mtime_ns)) for name, state in states))

    def read(self, rows):
        """The images in this slice, uint8 (n, C, H, W)."""
        C, *size = self.shape
        with ThreadPoolExecutor() as pool:  # Pillow lets other threads run while it decodes
            return torch.stack(list(pool.map(lambda file: read_tensor(
                file, size, "L" if C == 1 else "RGB", self.ground), self.files[rows])))

    def check(self):
        """Warns when the images are nothing to learn from; see `warn_of_alike`."""
        step = -(-len(self.files) // LOOKED_AT)
        warn_of_alike(torch.cat([self.read(slice(i, i + 1)) for i in range(0, len(self.files), step)]), self.root)

    def read_all(self):
        """All images, uint8 (N, C, H, W)."""
        N, block = len(self.files), 256
        demand_memory(N, self.shape[0], self.shape[1:])
        self.check()
        images = torch.empty(N, *self.shape, dtype=torch.uint8)
        with tqdm(total=N, desc=f"reading {self.root}", leave=False, disable=None) as bar:
            for start in range(0, N, block):
                images[start:start + block] = self.read(slice(start, start + block))
                bar.update(len(images[start:start + block]))
        return images


def warn_of_alike(images, root):
    """Warns if images uint8 (N, C, H, W), some of those in `root`, are all the same, or have few of the 256 levels."""
    low, high = images.min().item(), images.max().item()
    if high - low < NARROW:
        trouble = (f"have levels from {low} to {high} alone, of 0 to 255. Drawings on transparency may need --ground "
                   "white, and files of 16 bits a pixel are read as if they used all of 0 to 65,535")
    elif len(images) > 1 and (images == images[:1]).all():
        trouble = "are all the same"
    else:
        return
    parallel.say(f"warning: {len(images):,} of the images of {root}, spread over all, {trouble}")


def list_classes(root, train=True, wanted=is_image, whole=None):
    """The files of each class in a part of `root`: a dict from the names of classes to lists of files, and the names
    of all classes. Prints on standard error what is left out. Raises `UserError`.

    `root` holds a folder for each class, to which all below it belongs, as in torchvision's ImageFolder; or files
    alone, which are one class; or folders train and test (`TESTS`), each of which holds one of these.
    wanted, whole: as of `walk`.
    """
    part, tests = parts_of(root, wanted)
    found, left_out, empty = find_classes(part, wanted, whole)
    names = list(found)
    for part in [] if train else tests:
        found, left_out, empty = find_classes(part, wanted, whole)
        if found.keys() <= {*names}:
            break
    if strange := found.keys() - {*names}:
        raise UserError(f"{part / min(strange)} has no counterpart in {root / 'train'}: both need the same classes; or "
                        f"move {part} away")
    if part != root:
        left_out["classless file"] += len(list_files(root, wanted, left_out)[0])
    say_left_out(part, +left_out, empty)
    for name, files in found.items():
        places = {place(file).parent for file in files}
        if len(places) > 1:
            parallel.say(f"{part / name}: what lies in its {len(places):,} folders, such as {max(places)}, is all of "
                         f"class {name}")
            break
    return found, names


def place(found):
    """The path of what `walk` yields: a file, or the folder of a list of files."""
    return found[0].parent if isinstance(found, list) else found


def folder_of_classes(data_dir):
    """The folder that --data-dir names, a `Path`. Raises `UserError` if it is empty."""
    if not data_dir:
        raise UserError("name the folder that holds one folder per class with --data-dir")
    return Path(data_dir)


def has_test_part(name, data_dir):
    """Whether the data set called `name` has images to test on: all but folders without train/ and test/."""
    return name != "folder" or bool(parts_of(Path(data_dir))[1])


def parts_of(root, wanted=is_image):
    """The folder of the classes to learn from, `root` or its train/; and a list of those to test on, which is empty for
    `root`. Raises `UserError`.

    A class may be called train: train/ is a part only if no other folder of `root`, but for `TESTS`, holds a file that
    is `wanted`.
    """
    if not root.is_dir():
        raise UserError(f"{root} is not a folder: point --data-dir at a folder that holds one folder per class")
    folders = list_files(root, wanted, collections.Counter())[1]
    others = [folder for folder in folders if folder.name not in ("train", *TESTS)]
    taken = (walk(folder, wanted, collections.Counter(), above=[os.path.realpath(root)]) for folder in others)
    if not (root / "train").is_dir() or any(next(files, None) for files in taken):
        return root, []
    return root / "train", [root / name for name in TESTS if (root / name).is_dir()]


def find_classes(folder, wanted=is_image, whole=None):
    """The files of each class in `folder`: a dict from the names of its folders that hold any, in natural order, to
    lists of files; a Counter of the files that are left out; and the names of the empty folders. A name that is no text
    is spelt in bytes, such as \\xc4. Raises `UserError` if there is no file, or all lie one folder deeper."""
    left_out = collections.Counter()
    own, folders = list_files(folder, wanted, left_out)
    above = [os.path.realpath(folder)]
    found = {os.fsencode(path.name).decode(errors="backslashreplace"): list(walk(path, wanted, left_out, whole, above))
             for path in folders}
    empty = [name for name, files in found.items() if not files]
    found = {name: files for name, files in found.items() if files}
    if not found and own:
        return {ONE: own}, left_out, empty
    left_out.update({"classless file": len(own)} if own else {})
    if not found:
        raise UserError(f"no {'clips' if whole else 'images'} in {folder}/<class>/: it must hold one folder per class, "
                        f"with {'videos, animations or folders of images' if whole else 'images'} in each"
                        + (f"; it holds {show_left_out(left_out)}" if left_out else ""))
    if len(found) == 1:
        (name, files), = found.items()
        inner = [place(file).relative_to(folder).parts for file in files]
        if all(len(parts) > 2 for parts in inner) and len({parts[1] for parts in inner}) > 1:
            raise UserError(f"all that {folder} holds lies in {folder / name}, in several folders: if these are the "
                            f"classes, point --data-dir at {folder / name}")
    return found, left_out, empty
