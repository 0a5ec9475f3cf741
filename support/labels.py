"""The labels that a user asks for, by name or by number, and those of a folder of generated images."""

from support import parallel
from support.commands import UserError

import contextlib
import re

import torch


def parse_labels(words, names):
    """The labels that `words` (a list, or one) ask for, each by a class's name or its number, a list of ints.

    31415 is five digits, 3 14 or 3,14 are two labels. None: each label, but at most 10.
    names: those of the classes. Raises `UserError` for any other word.
    """
    if words is None:
        return list(range(min(len(names), 10)))
    known = {name: label for label, name in reversed([*enumerate(names)])}
    parts = []
    for word in map(str, [words] if isinstance(words, (str, int)) else words):
        for part in [word] if word in known else word.split(","):
            parts += [part.strip()] if part.strip() in known else part.split()
    if len(parts) == 1 and len(names) <= 10 and parts[0] not in known and parts[0].isdecimal():
        parts = list(parts[0])
    labels = [known.get(part, int(part) if re.fullmatch("[0-9]{1,9}", part) else len(names)) for part in parts or [""]]
    for part, label in zip(parts or [""], labels, strict=True):
        if label >= len(names):
            raise UserError(f"--labels: {part!r:.40} is no label; this model knows {list_names(names)}")
    return labels


def list_names(names):
    """What a model knows, in a few words."""
    if are_numbers(names):
        return f"0 to {len(names) - 1}"
    more = f" and {len(names) - 10:,} more" if len(names) > 10 else ""
    return f"{', '.join(f'{name!r:.30}' for name in names[:10])}{more} (or their numbers, from 0)"


def are_numbers(names):
    """Whether the classes have no names but their numbers."""
    return tuple(names) == tuple(map(str, range(len(names))))


def parse_morph(text, names):
    """The two labels of "3:8" or "cat:dog". Raises `UserError`."""
    words = text.split(":")
    for i in range(1, len(words)):  # a name may have a colon itself
        with contextlib.suppress(UserError):
            first, last = (parse_labels([":".join(part)], names) for part in (words[:i], words[i:]))
            if len(first) == len(last) == 1:
                return first + last
    raise UserError(f"--morph {text!r:.80}: must be two labels with a colon between, such as 3:8; this model knows "
                    f"{list_names(names)}")


def check_classes(config, data):
    """Raises `UserError` unless the model of `config` knows as many classes as the images `data` (a `Dataset`) have;
    other names for them are a warning."""
    if config.num_classes != len(data.classes):
        raise UserError(f"the model knows {config.num_classes:,} classes, but the images of {config.dataset} "
                        f"have {len(data.classes):,}: name its own with --dataset and --data-dir")
    for ours, theirs in zip(config.classes, data.classes, strict=False):  # a model may have no names
        if ours != theirs:
            parallel.say(f"warning: what the model calls {ours!r:.40} is {theirs!r:.40} in the data set: they are "
                         "taken for the same classes in the same order")
            break


def class_weights(labels, num_classes, equal=False):
    """The weight of each class among the images to draw, int64 (num_classes,): its count among the labels (N,) of real
    images. All weights are equal with `equal`, and if no class is larger than another by more than a quarter, as in
    MNIST, so that scores compare with others on such data."""
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
