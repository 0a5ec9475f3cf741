"""Data sets that torchvision reads and downloads."""

from support.commands import UserError, first_line

import sys
import tempfile
from pathlib import Path

import torch

TORCHVISION = {  # data sets that torchvision reads and downloads, and what shows that a folder holds one
    "FashionMNIST": "FashionMNIST/raw", "KMNIST": "KMNIST/raw", "EMNIST": "EMNIST/raw",
    "CIFAR10": "cifar-10-batches-py", "CIFAR100": "cifar-100-python", "SVHN": "train_32x32.mat"}


def read_torchvision(name, root, train):
    """A data set of `TORCHVISION` as images uint8 (N, C, H, W), labels (N,) and names of classes, from torchvision's
    files in `root`. Missing ones are downloaded: unless all of them come, none stays. Raises `UserError`."""
    from torchvision import datasets  # here: it takes a second that no other path needs

    options = {"split": "train" if train else "test"} if name == "SVHN" else {"train": train}
    options |= {"split": "balanced"} if name == "EMNIST" else {}
    trouble = "is damaged in"
    try:
        try:
            data = getattr(datasets, name)(root, **options)
        except RuntimeError as error:
            if "not found" not in str(error):
                raise
            print(f"downloading {name} into {root} ...", file=sys.stderr)
            trouble = "cannot be downloaded into"
            above = next(folder for folder in (root, *root.absolute().parents) if folder.exists())
            with tempfile.TemporaryDirectory(dir=above) as whole:
                data = getattr(datasets, name)(whole, download=True, **options)
                for path in [path for path in Path(whole).rglob("*") if path.is_file()]:
                    target = root / path.relative_to(whole)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    path.replace(target)
    except Exception as error:  # torchvision raises nearly anything when files are damaged, or do not come
        raise UserError(f"{name} {trouble} {root} ({first_line(error):.150})") from None
    images = torch.as_tensor(data.data)
    if name == "EMNIST":
        images = images.mT  # its files hold rows as columns
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2) if "CIFAR" in name else images
    labels = torch.as_tensor(data.labels if name == "SVHN" else data.targets)
    return images.contiguous(), labels, list(getattr(data, "classes", "0123456789"))
