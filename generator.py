"""Fills images/real from the data set and images/fake from the model, for fid_computer.py to compare."""

from support import parallel
from support.commands import UserError, flag_words, run, some_path
from support.image_files import write_image
from support.labels import check_classes, class_weights, labels_by

import argparse
import hashlib
import os
import shlex
from pathlib import Path

import torch
from tqdm import tqdm

from config import Config
from dataset import load_dataset
from inference import draw_batches, load_for_sampling, sampling_parser
from record.folder import open_folder


def fill_real(folder, data, todo, seed=0):
    """Writes the images of a `Dataset` number `todo` of a random order, which depends on the seed alone."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    for index in tqdm(todo, desc=f"real images to {folder}", unit=" images", disable=parallel.RANK > 0):
        k = order[index]
        write_image(folder / f"{index:06d}_{data.labels[k]}.png", data.images[k])


def fill_fake(folder, model, config, labels, todo, batch_size):
    """Draws the images number `todo`, each a function of the model, the settings, its index and its label, one of
    `labels` (count,)."""
    for rows, images in draw_batches(model, config, labels[todo], todo, batch_size, hidden=parallel.RANK > 0):
        for row, image in zip(rows.tolist(), images, strict=True):
            write_image(folder / f"{todo[row]:06d}_{labels[todo[row]]}.png", image)


@parallel.one_for_all()
def main(of=Config, load=load_dataset):
    parser = sampling_parser("Fills a folder with real and a folder with generated images, to score them with "
                             "fid_computer.py. A second call with a larger --count goes on where the first one ended.",
                             of)
    parser.add_argument("--count", type=int, default=10_000, help="images in each folder (default: 10000)")
    for kind, what in (("real", "real"), ("fake", "generated")):
        parser.add_argument(f"--{kind}", type=some_path, default=Path(f"images/{kind}"),
                            help=f"folder of the {what} images (default: images/{kind})")
    parser.add_argument("--batch-size", type=int, default=argparse.SUPPRESS, help="images drawn at once, which affects "
                        "the speed alone (default: as many as memory is estimated to hold, at most 4096 on a GPU and "
                        "500 elsewhere)")
    parser.add_argument("--equal", action="store_true", help="draw each class equally often (default: in the "
                        "proportions of the data, but equally often if no class is larger than another by more than a "
                        "quarter)")
    parser.add_argument("--data-dir", type=some_path, default=argparse.SUPPRESS,
                        help="where the data set is (default: as in training)")
    args = parser.parse_args()
    if not 1 <= args.count <= 1_000_000:
        raise UserError(f"--count {args.count}: must lie between 1 and 1,000,000")
    if os.path.realpath(args.real) == os.path.realpath(args.fake):
        raise UserError(f"--real and --fake are both {args.fake}: choose two folders")
    args.device = parallel.join(args.device)
    model, config = load_for_sampling(args, (of,))
    if config.channels not in (1, 3):
        raise UserError(f"{args.checkpoint} draws {config.channels} channels, which are no picture")
    with parallel.rank_0_first():
        data = load(config.dataset, config.data_dir, image_size=config.image_size, channels=config.channels,
                    ground=config.ground)
    check_classes(config, data)
    weights = class_weights(data.labels, config.num_classes, args.equal)
    unequal = weights.min() < weights.max()
    if unequal:
        parallel.say(f"a class has {weights.min():,} to {weights.max():,} images: the fakes are as unequal (--equal "
                     "draws equally many of each)")
    count = min(args.count, len(data.images))
    if count < args.count:
        parallel.say(f"{config.dataset} has only {count:,} training images: {args.real} gets them all")
    # Both folders are looked at before either is filled
    real = open_folder(args.real, count, {"dataset": config.dataset, "data": data.fingerprint, "seed": 0,
                                          "image_size": list(config.image_size), "channels": config.channels}, of)
    fake = open_folder(args.fake, args.count, {
        "checkpoint": hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest(),
        "classes": weights.tolist() if unequal else None, **config.drawn_how(args.device)}, of)
    fill_real(args.real, data, real)
    fill_fake(args.fake, model, config, labels_by(weights, args.count), fake,
              config.batch_size if "batch_size" in args else None)
    parallel.wait()  # until the others' images are there too
    folders = [shlex.join(flag_words(f"--{name}", getattr(args, name))) for name in ("real", "fake")
               if getattr(args, name) != parser.get_default(name)]
    print(" ".join(["score them with: python fid_computer.py", *folders]))


if __name__ == "__main__":
    run(main)
