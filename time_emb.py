"""The diffusion step t as a vector: sinusoids of many frequencies, then a small MLP."""

import math

import torch
from torch import nn


class TimeEmbedding(nn.Module):
    """Embeds diffusion steps, as "Attention is all you need" (1706.03762, section 3.5) embeds positions.

    Frequencies fall geometrically from 1 to 1/10000, spaced by log(10000) / (half - 1). They suit t in 0..1000: a t in
    0..1 would leave most of the sinusoids flat.

    forward: t (B,), integers or floats in 0..1000 -> (B, hidden_size)
    """

    def __init__(self, hidden_size, num_sinusoids=256):
        super().__init__()
        self.num_sinusoids = num_sinusoids
        self.mlp = nn.Sequential(nn.Linear(num_sinusoids, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        half = self.num_sinusoids // 2
        frequencies = torch.exp(-math.log(10000) / (half - 1) * torch.arange(half, device=t.device))  # (half,)
        angles = t[:, None].float() * frequencies                                                     # (B, half)
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)                                        # (B, 2 half)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))                                           # (B, D)
