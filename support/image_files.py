"""Image files of any kind and origin, read as people mean them."""

from support import parallel
from support.commands import UserError
from support.sizes import demand_memory

import collections
import contextlib
import functools
import itertools
import math
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageChops, ImageOps

TINT = 1  # level by which the channels of a grey pixel may differ: lossy formats round them
LONGEST = 10_000  # frames of a clip
SLOWEST = 100  # milliseconds a frame: of a video, and of a GIF that does not say
# Pillow recognizes these formats, but has other programs read them
NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
ONE_PICTURE = ("MPO", "PSD")  # what Pillow calls their frames are previews and layers
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ogv")
VIDEO_FORMATS = "mov,matroska,webm,avi,mpeg,mpegvideo,ogg"  # FFmpeg's; a playlist, which names other files, is none
# Files that systems leave everywhere, and generator.py's note
UNSAID = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "settings.json")


@functools.cache
def image_formats():
    """The formats that the installed Pillow reads by itself, a list."""
    Image.init()
    return [kind for kind in Image.OPEN if kind not in NOT_READ]


def is_image(path):
    """Whether a file's name ends as that of an image that Pillow reads."""
    kind = Image.registered_extensions().get(path.suffix.lower())
    return kind in image_formats() or kind == "MPO"  # which Pillow opens as JPEG


def is_video(path):
    """Whether a file's name ends as a video's does."""
    return Path(path).suffix.lower() in VIDEO_ENDINGS


def natural(path):
    """The key that sorts paths by their names in natural order: 1, 2, 10 instead of 1, 10, 2."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", path.name))], path.name


def list_files(folder, wanted, left_out):
    """The files in `folder` that are `wanted` (a function of a path), and the folders: two lists in natural order,
    without what systems hide. The Counter `left_out` counts the other files, by kind. Raises `UserError`."""
    files, folders = [], []
    try:
        found = sorted(Path(folder).iterdir(), key=natural)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}") from None
    for path in found:
        if path.name.startswith(".") or path.name.lower() in UNSAID:
            continue
        if path.is_file() and wanted(path):
            files.append(path)
        elif path.is_dir():
            folders.append(path)
        else:
            left_out["broken link" if not path.exists() else "special file" if not path.is_file() else
                     path.suffix.lower()[:20] or "file without an ending"] += 1
    return files, folders


def walk(folder, wanted, left_out, whole=None, above=()):
    """Yields all files in and below `folder` as `list_files` does, a folder's own before those in its folders. Links
    to a folder on the way, or to one in `above`, are left out.

    whole: a function of a folder and `left_out`; what it returns, if anything, is yielded for the folder's files.
    """
    here = os.path.realpath(folder)
    if any(Path(other).is_relative_to(here) for other in above):
        left_out["circular link"] += 1
        return
    files, folders = list_files(folder, wanted, left_out)
    yield from files
    for inner in folders:
        found = whole and whole(inner, left_out)
        if found:
            yield found
        else:
            yield from walk(inner, wanted, left_out, whole, (*above, here))


def show_left_out(left_out):
    """A Counter as words, such as 16 files: 12 .heic, 3 broken links, 1 .txt"""
    most_first = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    kinds = [f"{count:,} {kind}{'s' if count > 1 and kind[0] != '.' else ''}" for kind, count in most_first]
    return (f"{left_out.total():,} file{'s' if left_out.total() > 1 else ''}: {', '.join(kinds[:8])}"
            f"{' ...' if len(kinds) > 8 else ''}")


def say_left_out(where, left_out, folders=()):
    """Says on standard error what a reader left out: the files in the Counter `left_out`, and folders, by name."""
    parts = [show_left_out(left_out)] if left_out else []
    if folders:
        parts.append(f"{len(folders):,} folder{'s' if len(folders) > 1 else ''}, in which it found nothing to read: "
                     f"{', '.join(folders[:8])}{' ...' if len(folders) > 8 else ''}")
    if parts:
        parallel.say(f"{where}: left out {'; and '.join(parts)}")


def list_images(folder):
    """The image files in `folder`, in natural order. Says on standard error what else lies there. Raises `UserError`
    when there is no such folder."""
    folder, left_out = Path(folder), collections.Counter()
    if not folder.is_dir():
        raise UserError(f"{folder} is {'not a folder' if folder.exists() else 'missing: there is no such folder'}")
    files, folders = list_files(folder, is_image, left_out)
    left_out.update({"folder": len(folders)} if folders else {})
    say_left_out(folder, left_out)
    return files


@contextlib.contextmanager
def named(path, kind):
    """Within the block, any error is a `UserError` that names the file at `path`, which is read as `kind`."""
    try:
        if isinstance(path, (str, os.PathLike)) and not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no file")  # a named pipe would be waited for
        yield
    except (MemoryError, UserError, ModuleNotFoundError):
        raise
    except Exception as error:  # a damaged file fails in too many ways to list
        reason = str(error).replace(str(path), "the file").replace(repr(str(path)), "the file")
        raise UserError(f"{name_of(path)} cannot be read as {kind} ({reason:.100}): mend it or remove it") from None


@contextlib.contextmanager
def opened(path):
    """An image file as a PIL image whose pixels are not read yet. Any error with it is a `UserError` that names the
    file. path: or a picture from Python, a PIL image or an array uint8 (H, W) or (H, W, 3)."""
    with named(path, "an image"):
        if isinstance(path, (Image.Image, np.ndarray)):
            yield path.copy() if isinstance(path, Image.Image) else Image.fromarray(path)
            return
        with Image.open(path, formats=image_formats()) as image:
            yield image


def name_of(path):
    """What messages call a picture: its file's name, if it has one."""
    return os.fspath(path) if isinstance(path, (str, os.PathLike)) else "the picture"


