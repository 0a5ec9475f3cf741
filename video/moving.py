"""Clips of handwritten digits that move in straight lines and bounce off the walls, made anew at every step."""

from support.commands import UserError
from support.files import fingerprint
from support.folders import Images
from support.sizes import demand_memory, show_size

import dataclasses
import math

import torch

from dataset import load_dataset

SIZE = (16, 32, 32)  # frames, height and width, where the user names none
MARGIN = 10          # pixels from a digit's centre of mass to the nearest wall: most of MNIST's are 20 high
SPEEDS = {"slow": (1 / 64, 3 / 64), "fast": (3 / 64, 5 / 64)}  # from a frame to the next, in sides of a frame


def centres(images):
    """The centre of mass (N, 2), row and column, of images (N, H, W); the middle where all is black."""
    x = images.float()
    ink = x.sum((1, 2)).clamp(min=1e-9)                                                    # (N,)

    def centre(line):  # (N, n), the ink of each row or column
        middle = (line.shape[1] - 1) / 2
        return line @ (torch.arange(line.shape[1], device=x.device) - middle) / ink + middle

    return torch.stack([centre(x.sum(2)), centre(x.sum(1))], dim=1)


def bounce(u, length):
    """Where a point is that starts at 0, goes the way u, and is reflected at both ends of [0, length]."""
    return length - (length - u.remainder(2 * length)).abs()


def place(images, at, size):
    """Draws images (N, h, w), floats, into frames (N, T, H, W) of `size` (H, W), bilinearly, each with its centre of
    mass at the places `at` (N, T, 2), row and column. What lies outside is cut off."""
    corners = at - centres(images)[:, None]                                                # (N, T, 2)

    def weights(side, start, count):
        """How much of pixel i of an image goes to pixel k of a frame: (N, T, side, count)."""
        gap = torch.arange(side, device=at.device)[:, None] - torch.arange(count, device=at.device)
        return (1 - (gap - start[..., None, None]).abs()).clamp(min=0)

    rows, columns = (weights(side, corners[..., axis], count)
                     for axis, (side, count) in enumerate(zip(size, images.shape[1:], strict=True)))
    return rows @ images[:, None] @ columns.mT


@dataclasses.dataclass(frozen=True)
class Moving(Images):
    """Takes the place of a `Dataset`: clips of one or two digits, each with its own place, direction and speed.

    images: uint8 (N + 1, h, w), the digits, and a black image for no digit. shown: int64 (M, n), the images that each
    clip shows. paces: float (M, 2), the lowest and highest speed of each clip, in sides of a frame a frame. shape: (1,
    T, H, W).
    """

    images: torch.Tensor
    shown: torch.Tensor
    paces: torch.Tensor
    labels: torch.Tensor
    classes: list
    shape: tuple
    name = "moving"

    @property
    def summary(self):
        _, T, H, W = self.shape
        return (f"{self.name}: {T} frames of {H} x {W}, of {len(self.images) - 1:,} digits, classes "
                f"{', '.join(self.classes[:10])}{' ...' if len(self.classes) > 10 else ''}")

    @property
    def fingerprint(self):
        """A hash of all that decides the clips; see `Dataset.fingerprint`."""
        return fingerprint(repr((self.classes, self.shape, MARGIN, SPEEDS)), self.images, self.shown, self.paces,
                           self.labels)

    def load(self):
        return self

    def at(self, size):
        """The same clips in another size (T, H, W). Raises `UserError` when digits cannot move there."""
        if min(size[1:]) < 2 * MARGIN + 2:
            raise UserError(f"clips of {show_size(size)} are too small for moving digits: no side may be below "
                            f"{2 * MARGIN + 2} pixels, as in --image-size {show_size(SIZE)}")
        return dataclasses.replace(self, shape=(1, *size))

    def to(self, device):
        return dataclasses.replace(self, **{name: getattr(self, name).to(device)
                                            for name in ("images", "shown", "paces", "labels")})

    def paths(self, index, part, generator):
        """The rows and columns of the centres of the digits of clips `index`[`part`], (b, n, T, 2)."""
        _, T, *size = self.shape
        pace, turn, *starts = torch.rand(4, *self.shown[index].shape, generator=generator,
                                         device=index.device)[:, part, :, None]
        low, high = self.paces[index[part]].T[..., None, None]                                   # (b, 1, 1) each
        speed, angle = (low + (high - low) * pace) * min(size), 2 * math.pi * turn               # (b, n, 1) each
        frames, places = torch.arange(T, device=index.device), []
        for side, start, direction in zip(size, starts, (angle.sin(), angle.cos()), strict=True):
            room = side - 1 - 2 * MARGIN
            places.append(MARGIN + bounce(start * room + speed * direction * frames, room))      # (b, n, T)
        return torch.stack(places, dim=-1)

    def x_0(self, index, part, generator):
        """The clips `index`[`part`], floats (b, 1, T, H, W) in [-1, 1]; see `Dataset.x_0`."""
        paths = self.paths(index, part, generator)
        digits = self.images[self.shown[index[part]]].float() / 255                          # (b, n, h, w)
        frames = place(digits.flatten(0, 1), paths.flatten(0, 1), self.shape[2:])
        return frames.unflatten(0, digits.shape[:2]).amax(1)[:, None] * 2 - 1


def load_moving(config, train=True):
    """The clips that a `ClipConfig` asks for, with digits of the training or the test part of MNIST: a `Moving`.
    Raises `UserError`."""
    if config.vae or config.flips or config.channels > 1:
        raise UserError("moving digits are learned as grey pixels, and not in a mirror: leave out --vae, --flips and "
                        "--channels")
    size = config.image_size or SIZE
    for T, *sides in (size, *config.sizes):  # a batch of floats
        demand_memory(config.batch_size * T, 4, sides, "lower --image-size, --sizes or --batch-size")
    data = load_dataset("mnist", config.data_dir, train)
    images, labels, names, N = data.images[:, 0], data.labels, data.classes, len(data.images)
    shown = torch.arange(N)[:, None]
    if config.digits == 2:
        second = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        shown = torch.cat([torch.column_stack([shown, other]) for other in (torch.full_like(second, N), second)])
        a, b = torch.stack([labels, labels[second]]).sort(dim=0).values
        labels = torch.cat([labels, 10 + a * (21 - a) // 2 + b - a])
        names = names + [f"{a}+{b}" for a in range(10) for b in range(a, 10)]
    paces = torch.tensor([[SPEEDS["slow"][0], SPEEDS["fast"][1]]]).repeat(len(shown), 1)
    if config.speeds:
        paces = torch.tensor([*SPEEDS.values()]).repeat_interleave(len(shown), 0)
        labels = torch.cat([labels * len(SPEEDS) + i for i in range(len(SPEEDS))])
        shown, names = shown.repeat(len(SPEEDS), 1), [f"{name} {pace}" for name in names for pace in SPEEDS]
    return Moving(torch.cat([images, torch.zeros_like(images[:1])]), shown, paces, labels, names, ()).at(size)
