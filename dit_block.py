"""One transformer block, steered by the time and the label through adaLN-Zero."""

import torch
import torch.nn.functional as F
from torch import nn


def modulate(x, shift, scale):
    """x (B, N, D) scaled and shifted per image by shift and scale (B, D); both zero leave x as it is."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


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
        if x.is_cpu and x.dtype == torch.bfloat16:  # which torch's own attention computes in fp32 there, or slowly
            weights = (q @ k.mT * (D // self.num_heads) ** -0.5).softmax(dim=-1, dtype=torch.float32)
            x = weights.to(x.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)                       # (B, h, N, D/h)
        return self.out(x.transpose(1, 2).reshape(B, N, D))                   # (B, N, D)


class DiTBlock(nn.Module):
    """Attention and MLP, each behind a LayerNorm whose shift and scale, and each before a gate that, are computed from
    the conditioning c (DiT, 2212.09748, figure 3). The gates start at zero: an untrained block is the identity.

    forward: x (B, N, D), c (B, D) -> (B, N, D)
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0):
        super().__init__()
        mlp_size = int(hidden_size * mlp_ratio)
        self.norm_1 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(hidden_size, num_heads)
        self.norm_2 = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(hidden_size, mlp_size), nn.GELU(), nn.Linear(mlp_size, hidden_size))
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(c).chunk(6, dim=1)               # (B, D)
        x = torch.addcmul(x, gate_1[:, None], self.attention(modulate(self.norm_1(x), shift_1, scale_1)))  # (B, N, D)
        x = torch.addcmul(x, gate_2[:, None], self.mlp(modulate(self.norm_2(x), shift_2, scale_2)))        # (B, N, D)
        return x
