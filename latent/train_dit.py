"""Trains a DiT on latents, or on images in colour; see train.py.

    python -m latent.train_dit --vae vae_sprites --hidden-size 80 --steps 12000 --run-dir run_sprites
"""

from support.commands import run

import train as root
from latent.config import LatentConfig


def train(config, *args, **options):
    """`train.train` of a `LatentConfig`, or a dict of its settings."""
    return root.train(config, *args, of=LatentConfig, **options)


def main():
    root.main("latents, or on images in colour: the sprites", LatentConfig, train=train,
              script=("-m", "latent.train_dit"))


if __name__ == "__main__":
    run(main, memory="--batch-size, --image-size or --hidden-size, or try --recompute")
