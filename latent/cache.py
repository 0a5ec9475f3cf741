"""The latents of a data set's images, made once and kept in a file that is mapped into memory.

    latents/folder-256x256-1f0c.../latents.npy    (N, V, 2, C, h, w), float16: of image n, mirrored where v is 1, mean
                                                  and standard deviation of its latents, as the VAE has them
                                  /latents.json   what they are of, written when all are there
                                  /encoded        which blocks of images are there until then

An image's place in the file is its number, and a block is noted once it is on disk: whatever ends the encoding, it goes
on from there.
"""

from support import parallel
from support.commands import UserError, first_line
from support.files import fingerprint, lock_dir, make_dir, write_atomically
from support.folders import Folder
from support.pictures import psnr
from support.sizes import pick, where_it_fits

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from dataset import to_float, to_uint8
from latent.sprites import load_images
from latent.vae import check_same, check_shapes, load_vae

BLOCK = 256     # images between two notes
MARK = 16       # bytes of a note: a hash of the block's pixels
SEEN = 500      # images that the round trip is measured on
LOOKED_AT = 2**26  # bytes of the latents, at the most, that are held against what was written before they are used
FORMAT = "latents-1"


def open_data(config, device, images=None):
    """What a `LatentConfig` says to learn from: a `Dataset`, or with a VAE its `Latents`; either is there once it is
    `load`ed. images: a `Dataset` to take instead. With torchrun, every process must call both. Raises
    `UserError`."""
    if config.flips and config.dataset not in ("folder", "CIFAR10", "CIFAR100"):
        raise UserError(f"--flips is for photographs (--dataset folder, CIFAR10 or CIFAR100): what {config.dataset} "
                        "shows would mean something else in a mirror")
    of = dict(image_size=config.image_size, channels=config.channels, ground=config.ground)
    with parallel.rank_0_first():  # it may download them
        if not config.vae:
            images = images or load_images(config.dataset, config.data_dir, **of)
            return dataclasses.replace(images, flips=config.flips)
        vae = load_vae(config.vae, device)
        if config.latent_shape:  # of a run that goes on too
            check_same(config.vae, vae, config.vae_hash)
            vae.normalize_by(config.latent_mean, config.latent_std)
        of["channels"] = of["channels"] or vae.image_channels
        if not images and config.dataset == "folder":
            images = Folder(config.data_dir, **of)
            images.check()
        images = images or load_images(config.dataset, config.data_dir, **of)
    check_shapes(config.vae, vae, images.shape)
    return Latents(images, config.vae, vae, config.flips, Path(config.latents))


