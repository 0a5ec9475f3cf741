"""Clips of handwritten digits that move in straight lines and bounce off the walls, made anew at every step."""

from support.commands import UserError
from support.folders import Images
from support.sizes import demand_memory, show_size

import dataclasses
import hashlib
import math

import torch

from dataset import load_dataset

SIZE = (16, 32, 32)  # frames, height and width, where the user names none
MARGIN = 10          # pixels from a digit's centre of mass to the nearest wall: most of MNIST's are 20 high
SPEEDS = {"slow": (1 / 64, 3 / 64), "fast": (3 / 64, 5 / 64)}  # from a frame to the next, in sides of a frame


def made_there(numbers, device):
    """These few numbers as a tensor. A copy of a tensor that is made here would hold up a GPU."""
    return torch.stack([torch.full((), number, device=device) for number in numbers])


def centres(images):
    """The centre of mass (N, 2), row and column, of images (N, H, W); the middle where all is black."""
    x = images.float()
    ink = x.sum((1, 2))[:, None]                                                           # (N, 1)
    rows, columns = (torch.arange(n, device=x.device).float() - (n - 1) / 2 for n in x.shape[1:])
    sums = torch.stack([x.sum(2) @ rows, x.sum(1) @ columns], dim=1)                       # from the middle
    return sums / ink.clamp(min=1e-9) + made_there([(n - 1) / 2 for n in x.shape[1:]], x.device)


def bounce(u, length):
    """Where a point is that has gone the way u from one end of [0, length] on, elastically reflected at both."""
    return length - (length - u.remainder(2 * length)).abs()


def place(images, at, size):
    """Draws images (N, h, w), floats, into frames (N, T, H, W) of `size` (H, W), each with its centre of mass at the
    places `at` (N, T, 2), row and column, in between pixels bilinearly. What lies outside is cut off."""
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
    """In the place of a `Dataset`: clips of one or two digits, each with a place, a direction and a speed of its own.

    images: uint8 (N + 1, h, w), the digits, and a black one for none. shown: int64 (M, n), which of them clip k shows.
    paces: float (M, 2), its lowest and highest speed, in sides of a frame. shape: (1, T, H, W).
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
        """As of a `Dataset`: of other clips, another."""
        digest = hashlib.sha256(repr((self.classes, self.shape, MARGIN, SPEEDS)).encode())
        for tensor in (self.images, self.shown, self.paces, self.labels):
            digest.update(tensor.contiguous().numpy())
        return digest.hexdigest()[:16]

    def load(self):
        return self

    def at(self, size):
        """The same in another size (T, H, W)."""
        check_size(size)
        return dataclasses.replace(self, shape=(1, *size))

    def to(self, device):
        return dataclasses.replace(self, **{name: getattr(self, name).to(device)
                                            for name in ("images", "shown", "paces", "labels")})

    def paths(self, index, part, generator):
        """Where the digits of clips `index`[`part`] are, rows and columns of their centres, (b, n, T, 2)."""
        _, T, *size = self.shape
        pace, turn, *start = torch.rand(4, *self.shown[index].shape, generator=generator,
                                         device=index.device)[:, part]
        low, high = self.paces[index[part]].T[..., None]
        speed, angle = (low + (high - low) * pace) * min(size), 2 * math.pi * turn               # (b, n) each
        velocity = speed[..., None] * torch.stack([angle.sin(), angle.cos()], dim=-1)            # (b, n, 2), a frame
        rooms = made_there([side - 1 - 2 * MARGIN for side in size], index.device)               # (2,)
        frames = torch.arange(T, device=index.device)[:, None]                                   # (T, 1)
        way = torch.stack(start, dim=-1)[:, :, None] * rooms + velocity[:, :, None] * frames     # (b, n, T, 2)
        return MARGIN + bounce(way, rooms)

    def x_0(self, index, part, generator):
        """What a network learns from: clips `index`[`part`], floats (b, 1, T, H, W) in [-1, 1]; see `Dataset.x_0`."""
        paths = self.paths(index, part, generator)
        digits = self.images[self.shown[index[part]]].float() / 255                          # (b, n, h, w)
        frames = place(digits.flatten(0, 1), paths.flatten(0, 1), self.shape[2:])
        return frames.unflatten(0, digits.shape[:2]).amax(1)[:, None] * 2 - 1


def check_size(size):
    """Raises `UserError` unless digits can move in clips of this size."""
    if min(size[1:]) < 2 * MARGIN + 2:
        raise UserError(f"clips of {show_size(size)} are too small for moving digits: no side may be below "
                        f"{2 * MARGIN + 2} pixels, as in --image-size {show_size(SIZE)}")


def load_moving(config, train=True):
    """The clips that a `ClipConfig` asks for, with digits of the training or the test part of MNIST: a `Moving`.
    Raises `UserError`."""
    size = config.image_size or SIZE
    check_size(size)
    for T, *sides in (size, *config.sizes):  # a batch of floats
        demand_memory(config.batch_size * T, 4, sides, "lower --image-size, --sizes or --batch-size")
    data = load_dataset("mnist", config.data_dir, train)
    images, N = data.images[:, 0], len(data.images)
    first, names = torch.arange(N), [str(digit) for digit in range(10)]
    shown, labels = first[:, None], data.labels
    if config.digits == 2:
        second = torch.randperm(N, generator=torch.Generator().manual_seed(0))
        shown = torch.cat([torch.stack([first, other], dim=1) for other in (torch.full_like(first, N), second)])
        pairs = [f"{a}+{b}" for a in range(10) for b in range(a, 10)]
        a, b = torch.stack([labels, labels[second]]).sort(dim=0).values
        labels, names = torch.cat([labels, 10 + a * (21 - a) // 2 + b - a]), names + pairs
    paces = torch.tensor([[SPEEDS["slow"][0], SPEEDS["fast"][1]]]).repeat(len(shown), 1)
    if config.speeds:
        paces = torch.tensor([*SPEEDS.values()]).repeat_interleave(len(shown), 0)
        labels = torch.cat([labels * len(SPEEDS) + i for i in range(len(SPEEDS))])
        shown, names = shown.repeat(len(SPEEDS), 1), [f"{name} {pace}" for name in names for pace in SPEEDS]
    return Moving(torch.cat([images, torch.zeros_like(images[:1])]), shown, paces, labels, names, (1, *size))
