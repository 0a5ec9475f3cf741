"""The Diffusion Transformer (DiT, arXiv 2212.09748): patches in, blocks, patches out.

    python dit.py      prints the shapes on the way through the network, its parameters and its Gflops
"""

from support.commands import run
from support.flops import flops

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dit_block import DiTBlock, modulate
from time_emb import TimeEmbedding

# Sizes and patches are tuples with a number for each axis of the input: (H, W) of an image. The grid is how many
# patches lie along each axis. Nothing here needs the axes to be two.


def patchify(x, patch):
    """Cuts x (B, C, *size) into patches, row by row -> (B, N, prod(patch) * C)."""
    B, C, *size = x.shape
    axes = len(size)
    grid = [s // p for s, p in zip(size, patch, strict=True)]
    x = x.reshape(B, C, *[n for pair in zip(grid, patch, strict=True) for n in pair])   # (B, C, H/p, p, W/p, p)
    outer, inner = range(2, 2 + 2 * axes, 2), range(3, 3 + 2 * axes, 2)
    return x.permute(0, *outer, *inner, 1).reshape(B, math.prod(grid), math.prod(patch) * C)


def unpatchify(x, patch, grid):
    """Lays the patches x (B, N, prod(patch) * C) of a grid out again, the inverse of `patchify` -> (B, C, *size)."""
    axes = len(grid)
    x = x.view(len(x), *grid, *patch, -1)                                               # (B, H/p, W/p, p, p, C)
    pairs = [axis for i in range(axes) for axis in (1 + i, 1 + axes + i)]
    x = x.permute(0, -1, *pairs)                                                        # (B, C, H/p, p, W/p, p)
    return x.reshape(*x.shape[:2], *[n * p for n, p in zip(grid, patch, strict=True)])


def on_meta():
    """Whether networks are built of shapes alone (`with torch.device("meta")`), to check a file or to be filled from
    one. Values would be lost there, and torch would import 1,500 modules to compute them, which takes a second."""
    return torch.get_default_device().type == "meta"


def count_to(n):
    """0..n-1, float64, on the CPU: positions are not in a file, so they are needed even `on_meta`."""
    return torch.arange(n, dtype=torch.float64, device="cpu")


def sincos_positions(grid, hidden_size):
    """Fixed positions of a grid's patches (1, N, D): an equal share of D for each axis, the last axis first, as in the
    paper's code. Channels that cannot be shared equally (three axes of a width such as 128) are zero."""
    half = hidden_size // len(grid) // 2
    frequencies = 10000.0 ** -(count_to(half) / half)
    places = torch.meshgrid(*map(count_to, grid), indexing="ij")                                     # each (*grid)
    angles = [place.flatten()[:, None] * frequencies for place in reversed(places)]                  # each (N, half)
    waves = [wave for angle in angles for wave in (angle.sin(), angle.cos())]
    positions = torch.cat(waves, dim=1)                                                              # (N, 2 half axes)
    return nn.functional.pad(positions, (0, hidden_size - positions.shape[1]))[None].float()


class PatchEmbedding(nn.Module):
    """Each patch of the input as a token that knows its place. forward: (B, C, *size) -> (B, N, D); positions (N, D):
    others than those of the whole grid."""

    def __init__(self, grid, patch, channels, hidden_size):
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(math.prod(patch) * channels, hidden_size)
        self.register_buffer("positions", sincos_positions(grid, hidden_size), persistent=False)

    def forward(self, x, positions=None):
        tokens = self.linear(patchify(x, self.patch).to(self.linear.weight.dtype))
        return tokens + (self.positions if positions is None else positions)


class FinalLayer(nn.Module):
    """Tokens back to patches, behind one more modulated LayerNorm.

    forward: x (B, N, D), c (B, D) -> (B, N, out_size)
    """

    def __init__(self, hidden_size, out_size):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.linear = nn.Linear(hidden_size, out_size)

    def forward(self, x, c):
        shift, scale = self.modulation(c).chunk(2, dim=1)       # each (B, D)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(nn.Module):
    """Predicts a process's target from x_t, t and the label, in the type of its weights.

    forward: x (B, C, *size) floats, t (B,) steps 0..T-1, y (B,) labels 0..num_classes, where num_classes is the null
    label (no label) -> like x. A plain number as t or y holds for all of the batch. Raises TypeError when x holds
    integers, and ValueError when its size is not `input_size`.

    input_size, patch_size: a tuple with a number for each axis, or a number for square images and patches.
    out_channels: channels of the prediction; None: as many as x has. time_spacing: see `time_emb.sinusoids`.
    block: makes a block of hidden_size, num_heads and mlp_ratio.
    recompute: keep only what goes into each block, and compute the rest again for its gradient (1604.06174).
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, input_size=(28, 28), patch_size=(7, 7), channels=1, num_classes=10, hidden_size=128, depth=4,
                 num_heads=4, mlp_ratio=4.0, time_spacing="dit", recompute=False, out_channels=None,
                 block=DiTBlock):
        super().__init__()
        size, patch = ((n, n) if isinstance(n, int) else tuple(n) for n in (input_size, patch_size))
        if not size or len(size) != len(patch) or any(s % p for s, p in zip(size, patch, strict=False)):
            raise ValueError(f"patch_size {patch_size} does not divide input_size {input_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of 4 and of num_heads {num_heads}")
        self.null_label, self.recompute = num_classes, recompute
        self.input_size, self.patch = size, patch
        self.grid = [s // p for s, p in zip(size, patch, strict=True)]
        self.patch_embedding = PatchEmbedding(self.grid, patch, channels, hidden_size)
        self.time_embedding = TimeEmbedding(hidden_size, spacing=time_spacing)
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_size, _weight=torch.empty(
            num_classes + 1, hidden_size) if on_meta() else None)
        self.blocks = nn.ModuleList(block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, math.prod(patch) * (out_channels or channels))
        if not on_meta():
            self.initialize()

    def initialize(self):
        """As the paper does it; the zeros make every block the identity and the output zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for embedding in (self.time_embedding.mlp[0], self.time_embedding.mlp[2], self.label_embedding):
            nn.init.normal_(embedding.weight, std=0.02)
        for layer in [*self.blocks, self.final_layer]:
            nn.init.zeros_(layer.modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def forward(self, x, t, y):
        dtype, size = x.dtype, tuple(x.shape[2:])
        if not dtype.is_floating_point:
            raise TypeError(f"x holds {dtype}, but a DiT sees floats in [-1, 1]: dataset.to_float makes them")
        if size != self.input_size:
            raise ValueError(f"an input of {size} is not of the input_size {self.input_size}")
        t, y = (torch.as_tensor(value, device=x.device).expand(len(x)) for value in (t, y))  # (B,)
        x = self.patch_embedding(x)                                # (B, N, D)
        c = self.time_embedding(t) + self.label_embedding(y)       # (B, D)
        for block in self.blocks:
            x = self.run_block(block, x, c)                        # (B, N, D)
        x = self.final_layer(x, c)                                 # (B, N, prod(patch) * C)
        return unpatchify(x, self.patch, self.grid).to(dtype)      # (B, C, *size)

    def run_block(self, block, *inputs):
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)  # it draws nothing
        return block(*inputs)


def main():
    model, x, t, y = DiT(), torch.randn(1, 1, 28, 28), torch.tensor([5]), torch.tensor([1])
    parts = {"patch embedding": model.patch_embedding, "time embedding": model.time_embedding,
             "label embedding": model.label_embedding, "blocks": model.blocks, "final layer": model.final_layer}
    print(f"x (B, C, H, W)        {tuple(x.shape)}")
    print(f"patches (B, N, ppC)   {tuple(patchify(x, model.patch).shape)}")
    print(f"tokens (B, N, D)      {tuple(model.patch_embedding(x).shape)}")
    print(f"c (B, D)              {tuple((model.time_embedding(t) + model.label_embedding(y)).shape)}")
    output = model(x, t, y)
    print(f"output (B, C, H, W)   {tuple(output.shape)}, all {output.unique().item():g} before training\n")
    for name, part in parts.items():
        print(f"{name:16} {sum(p.numel() for p in part.parameters()):10,} parameters")
    print(f"{'in all':16} {sum(p.numel() for p in model.parameters()):10,} parameters, "
          f"{flops(lambda: model(x, t, y)) / 1e9:.4f} Gflops for an image")


if __name__ == "__main__":
    run(main)
