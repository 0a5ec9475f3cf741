"""Pictures of samples, and their files."""

from support.commands import UserError, first_line, is_out_of_memory
from support.files import MARK, check_output, write_atomically

import contextlib
import io
import itertools
import sys
from pathlib import Path

import torch
from PIL import ExifTags, Image, ImageDraw

LINE = 14  # the height of a line of text in PIL's own font, pixels
EXIF = Image.Exif()
EXIF[ExifTags.Base.Software] = MARK.decode()


def grid(images, columns, gap=2, height=56, captions=()):
    """Lays out uint8 images (N, C, H, W) row by row as one PIL image, grey or RGB. Small images are enlarged to about
    `height` pixels. captions: a text above each column, cut to its width."""
    size, scale = grid_size(len(images), *images.shape[2:], columns, gap, height, captions)
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    C, H, W = images.shape[1:]
    head = LINE if captions else 0
    # Two channels are shown as red and green, and of latents the first three
    picture = torch.zeros(C if C == 1 else max(C, 3), *size[::-1], dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = head + gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        picture[:C, top:top + H, left:left + W] = image
    picture = Image.fromarray(picture[0].numpy() if C == 1 else picture[:3].permute(1, 2, 0).contiguous().numpy())
    for i, caption in enumerate(captions):
        write(picture, gap + i * (W + gap), 1, caption, W)
    return picture


def grid_size(N, H, W, columns, gap=2, height=56, captions=()):
    """The size (width, height) of what `grid` makes of N images of H x W, and by how much it enlarges them."""
    scale = max(1, round(height / H))
    rows, head = -(-N // columns), LINE if captions else 0
    return (columns * (scale * W + gap) + gap, head + rows * (scale * H + gap) + gap), scale


def frames_of(x):
    """The frames of clips x (B, C, T, H, W) as a tuple of T images (B, C, H, W); images x are one frame."""
    return x.reshape(*x.shape[:2], -1, *x.shape[-2:]).unbind(2)


def write(picture, x, y, text, width):
    """Writes one line of text into a PIL image, cut to `width` pixels, with its upper left corner at (x, y)."""
    draw, text = ImageDraw.Draw(picture), " ".join(text[:1000].split())
    cut = text
    while cut and draw.textlength(cut) > width:
        text = text[:-1]
        cut = text + "…"[:len(text)]
    draw.text((x, y), cut, fill="white")


def format_of(path):
    """The format that the ending of a path stands for, as PIL calls it. Raises `UserError` if there is none."""
    Image.preinit()  # most are found without all of PIL's plug-ins, which take a while to load
    ending = Path(path).suffix.lower()
    kind = Image.EXTENSION.get(ending) or Image.registered_extensions().get(ending)
    if kind is None:
        raise UserError(f"{path} should end in .png, .gif or another ending of a picture")
    return kind


def check_picture(path, animated=False, inputs=(), size=(64, 64)):
    """Raises `UserError` unless `save_picture` may write a picture of this size, (width, height), to `path`.
    animated: with several frames. inputs: as of `check_output`."""
    path = Path(path)
    check_output(path, inputs=inputs)
    kind = format_of(path)
    if animated and kind not in ("GIF", "PNG", "WEBP", "AVIF"):
        raise UserError(f"{path}: {kind} cannot be animated; let it end in .gif, .png or .webp")
    try:  # a format may be for reading only, need a program that is missing, know no grey, or limit its sides
        for mode, part in itertools.product(("L", "RGB"), {(size[0], 64), (64, size[1])}):
            Image.new(mode, part).save(io.BytesIO(), kind, save_all=animated)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{path} cannot be written as {kind}, {size[0]:,} x {size[1]:,} pixels "
                        f"({first_line(error):.100}); let it end in .png") from None


def save_picture(path, picture, **options):
    """Writes a PIL image in the format that the ending of `path` names, with `MARK` in it if the format has a place for
    that. Raises `UserError` when it cannot."""
    kind = format_of(path)

    def save(file):
        try:
            picture.save(file, kind, comment=MARK, exif=EXIF, **options)
        except Exception as error:  # each format fails in its own way, say when a picture is too large for it
            if (isinstance(error, OSError) and error.errno) or is_out_of_memory(error):
                raise
            raise UserError(f"{path} cannot be written as {kind}: {first_line(error):.150}") from None

    write_atomically(path, save)


def save_animation(path, pictures, durations):
    """Writes PIL images as an animation, each shown for so many milliseconds; a single one as a picture. Raises
    `UserError`."""
    more = dict(save_all=True, append_images=pictures[1:], loop=0, duration=durations) if len(pictures) > 1 else {}
    save_picture(path, pictures[0], **more)


@contextlib.contextmanager
def warned():
    """A picture that cannot be written ends no run: within the block, a `UserError` is a warning."""
    try:
        yield
    except UserError as error:
        print(f"\nwarning: {error}", file=sys.stderr)  # below the bar


def write_figure(figure, path):
    """Writes a figure of matplotlib as a PNG. Raises `UserError` when that cannot be done."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120,
                                                       metadata={"Software": MARK.decode()}))


def psnr(images, others):
    """The peak signal-to-noise ratio of pairs of images, uint8 (N, C, H, W): dB, the mean over the pairs. Equal images
    count as 59 dB, as if they differed by rounding (a squared error of 1/12)."""
    errors = [((a.float() - b.float()) ** 2).mean(dim=(1, 2, 3))
              for a, b in zip(images.split(100), others.split(100), strict=True)]  # each (100,)
    return (10 * (255**2 / torch.cat(errors).clamp(min=1 / 12)).log10()).mean().item()
