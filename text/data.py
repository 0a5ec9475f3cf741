"""Clips with captions instead of classes: the sprites, and the images in a user's files. An image is a clip of one
frame."""

from support import parallel
from support.commands import UserError
from support.files import fingerprint
from support.folders import ONE, Folder, folder_of_classes
from support.image_files import is_image, say_left_out, walk
from support.sizes import show_size

import collections
import dataclasses
import json
import random

import torch

from dataset import Dataset
from latent.cache import open_data
from latent.sprites import CELL
from text.captions import SpriteCaptions
from text.words import MOST_WORDS, number_words, split_words
from video.clips import Clips, open_sprites

TABLE = "metadata.jsonl"  # the captions, a line for each image, as in Hugging Face's image folders
SHAPE = '{"file_name": "cat.png", "text": "a sleeping cat"}'


class Captioned(Clips):
    """`Clips` with captions instead of classes: the label of a clip is the number of its caption.

    captions: an object with `length`, `vocabulary`, `example`, `summary` and `fingerprint`. Its `read(number, draw)`
    returns the words of a caption as `number_words` does; a `random.Random` chooses them.
    """

    def __init__(self, clips, captions):
        numbers = torch.arange(len(captions), device=clips.starts.device)
        super().__init__(clips.name, clips.frames, clips.starts, clips.lengths, numbers, clips.T)
        self.captions = captions

    @property
    def settings(self):
        words = dict(words=tuple(self.captions.vocabulary), length=self.captions.length, example=self.captions.example)
        return super().settings | dict(num_classes=len(self.labels), classes=()) | words

    @property
    def summary(self):
        what = f"clips of {self.T} frames" if self.T > 1 else "images"
        frames = self.frames.summary.replace(", one class: unconditional", "")
        return f"{len(self.labels):,} captioned {what}; {frames}; {self.captions.summary}"

    @property
    def fingerprint(self):
        found = f"{super().fingerprint} {self.captions.fingerprint} {self.captions.vocabulary} {self.captions.length}"
        return fingerprint(found)

    def to(self, device):
        return type(self)(super().to(device), self.captions)

    def words(self, numbers, seeds):
        """The captions (b, L) of the clips `numbers` (b,). Each of the `seeds` (b,) chooses the wording of one. The
        caption is empty for the null label."""
        empty = [len(self.captions.vocabulary)] * self.captions.length
        return torch.tensor([self.captions.read(number, random.Random(seed)) if number < len(self.labels) else empty
                             for number, seed in zip(numbers.tolist(), seeds, strict=True)], device=numbers.device)


class Pairs(Captioned):
    """Two clips side by side, in the order of the captions of pairs."""

    @property
    def shape(self):
        return (*super().shape[:-1], 2 * super().shape[-1])

    @property
    def settings(self):
        *size, width = super().settings["image_size"]
        return super().settings | dict(image_size=(*size, 2 * width))

    def x_0(self, index, part, generator):
        left, right = index % len(self.starts), torch.from_numpy(self.captions.right).to(index.device)[index]
        return torch.cat([super(Pairs, self).x_0(side, part, generator) for side in (left, right)], dim=-1)


class FileCaptions:
    """One caption, a string, for each image; "" for no caption."""

    summary = "captions from files"

    def __init__(self, texts):
        words = [split_words(text) for text in texts]
        found = sorted({word for each in words for word in each})
        self.vocabulary = {word: number for number, word in enumerate(found)}
        self.length, self.example = max(map(len, words)), next(filter(split_words, texts))
        self.numbers = [number_words(each, self.vocabulary, self.length) for each in words]
        self.fingerprint = fingerprint(repr(texts))

    def __len__(self):
        return len(self.numbers)

    def read(self, number, draw):
        return self.numbers[number]


