"""Fills images/real from the data set and images/fake from the model, for fid_computer.py to compare."""

from support import parallel
from support.commands import UserError, flag_words, run, some_path
from support.files import make_dir, write_atomically
from support.image_files import list_images
from support.sizes import show_size

import argparse
import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from config import SAMPLING, Config
from dataset import load_dataset
from inference import batch_that_fits, find_vae, generate, load_for_sampling, sampling_parser, to_images


def check_classes(config, data):
    """Raises `UserError` unless the model of `config` knows as many classes as the images `data` (a `Dataset`) have;
    other names for them are a warning."""
    if config.num_classes != len(data.classes):
        raise UserError(f"the model knows {config.num_classes:,} classes, but the images of {config.dataset} "
                        f"have {len(data.classes):,}: name its own with --dataset and --data-dir")
    if config.classes and config.classes != tuple(data.classes) and not parallel.RANK:
        one = next(i for i, name in enumerate(data.classes) if name != config.classes[i])
        print(f"warning: what the model calls {config.classes[one]!r:.40} is {data.classes[one]!r:.40} in the data "
              "set: they are taken for the same classes in the same order", file=sys.stderr)


def class_weights(labels, num_classes, equal=False):
    """How often each class is to be drawn, next to the others, int64 (num_classes,): as often as real images have these
    labels (N,). Equally often with `equal`, and where no class is larger than another by more than a quarter, as in
    MNIST, so that scores compare with others of such data."""
    counts = labels.bincount(minlength=num_classes)
    return torch.ones_like(counts) if equal or 4 * counts.max() <= 5 * counts.min() else counts


def labels_by(weights, count):
    """The labels of the images number 0 to `count` - 1, int64 (count,): whatever the count, each class has the share of
    them that `weights` (num_classes,) say, rounded. Equal weights take turns."""
    enough = (weights * ((count + len(weights)) / weights.sum()) + 1).long()  # of each class
    labels = torch.arange(len(weights)).repeat_interleave(enough)
    place = torch.arange(len(labels)) - (enough.cumsum(0) - enough)[labels]  # within its class
    # Webster's method: it never takes back an image of a class when there are to be more of all
    return labels[((2 * place + 1) / weights[labels].double()).argsort(stable=True)[:count]]


def missing_indices(folder, count):
    """The indices below `count` that have no image {index:06d}_{label}.png in `folder` yet, ascending."""
    there = {path.name[:6] for path in folder.glob("[0-9][0-9][0-9][0-9][0-9][0-9]_*.png")}
    return [index for index in range(count) if f"{index:06d}" not in there]


def open_folder(folder, count, settings):
    """Makes `folder` for images that `settings` (a dict) made, or checks that those in it were made by the same:
    images of two kinds in one folder would have a score that means nothing. Raises `UserError`.

    Returns this process's share of the indices below `count` that have no image in it yet.
    """
    with parallel.rank_0_first():
        make_dir(folder)
        note, images = folder / "settings.json", list_images(folder)
        strange = [image for image in images if not re.fullmatch(r"[0-9]{6}_[0-9]+\.png", image.name)]
        if strange or (images and not os.path.lexists(note)):
            raise UserError(f"{folder} holds images of unknown origin ({(strange or images)[0].name:.50}): remove the "
                            "folder, or choose another one")
        if os.path.lexists(note):
            try:
                before = json.loads(note.read_bytes())
                changed = [name for name, value in settings.items()  # what was no setting yet is as it was then
                           if before.get(name, getattr(Config, name, None)) != value]
            except (OSError, ValueError, AttributeError, RecursionError):
                raise UserError(f"{note} does not say what made the images beside it: remove the folder, or choose "
                                "another one") from None
            if changed:
                raise UserError(f"the images in {folder} were made with another {', '.join(changed)}: remove the "
                                "folder, or choose another one")
        elif not parallel.RANK:
            write_atomically(note, lambda file: file.write(json.dumps(settings, indent=1).encode()))
        if len(images) > count and not parallel.RANK:
            print(f"{folder} holds {len(images):,} images already, and all of them will be scored: for a score of "
                  f"{count:,}, choose another folder", file=sys.stderr)
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


