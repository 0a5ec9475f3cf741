"""Data sets of clips: moving digits, sprites in motion, and the clips in a user's files."""

from support import parallel
from support.commands import UserError
from support.files import fingerprint
from support.folders import LOOKED_AT, folder_of_classes, list_classes, place, warn_of_alike
from support.image_files import SLOWEST, TINT, is_animation, is_image, is_video, list_files, read_clip
from support.sizes import show_size

import collections

import torch
from tqdm import tqdm

from dataset import Dataset
from latent.cache import open_data
from latent.sprites import CELL, FRAMES, load_images
from video.moving import load_moving

MOST = 16  # frames that are learned from at once, unless the user says otherwise or a clip is shorter


class Clips:
    """Takes the place of a `Dataset`: each clip is a run of consecutive images of another data set.

    frames: a `Dataset` of all frames, or their `Latents`. starts, lengths: int64 (N,), the first frame of each clip and
    the number of its frames. labels: int64 (N,). T: how many frames are learned from at once, anywhere in the clip.
    """

    def __init__(self, name, frames, starts, lengths, labels, T):
        self.name, self.frames, self.T = name, frames, T
        self.starts, self.lengths, self.labels = starts, lengths, labels

    @property
    def classes(self):
        return self.frames.classes

    @property
    def shape(self):
        C, *size = self.frames.shape
        return C, self.T, *size

    @property
    def settings(self):
        """Those of a `Dataset`, with the frames in each size."""
        found = dict(self.frames.settings)
        latent = dict(latent_shape=self.shape) if "latent_shape" in found else {}
        return found | dict(dataset=self.name, image_size=(self.T, *found["image_size"])) | latent

    @property
    def summary(self):
        lengths = " to ".join(map(str, sorted({self.lengths.min().item(), self.lengths.max().item()})))
        return f"{len(self.labels):,} clips of {lengths} frames, {self.T} at a time; {self.frames.summary}"

    @property
    def fingerprint(self):
        """A hash of all that decides the clips; see `Dataset.fingerprint`."""
        return fingerprint(f"{self.frames.fingerprint} {self.T}", self.starts, self.lengths, self.labels)

    def load(self):
        self.frames = self.frames.load()
        return self

    def to(self, device):
        numbers = (part.to(device) for part in (self.starts, self.lengths, self.labels))
        return Clips(self.name, self.frames.to(device), *numbers, self.T)

    def at(self, size):
        """The same clips in another size (T, H, W), with fewer frames. Raises `UserError`."""
        T, *rest = size
        if tuple(rest) != self.frames.shape[1:] or self.lengths.min() < T:
            raise UserError(f"sizes hold {show_size(size)}, but the frames of these clips are "
                            f"{show_size(self.shape[2:])}, and the shortest clip has {self.lengths.min()}")
        return Clips(self.name, self.frames, self.starts, self.lengths, self.labels, T)

    def x_0(self, index, part, generator):
        """T frames of each clip of `index`[`part`], floats (b, C, T, H, W), or latents; see `Dataset.x_0`."""
        late = torch.rand(len(index), generator=generator, device=index.device) * (self.lengths[index] - self.T + 1)
        first = self.starts[index] + late.long()                                                       # (B,)
        frames = (first[:, None] + torch.arange(self.T, device=index.device)).flatten()                # (B T,)
        rows = range(len(index))[part]
        x = self.frames.x_0(frames, slice(rows.start * self.T, rows.stop * self.T), generator)         # (b T, C, H, W)
        return x.unflatten(0, (-1, self.T)).movedim(1, 2)


def find_frames(folder, left_out):
    """The images in a folder that is a clip, a list; None if it is no clip, since it holds no image, or clips."""
    counted = collections.Counter()
    files, folders = list_files(folder, is_image, counted)
    if not files or is_animation(files[0]):
        return None
    left_out.update(counted + collections.Counter({"folder beside frames": len(folders)}))
    return files


