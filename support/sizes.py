"""Sizes of images and clips: as tuples, as words, and in memory."""

from support.commands import UserError

import contextlib
import math
import os
import re
import sys
from pathlib import Path

import torch

LARGEST = 1024  # pixels, the longest side of an image


def show_divisors(size):
    """What divides each side of a size: [1, 2, 7, 14], or for sides that differ [1, 3] x [1, 5]."""
    lists = [str([d for d in range(1, side + 1) if side % d == 0]) for side in size]
    return lists[0] if len(set(size)) == 1 else " x ".join(lists)


def as_size(value):
    """A size as a tuple (H, W), or (T, H, W) of clips: n or "n" stands for a square, "28x20" for (28, 20), "16x32x32"
    for (16, 32, 32), 0 for (), not known. Anything else stays as it is, for a later check."""
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}(x[0-9]{1,9}){0,2}", value):
        value = tuple(map(int, value.split("x"))) if "x" in value else int(value)
    if type(value) is int:
        return (value, value) if value else ()
    return tuple(value) if isinstance(value, list) else value


def as_sizes(value):
    """Several sizes as a tuple of them, from a list, or as in "8x32x32,16x32x64"; 0 stands for ()."""
    value = value.split(",") if isinstance(value, str) else value or ()
    return tuple(size for size in map(as_size, value) if size != ()) if isinstance(value, (list, tuple)) else value


def show_size(size):
    """28, 28x20 or 16x32x32."""
    return str(size[0]) if len(size) == 2 and size[0] == size[1] else "x".join(map(str, size))


def demand_memory(count, channels, size, remedy=""):
    """Raises `UserError` unless `count` images (channels, *size) of bytes fit into half of the free memory: training
    needs some as well. remedy: what to do, if not a smaller --image-size."""
    needed, free = count * channels * math.prod(size), available_memory()
    if max(size) > LARGEST or needed > free / 2:
        limit = f"{LARGEST} x {LARGEST} is the largest size" if max(size) > LARGEST else (
            f"more than half of the {free / 1e9:.3g} GB that are free")
        smaller = show_size([max(1, side * min(64, max(size) // 2) // max(size)) for side in size])
        raise UserError(f"{count:,} images of {size[0]} x {size[1]} pixels would take {needed / 1e9:.3g} GB of memory, "
                        f"and {limit}: {remedy or f'make them smaller, for example with --image-size {smaller}'}")


def available_memory():
    """The bytes of free memory; of all memory, if the system does not say; infinity, if it says neither."""
    with contextlib.suppress(OSError, TypeError):
        return int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    with contextlib.suppress(OSError, AttributeError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def where_it_fits(rows, device):
    """A tensor on the device; or as it is, if it would take more than half of a GPU's free memory: the network needs
    some as well. `pick` takes rows of either."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else math.inf
    if 2 * rows.nbytes <= free:
        return rows.to(device)
    print(f"the {rows.nbytes / 1e9:.3g} GB of data are more than half of the {free / 1e9:.3g} GB that are free on "
          f"{device}: they stay in the host's memory, and each batch is copied", file=sys.stderr)
    return rows


def pick(rows, *places):
    """rows[places], on the device of the places (tensors of integers), wherever the rows are."""
    return rows[*(numbers.to(rows.device) for numbers in places)].to(places[0].device)


def batch_that_fits(config, device):
    """How many images to draw at once: an estimate, on the safe side, of what half of a GPU's free memory, or 2 GB of
    any other, holds; at most 4,096 on a GPU, and elsewhere 8,192 tokens, beyond which nothing gets quicker."""
    tokens = math.prod(config.input_shape[1:]) // math.prod(config.patch_size)
    # What a block keeps for a token: qkv, its output and the MLP's two, in fp32; with guidance for two images
    floats = 2 * tokens * config.hidden_size * (8 + 2 * config.mlp_ratio)
    floats += 2 * tokens**2 * config.num_heads  # where attention has no kernel of its own
    floats += 20 * math.prod(config.input_shape)  # the states, and noise drawn ahead
    free, most = (torch.cuda.mem_get_info(device)[0] / 2, 4096) if device.type == "cuda" else (2e9, 8192 // tokens)
    return int(max(min(free / (4 * floats), most), 1))


def show_time(seconds):
    """2 h 05 min, 7 min, 40 s."""
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes > 99 else f"{minutes} min" if minutes > 1 else (
        f"{seconds:.0f} s")
