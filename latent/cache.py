"""The latents of a data set's images: encoded once, kept in a file, and mapped into memory.

    latents/folder-256x256-1f0c.../latents.npy    float16 (N, V, 2, C, h, w): mean and standard deviation of the latents
                                                  of image n, mirrored where v is 1, as the VAE has them
                                  /latents.json   what they belong to, written when all of them are there
                                  /encoded        until then: a hash of the pixels of each block of images whose
                                                  latents are on disk, and zeros for the other blocks

An image's place in the file is its number. Whatever stops the encoding, it goes on with the blocks that are missing.
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
from latent.vae import check_shapes, load_vae, normalize_as

FORMAT = "latents-1"
BLOCK = 256       # images of a block, after which the encoding can go on
HASH = 16         # bytes of a block's hash
CHECKED = 2**26   # bytes of the latents, at most, that are compared with what was written before they are used
ROUND_TRIP = 500  # images, at most, that the round trip is measured on


def open_data(config, device, images=None):
    """The data of a `LatentConfig`: a `Dataset` or, if it has a VAE, the `Latents` of one. `load` them before use.

    images: a `Dataset` to take instead of the one that the settings name. With torchrun, every process must call this,
    and `load`. Raises `UserError`.
    """
    if config.flips and config.dataset not in ("folder", "CIFAR10", "CIFAR100"):
        raise UserError(f"--flips is for photographs (--dataset folder, CIFAR10 or CIFAR100): what {config.dataset} "
                        "shows would mean something else in a mirror")
    with parallel.rank_0_first():  # it may download them
        vae = load_vae(config.vae, device) if config.vae or config.latent_shape else None
        if config.latent_shape:  # of a run that is resumed
            normalize_as(config.vae, vae, config.vae_hash, config.latent_mean, config.latent_std)
        of = dict(image_size=config.image_size, channels=config.channels or (vae.image_channels if vae else 0),
                  ground=config.ground)
        if vae and not images and config.dataset == "folder":  # it is read block by block
            images = Folder(config.data_dir, **of)
            images.check()
        images = images or load_images(config.dataset, config.data_dir, **of)
    if not vae:
        return dataclasses.replace(images, flips=config.flips)
    check_shapes(config.vae, vae, images.shape)
    return Latents(images, config.vae, vae, config.flips, Path(config.latents))


class Latents:
    """Training reads these instead of a `Dataset`: the latents of its images, sampled anew from their posteriors at
    every step.

    images: a `Dataset`, or a `Folder`, which is read block by block. name: of the `VAE`, as --vae has it. flips: mirror
    half of the images. folder: holds a folder of latents for each data set, size and VAE.
    """

    def __init__(self, images, name, vae, flips, folder):
        self.labels, self.classes = images.labels, images.classes
        C, (height, width) = vae.settings["latent_channels"], images.shape[1:]
        self.shape = (C, height // vae.factor, width // vae.factor)
        self.images, self.vae, self.flips, self.folder = images, vae, flips, folder
        self.mean, self.std = vae.mean.cpu(), vae.std.cpu()
        self.settings = images.settings | vae.settings_of_latents(name) | dict(latent_shape=self.shape, clamp=False)

    def load(self):
        """Encodes the images that are not encoded yet, and maps the latents into memory. Raises `UserError`."""
        images = self.images
        size = [len(self.labels), 2 if self.flips else 1, 2, *self.shape]
        identity = dict(format=FORMAT, vae=self.settings["vae_hash"], images=images.fingerprint, size=size,
                        image_shape=list(images.shape))
        which = fingerprint(json.dumps(identity, sort_keys=True))[:12]
        path = self.folder / f"{images.name}-{'x'.join(map(str, images.shape[1:]))}-{which}"
        note = read_note(path, identity) or encode(images, self.vae, path, identity)
        self.rows, self.fingerprint = open_array(path, size), note["fingerprint"]
        check = check_of(self.rows)
        if note.get("check", check) != check:
            raise UserError(f"{path / 'latents.npy'} has changed since it was written: remove {path} to have it "
                            "encoded anew")
        fewer = math.prod(images.shape) / math.prod(self.shape)
        self.summary = (f"{images.summary}\nlatents   {' x '.join(map(str, self.shape))} of {self.settings['vae']}, "
                        f"{fewer:.3g} times fewer numbers; round trip {note['psnr']:.1f} dB")
        del self.images, self.vae  # and their memory
        return self

    def to(self, device):
        self.labels, self.mean, self.std = (part.to(device) for part in (self.labels, self.mean, self.std))
        self.rows = where_it_fits(self.rows, device)
        return self

    def x_0(self, index, part, generator):
        """What a network learns from: samples of the normalized latents of the images `index`[`part`], (b, C, h, w);
        see `Dataset.x_0`."""
        noise = torch.randn((len(index), *self.shape), generator=generator, device=index.device)
        mirrored = torch.randint(self.rows.shape[1], (len(index),), generator=generator, device=index.device)
        mean, std = pick(self.rows, index[part], mirrored[part]).float().unbind(1)
        return (mean + std * noise[part] - self.mean) / self.std


# The files, once they are written


def read_note(path, identity):
    """The dict in latents.json; None if there is none, since the encoding is not done. Raises `UserError` if it is of
    latents of another `identity`."""
    note = path / "latents.json"
    if not note.exists():
        return None
    try:
        content = json.loads(note.read_bytes() if note.is_file() else "")  # to read a named pipe is to wait for ever
        if content != content | identity:
            raise ValueError("it is of other images, or of another VAE")
        return content | dict(fingerprint=str(content["fingerprint"]), psnr=float(content["psnr"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{note} is damaged ({first_line(error, 80)}): remove {path} to have the latents encoded "
                        "anew") from None


def open_array(path, size):
    """latents.npy as a float16 tensor of this size, mapped into memory. Raises `UserError` unless the file holds it."""
    file = path / "latents.npy"
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is no file")
        array = np.lib.format.open_memmap(file, "c")  # c: torch takes it for writable; nothing is written
        if array.shape != tuple(size) or array.dtype != np.float16 or not array.flags.c_contiguous:
            raise ValueError(f"it holds {array.dtype} {array.shape}, not float16 {tuple(size)}")
    except Exception as error:  # numpy raises nearly anything when a file is not its own
        raise UserError(f"{file} is damaged or cut short ({first_line(error, 120)}): remove {path} to have it encoded "
                        "anew") from None
    return torch.from_numpy(array)


def check_of(rows):
    """A hash of the latents, or of `CHECKED` bytes of them, evenly spaced."""
    count = max(1, min(len(rows), CHECKED // rows[0].nbytes))
    picked = torch.linspace(0, len(rows) - 1, count, dtype=torch.float64).round().long()
    return fingerprint(str(count), *(rows[i] for i in picked.tolist()))


# How they are written


def encode(images, vae, path, identity):
    """Encodes the blocks of `images` that are missing, each process its share, and writes latents.json. Returns the
    dict in it. Raises `UserError`."""
    size = identity["size"]
    make_dir(path)
    with lock_dir(path):
        with parallel.rank_0_first():
            if not parallel.RANK:
                make_files(path, size)
        try:
            encode_blocks(images, vae, path, size)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}; what is encoded is kept, and the same "
                            "command goes on from there") from None
        except KeyboardInterrupt:
            print(f"\nwhat is encoded is kept in {path}; the same command goes on from there", file=sys.stderr)
            raise
        parallel.wait()  # until the blocks of all processes are there
        if not parallel.RANK:
            rows = open_array(path, size)
            what = json.dumps([identity["vae"], images.classes, size])
            note = identity | dict(fingerprint=fingerprint(what, images.labels, *read_hashes(path)),
                                   psnr=round_trip(images, vae, rows), check=check_of(rows))
            write_atomically(path / "latents.json", lambda file: file.write(json.dumps(note, indent=1).encode()))
            (path / "encoded").unlink()
        parallel.wait()
    return read_note(path, identity)


def make_files(path, size):
    """Makes latents.npy and `encoded`, unless both are there from before. They take all of their space on the disk: it
    is better to fail now. Raises `UserError`."""
    latents, encoded, needed = path / "latents.npy", path / "encoded", 2 * math.prod(size)
    none = bytes(HASH * math.ceil(size[0] / BLOCK))
    if latents.exists() and encoded.is_file() and encoded.stat().st_size == len(none):
        done = read_hashes(path).any(axis=1)
        print(f"latents   {done.sum()} of {len(done)} blocks are in {path} already")
        return
    print(f"latents   are made once and kept in {path}, {needed / 1e6:,.2f} MB", flush=True)
    try:
        latents.unlink(missing_ok=True)
        if needed > shutil.disk_usage(path).free:
            raise OSError(errno.ENOSPC, "there is not so much space left on its disk")
        np.lib.format.open_memmap(latents, "w+", np.float16, tuple(size))
        with latents.open("r+b") as file, contextlib.suppress(AttributeError):  # only Linux has it
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # this file system cannot
            latents.unlink(missing_ok=True)
            raise UserError(f"{path} cannot hold {needed / 1e6:,.2f} MB of latents: {error.strerror}; choose another "
                            "folder with --latents") from None
    write_atomically(encoded, lambda file: file.write(none))


def read_hashes(path):
    """What `encoded` holds, uint8 (blocks, HASH): the hash of each block, zeros if it is missing."""
    return np.fromfile(path / "encoded", dtype=np.uint8).reshape(-1, HASH)


def encode_blocks(images, vae, path, size):
    """Encodes the missing ones among this process's blocks. A block's hash is written once its latents are on disk."""
    open_array(path, size)  # a damaged file is refused, and not written over
    done = read_hashes(path).any(axis=1)
    missing = [block for block in range(parallel.RANK, len(done), parallel.WORLD) if not done[block]]
    total = sum(min(BLOCK, size[0] - BLOCK * block) for block in missing)
    with (path / "latents.npy").open("r+b") as latents, (path / "encoded").open("r+b", 0) as hashes, \
            tqdm(total=total, desc="encoding", unit=" images", disable=parallel.RANK > 0 or None) as bar:
        for block in missing:
            pixels = images.read(slice(BLOCK * block, BLOCK * (block + 1)))
            x = to_float(pixels.to(vae.mean.device))
            moments = torch.stack([vae.moments(view) for view in (x, x.flip(-1))[:size[1]]], dim=1).half()
            if not moments.isfinite().all():
                raise UserError("the VAE makes latents that are not finite, or too large for float16: it is broken, or "
                                "these images are not what it has learned")
            latents.seek(-2 * math.prod(size[1:]) * (size[0] - BLOCK * block), os.SEEK_END)
            latents.write(moments.cpu().numpy().tobytes())
            latents.flush()
            os.fsync(latents.fileno())
            hashes.seek(HASH * block)
            hashes.write(hashlib.blake2b(pixels.contiguous().numpy(), digest_size=HASH).digest())
            bar.update(len(pixels))


def round_trip(images, vae, rows):
    """The PSNR, dB, of up to `ROUND_TRIP` images, evenly spaced, that were encoded and decoded."""
    picked = torch.linspace(0, len(rows) - 1, min(ROUND_TRIP, len(rows))).long()
    pixels = torch.cat([images.read(slice(i, i + 1)) for i in picked.tolist()])
    mean = rows[picked, 0, 0].to(vae.mean.device).float()
    return psnr(pixels, to_uint8(vae.decode((mean - vae.mean) / vae.std)).cpu())
