"""Trains a DiT on clips; see train.py.

    python -m video.train_dit --preset moving --steps 10000 --run-dir run_moving
"""

from support import parallel
from support.commands import run
from support.pictures import frames_of, grid, save_animation

import functools

import train as root
from video.config import PRESETS, ClipConfig
from video.draw import FRAME
from video.given import given_frames, losses


def prepare(run, data, step):
    """As `train.prepare`, of clips, perhaps of another size, some of them with frames given."""
    config, part = run.config, parallel.share(run.config.batch_size)
    generator = root.step_generator(config.seed, step, data.labels.device)
    if config.sizes:
        data = data.at((data.shape[1:], *config.sizes)[generator.initial_seed() % (1 + len(config.sizes))])
    x_0, y, t, noise = root.make_batch(data, run.process, config, step, part)
    if not (config.given or config.motion):
        return root.losses, (x_0, y, t, noise), t
    generator.manual_seed(generator.initial_seed() ^ 1)  # another stream than the batch's
    known = given_frames(config.batch_size, data.shape[1], config.given, generator)[part]
    return clip_losses, (x_0, y, t, noise, known), t


def clip_losses(run, x_0, y, t, noise, known):
    """As `train.losses`, of clips whose frames are given where they are `known`, bool (B, 1, T, 1, 1)."""
    return losses(run.process, run.worker, x_0, t, y, noise, known, run.config.loss, run.config.motion)


def save_grid(path, clips):
    """Writes the grid of clips uint8 (B, C, T, H, W), in which they move."""
    save_animation(path, [grid(view, columns=10) for view in frames_of(clips)], FRAME)


show = functools.partial(root.show, save=save_grid)


def train(config, *args, **options):
    """`train.train` of a `ClipConfig`, or a dict of its settings. Several sizes are not compiled, since each would be
    compiled anew."""
    if isinstance(config, dict) and config.get("sizes"):
        config = {"compile": False} | config
    return root.train(config, *args, prepare=prepare, show=show, of=ClipConfig, **options)


def main():
    root.main("clips: moving digits", ClipConfig, PRESETS, train, ("-m", "video.train_dit"))


if __name__ == "__main__":
    run(main, memory="--batch-size, --image-size or --hidden-size, or try --recompute")