class Latents:
    """In the place of a `Dataset`: the latents of its images, each sampled anew from its posterior at every step.

    images: a `Dataset`, or a `Folder`, which is read block by block. name: where the `VAE` was found. flips: the
    mirrored images too. folder: has a folder for each data set, size and VAE.
    """

    def __init__(self, images, name, vae, flips, folder):
        self.labels, self.classes = images.labels, images.classes
        C, (height, width) = vae.settings["latent_channels"], images.shape[1:]
        self.shape = (C, height // vae.factor, width // vae.factor)
        self.images, self.vae, self.flips, self.folder = images, vae, flips, folder
        self.mean, self.std = vae.mean.cpu(), vae.std.cpu()
        mean, std = (tuple(numbers.flatten().tolist()) for numbers in (self.mean, self.std))
        self.settings = images.settings | dict(vae=name, vae_hash=vae.fingerprint, latent_shape=self.shape,
                                               latent_mean=mean, latent_std=std, clamp=False)

    def load(self):
        """Encodes what is not there yet, and maps it into memory. Raises `UserError`."""
        images, vae = self.images, self.vae
        size = (len(images.labels), 2 if self.flips else 1, 2, *self.shape)
        identity = dict(format=FORMAT, vae=self.settings["vae_hash"], images=images.fingerprint, size=list(size),
                        image_shape=list(images.shape))
        which = fingerprint(json.dumps(identity, sort_keys=True))[:12]
        path = self.folder / f"{images.name}-{'x'.join(map(str, images.shape[1:]))}-{which}"
        note = read_note(path, identity) or encode(images, vae, path, identity)
        self.rows, self.fingerprint = torch.from_numpy(open_array(path, size)), note["fingerprint"]
        check = check_of(self.rows)
        if note.get("check", check) != check:
            raise UserError(f"{path / 'latents.npy'} has changed since it was written: remove {path} to have it "
                            "encoded anew")
        fewer = math.prod(images.shape) / math.prod(self.shape)
        self.summary = (f"{images.summary}\nlatents   {' x '.join(map(str, self.shape))} of {self.settings['vae']}, "
                        f"{fewer:.3g} times fewer numbers; round trip {note['psnr']:.1f} dB"
                        f"{kept_distance(self.settings['vae'], vae, images)}")
        del self.images, self.vae  # and their memory
        return self

    def to(self, device):
        self.labels, self.mean, self.std = (part.to(device) for part in (self.labels, self.mean, self.std))
        self.rows = where_it_fits(self.rows, device)
        return self

    def x_0(self, index, part, generator):
        """What a network learns from: samples of the normalized latents of images `index`[`part`], (b, C, h, w); see
        `Dataset.x_0`."""
        noise = torch.randn((len(index), *self.shape), generator=generator, device=index.device)
        mirrored = torch.randint(self.rows.shape[1], (len(index),), generator=generator, device=index.device)
        mean, std = pick(self.rows, index[part], mirrored[part]).float().unbind(1)
        return (mean + std * noise[part] - self.mean) / self.std


def kept_distance(name, vae, images):
    """What `python -m measure.score --vae` has found out about the VAE called `name`, and kept in its folder: "" where
    nothing, or it was of another VAE or of other images."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        kept = Path(name) / "round_trip.json"
        kept = json.loads(kept.read_bytes() if kept.is_file() else "{}")
        if (kept["vae_hash"], kept["data"]) == (vae.hash_of(), images.fingerprint):
            return f", Fréchet distance {kept['vae']['frechet']:.3f} (of real images {kept['real']['frechet']:.3f})"
    return ""


def read_note(path, identity):
    """What latents.json says, or None without one: then the encoding is not done. Raises `UserError`."""
    note = path / "latents.json"
    if not note.exists():
        return None
    try:
        if not note.is_file():  # to read a named pipe is to wait for ever
            raise ValueError
        content = json.loads(note.read_bytes())
        if {name: content[name] for name in identity} == identity and type(content["fingerprint"]) is str:
            return content | {"psnr": float(content["psnr"])}
        reason = "they are of other images, or of another VAE"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"it is damaged: {type(error).__name__}"
    raise UserError(f"{note} does not belong to these latents ({reason}): remove {path} to have them encoded anew")


def open_array(path, size):
    """The latents, a numpy array of float16 of this size, mapped into memory. Raises `UserError` unless the file holds
    them all."""
    file = path / "latents.npy"
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")
        array = np.lib.format.open_memmap(file, "c")  # c: what torch takes for writable; none of it is written
        if array.shape != size or array.dtype != np.float16 or not array.flags.c_contiguous:
            raise ValueError(f"it holds {array.dtype} {array.shape}, not float16 {size}")
    except Exception as error:  # numpy raises nearly anything when a file is not its own
        raise UserError(f"{file} is damaged or cut short ({first_line(error, 120)}): remove {path} to have it encoded "
                        "anew") from None
    return array


def check_of(rows):
    """A hash of the latents, or of as many of them, evenly spaced, as `LOOKED_AT` allows."""
    count = max(1, min(len(rows), LOOKED_AT // rows[0].nbytes))
    picked = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).round().long()
    return fingerprint(str(count), *(rows[i] for i in picked.tolist()))


def encode(images, vae, path, identity):
    """Encodes the blocks of `images` that are not there yet, every process its share. Returns what latents.json says.
    Raises `UserError`."""
    size = tuple(identity["size"])
    blocks = math.ceil(size[0] / BLOCK)
    with parallel.rank_0_first():
        if not parallel.RANK:
            make_dir(path)
    with lock_dir(path):
        with parallel.rank_0_first():
            if not parallel.RANK:
                reserve(path, size, blocks)
            marks = read_marks(path, blocks)
        parallel.wait()  # with the first block until all have looked
        todo = [block for block in range(blocks) if not any(marks[block])]
        try:
            encode_blocks(images, vae, path, size, todo[parallel.share(len(todo))])
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}; what is encoded is kept, and the same "
                            "command goes on from there") from None
        except KeyboardInterrupt:
            print(f"\nwhat is encoded is kept in {path}; the same command goes on from there", file=sys.stderr)
            raise
        parallel.wait()
        if not parallel.RANK:
            rows = torch.from_numpy(open_array(path, size))
            what = json.dumps([identity["vae"], images.classes, identity["size"]])
            content = identity | {"fingerprint": fingerprint(what, images.labels, *read_marks(path, blocks)),
                                  "psnr": round_trip(images, vae, rows), "check": check_of(rows)}
            write_atomically(path / "latents.json", lambda file: file.write(json.dumps(content, indent=1).encode()))
            (path / "encoded").unlink()
        parallel.wait()
    return read_note(path, identity)


def read_marks(path, blocks):
    """The notes (blocks, MARK) on the blocks that are encoded, zeros for the others; None if there are no notes."""
    marks = path / "encoded"
    if not marks.is_file() or marks.stat().st_size != blocks * MARK:
        return None
    return np.fromfile(marks, dtype=np.uint8).reshape(blocks, MARK)


def reserve(path, size, blocks):
    """Makes the files for latents of this size where they are not there, and takes their space on the disk: it is
    better to fail now. Raises `UserError`."""
    latents, room = path / "latents.npy", 2 * math.prod(size)
    there = latents.stat().st_size if latents.is_file() else 0
    marks = read_marks(path, blocks)
    if marks is not None and there > room:
        print(f"latents   {int(marks.any(axis=1).sum())} of {blocks} blocks are in {path} already")
        return
    print(f"latents   are made once and kept in {path}, {show_bytes(room)}", flush=True)
    try:
        if room > shutil.disk_usage(path).free + there:
            raise OSError(errno.ENOSPC, "there is not so much space left on its disk")
        np.lib.format.open_memmap(latents, "w+", np.float16, size)
        with latents.open("r+b") as file, contextlib.suppress(AttributeError):  # only Linux has it
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # this file system cannot
            latents.unlink(missing_ok=True)
            raise UserError(f"{path} cannot hold {show_bytes(room)} of latents: {error.strerror}; choose another "
                            "folder with --latents") from None
    write_atomically(path / "encoded", lambda file: file.write(bytes(blocks * MARK)))


def show_bytes(count):
    unit = next((unit for unit in (1e9, 1e6) if count >= unit), 1e3)
    return f"{count / unit:.3g} { {1e9: 'GB', 1e6: 'MB', 1e3: 'kB'}[unit]}"


def encode_blocks(images, vae, path, size, todo):
    """Encodes these blocks. One is noted as encoded when it is on disk."""
    total = sum(min(BLOCK, size[0] - BLOCK * block) for block in todo)
    offset = open_array(path, size).offset
    with (path / "latents.npy").open("r+b", 0) as latents, (path / "encoded").open("r+b", 0) as marks, \
            tqdm(total=total, desc="encoding", unit=" images", disable=parallel.RANK > 0 or None) as bar:
        for block in todo:
            pixels = images.read(slice(BLOCK * block, BLOCK * (block + 1)))
            x = to_float(pixels.to(vae.mean.device))
            moments = torch.stack([vae.moments(view) for view in (x, x.flip(-1))[:size[1]]], dim=1).half()
            if not moments.isfinite().all():
                raise UserError("the VAE makes latents that are not finite, or too large for float16: it is broken, or "
                                "these images are not what it has learned")
            latents.seek(offset + BLOCK * block * 2 * math.prod(size[1:]))
            latents.write(moments.cpu().numpy().tobytes())
            os.fsync(latents.fileno())
            marks.seek(MARK * block)
            marks.write(hashlib.blake2b(pixels.contiguous().numpy(), digest_size=MARK).digest())
            bar.update(len(pixels))


def round_trip(images, vae, rows):
    """The PSNR, dB, of images that were encoded and decoded: up to `SEEN`, evenly spaced."""
    picked = torch.linspace(0, len(rows) - 1, min(SEEN, len(rows))).long()
    pixels = torch.cat([images.read(slice(i, i + 1)) for i in picked.tolist()])
    mean = rows[picked, 0, 0].to(vae.mean.device).float()
    return psnr(pixels, to_uint8(vae.decode((mean - vae.mean) / vae.std)).cpu())
