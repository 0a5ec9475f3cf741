"""Trains a DiT on latents, or on images in colour; see train.py.

    python -m latent.train_dit --vae vae_sprites --hidden-size 80 --steps 12000 --run-dir run_sprites
"""

from support import parallel
from support.commands import run
from support.settings import given_flags

import train as root
from config import PRESETS
from latent.config import LatentConfig


def train(config, *args, **options):
    """`train.train` of a `LatentConfig`, or a dict of its settings."""
    return root.train(config, *args, of=LatentConfig, **options)


@parallel.one_for_all()
def main():
    args = root.train_parser("Trains a diffusion transformer on latents, or on images in colour: the sprites unless "
                             "told otherwise.", LatentConfig).parse_args()
    done, stopped = train(PRESETS[args.preset or "default"] | given_flags(args, LatentConfig), args.run_dir,
                          args.resume, args.device)
    root.say_end(done, stopped, args.run_dir, LatentConfig.drawn_by, ("-m", "latent.train_dit"))


if __name__ == "__main__":
    run(main, memory="--batch-size, --image-size or --hidden-size, or try --recompute")
