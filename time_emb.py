"""The diffusion step t as a vector: sinusoids of many frequencies, then a small MLP.

    python time_emb.py      writes time_emb.png: the sinusoids of every step
"""

from support.commands import run
from support.pictures import check_picture, write_figure

import math

import torch
from torch import nn


def sinusoids(t, count, spacing="dit"):
    """`count` sinusoids of each t (B,): sines, then cosines, (B, count), float32 (1706.03762, section 3.5).

    Frequencies fall geometrically from 1 to about 1/10000. They suit t in 0..1000: a t in 0..1 would leave most of them
    flat. spacing of their logarithms: "dit", log(10000) / half, of DiT's official code, or "article",
    log(10000) / (half - 1).
    """
    half = count // 2
    gap = math.log(10000) / (half if spacing == "dit" else half - 1)
    angles = t[:, None].float() * torch.exp(-gap * torch.arange(half, device=t.device))  # (B, half)
    return torch.cat([angles.sin(), angles.cos()], dim=1)                                # (B, 2 half)


class TimeEmbedding(nn.Module):
    """Embeds diffusion steps by their sinusoids and an MLP. forward: t (B,), integers or floats in 0..1000 -> (B, D)"""

    def __init__(self, hidden_size, num_sinusoids=256, spacing="dit"):
        super().__init__()
        self.num_sinusoids, self.spacing = num_sinusoids, spacing
        self.mlp = nn.Sequential(nn.Linear(num_sinusoids, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t):
        waves = sinusoids(t, self.num_sinusoids, self.spacing)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


def main():
    from matplotlib.figure import Figure

    waves = sinusoids(torch.arange(1000), 256)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="t", ylabel="sinusoid (above cosines, below sines)")
    axes.imshow(waves.T, aspect="auto", cmap="coolwarm", origin="lower")
    check_picture("time_emb.png")
    write_figure(figure, "time_emb.png")
    print(f"t (B,) -> sinusoids (B, 256) -> embedding {tuple(TimeEmbedding(128)(torch.tensor([0, 500])).shape)}")
    for a, b in ((500, 501), (500, 510), (500, 900)):
        print(f"t = {a} and {b}: their sinusoids have the cosine similarity "
              f"{torch.cosine_similarity(waves[a], waves[b], dim=0):.3f}")
    print("time_emb.png: the sinusoids of every step; the quick ones tell neighbours apart, the slow ones far steps")


if __name__ == "__main__":
    run(main)