def fill_real(folder, data, todo, seed=0):
    """Writes the images of a `Dataset` number `todo` of a random order, which depends on the seed alone."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))
    for index in tqdm(todo, desc=f"real images to {folder}", unit=" images", disable=parallel.RANK > 0):
        k = order[index]
        write_image(folder / f"{index:06d}_{data.labels[k]}.png", data.images[k])


def fill_fake(folder, model, config, labels, todo, batch_size):
    """Draws the images number `todo`, each a function of the model, the settings, its index and its label, one of
    `labels` (count,)."""
    device = next(model.parameters()).device
    with tqdm(total=len(todo), desc=f"fake images to {folder}", unit=" images", disable=parallel.RANK > 0) as bar:
        for start in range(0, len(todo), batch_size):
            indices = todo[start:start + batch_size]
            images = to_images(generate(model, config, labels[indices].to(device), indices), config).cpu()
            for index, label, image in zip(indices, labels[indices], images, strict=True):
                write_image(folder / f"{index:06d}_{label}.png", image)
            bar.update(len(indices))


@parallel.one_for_all()
def main():
    parser = sampling_parser("Fills a folder with real and a folder with generated images, to score them with "
                             "fid_computer.py. A second call with a larger --count goes on where the first one ended.")
    parser.add_argument("--count", type=int, default=10_000, help="images in each folder (default: 10000)")
    parser.add_argument("--real", type=some_path, default=Path("images/real"), help="(default: images/real)")
    parser.add_argument("--fake", type=some_path, default=Path("images/fake"), help="(default: images/fake)")
    parser.add_argument("--batch-size", type=int, default=argparse.SUPPRESS, help="images drawn at once, which affects "
                        "the speed alone (default: as many as memory is estimated to hold, at most 4096 on a GPU and "
                        "500 elsewhere)")
    parser.add_argument("--equal", action="store_true", help="draw equally many of each class (default: as many as the "
                        "data have, in proportion, but equally many where no class is larger than another by more than "
                        "a quarter)")
    parser.add_argument("--data-dir", type=some_path, default=argparse.SUPPRESS,
                        help="where the data set is (default: as in training)")
    args = parser.parse_args()
    if not 1 <= args.count <= 1_000_000:
        raise UserError(f"--count {args.count}: must lie between 1 and 1,000,000")
    if os.path.realpath(args.real) == os.path.realpath(args.fake):
        raise UserError(f"--real and --fake are both {args.fake}: choose two folders")
    args.device = parallel.join(args.device)
    model, config = load_for_sampling(args)
    if config.channels not in (1, 3) or len(config.image_size) != 2:
        raise UserError(f"{args.checkpoint} draws {config.channels} channels of {show_size(config.image_size)}, which "
                        "are no picture")
    with parallel.rank_0_first():
        data = load_dataset(config.dataset, config.data_dir, image_size=config.image_size, channels=config.channels,
                            ground=config.ground)
    check_classes(config, data)
    weights = class_weights(data.labels, config.num_classes, args.equal)
    unequal = weights.min() < weights.max()
    if unequal and not parallel.RANK:
        print(f"a class has {weights.min():,} to {weights.max():,} images: the fakes are as unequal (--equal draws "
              "equally many of each)", file=sys.stderr)
    count = min(args.count, len(data.images))
    if count < args.count and not parallel.RANK:
        print(f"{config.dataset} has only {count:,} training images: {args.real} gets them all", file=sys.stderr)
    # Both folders are looked at before either is filled
    real = open_folder(args.real, count, {"dataset": config.dataset, "data": data.fingerprint, "seed": 0,
                                          "image_size": list(config.image_size), "channels": config.channels})
    fake = open_folder(args.fake, args.count, {
        "checkpoint": hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest(),
        **({"vae": find_vae(config, args.device).hash_of("decoder", "post_quant_conv")} if config.latent_shape else {}),
        "classes": weights.tolist() if unequal else None, **{name: getattr(config, name) for name in SAMPLING}})
    fill_real(args.real, data, real)
    fill_fake(args.fake, model, config, labels_by(weights, args.count), fake,
              config.batch_size if "batch_size" in args else batch_that_fits(config, args.device))
    parallel.wait()  # until the others' images are there too
    folders = [shlex.join(flag_words(f"--{name}", getattr(args, name))) for name in ("real", "fake")
               if getattr(args, name) != parser.get_default(name)]
    print(" ".join(["score them with: python fid_computer.py", *folders]))


if __name__ == "__main__":
    run(main)