def is_grey(path, ground="black"):
    """Whether an image file is grey: its header says so, or the channels of no pixel differ by more than `TINT`. Raises
    `UserError`."""
    with opened(path) as image:
        if Image.getmodebase(image.mode) == "L":
            return True
    red, green, blue = read_image(path, "RGB", ground).split()
    return all(ImageChops.difference(*pair).getextrema()[1] <= TINT
               for pair in ((red, green), (green, blue), (blue, red)))


def read_image(path, mode=None, ground="black"):
    """One image file as a PIL image in `mode` ("L" or "RGB"; None: as the file has it), turned as its EXIF data says,
    with transparency laid on the colour `ground`.

    Greys deeper than a byte are scaled: 16 bits from 0..65535; 32 bits too, unless none is above 255; floats from 0..1,
    or from 0..255 if any lies outside 0..1. Values out of range are clipped.
    Raises `UserError` that names the file when it cannot be read as an image.
    """
    with opened(path) as image:
        image.filename = ""  # else Pillow maps plain TIFFs into memory, and shears those that it has to turn
        return convert(image, mode, ground)


def read_batches(paths, batch_size, ahead=2):
    """Yields lists of `batch_size` RGB images, uint8 (3, H, W), while threads decode the next `ahead` batches."""
    def read(path):
        return to_tensor(read_image(path, "RGB"))

    pool, pending = ThreadPoolExecutor(), collections.deque()
    try:
        for start in range(0, len(paths) + ahead * batch_size, batch_size):  # at last `ahead` empty ones
            pending.append([pool.submit(read, path) for path in paths[start:start + batch_size]])
            if len(pending) > ahead:
                yield [future.result() for future in pending.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, decode no more images that nobody will see


def convert(image, mode, ground):
    """What `read_image` makes of an open image, or of the frame of it that was sought."""
    image.load()
    mode = mode or ("L" if Image.getmodebase(image.mode) == "L" else "RGB")
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
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, ground), rgba)
    return image.convert(mode)


def read_clip(source, size=(), mode="RGB", ground="black", still=False, held=0):
    """The frames of a clip, uint8 (T, C, H, W), each read as by `read_image` and cropped at its centre to `size` (H, W;
    (): a square, the first one's shorter side); and the first one's size in the file, (width, height).

    source: a video; a GIF, a WebP or an APNG; a picture, which is a clip of one frame, or one from Python; a folder of
    images, or a list of them. still: read the first frame alone. held: frames of this size that are in memory already.

    A video is read at ten frames a second. The frames of an animation may be shown for different times: each is
    repeated as often as the shortest of these times goes into its own. A time longer than `SLOWEST` milliseconds counts
    as several frames, and 10 milliseconds or less as `SLOWEST`, as in browsers.
    Raises `UserError` that names the file, or says that the frames do not fit into memory.
    """
    frames, times, name, is_path = [], [], name_of(source), isinstance(source, (str, os.PathLike))
    read = read_video if is_path and is_video(source) else read_animation
    if isinstance(source, list) or (is_path and os.path.isdir(source)):
        read, source = read_stills, source if isinstance(source, list) else list_images(source)
    channels = 1 if mode == "L" else 3
    with contextlib.closing(read(source, mode, ground)) as found:
        for image, time, count in found:
            if not frames:
                own, size = image.size, size or (min(image.size),) * 2
                demand_memory(held + (1 if still else count), channels, size)
            frames.append(to_tensor(fit(image, size)))
            times.append(time)
            if still:
                break
    if not frames:
        raise UserError(f"{name} holds no images")
    shortest = min(*times, SLOWEST)
    counts = [1] if still else [round(time / shortest) for time in times]
    if sum(counts) > LONGEST:
        raise UserError(f"{name} is longer than {LONGEST:,} frames, {shortest:g} milliseconds each: cut it into parts")
    demand_memory(held + sum(counts), channels, size)
    return torch.stack([frame for frame, count in zip(frames, counts, strict=True) for _ in range(count)]), own


