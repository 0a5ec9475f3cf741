"""A small classifier of images, trained on real ones. `measure.score` compares images by its features.

    python -m measure.classifier --dataset folder --data-dir my_images --flips   for your images, in minutes
    python -m measure.classifier                             for MNIST once more: 1 to 2 minutes on two CPU cores

MNIST's weights come with the repository (float16, 0.5 MB), so that scoring needs no download. Those for other images
are kept in classifiers/. A fingerprint of the training images in the file's name finds them again.
"""

from support.commands import (
    Parser,
    UserError,
    add_device_flag,
    first_line,
    in_full_precision,
    pick_device,
    resolve_precision,
    run,
    some_path,
)
from support.files import check_output, make_dir, write_atomically
from support.settings import add_flags, given_flags, say_default
from support.sizes import pick, show_size, where_it_fits
from support.tensors import read_tensors

import functools
import math
import os
import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from config import Config
from dataset import to_float
from latent.config import LatentConfig
from latent.sprites import load_images
from record.log import Bar

WEIGHTS = Path(__file__).parent.parent / "weights" / "digit_classifier.pth"
KEPT = Path("classifiers")
FORMAT = "classifier-1"
DIGITS = "mnist", (1, 28, 28)  # the images that `DigitClassifier` reads
MNIST = "1c4bb9346033fd0f"  # the fingerprint of MNIST's 60,000 training images
FEATURES = 64
SMOOTHING = 0.1  # of the labels (1512.00567)
LR = 5e-3  # the peak of the learning rate


def layer(in_channels, out_channels, kernel_size=3, stride=1, halve=False):
    """Convolution, 2 x 2 max pooling if `halve`, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.MaxPool2d(2, ceil_mode=True) if halve else nn.Identity(),
        nn.BatchNorm2d(out_channels), nn.ReLU())


class Classifier(nn.Module):
    """Classifies images, float (B, *shape) in [-1, 1]. The sizes in the comments are for images of 32 x 32 or more."""

    def __init__(self, shape, num_classes):
        super().__init__()
        self.shape, self.num_classes = tuple(shape), num_classes
        self.body = self.build_body()
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, num_classes))
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def build_body(self):
        C, *size = self.shape
        stride = math.ceil(max(size) / 32)  # reduces larger images to 32 x 32
        rows, columns = (math.ceil(side / stride / 8) for side in size)
        return nn.Sequential(
            layer(C, 32, 2 * stride + 1, stride),                                        # (B, 32, 32, 32)
            layer(32, 64, halve=True), layer(64, 64),                                    # (B, 64, 16, 16)
            layer(64, 128, halve=True), layer(128, 128),                                 # (B, 128, 8, 8)
            layer(128, 128, halve=True), layer(128, 128),                                # (B, 128, 4, 4)
            nn.Flatten(),                                  # no average over the image: the place of things counts
            nn.Linear(128 * rows * columns, FEATURES, bias=False), nn.BatchNorm1d(FEATURES),
        )

    def features(self, x):
        """(B, 64), before the ReLU. There they are closer to a Gaussian, as the Fréchet distance assumes, and keep more
        of the differences within a class."""
        return self.body(x)

    def forward(self, x):
        """The logits (B, num_classes)."""
        return self.head(self.features(x))


class DigitClassifier(Classifier):
    """Classifies MNIST's digits, float (B, 1, 28, 28) in [-1, 1]."""

    def __init__(self):
        super().__init__(DIGITS[1], 10)

    def build_body(self):
        return nn.Sequential(
            layer(1, 32, 5, halve=True),                                                 # (B, 32, 14, 14)
            layer(32, 64, 3, halve=True),                                                # (B, 64, 7, 7)
            nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 7 * 7, FEATURES, bias=False), nn.BatchNorm1d(FEATURES),
        )


def build_classifier(name, shape, num_classes):
    """The untrained network for images of `shape` (C, H, W) from the data set called `name`."""
    return DigitClassifier() if (name, tuple(shape)) == DIGITS else Classifier(shape, num_classes)


