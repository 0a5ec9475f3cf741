"""The settings of a run on captions: those of `ClipConfig`, and those of the words."""

from support.commands import UserError
from support.settings import flag
from support.sizes import LARGEST, as_size

import dataclasses
import functools

import torch

from text.dit import TextDiT
from text.words import MOST_WORDS
from video.config import ClipConfig


def as_clip_size(value):
    """As `as_size`, but an image is a clip of one frame: 64x64 stands for (1, 64, 64)."""
    size = as_size(value)
    return (1, *size) if type(size) is tuple and len(size) == 2 else size


def unused(default):
    """A setting of `ClipConfig` that is not used here: it has no flag, and only this value."""
    return dataclasses.field(default=default, metadata=dict(choices=(default,), low=default, high=default))


@dataclasses.dataclass(frozen=True)
class TextConfig(ClipConfig):
    """All settings of a run of `text.train`; see `Config`."""

    kind = "text"
    trained_by, drawn_by = "-m text.train", "-m text.draw"
    size_words = "height and width, or frames, height and width of clips, such as 8x64x64"
    page = (("columns", "columns: captions of the data; from the same noise at every step"),)

    # Data
    dataset: str = flag("sprites", "sprites, or folder: images, each with a caption in a .txt of its name, or all in "
                        "metadata.jsonl", choices=("sprites", "folder"))
    image_size: tuple = flag((), "height and width of the images, pixels, or frames, height and width of the clips: "
                             "8x64x64; 0 = as the data set has them", 1, LARGEST, read=as_clip_size)
    figures: int = flag(1, "sprites in each image: 1, or 2 side by side", 1, 2)
    digits: int = unused(1)
    speeds: bool = unused(False)
    sizes: tuple = unused(())
    given: float = unused(0.0)
    motion: float = unused(0.0)
    qk_norm: bool = unused(False)
    # These have no flag: the captions say them.
    words: tuple = ()  # all words in the captions
    length: int = dataclasses.field(default=0, metadata=dict(low=0, high=MOST_WORDS))  # words of the longest caption
    example: str = ""  # a caption

    # Model
    patch_size: tuple = flag((), "height and width of a patch, or frames, height and width: 1x2x2; 0 = a quarter of "
                             "each", 1, LARGEST, read=as_clip_size)
    text_depth: int = flag(2, "blocks of the text encoder", 1, 256)

    def check(self):
        super().check()
        if not all(type(word) is str for word in self.words) or len(set(self.words)) < len(self.words):
            raise UserError("words must be strings that all differ")

    @functools.cached_property
    def vocabulary(self):
        """The number of each word, a dict."""
        return {word: number for number, word in enumerate(self.words)}

    def resolve(self, data):
        _, frames, *size = data.shape
        still = not self.patch_size and frames == 1  # one frame has no quarter
        patch = (1, *(max(1, side // 4) for side in size)) if still else self.patch_size
        return super(TextConfig, dataclasses.replace(self, patch_size=patch)).resolve(data)

    def network_options(self):
        return super().network_options() | dict(num_classes=len(self.words))

    def build_model(self):
        return TextDiT(**self.network_options(), rope=self.rope, length=self.length, text_depth=self.text_depth)

    def describe(self, model):
        return f"{super().describe(model)}; {len(self.words)} words, up to {self.length} at a time"

    def to_images(self, x):
        """Each figure is decoded alone, as it was encoded: the VAE has not seen two side by side."""
        return torch.cat([super(TextConfig, self).to_images(part) for part in x.chunk(self.figures, dim=-1)], dim=-1)

    def open_data(self, device):
        """The images or clips, and their captions. Raises `UserError`."""
        from text.data import open_captioned

        return open_captioned(self, device)


SPRITES = dict(dataset="sprites", vae="weights/vae_sprites", patch_size="1x2x2", rope=True, guidance=2.0,
               sample_steps=8)
PRESETS = {
    "default": {},
    "still": SPRITES | dict(image_size="64x64"),
    "clip": SPRITES | dict(image_size="8x64x64", batch_size=32, shift=4.0),
    "pair": SPRITES | dict(image_size="64x128", figures=2),
}
