"""The `DiT` of clips: rotary positions, and any size up to the largest that it has learned."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from dit import DiT, count_to, unpatchify
from dit_block import Attention, DiTBlock, attend

# A grid has a number of patches for each axis: time, height and width.


def rotations(grid, head_size, base=100.0):
    """The angles by which `rotate` turns the queries and keys of a grid's patches, as cosines and sines (2, *grid,
    head_size / 2). Each axis has an equal share of the angles, and the first axis also the rest. The base is small, as
    for images (2403.13298), since there are few patches along an axis."""
    half, axes = head_size // 2, len(grid)
    shares = [half - (axes - 1) * (half // axes), *[half // axes] * (axes - 1)]
    places = torch.meshgrid(*map(count_to, grid), indexing="ij")                                     # each (*grid)
    angles = torch.cat([place[..., None] * base ** -(count_to(n) / max(1, n))
                        for place, n in zip(places, shares, strict=True)], dim=-1)
    return torch.stack([angles.cos(), angles.sin()]).float()


def rotate(x, rotation):
    """Turns each pair of channels (i, i + D/2h) of queries or keys x (B, h, N, D/h) by an angle that depends on the
    token's place (RoFormer, 2104.09864, equation 34). The product of a query and a key then depends on how far apart
    their tokens are. rotation: cosines and sines of the angles, (2, N, D/2h)."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class RotaryAttention(Attention):
    """`Attention` with queries and keys that are turned by their places, if it is given a rotation. forward: x (B, N,
    D), rotation (2, N, D/2h), see `rotate` -> (B, N, D)

    qk_norm: divides each query and key by its root mean square first (2302.05442), and learns the scale of the queries.
    """

    def __init__(self, hidden_size, num_heads, qk_norm=False):
        super().__init__(hidden_size, num_heads)
        self.scale = nn.Parameter(torch.ones(hidden_size // num_heads)) if qk_norm else None

    def forward(self, x, rotation=None):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)  # (B, N, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # each (B, h, N, D/h)
        if self.scale is not None:
            q, k = F.rms_norm(q, q.shape[-1:], self.scale, 1e-6), F.rms_norm(k, k.shape[-1:], eps=1e-6)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        x = attend(q, k, v)                                                   # (B, h, N, D/h)
        return self.out(x.transpose(1, 2).reshape(B, N, D))                   # (B, N, D)


class ClipDiT(DiT):
    """A `DiT` of clips. forward: as `DiT`, for an x (B, C, T, H, W) of any size up to `input_size`, such as a shorter
    clip or one frame. Raises ValueError when x is larger.

    rope: rotary positions (2104.09864) in attention, beside those of the patch embedding. qk_norm: see
    `RotaryAttention`. attention: another class in its place.
    """

    def __init__(self, *args, rope=False, qk_norm=False, attention=None, **options):
        super().__init__(*args, **options, block=functools.partial(
            DiTBlock, attention=attention or functools.partial(RotaryAttention, qk_norm=qk_norm)))
        head_size = self.label_embedding.embedding_dim // self.blocks[0].attention.num_heads
        self.register_buffer("rotations", rotations(self.grid, head_size) if rope else None,
                             persistent=False)                                      # (2, *grid, D/2h)

    def forward(self, x, t, y):
        dtype, size = x.dtype, x.shape[2:]
        if not dtype.is_floating_point:
            raise TypeError(f"x holds {dtype}, but a DiT sees floats in [-1, 1]: dataset.to_float makes them")
        gaps = [-s % p for s, p in zip(size, self.patch, strict=True)]
        if any(gaps):  # repeat the last values along each axis until patches divide it
            x = F.pad(x, [n for gap in reversed(gaps) for n in (0, gap)], "replicate")
        grid = [s // p for s, p in zip(x.shape[2:], self.patch, strict=True)]
        if any(n > most for n, most in zip(grid, self.grid, strict=True)):
            raise ValueError(f"an input of {tuple(size)} is larger than the input_size {self.input_size}")
        t, y = (torch.as_tensor(value, device=x.device) for value in (t, y))
        t, y = (value.expand(len(x), *value.shape[1:]) for value in (t, y))         # (B,)
        corner = tuple(map(slice, grid))
        positions = self.patch_embedding.positions.view(*self.grid, -1)[corner].flatten(0, -2)  # (N, D)
        x = self.patch_embedding(x, positions)                                      # (B, N, D)
        rotation = [] if self.rotations is None else [self.rotations[(slice(None), *corner)].flatten(1, -2)]
        c, *context = self.condition(t, y, *rotation)                               # (B, D)
        for block in self.blocks:
            x = self.run_block(block, x, c, *context)                               # (B, N, D)
        x = self.final_layer(x, c)                                                  # (B, N, prod(patch) * C)
        return unpatchify(x, self.patch, grid).to(dtype)[(..., *map(slice, size))]  # (B, C, *size)

    def condition(self, t, y, *rotation):
        """What the blocks get beside the tokens: c (B, D), and the further arguments of their attention."""
        return self.time_embedding(t) + self.label_embedding(y), *rotation