class CaptionedFolder(Folder):
    """A `Folder` of images, anywhere in and below `root`, with their captions beside them. Raises `UserError`."""

    def __init__(self, root, image_size=(), channels=0, ground="black"):
        self.root, self.ground, self.classes = folder_of_classes(root), ground, [ONE]
        if not self.root.is_dir():
            raise UserError(f"{root} is not a folder: point --data-dir at the folder of the images")
        left_out = collections.Counter()
        self.files = list(walk(self.root, is_image, left_out))
        if not self.files:
            raise UserError(f"{root} holds no image: point --data-dir at images, each with a .txt of the same name, or "
                            f"with {TABLE} beside them")
        self.labels = torch.zeros(len(self.files), dtype=torch.int64)
        self.captions = read_captions(self.root, self.files, left_out)
        say_left_out(self.root, +left_out)
        self.find_shape(image_size, channels)


def read_text(path):
    """A file's text. Raises `UserError` unless it is UTF-8."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,}): save it as UTF-8") from None


def read_table(path, files):
    """The captions in a `TABLE`, {file: text}. Raises `UserError`."""
    captions, known = {}, set(files)
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
            if type(name) is not str or type(text) is not str:
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}, line {number:,}, is not of the form {SHAPE}: mend it or remove it") from None
        file = path.parent / name
        if file not in known or file in captions:
            raise UserError(f"{path}, line {number:,}, names {name!r:.80}, which "
                            f"{'an earlier line names too' if file in captions else 'is no image there'}: mend it or "
                            "remove it")
        captions[file] = text
    return captions


def read_captions(root, files, left_out):
    """The captions of the image `files` below `root`, a list of strings, from `TABLE` and .txt files. These files are
    taken off the Counter `left_out`. Says which images have no caption. Raises `UserError`."""
    table = root / TABLE
    captions, used = read_table(table, files) if table.is_file() else {}, set()
    left_out[".jsonl"] -= table.is_file()
    for file in files:
        text = file.with_suffix(".txt")
        if text.is_file():
            if file in captions:
                raise UserError(f"{file} has a caption in {text.name} and another in {TABLE}: remove one of them")
            captions[file] = read_text(text)
            used.add(text)
    left_out[".txt"] -= len(used)
    for file, text in captions.items():
        if len(split_words(text)) > MOST_WORDS:
            raise UserError(f"the caption of {file} has {len(split_words(text)):,} words, and {MOST_WORDS} are the "
                            "most: make it shorter")
    missing = [file for file in files if file not in captions]
    empty = [file for file, text in captions.items() if not split_words(text)]
    if len(missing) + len(empty) == len(files):
        raise UserError(f"no image in {root} has a caption: write each one's into a .txt of the same name, or all into "
                        f"{table}, a line like {SHAPE} for each")
    for which, what in ((missing, "no caption"), (empty, "an empty caption")):
        if which:
            parallel.say(f"{len(which):,} of {len(files):,} images have {what}, such as {which[0]}: they are learned "
                         "without")
    return [captions.get(file, "") for file in files]


def open_folder(config, device):
    """A user's images with their captions, as pixels or as latents."""
    if config.image_size and config.image_size[0] > 1:
        raise UserError(f"image_size {show_size(config.image_size)}: images are no clips, so say their height and "
                        "width alone")
    with parallel.rank_0_first():
        folder = CaptionedFolder(config.data_dir, config.image_size[1:], config.channels, config.ground)
        images = folder if config.vae else Dataset("folder", folder.read_all(), folder.labels, folder.classes)
    if config.vae:
        folder.check()
    numbers = torch.arange(len(folder.files))
    frames = open_data(config, device, images)
    return Captioned(Clips("folder", frames, numbers, torch.ones_like(numbers), numbers, 1),
                     FileCaptions(folder.captions))


def open_captioned(config, device):
    """The data of a `TextConfig`, a `Captioned`. Raises `UserError`."""
    if config.dataset == "folder":
        return open_folder(config, device)
    if config.figures == 1:
        return Captioned(open_sprites(config, device), SpriteCaptions())
    T, height, width = config.image_size or (1, CELL, 2 * CELL)
    one = dataclasses.replace(config, image_size=(T, height, width // 2), patch_size=())
    return Pairs(open_sprites(one, device), SpriteCaptions(2))
