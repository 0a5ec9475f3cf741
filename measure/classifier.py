"""A small network that reads what images show: its features are the ruler of `measure.score`.

    python -m measure.classifier --dataset folder --data-dir my_images --flips   one of your images, in minutes
    python -m measure.classifier                                  MNIST's anew, a minute or two on two CPU cores

MNIST's weights come with the repository (float16, half a megabyte), so that scoring needs no download. Others are kept
in classifiers/ and found again by the images that they were trained on.
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
MNIST = "1c4bb9346033fd0f"  # the fingerprint of all of them
FEATURES = 64
WIDTHS = 32, 64, 128, 128  # channels of `Classifier` at each resolution
LARGEST_GRID = 32  # its first convolution brings larger images down to this
SMOOTHING = 0.1  # of the labels (1512.00567)


def conv(in_channels, out_channels, kernel_size):
    """Convolution, halved by taking maxima, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False),
                         nn.MaxPool2d(2), nn.BatchNorm2d(out_channels), nn.ReLU())


class DigitClassifier(nn.Module):
    """Reads MNIST's digits, float (B, 1, 28, 28) in [-1, 1]."""

    def __init__(self):
        super().__init__()
        self.shape, self.num_classes = DIGITS[1], 10
        self.body = nn.Sequential(
            conv(1, 32, 5),                                                              # (B, 32, 14, 14)
            conv(32, 64, 3),                                                             # (B, 64, 7, 7)
            nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Flatten(),                             # not averaged over the image: it counts where a stroke is
            nn.Linear(64 * 7 * 7, 64, bias=False), nn.BatchNorm1d(64),                    # (B, 64)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, 10))
        self.to(memory_format=torch.channels_last)  # a third faster on a CPU

    def features(self, x):
        """(B, 64), as they are before the ReLU: nearer to a Gaussian, which the Fréchet distance takes them for, and
        they keep more of what differs within a class."""
        return self.body(x)

    def forward(self, x):
        """The logits (B, 10)."""
        return self.head(self.features(x))


def layer(in_channels, out_channels, kernel_size=3, stride=1, halve=False):
    """Convolution, perhaps halved by taking maxima, batch norm, ReLU."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False),
        nn.MaxPool2d(2, ceil_mode=True) if halve else nn.Identity(),
        nn.BatchNorm2d(out_channels), nn.ReLU())


class Classifier(nn.Module):
    """Reads any images float (B, *shape) in [-1, 1]; the sizes below are those of images of 32 x 32 or more."""

    def __init__(self, shape, num_classes):
        super().__init__()
        self.shape, self.num_classes = tuple(shape), num_classes
        C, *size = shape
        stride = math.ceil(max(size) / LARGEST_GRID)
        a, b, c, d = WIDTHS
        rows, columns = (math.ceil(side / stride / 8) for side in size)
        self.body = nn.Sequential(
            layer(C, a, 2 * stride + 1, stride),                                         # (B, 32, 32, 32)
            layer(a, b, halve=True), layer(b, b),                                        # (B, 64, 16, 16)
            layer(b, c, halve=True), layer(c, c),                                        # (B, 128, 8, 8)
            layer(c, d, halve=True), layer(d, d),                                        # (B, 128, 4, 4)
            nn.Flatten(),                             # not averaged over the image: it counts where things are
            nn.Linear(d * rows * columns, FEATURES, bias=False), nn.BatchNorm1d(FEATURES),
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(FEATURES, num_classes))
        self.to(memory_format=torch.channels_last)

    def features(self, x):
        """(B, 64), as those of `DigitClassifier`."""
        return self.body(x)

    def forward(self, x):
        """The logits (B, num_classes)."""
        return self.head(self.features(x))


def build_classifier(name, shape, num_classes):
    """The untrained network for images of `shape` (C, H, W) of the data set called `name`."""
    return DigitClassifier() if (name, tuple(shape)) == DIGITS else Classifier(shape, num_classes)


def augment(x, generator):
    """Images (B, 1, H, W), each turned by up to 10 degrees, scaled by up to 10 % and shifted by up to a 14th of
    its side: 2 pixels of MNIST's 28."""
    turn, scale, shift_x, shift_y = torch.rand(4, len(x), generator=generator).to(x.device) * 2 - 1  # each (B,)
    angle, scale, shift = turn * torch.pi / 18, 1 + scale / 10, 2 / 14  # the image reaches from -1 to 1
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([cos, -sin, shift_x * shift, sin, cos, shift_y * shift], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def shift(images, generator, flips=False):
    """Images (B, C, H, W), each shifted by up to an eighth of its sides, 4 pixels of 32, its border repeated; with
    `flips`, every other one mirrored."""
    B, C, *size = images.shape
    places = []
    for side in size:
        offsets = torch.randint(-(side // 8), side // 8 + 1, (B, 1), generator=generator)
        places.append((torch.arange(side) + offsets).clamp(0, side - 1))                 # (B, H), (B, W)
    rows, columns = places
    if flips:
        columns = torch.where(torch.rand(B, 1, generator=generator) < 0.5, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    b, c = (torch.arange(n, device=images.device) for n in (B, C))
    return images[b[:, None, None, None], c[:, None, None], rows[:, None, :, None], columns[:, None, None, :]]


def schedule(data):
    """How many epochs, and how large a batch, train a classifier of a `Dataset`: 10 epochs, but not less than about
    1,000 steps, and not more than about 5,000."""
    N = len(data.images)
    if (data.name, data.shape) == DIGITS:
        return 5, min(256, N)
    batch_size = max(2, min(128, N // 10))
    batches = max(1, N // batch_size)
    return max(math.ceil(1000 / batches), min(10, math.ceil(5000 / batches))), batch_size


def train_classifier(data, epochs=None, batch_size=None, flips=False, lr=5e-3, seed=0, device="cpu", leave=False):
    """A classifier trained on a `Dataset`, its weights as of float16.

    epochs, batch_size: None = as `schedule` says. flips: mirrored images count as well. leave: the bar stays.
    """
    images, labels = where_it_fits(data.images, torch.device(device)), data.labels.to(device)
    digits = (data.name, data.shape) == DIGITS
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    classifier = build_classifier(data.name, images.shape[1:], len(data.classes)).to(device)
    epochs, batch_size = (given or usual for given, usual in zip((epochs, batch_size), schedule(data), strict=True))
    bf16 = not digits and resolve_precision("auto", torch.device(device)) == "bf16"
    batches = len(images) // batch_size
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=lr)
    lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches)
    with Bar(total=epochs * batches * batch_size, desc="training the classifier", unit=" images", unit_scale=True,
             leave=leave, disable=False if leave else None,
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
    return classifier.half().float().eval()  # what is measured now is what the file will hold


def load_parts(config):
    """The training part and the test part of the data set of a `Config`, each a `Dataset`; train.py learns nothing of
    the second. If a folder has no test/, a line on standard error says what is held out. Raises `UserError`."""
    name, data_dir, of = config.dataset, config.data_dir, dict(ground=config.ground)
    train = load_images(name, data_dir, train=True, image_size=config.image_size, channels=config.channels, **of)
    C, *size = train.shape
    test = load_images(name, data_dir, train=False, image_size=tuple(size), channels=C, **of)
    if train.held_out:
        print(f"{data_dir} has no test/: every tenth image of each class, {train.held_out:,} in all, is held out to "
              "test on, and train.py learns none of these", file=sys.stderr)
    return train, test


def where_kept(data):
    """The file of the classifier of a `Dataset`: that of all MNIST comes with the repository."""
    own = (data.name, data.shape, data.fingerprint) == (*DIGITS, MNIST)
    return WEIGHTS if own else KEPT / f"{data.name}-{data.fingerprint}.pth"


def save_classifier(path, classifier, data, accuracy):
    """Writes a classifier of the `Dataset` data. Raises `UserError`."""
    state = {name: tensor.half().cpu() if tensor.is_floating_point() else tensor.cpu()
             for name, tensor in classifier.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in state.values()):
        raise UserError("the classifier has learned nothing: its weights are not all finite. Try another --seed")
    content = {"format": FORMAT, "dataset": data.name, "data": data.fingerprint, "shape": list(classifier.shape),
               "classes": list(data.classes), "test_accuracy": accuracy, "state_dict": state}
    write_atomically(path, lambda file: torch.save(content, file))


def load_classifier(path=WEIGHTS, name="mnist", fingerprint=None, device="cpu"):
    """The classifier in a file, of the data set called `name` with this fingerprint (None: whichever). Nothing in it
    can run code. Raises `UserError` when the file is missing, damaged, or reads other images."""
    retrain = "train it anew with python -m measure.classifier" + (f" --dataset {name}" if name != "mnist" else "")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no classifier {path}: {retrain}") from None
    except Exception as error:  # torch.load raises nearly anything when a file is not its own
        raise UserError(f"{path} is not a classifier, or is cut short ({type(error).__name__}): {retrain}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a classifier (no format {FORMAT!r} in it): {retrain}")
    if content.get("dataset") != name or (fingerprint and content.get("data") not in (None, fingerprint)):  # None: any
        which = "other images of " if content.get("dataset") == name else ""
        raise UserError(f"{path} reads {which}{content.get('dataset')!r:.40}, not {'these' if which else repr(name)}: "
                        "its features mean nothing there")
    try:
        shape, classes, state = tuple(content["shape"]), content["classes"], content["state_dict"]
        if len(shape) != 3 or not all(type(n) is int and 1 <= n <= most for n, most in zip(
                shape, (16, 1024, 1024), strict=True)) or not all(type(label) is str for label in classes):
            raise UserError("it reads images of an impossible shape, or classes without names")
        classifier = build_classifier(name, shape, len(classes))
        classifier.load_state_dict(state)
        if not all(weight.isfinite().all() for weight in state.values()):
            raise UserError("its weights are not all finite")
    except Exception as error:
        raise UserError(f"{path} is damaged ({first_line(error):.100}): {retrain}") from None
    return classifier.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)  # twice as fast


def find_classifier(data, data_dir, device="cpu"):
    """The classifier that was trained on the `Dataset` data; or on all MNIST, when data is a part of it. Raises
    `UserError` when there is none, with the command that trains it."""
    path = where_kept(data)
    if path.exists() or path == WEIGHTS:
        return load_classifier(path, data.name, data.fingerprint, device)
    if (data.name, data.shape) == DIGITS:  # some of MNIST
        return load_classifier(device=device)
    C, *size = data.shape
    flags = ["--dataset", data.name, *(["--data-dir", str(data_dir)] if str(data_dir) != Config.data_dir else []),
             "--image-size", show_size(size), "--channels", str(C)]
    raise UserError(f"no classifier has learned these {len(data.images):,} images yet: python -m measure.classifier "
                    f"{shlex.join(flags)} trains one (photographs: add --flips)")


@in_full_precision()
def accuracy_on(classifier, data):
    """The share of a `Dataset` that is read as its labels say."""
    device = next(classifier.parameters()).device
    reads = [classifier(to_float(x.to(device))).argmax(1).cpu() for x in data.images.split(500)]
    return (torch.cat(reads) == data.labels).float().mean().item()


def main():
    parser = Parser(description="Trains the classifier that measure.score uses: a network that reads what images show, "
                                "of any labelled data set.")
    add_flags(parser, LatentConfig, ["dataset", "data_dir", "image_size", "channels", "ground", "flips", "seed"])
    parser.set_defaults(dataset="mnist")
    say_default(parser, ["dataset"], "mnist")
    parser.add_argument("--epochs", type=int, help="passes through the training images (default: 10, or what makes "
                        "1,000 to 5,000 steps; fewer for digits)")
    parser.add_argument("--out", type=some_path, help="the file to write (default: where measure.score looks for it: "
                        "weights/digit_classifier.pth for MNIST, else in classifiers/)")
    add_device_flag(parser)
    args = parser.parse_args()
    config = LatentConfig(**given_flags(args, LatentConfig))  # it knows what each may be
    if args.epochs is not None and not 1 <= args.epochs <= 10_000:
        raise UserError(f"--epochs {args.epochs}: must lie between 1 and 10,000")
    if args.out:  # before the images are read
        check_output(args.out, FORMAT.encode())
    device = pick_device(args.device)
    train, test = load_parts(config)
    if len(train.classes) < 2:
        raise UserError(f"{config.data_dir} holds one class, {train.classes[0]!r:.40}: a network learns by telling "
                        "classes apart. FID needs none: fid_computer.py")
    path = args.out or where_kept(train)
    if path.parent == KEPT:
        make_dir(KEPT)
    check_output(path, FORMAT.encode())
    classifier = train_classifier(train, args.epochs, flips=config.flips, seed=config.seed, device=device, leave=True)
    accuracy = accuracy_on(classifier, test)
    save_classifier(path, classifier, train, accuracy)
    print(f"{path}: reads {accuracy:.2%} of {len(test.images):,} test images right, "
          f"{os.path.getsize(path) / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main, memory="--image-size", alone=True)
