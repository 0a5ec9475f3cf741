"""Draws images with a model of `latent.train_dit`: of latents, or of pixels in colour.

    python -m latent.draw --checkpoint weights/sprites.pth --labels "walk left" "slash front" --count 4
"""

from support.commands import run

from inference import main
from latent.config import LatentConfig

if __name__ == "__main__":
    run(lambda: main(LatentConfig), memory="--count", alone=True)
