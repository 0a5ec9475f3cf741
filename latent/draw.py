"""Draws images with a model of `latent.train_dit`: of latents, or of pixels in colour.

    python -m latent.draw --checkpoint weights/sprites.pth --labels "walk left" "slash front" --count 4
"""

from support.commands import run

import functools

import inference
from latent.config import LatentConfig

draw = functools.partial(inference.draw, of=LatentConfig)  # for a notebook


def main():
    inference.main(LatentConfig)


if __name__ == "__main__":
    run(main, memory="--count", alone=True)
