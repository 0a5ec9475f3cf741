"""Pictures of samples, and their files."""

from support.commands import UserError
from support.files import write_atomically

from pathlib import Path

import torch
from PIL import Image


def grid(images, columns, gap=2, height=56):
    """Lays out uint8 images (N, C, H, W) row by row as one PIL image, grey or RGB, enlarged to about `height` pixels
    each so that small images can be seen."""
    scale = max(1, round(height / images.shape[2]))
    images = images.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    N, C, H, W = images.shape
    rows = -(-N // columns)
    picture = torch.zeros(C, rows * (H + gap) + gap, columns * (W + gap) + gap, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (H + gap), gap + i % columns * (W + gap)
        picture[:, top:top + H, left:left + W] = image
    picture = picture.expand(3, -1, -1) if C == 2 else picture[:3]  # of latents the first three channels
    return Image.fromarray(picture[0].numpy() if C == 1 else picture.permute(1, 2, 0).contiguous().numpy())


def save_picture(path, picture, **options):
    """Writes a PIL image as the format that `path` ends with. Raises `UserError` when that cannot be done."""
    formats = Image.registered_extensions()
    if Path(path).suffix.lower() not in formats:
        raise UserError(f"{path} should end in .png, .gif or another ending of a picture")
    write_atomically(path, lambda file: picture.save(file, formats[Path(path).suffix.lower()], **options))
