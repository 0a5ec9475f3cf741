"""Trains a DiT on captions; see train.py.

    python -m text.train --preset clip --run-dir run_text
"""

from support import parallel
from support.commands import run

from pathlib import Path

import torch

import train as root
from text.config import PRESETS, TextConfig
from video.train_dit import save_grid


def prepare(run, data, step):
    """As `train.prepare`, of clips and their captions."""
    config, part = run.config, parallel.share(run.config.batch_size)
    x_0, y, t, noise = root.make_batch(data, run.process, config, step, part)
    seed = root.step_generator(config.seed, step, "cpu").initial_seed()
    y = data.words(y, [seed + row for row in range(config.batch_size)[part]])  # (B, L)
    return root.losses, (x_0, y, t, noise), t


def show(run, path, stop):
    """Writes the grid of samples, as `train.show` does, with one caption a column."""
    numbers = torch.linspace(0, len(run.data.labels) - 1, 10).long()
    words = run.data.words(numbers, numbers.tolist()).to(run.data.labels.device)
    root.show(run, path, stop, save_grid, words)


def train(config, *args, **options):
    """`train.train` of a `TextConfig`, or a dict of its settings."""
    return root.train(config, *args, prepare=prepare, show=show, of=TextConfig, **options)


def main():
    root.main("images or clips and their captions: the sprites", TextConfig, PRESETS, train, ("-m", "text.train"),
              Path("run_text"))


if __name__ == "__main__":
    run(main, memory="--batch-size, --image-size or --hidden-size, or try --recompute")
