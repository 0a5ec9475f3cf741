"""Fills images/real from the data set and images/fake from the model, for fid_computer.py to compare."""

from support import parallel
from support.commands import UserError, run
from support.files import make_dir, write_atomically

import argparse
import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from config import SAMPLING
from dataset import load_dataset, to_uint8
from inference import find_checkpoint, load_for_sampling, sample, sampling_parser


def missing_indices(folder, count):
    """The indices below `count` that have no image {index:06d}_{label}.png in `folder` yet, ascending."""
    there = {path.name[:6] for path in folder.glob("[0-9][0-9][0-9][0-9][0-9][0-9]_*.png")}
    return [index for index in range(count) if f"{index:06d}" not in there]


def open_folder(folder, count, settings):
    """Makes `folder` for images that `settings` (a dict) made, or checks that those in it were made by the same:
    images of two kinds in one folder would have a score that means nothing. Raises `UserError`.

    Returns this process's share of the indices below `count` that have no image in it yet.
    """
    with parallel.first_process_first():
        make_dir(folder)
        note = folder / "settings.json"
        if note.exists():
            try:
                before = json.loads(note.read_text())
            except ValueError:
                before = {}
            changed = [name for name, value in settings.items() if before.get(name) != value]
            if changed:
                raise UserError(f"the images in {folder} were made with another {', '.join(changed)}: remove the "
                                "folder, or choose another one")
        elif next(folder.glob("*.png"), None):
            raise UserError(f"{folder} holds images of unknown origin: remove the folder, or choose another one")
        if not parallel.RANK:
            write_atomically(note, lambda file: file.write(json.dumps(settings, indent=1).encode()))
    todo = missing_indices(folder, count)
    parallel.wait()  # with its first image until all have looked
    return todo[parallel.share(len(todo))]


def write_image(path, image):
    """Writes a uint8 image (C, H, W) as a PNG, whole or not at all."""
    array = image.permute(1, 2, 0).contiguous().numpy()
    temporary = path.with_suffix(".tmp")
    try:
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(temporary, "PNG")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}; the images before it are kept") from None


def fill_real(folder, config, count):
    """Writes `count` random images of the training set, without repetition; which ones depends on the seed alone."""
    with parallel.first_process_first():
        data = load_dataset(config.dataset, config.data_dir, image_size=config.image_size, channels=config.channels)
    if count > len(data.images):
        if not parallel.RANK:
            print(f"{config.dataset} has only {len(data.images):,} training images: {folder} gets them all",
                  file=sys.stderr)
        count = len(data.images)
    todo = open_folder(folder, count, {"dataset": config.dataset, "image_size": config.image_size, "seed": config.seed})
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(config.seed))
    for index in tqdm(todo, desc=f"real images to {folder}", unit=" images", disable=parallel.RANK > 0):
        k = order[index]
        write_image(folder / f"{index:06d}_{data.labels[k]}.png", data.images[k])


def fill_fake(folder, model, config, count, checkpoint):
    """Draws `count` images, equally many of each label, each a function of the model, the settings and its index."""
    todo = open_folder(folder, count, {"checkpoint": hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest(),
                                       **{name: getattr(config, name) for name in SAMPLING}})
    device = next(model.parameters()).device
    with tqdm(total=len(todo), desc=f"fake images to {folder}", unit=" images", disable=parallel.RANK > 0) as bar:
        for start in range(0, len(todo), config.batch_size):
            indices = todo[start:start + config.batch_size]
            labels = torch.tensor(indices) % config.num_classes
            *_, x = sample(model, config, labels.to(device), indices)
            for index, label, image in zip(indices, labels, to_uint8(x).cpu(), strict=True):
                write_image(folder / f"{index:06d}_{label}.png", image)
            bar.update(len(indices))


@parallel.one_for_all()
def main():
    parser = sampling_parser("Fills a folder with real and a folder with generated images, to score them with "
                             "fid_computer.py. A second call with a larger --count goes on where the first one ended.")
    parser.add_argument("--count", type=int, default=10_000, help="images in each folder (default: 10000)")
    parser.add_argument("--real", type=Path, default=Path("images/real"), help="(default: images/real)")
    parser.add_argument("--fake", type=Path, default=Path("images/fake"), help="(default: images/fake)")
    parser.add_argument("--batch-size", type=int, default=500, help="images drawn at once (default: 500)")
    parser.add_argument("--data-dir", default=argparse.SUPPRESS, help="where the data set is (default: as in training)")
    args = parser.parse_args()
    if not 1 <= args.count <= 1_000_000:
        raise UserError(f"--count {args.count}: must lie between 1 and 1,000,000")
    args.device = parallel.join(args.device)
    args.checkpoint = find_checkpoint(args.checkpoint)
    model, config = load_for_sampling(args)
    if config.channels not in (1, 3):
        raise UserError(f"{args.checkpoint} draws {config.channels} channels, which are no picture")
    fill_real(args.real, dataclasses.replace(config, seed=0), args.count)
    fill_fake(args.fake, model, config, args.count, args.checkpoint)


if __name__ == "__main__":
    run(main)
