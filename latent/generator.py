"""Fills a folder with real and a folder with generated images, as generator.py does, with a model of
`latent.train_dit`.

    python -m latent.generator --checkpoint xl.pth --data-dir imagenet --count 50000
"""

from support.commands import run

import generator
from latent.config import LatentConfig
from latent.sprites import load_images


def main():
    generator.main(LatentConfig, load_images)


if __name__ == "__main__":
    run(main)