def augment(x, generator):
    """Rotates each of the images (B, 1, H, W) by up to 10 degrees, scales it by up to 10 %, and shifts it by up to 1/14
    of its side: 2 of MNIST's 28 pixels."""
    turn, scale, shift_x, shift_y = torch.rand(4, len(x), generator=generator).to(x.device) * 2 - 1  # each (B,)
    angle, scale, shift = turn * torch.pi / 18, 1 + scale / 10, 2 / 14  # the image reaches from -1 to 1
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin, shift_x * shift, sin, cos, shift_y * shift], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def shift(images, generator, flips=False):
    """Shifts each of the images (B, C, H, W) by up to 1/8 of its sides, 4 of 32 pixels, and repeats its border. With
    `flips`, mirrors about half of them."""
    B, _, *size = images.shape
    rows, columns = ((torch.arange(side) + torch.randint(-(side // 8), side // 8 + 1, (B, 1), generator=generator))
                     .clamp(0, side - 1) for side in size)                               # (B, H), (B, W)
    if flips:
        columns = torch.where(torch.rand(B, 1, generator=generator) < 0.5, columns.flip(1), columns)
    b, rows, columns = (index.to(images.device) for index in (
        torch.arange(B)[:, None, None], rows[:, :, None], columns[:, None, :]))
    return images[b, :, rows, columns].movedim(-1, 1)                                    # (B, C, H, W)


def schedule(data):
    """The epochs and the batch size to train a classifier of a `Dataset`: 10 epochs, but at least about 1,000 steps and
    at most about 5,000."""
    N = len(data.images)
    if (data.name, data.shape) == DIGITS:
        return 5, min(256, N)
    batch_size = max(2, min(128, N // 10))
    batches = max(1, N // batch_size)
    return max(math.ceil(1000 / batches), min(10, math.ceil(5000 / batches))), batch_size


def train_classifier(data, epochs=None, batch_size=None, flips=False, seed=0, device="cpu"):
    """A classifier trained on a `Dataset`. Its weights are rounded to float16, as its file will hold them.

    epochs, batch_size: None = as `schedule` says. flips: learn from mirrored images as well.
    """
    images, labels = where_it_fits(data.images, torch.device(device)), data.labels.to(device)
    digits = (data.name, data.shape) == DIGITS
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = build_classifier(data.name, data.shape, len(data.classes)).to(device)
    epochs, batch_size = (given or usual for given, usual in zip((epochs, batch_size), schedule(data), strict=True))
    bf16 = not digits and resolve_precision("auto", torch.device(device)) == "bf16"
    batches = len(images) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=LR)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=epochs * batches)
    with Bar(total=epochs * batches * batch_size, desc="training the classifier", unit=" images", unit_scale=True,
             mininterval=0.2 if sys.stderr.isatty() else 20) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(images), generator=generator).to(device)
            for index in order[:batches * batch_size].view(batches, batch_size):
                x = pick(images, index)
                x = augment(to_float(x), generator) if digits else (
                    to_float(shift(x, generator, flips)).contiguous(memory_format=torch.channels_last))
                with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                    logits = classifier(x)
                loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0 if digits else SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                lr_schedule.step()
                bar.update(batch_size)
    return classifier.half().float().eval()


def load_parts(config):
    """The training part and the test part of the data that a `Config` names, each a `Dataset`. train.py never learns
    from the second. A folder without test/ has some images held out, which a line on standard error says. Raises
    `UserError`."""
    load = functools.partial(load_images, config.dataset, config.data_dir, ground=config.ground)
    train = load(train=True, image_size=config.image_size, channels=config.channels)
    test = load(train=False, image_size=train.shape[1:], channels=train.shape[0])
    if train.held_out:
        print(f"{config.data_dir} has no test/: every tenth image of each class, {train.held_out:,} in all, is held "
              "out to test on, and train.py learns none of these", file=sys.stderr)
    return train, test


def where_kept(data):
    """The file of the classifier for a `Dataset`. The one for all of MNIST comes with the repository."""
    own = (data.name, data.shape, data.fingerprint) == (*DIGITS, MNIST)
    return WEIGHTS if own else KEPT / f"{data.name}-{data.fingerprint}.pth"


def save_classifier(path, classifier, data, accuracy):
    """Writes a classifier that was trained on the `Dataset` data. Raises `UserError`."""
    state = {name: tensor.half().cpu() if tensor.is_floating_point() else tensor.cpu()
             for name, tensor in classifier.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError("the classifier has learned nothing: its weights are not all finite. Try another --seed")
    content = {"format": FORMAT, "dataset": data.name, "data": data.fingerprint, "shape": list(classifier.shape),
               "classes": list(data.classes), "test_accuracy": accuracy, "state_dict": state}
    write_atomically(path, lambda file: torch.save(content, file))


def load_classifier(path=WEIGHTS, name="mnist", fingerprint=None, device="cpu"):
    """The classifier in a file. It must have learned the data set called `name`, with this fingerprint unless that is
    None. Nothing in the file can run code. Raises `UserError` when it is missing, damaged, or for other images."""
    retrain = "train it anew with python -m measure.classifier" + (f" --dataset {name}" if name != "mnist" else "")
    try:
        content = read_tensors(path)
        if content["format"] != FORMAT:
            raise UserError(f"its format is not {FORMAT!r}")
        dataset, (C, H, W) = str(content["dataset"]), content["shape"]
        if not (1 <= C <= 16 and 1 <= H <= 1024 and 1 <= W <= 1024):  # else the network could fill the memory
            raise UserError("it reads images of an impossible shape")
        classifier = build_classifier(dataset, (C, H, W), len(content["classes"]))
        classifier.load_state_dict(content["state_dict"])
        if not all(weight.isfinite().all() for weight in classifier.state_dict().values()):
            raise UserError("its weights are not all finite")
    except FileNotFoundError:
        raise UserError(f"there is no classifier {path}: {retrain}") from None
    except Exception as error:  # a file that is not ours fails in too many ways to list
        raise UserError(f"{path} is not a classifier, or is cut short or damaged ({first_line(error):.100}): {retrain}"
                        ) from None
    if dataset != name or (fingerprint and content.get("data") not in (None, fingerprint)):  # None: any
        which = "other images of " if dataset == name else ""
        raise UserError(f"{path} reads {which}{dataset!r:.40}, not {'these' if which else repr(name)}: its features "
                        "mean nothing there")
    return classifier.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # twice as fast


def find_classifier(data, data_dir, device="cpu"):
    """The classifier that was trained on the `Dataset` data; for a part of MNIST, the one that was trained on all of
    it. Raises `UserError` when there is none, with the command that trains it."""
    path = where_kept(data)
    if path.exists() or path == WEIGHTS:
        return load_classifier(path, data.name, data.fingerprint, device)
    if (data.name, data.shape) == DIGITS:
        return load_classifier(device=device)
    C, *size = data.shape
    flags = ["--dataset", data.name, *(["--data-dir", str(data_dir)] if str(data_dir) != Config.data_dir else []),
             "--image-size", show_size(size), "--channels", str(C)]
    raise UserError(f"no classifier has learned these {len(data.images):,} images yet: python -m measure.classifier "
                    f"{shlex.join(flags)} trains one (photographs: add --flips)")


@in_full_precision()
def embed(classifier, images, batch_size=250):
    """The features (N, 64) of images uint8 (N, C, H, W), and the probabilities of the classes (N, num_classes). Both
    are on the classifier's device."""
    C, H, W = classifier.shape
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != (C, H, W):
        raise UserError(f"the classifier reads images of {H} x {W} pixels, uint8 (N, {C}, {H}, {W}), not "
                        f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}")
    device = next(classifier.parameters()).device
    features = [classifier.features(to_float(batch.to(device))) for batch in images.split(batch_size)]
    probs = [classifier.head(batch).softmax(dim=1) for batch in features]
    return torch.cat(features), torch.cat(probs)


def accuracy_on(classifier, data):
    """The share of the images of a `Dataset` that are classified as their labels say."""
    reads = embed(classifier, data.images)[1].argmax(dim=1)
    return (reads.cpu() == data.labels).float().mean().item()


def main():
    parser = Parser(description="Trains the classifier that measure.score compares images with, on any labelled data "
                                "set.")
    add_flags(parser, LatentConfig, ["dataset", "data_dir", "image_size", "channels", "ground", "flips", "seed"])
    parser.set_defaults(dataset="mnist")
    say_default(parser, ["dataset"], "mnist")
    parser.add_argument("--epochs", type=int, help="passes through the training images (default: 10, but at least "
                        "1,000 and at most 5,000 steps; 5 for MNIST)")
    parser.add_argument("--out", type=some_path, help="the file to write (default: where measure.score looks for it, "
                        "weights/digit_classifier.pth for MNIST and classifiers/ for others)")
    add_device_flag(parser)
    args = parser.parse_args()
    config = LatentConfig(**given_flags(args, LatentConfig))  # checks the values
    if args.epochs is not None and not 1 <= args.epochs <= 10_000:
        raise UserError(f"--epochs {args.epochs}: must lie between 1 and 10,000")
    if args.out:  # before the images are read
        check_output(args.out, FORMAT.encode())
    device = pick_device(args.device)
    train, test = load_parts(config)
    if len(train.classes) < 2:
        raise UserError(f"{config.data_dir} holds one class, {train.classes[0]!r:.40}: a classifier needs two. FID "
                        "needs none: fid_computer.py")
    path = args.out or where_kept(train)
    if path.parent == KEPT:
        make_dir(KEPT)
    check_output(path, FORMAT.encode())
    classifier = train_classifier(train, args.epochs, flips=config.flips, seed=config.seed, device=device)
    accuracy = accuracy_on(classifier, test)
    save_classifier(path, classifier, train, accuracy)
    print(f"{path}: reads {accuracy:.2%} of {len(test.images):,} test images right, "
          f"{os.path.getsize(path) / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main, memory="--image-size", alone=True)
