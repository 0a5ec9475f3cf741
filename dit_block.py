"""One transformer block, modulated by time and label through adaLN-Zero.

    python dit_block.py      shows that an untrained block is the identity, and what a gate lets through
"""

from support.commands import run

import torch
import torch.nn.functional as F
from torch import nn


def modulate(x, shift, scale):
    """x (B, N, D) scaled and shifted per image by shift and scale (B, D): x * (1 + scale) + shift."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def add_gated(x, gate, update):
    """x + gate * update, for x and update (B, N, D) and gate (B, D)."""
    return torch.addcmul(x, gate[:, None], update)


def attend(q, k, v):
    """Scaled dot-product attention (1706.03762, equation 1) of q, k, v, each (B, h, N, D/h) -> (B, h, N, D/h)."""
    if q.is_cpu and q.dtype == torch.bfloat16:  # which torch's own attention computes in fp32 there, or slowly
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1, dtype=torch.float32)
        return weights.to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v)


class Attention(nn.Module):
    """Multi-head self-attention (1706.03762) over the tokens of an image. forward: (B, N, D) -> (B, N, D)"""

    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.num_heads, D // self.num_heads)  # (B, N, 3, h, D/h)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                                  # each (B, h, N, D/h)
        x = attend(q, k, v)                                                   # (B, h, N, D/h)
        return self.out(x.transpose(1, 2).reshape(B, N, D))                   # (B, N, D)


class DiTBlock(nn.Module):
    """Attention and MLP, each between a LayerNorm with a shift and a scale, and a gate: all computed from the
    conditioning c (DiT, 2212.09748, figure 3). The gates start at zero: an untrained block is the identity.

    forward: x (B, N, D), c (B, D), and whatever else its attention takes -> (B, N, D)
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, attention=Attention):
        super().__init__()
        mlp_size = int(hidden_size * mlp_ratio)
        self.norm_1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attention = attention(hidden_size, num_heads)
        self.norm_2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp_size), nn.GELU(), nn.Linear(mlp_size, hidden_size))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c, *context):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c).chunk(6, dim=1)       # each (B, D)
        x = add_gated(x, gate_1, self.attention(modulate(self.norm_1(x), shift_1, scale_1), *context))  # (B, N, D)
        x = add_gated(x, gate_2, self.mlp(modulate(self.norm_2(x), shift_2, scale_2)))                # (B, N, D)
        return x


def main():
    torch.manual_seed(0)
    block, x, c = DiTBlock(128, 4), torch.randn(2, 16, 128), torch.randn(2, 128)
    parts = {"attention": block.attention, "MLP": block.mlp, "modulation": block.modulation}
    print(f"x {tuple(x.shape)}: 2 images of 16 tokens of 128;  c {tuple(c.shape)}: their times and labels")
    print("parameters: " + ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}"
                                     for name, part in parts.items()))
    nn.init.zeros_(block.modulation[1].weight)
    nn.init.zeros_(block.modulation[1].bias)
    print(f"gates at 0, as training starts: the block changes x by {(block(x, c) - x).norm() / x.norm():.0%}")
    nn.init.ones_(block.modulation[1].bias[2 * 128:3 * 128])
    print(f"the gate of the attention at 1: the block changes x by {(block(x, c) - x).norm() / x.norm():.0%}")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run(main)
