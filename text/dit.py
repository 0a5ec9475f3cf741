"""The `DiT` that is asked in words. A text encoder of the same blocks reads them, and the attention of the patches
looks at the words as well."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from dit import on_meta
from dit_block import Attention, DiTBlock, attend
from video.dit import ClipDiT, RotaryAttention, rotate, rotations


class WordAttention(Attention):
    """`Attention` from patches to patches and words. forward: x (B, N, D), words (B, L, D), and the rotation of the
    patches (2, N, D/2h) or None, see `rotate` -> (B, N, D)"""

    def forward(self, x, words, rotation=None):
        B, N, D = x.shape
        qkv = self.qkv(torch.cat([x, words], dim=1)).view(B, -1, 3, self.num_heads, D // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # each (B, h, N + L, D/h)
        q = q[:, :, :N]                                                       # (B, h, N, D/h)
        if rotation is not None:
            q, k = rotate(q, rotation), torch.cat([rotate(k[:, :, :N], rotation), k[:, :, N:]], dim=2)
        return self.out(attend(q, k, v).transpose(1, 2).reshape(B, N, D))     # (B, N, D)


class TextEncoder(nn.Module):
    """Words in their context. Attention is rotary: it sees how far apart two words are, and so which colour belongs to
    which noun. Neighbours are known from the start: each word begins as the sum of itself and the word before it.

    forward: words (B, L, D), c (B, D) -> (B, L, D), normalized
    """

    def __init__(self, length, hidden_size, num_heads, mlp_ratio, depth):
        super().__init__()
        block = functools.partial(DiTBlock, attention=RotaryAttention)
        self.blocks = nn.ModuleList(block(hidden_size, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.register_buffer("rotations", rotations([length], hidden_size // num_heads), persistent=False)

    def forward(self, words, c):
        words = words + F.pad(words, (0, 0, 1, -1))
        for block in self.blocks:
            words = block(words, c, self.rotations)
        return self.norm(words)


class TextDiT(ClipDiT):
    """A `ClipDiT` that is asked in words; an image is a clip of one frame. forward: x (B, C, T, H, W), t (B,), y (B,
    L): the numbers of a caption's words, followed by the null label. An empty caption consists of null labels, and
    guidance uses it as "no label".

    num_classes: of words. length: L. text_depth: blocks of the text encoder.
    """

    def __init__(self, *args, length, text_depth=2, hidden_size=128, num_heads=4, mlp_ratio=4.0, **options):
        super().__init__(*args, hidden_size=hidden_size, num_heads=num_heads, mlp_ratio=mlp_ratio,
                         attention=WordAttention, **options)
        self.encoder = TextEncoder(length, hidden_size, num_heads, mlp_ratio, text_depth)
        self.pool = nn.Linear(hidden_size, hidden_size)
        if not on_meta():
            self.initialize()
            for block in self.encoder.blocks:
                nn.init.zeros_(block.modulation[1].weight)
            nn.init.normal_(self.pool.weight, std=0.02)

    def condition(self, t, y, *rotation):
        c = self.time_embedding(t)                                                  # (B, D)
        words = self.encoder(self.label_embedding(y), c)                            # (B, L, D)
        return c + self.pool(words.mean(dim=1)), words, *rotation
