"""The Diffusion Transformer (DiT, arXiv 2212.09748): patches in, blocks, patches out."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dit_block import DiTBlock, modulate
from time_emb import TimeEmbedding


def patchify(x, patch_size):
    """Cuts images into square patches, row by row: (B, C, H, W) -> (B, N, p * p * C)."""
    B, C, H, W = x.shape
    p = patch_size
    x = x.view(B, C, H // p, p, W // p, p).permute(0, 2, 4, 3, 5, 1)  # (B, H/p, W/p, p, p, C)
    return x.reshape(B, (H // p) * (W // p), p * p * C)


def unpatchify(x, patch_size, channels):
    """Lays the patches of a square image out again, the inverse of `patchify`: (B, N, p * p * C) -> (B, C, H, W)."""
    B, N, _ = x.shape
    p, side = patch_size, round(N**0.5)
    x = x.view(B, side, side, p, p, channels).permute(0, 5, 1, 3, 2, 4)  # (B, C, H/p, p, W/p, p)
    return x.reshape(B, channels, side * p, side * p)


def sincos_positions(side, hidden_size):
    """Fixed 2-D positions (1, side * side, D), as in the paper's code: half of D for the column, half for the row."""
    frequencies = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies               # (side, D/4)
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)                                # (side, D/2)
    columns, rows = waves.expand(side, -1, -1), waves[:, None].expand(-1, side, -1)       # (side, side, D/2)
    return torch.cat([columns, rows], dim=2).reshape(1, side * side, hidden_size).float()


class PatchEmbedding(nn.Module):
    """Each patch of an image as a token that knows its place. forward: (B, C, H, W) -> (B, N, D)"""

    def __init__(self, image_size, patch_size, channels, hidden_size):
        super().__init__()
        self.patch_size = patch_size
        self.linear = nn.Linear(patch_size * patch_size * channels, hidden_size)
        self.register_buffer("positions", sincos_positions(image_size // patch_size, hidden_size), persistent=False)

    def forward(self, x):
        x = patchify(x, self.patch_size).to(self.linear.weight.dtype)
        return self.linear(x) + self.positions


class FinalLayer(nn.Module):
    """Tokens back to patches, behind one more modulated LayerNorm.

    forward: x (B, N, D), c (B, D) -> (B, N, p * p * C)
    """

    def __init__(self, hidden_size, out_size):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))
        self.linear = nn.Linear(hidden_size, out_size)

    def forward(self, x, c):
        shift, scale = self.modulation(c).chunk(2, dim=1)       # (B, D)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(nn.Module):
    """Predicts from a noisy image, its step and its label what `Diffusion.target` says, computed in the type of its
    weights.

    forward: x (B, C, H, W) floats, t (B,) steps 0..T-1, y (B,) labels 0..num_classes, of which the last is the null
    label (no label) -> (B, C, H, W), of the type of x. A plain number as t or y holds for all images. Raises TypeError
    when x holds integers.

    recompute: keep only what goes into each block, and compute the rest again for its gradient (1604.06174).
    Raises ValueError for sizes that do not fit together.
    """

    def __init__(self, image_size=28, patch_size=7, channels=1, num_classes=10, hidden_size=128, depth=4, num_heads=4,
                 mlp_ratio=4.0, recompute=False):
        super().__init__()
        if image_size % patch_size:
            raise ValueError(f"patch_size {patch_size} does not divide image_size {image_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of 4 and of num_heads {num_heads}")
        self.patch_size, self.channels, self.null_label = patch_size, channels, num_classes
        self.recompute = recompute
        self.patch_embedding = PatchEmbedding(image_size, patch_size, channels, hidden_size)
        self.time_embedding = TimeEmbedding(hidden_size)
        self.label_embedding = nn.Embedding(num_classes + 1, hidden_size)
        self.blocks = nn.ModuleList(DiTBlock(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, patch_size * patch_size * channels)
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
        dtype = x.dtype
        if not dtype.is_floating_point:
            raise TypeError(f"x holds {dtype}, but a DiT sees floats in [-1, 1]: dataset.to_float makes them")
        t, y = (torch.as_tensor(value, device=x.device).expand(len(x)) for value in (t, y))  # (B,)
        x = self.patch_embedding(x)                               # (B, N, D)
        c = self.time_embedding(t) + self.label_embedding(y)      # (B, D)
        for block in self.blocks:                                 # (B, N, D)
            again = self.recompute and torch.is_grad_enabled()
            x = checkpoint(block, x, c, use_reentrant=False) if again else block(x, c)
        x = self.final_layer(x, c)                                # (B, N, p * p * C)
        return unpatchify(x, self.patch_size, self.channels).to(dtype)  # (B, C, H, W)