def read_clips(config):
    """The clips in the files of `config.data_dir`: all their frames, a `Dataset`, and the other arguments of `Clips`.

    The clips lie in the folders of their classes, see `list_classes`: videos, animations and folders of images. T and
    the frames' size are those of `config.image_size`; (): as many frames as the shortest clip has, but at most MOST,
    and the first clip's shorter side. Shorter clips than T are left out, which is said on standard error. The frames
    are grey if all clips are, unless `config.channels` says otherwise. Raises `UserError`.
    """
    found, names = list_classes(folder_of_classes(config.data_dir), whole=find_frames,
                                wanted=lambda path: is_image(path) or is_video(path))
    size, clips, mode, held = config.image_size[1:], [], "L" if config.channels == 1 else "RGB", 0
    listed = [(path, label) for label, paths in enumerate(found.values()) for path in paths]
    videos = sum(is_video(path) for path, _ in listed if not isinstance(path, list))
    if videos:
        parallel.say(f"{config.data_dir}: {1000 // SLOWEST} frames a second are taken of the {videos:,} videos")
    for path, label in tqdm(listed, desc=f"reading {config.data_dir}", leave=False, disable=None):
        clip, _ = read_clip(path, size, mode, config.ground, held=held)
        if config.channels == 0 and (clip.amax(1) - clip.amin(1)).max() <= TINT:
            clip = clip[:, :1]
        clips.append((clip, label, place(path)))
        size = tuple(clip.shape[2:])
        held = sum(clip.shape[0] * clip.shape[1] for clip, *_ in clips) // len(mode)
    if not config.image_size and max(len(clip) for clip, *_ in clips) == 1:
        raise UserError(f"the clips in {config.data_dir} have one frame each: if its folders are clips, and not "
                        "classes, put them into the folder of a class")
    T = config.image_size[0] if config.image_size else min(MOST, *(len(clip) for clip, *_ in clips))
    short = [path for clip, _, path in clips if len(clip) < T]
    if short:
        parallel.say(f"{len(short):,} of {len(clips):,} clips have fewer than {T} frames and are left out, such as "
                     f"{short[0]}")
    kept = [(clip, label) for clip, label, _ in clips if len(clip) >= T]
    for label, name in enumerate(names):
        if not any(label == other for _, other in kept):
            raise UserError(f"class {name} has no clip of {T} frames: set --image-size to fewer, such as "
                            f"{max(1, T // 2)}x{'x'.join(map(str, size))}")
    channels = max(clip.shape[1] for clip, _ in kept)
    lengths, labels = torch.tensor([(len(clip), label) for clip, label in kept]).T.contiguous()
    images = torch.cat([clip.expand(-1, channels, -1, -1) for clip, _ in kept])
    frames = Dataset("clips", images, labels.repeat_interleave(lengths), names)
    warn_of_alike(images[::-(-len(images) // LOOKED_AT)], config.data_dir)
    return frames, lengths.cumsum(0) - lengths, lengths, labels, T


def open_clips(config, device):
    """The clips in the user's files, as pixels or as latents; see `open_data`."""
    with parallel.rank_0_first():
        frames, *rest = read_clips(config)
    return Clips("clips", open_data(config, device, frames), *rest)


def open_sprites(config, device):
    """The sprites in motion; see `open_data`."""
    T, *size = config.image_size or (FRAMES, CELL, CELL)
    if T > FRAMES:
        raise UserError(f"image_size {show_size(config.image_size)}: the sprites move in {FRAMES} frames, and no more")
    with parallel.rank_0_first():  # it may download them
        frames = load_images("sprites", config.data_dir, image_size=size, channels=config.channels)
    starts = torch.arange(0, len(frames.labels), FRAMES)
    lengths = torch.full_like(starts, FRAMES)
    return Clips("sprites", open_data(config, device, frames), starts, lengths, frames.labels[starts], T)


# What opens a data set of clips, in the place of `open_data`
CLIPS = {"moving": lambda config, device: load_moving(config), "sprites": open_sprites, "clips": open_clips}