def frame_count(image):
    """How many frames an open image has."""
    return 1 if image.format in ONE_PICTURE else getattr(image, "n_frames", 1)


def is_animation(path):
    """Whether an image file has several frames. Raises `UserError` as `opened` does."""
    with opened(path) as image:
        return frame_count(image) > 1


def read_stills(files, mode, ground):
    """Yields each image, for how long it is shown, milliseconds, and how many there are."""
    for file in files:
        with opened(file) as image:
            if frame_count(image) > 1:
                raise UserError(f"{file} has {image.n_frames:,} frames, and is no frame of a clip: if {file.parent} "
                                "is a class of clips, name the folder above it")
        yield read_image(file, mode, ground), SLOWEST, len(files)


def read_animation(path, mode, ground):
    """Yields the frames of an animation, or the one of a picture, as `read_stills` does."""
    with opened(path) as image:
        count = frame_count(image)
        if count == 1 and not image.info.get("duration"):
            yield read_image(path, mode, ground), SLOWEST, 1
            return
        for i in range(count):
            image.seek(i)
            frame = convert(image.copy(), mode, ground)
            time = image.info.get("duration") or 0  # WebP says it once the frame is read
            yield frame, time if time > 10 else SLOWEST, count


def read_video(path, mode, ground):
    """Yields the frames that a video shows after 0, 1, 2 ... times `SLOWEST` milliseconds, as `read_stills` does."""
    import av  # here: none but videos need it

    with named(path, "a video"), open(path, "rb") as file, av.open(
            file, options={"format_whitelist": VIDEO_FORMATS}) as video:
        stream, first, done = video.streams.video[0], None, 0
        count = max(1, math.ceil((video.duration or 0) / 1000 / SLOWEST))  # as its header says, microseconds
        if count > LONGEST:
            raise ValueError(f"it is longer than {LONGEST:,} frames, ten a second: cut it into parts")
        for frame, after in itertools.pairwise(itertools.chain(video.decode(stream), [None])):
            first = frame.time if first is None else first
            end = after.time if after else frame.time + 1 / float(stream.average_rate or 10)
            while done * SLOWEST < (end - first) * 1000 - 0.5:
                image = frame.to_image()
                image = image.rotate(frame.rotation, expand=True) if frame.rotation else image
                yield image.convert(mode), SLOWEST, count
                done += 1


def fit(image, size, resample=Image.Resampling.BICUBIC):
    """The largest central part of a PIL image with the proportions of `size`, (height, width), in that size."""
    width = min(image.width, image.height * size[1] / size[0])
    height = min(image.height, image.width * size[0] / size[1])
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.resize((size[1], size[0]), resample, box=(left, top, left + width, top + height))


def to_tensor(image):
    """A PIL image, grey or RGB, as uint8 (C, H, W)."""
    return torch.from_numpy(np.array(image)).view(image.height, image.width, -1).permute(2, 0, 1)


def read_tensor(path, size, mode, ground):
    """One image file as uint8 (C, H, W), as `read_image` and `fit` make it. Raises `UserError`."""
    return to_tensor(fit(read_image(path, mode, ground), size))


def write_image(path, image):
    """Writes a uint8 image (C, H, W) as a PNG, whole or not at all."""
    array = image.permute(1, 2, 0).contiguous().numpy()
    temporary = path.with_suffix(".tmp")
    try:
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(temporary, "PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; the images before it are kept") from None


def recolour(images, channels):
    """Images uint8 (N, C, H, W) with 1 channel, the colours weighed as by Pillow, or 3."""
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
