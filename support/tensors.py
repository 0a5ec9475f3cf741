"""Tensors from files of unknown origin. Nothing in such a file can run code or take more memory than it holds."""

from support.commands import UserError

import json
import os
import re
import warnings
import zipfile
from pathlib import Path

import safetensors.torch
import torch


def read_tensors(path, known=(), mmap=False):
    """What `torch.save` wrote into a file, on the CPU. For a safetensors file: the dict in its metadata, JSON under
    "checkpoint", with the file's tensors as its "ema".

    known: classes (or pairs of a class and the name that stands for it) that the file may hold beside plain values.
    mmap: nothing is in memory yet. Raises FileNotFoundError, `UserError`, or nearly anything when it is another file.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # to read a named pipe is to wait for ever
        raise UserError("it is a folder" if path.is_dir() else "it is no file")
    size, is_zip = os.path.getsize(path), zipfile.is_zipfile(path)
    with path.open("rb") as file:
        head = file.read(9)
    if head[8:] == b"{" and int.from_bytes(head[:8], "little") <= size:
        with safetensors.safe_open(path, "pt") as file:
            content = json.loads((file.metadata() or {}).get("checkpoint", "{}"))
        return content | {"ema": safetensors.torch.load_file(path)}
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > size:
                raise UserError("its archive is compressed, or claims more than the file holds")
    try:
        with torch.serialization.safe_globals([*known]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except Exception as error:  # torch says what is wrong at the end of a long text
        found = re.search(r"(?i:unsupported)(?: \w+:)? (?:GLOBAL )?([\w.]+)", str(error))
        if found:
            raise UserError(f"it holds {found[1]:.80}, which is neither a tensor nor a plain value") from None
        raise


def misfit(tensors, shapes):
    """The first difference between the names and shapes of `tensors` and the dict `shapes`, in words; "" for none."""
    for name in [*shapes, *tensors]:
        if name not in tensors or name not in shapes:
            return f"{name!r:.80} is " + ("missing" if name in shapes else "not a part of it")
        if tuple(tensors[name].shape) != tuple(shapes[name]):
            return f"{name} is {tuple(tensors[name].shape)}, not {tuple(shapes[name])}"
    return ""


def check_tensors(what, tensors, shapes, dtypes=(torch.float32,)):
    """Raises an exception unless `tensors` is a dict of finite dense tensors of just these names, shapes and dtypes.
    Returns their size in bytes."""
    wrong = misfit(tensors, shapes)
    if wrong:
        raise UserError(f"its {what} do not fit its configuration: {wrong}")
    size = 0
    for tensor in tensors.values():
        if tensor.layout != torch.strided or tensor.dtype not in dtypes or tensor.device.type != "cpu":
            raise UserError(f"its {what} are not all plain tensors of floats")
        if not tensor.is_contiguous():  # it may claim more elements than are stored
            raise UserError(f"its {what} claim more than the file holds")
        if not tensor.isfinite().all():
            raise UserError(f"its {what} are not all finite numbers")
        size += tensor.numel() * tensor.element_size()
    return size
