"""Image files of any kind and origin, read as people mean them."""

from support.commands import UserError

import contextlib
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")
LONGEST = 10_000  # frames of a clip
SLOWEST = 100  # milliseconds: ten frames a second, what a GIF has that says nothing
IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".pgm", ".ppm")


def visible(folder):
    """What lies in `folder`, sorted by name, but for what systems and tools hide there. Raises `UserError`."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX")
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None


def list_images(folder):
    """The image files directly in `folder`, sorted by name. Raises `UserError` when there is no such folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is {'not a folder' if folder.exists() else 'missing: there is no such folder'}")
    return [path for path in visible(folder) if path.suffix.lower() in IMAGE_ENDINGS and path.is_file()]


@contextlib.contextmanager
def opened(path):
    """An image file as a PIL image whose pixels are not read yet. Whatever goes wrong with it is a `UserError` that
    names the file. path: or a picture from Python, a PIL image or an array uint8 (H, W) or (H, W, 3)."""
    try:
        if isinstance(path, (Image.Image, np.ndarray)):
            yield path.copy() if isinstance(path, Image.Image) else Image.fromarray(path)
            return
        with Image.open(path) as image:
            yield image
    except MemoryError:
        raise
    except Exception as error:  # a damaged file fails in too many ways to list
        reason = str(error).replace(str(path), "the file").replace(repr(str(path)), "the file")
        raise UserError(f"{name_of(path)} cannot be read as an image ({reason:.100}): mend it or remove it") from None


def name_of(path):
    """What messages call a picture: its file's name, where it is in one."""
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else "the picture"


def is_grey(path):
    """Whether an image file is of greys, as its header says. Raises `UserError` as `opened` does."""
    with opened(path) as image:
        return image.mode in GREY_MODES


def read_image(path, mode=None):
    """One image file as a PIL image in `mode` ("L" or "RGB"; None: whichever holds it), turned as its EXIF data says,
    transparency laid on black.

    Greys deeper than a byte are scaled: 16 bits from 0..65535; 32 bits too, unless none is above 255; floats from 0..1,
    unless one lies outside, when they are taken to be 0..255. What lies outside is cut off.
    Raises `UserError` that names the file when it cannot be read as an image.
    """
    with opened(path) as image:
        image.filename = ""  # else Pillow maps plain TIFFs into memory, and shears those that it has to turn
        return convert(image, mode)


def convert(image, mode):
    """What `read_image` makes of an open image, or of the frame of it that was sought."""
    image.load()
    mode = mode or ("L" if image.mode in GREY_MODES else "RGB")
    with contextlib.suppress(Exception):  # damaged EXIF data are no damaged image
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):  # PIL clips these at 255 instead of scaling them
        array = np.asarray(image, dtype=np.float64)
        if not np.isfinite(array).all():
            raise ValueError("some of its pixels are NaN or infinite")
        if image.mode == "F":
            scale = 255 if array.min() >= 0 and array.max() <= 1 else 1
        else:  # "I" of other formats than TIFF comes from 16 bits
            scale = 1 if image.mode == "I" and image.format == "TIFF" and array.max() <= 255 else 1 / 257
        image = Image.fromarray((array * scale).clip(0, 255).round().astype(np.uint8))
    if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "La", "RGBa"):
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    return image.convert(mode)


def read_frames(path, mode=None):
    """The frames of a clip, a list of PIL images, each as `read_image` reads it: of a GIF, a WebP or an APNG, or the
    images in a folder, in the order of their names. A picture is a clip of one frame.

    An animation may show its frames for different times, as GIFs do that show a frame longer instead of twice. Each is
    repeated as often as the shortest of these times goes into its own; what is shown for longer than `SLOWEST`
    milliseconds is taken for several frames. Raises `UserError` that names the file.
    """
    if isinstance(path, (str, os.PathLike)) and os.path.isdir(path):
        return [read_image(file, mode) for file in list_images(path)]
    with opened(path) as image:
        count = getattr(image, "n_frames", 1)
        if count > 1 or image.info.get("duration"):
            return expand(*read_animation(image, count, mode))
    return [read_image(path, mode)]


def read_animation(image, count, mode):
    """The `count` frames of an open image, and for how long it shows each, milliseconds: two lists."""
    frames, times = [], []
    for i in range(count):
        image.seek(i)
        frames.append(convert(image.copy(), mode))
        times.append(image.info.get("duration") or SLOWEST)
    return frames, times


def expand(frames, times):
    """The frames, each as often as the shortest of the times, or SLOWEST, goes into its own."""
    shortest = min(*times, SLOWEST)
    if sum(times) > LONGEST * shortest:
        raise ValueError(f"it is longer than {LONGEST:,} frames of its shortest, {shortest:g} milliseconds")
    return [frame for frame, time in zip(frames, times, strict=True) for _ in range(round(time / shortest))]


def fit(image, size, resample=Image.Resampling.BICUBIC):
    """The centre of a PIL image, as much of it as has the shape of `size`, (height, width), and in that size."""
    width = min(image.width, image.height * size[1] / size[0])
    height = min(image.height, image.width * size[0] / size[1])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.resize((size[1], size[0]), resample, box=(left, top, left + width, top + height))


def to_tensor(image):
    """A PIL image, grey or RGB, as uint8 (C, H, W)."""
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)
