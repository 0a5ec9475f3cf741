"""Scores clips of sprites. All real clips are known: each drawn clip is compared with the nearest one."""

import torch

from config import Config
from dataset import resize
from latent.sprites import CHARACTERS, FRAMES, TRAINING_CHARACTERS, load_images, split_characters
from measure.score import nearest, share

SIDE = 16  # pixels, the sides of the frames that are compared
CHOICES = 6  # of each part
PARTS = ("body", "trousers", "top", "hair")  # the digits of a character's number, in base `CHOICES`
FIGURES = {  # {name: (title, format)}
    "action": ("action and direction as asked, of all clips", "{:.1%}"),
    **{part: (f"the same {part} in every frame, of all clips", "{:.1%}") for part in PARTS},
    "character": ("all four the same in every frame, of all clips", "{:.1%}"),
    "order": ("each frame in its place, of all frames", "{:.1%}"),
    "motion": ("change from frame to frame, of the nearest real clip's", "{:.2f}"),
    "distance": ("distance to the nearest real clip, grey levels", "{:.1f}"),
    "copies": (f"nearest to a training character (by chance {TRAINING_CHARACTERS / CHARACTERS:.0%})", "{:.1%}"),
}


def parts_of(characters):
    """The choices of body, trousers, top and hair of the characters of these numbers, int64 (..., 4)."""
    powers = CHOICES ** torch.arange(len(PARTS) - 1, -1, -1)
    return characters[..., None] // powers % CHOICES


def as_pixels(values):
    """Values (N, D) as `nearest` takes them: images of one pixel with D channels."""
    return values[:, :, None, None]


class SpriteJudge:
    """Scores clips of sprites against all clips of all characters, which are read from `data_dir` with this many
    channels."""

    figures = FIGURES

    def __init__(self, data_dir=Config.data_dir, channels=3):
        self.data_dir, self.channels = data_dir, channels
        parts = [load_images("sprites", data_dir, train, (SIDE, SIDE), channels) for train in (True, False)]
        self.kinds = len(parts[0].classes)
        self.gallery = torch.empty(CHARACTERS, self.kinds, FRAMES, channels * SIDE**2, dtype=torch.uint8)
        self.training = torch.zeros(CHARACTERS, dtype=torch.bool)
        for data, train in zip(parts, (True, False), strict=True):
            order = torch.from_numpy(split_characters(train))
            self.gallery[order] = data.images.view(len(order), *self.gallery.shape[1:])
            self.training[order] = train

    def real_clips(self, count, size):
        """`count` clips of test characters, uint8 (N, C, 8, H, W) of `size` (H, W), and their labels."""
        data = load_images("sprites", self.data_dir, False, size, self.channels)
        clips = data.images.unflatten(0, (-1, FRAMES))
        index = torch.randint(len(clips), (count,), generator=torch.Generator().manual_seed(0))
        return clips[index].movedim(1, 2), data.labels[::FRAMES][index]

    def find(self, frames):
        """The character and the kind (N,) of the real clip that is nearest to each of `frames`, uint8 (N, 8, D)."""
        _, index = nearest(as_pixels(frames.flatten(1)), as_pixels(self.gallery.flatten(0, 1).flatten(1)))
        return index // self.kinds, index % self.kinds

    def characters(self, frames, labels):
        """The number (N, 8) of the character that is nearest to each of `frames`, uint8 (N, 8, D), among all characters
        that do what the `labels` (N,) ask for, at the same time."""
        numbers = torch.empty(frames.shape[:2], dtype=torch.int64)
        for label in labels.unique().tolist():
            rows = labels == label
            for t in range(FRAMES):
                _, numbers[rows, t] = nearest(as_pixels(frames[rows, t]), as_pixels(self.gallery[:, label, t]))
        return numbers

    def score(self, clips, labels):
        """The `FIGURES` of clips uint8 (N, C, 8, H, W) that should show `labels`, a dict of floats."""
        N = len(clips)
        frames = resize(clips.transpose(1, 2).flatten(0, 1), (SIDE, SIDE)).reshape(N, FRAMES, -1)
        character, kind = self.find(frames)
        parts = parts_of(self.characters(frames, labels))                              # (N, 8, 4)
        frames, near = frames.float(), self.gallery[character, kind].float()           # (N, 8, D)
        same = (parts == parts[:, :1]).all(1)                                          # (N, 4)
        distances = torch.cdist(frames, near, compute_mode="donot_use_mm_for_euclid_dist")
        change, real_change = (x.diff(dim=1).norm(dim=2).sum(1) for x in (frames, near))
        in_place = distances.diagonal(dim1=1, dim2=2) <= distances.amin(2)
        return {"action": share(kind == labels), **{part: share(same[:, i]) for i, part in enumerate(PARTS)},
                "character": share(same.all(1)), "order": share(in_place),
                "motion": (change / real_change.clamp(min=1e-9)).median().item(),
                "distance": (frames - near).square().mean((1, 2)).sqrt().median().item(),
                "copies": share(self.training[character])}
