"""Several processes, started by torchrun, that work as one: each has its shard, and rank 0 prints.

Without torchrun there is one process, and everything here does nothing.
"""

from support.commands import UserError, first_line, pick_device

import contextlib
import inspect
import os
import sys

import numpy as np
import torch
import torch.distributed as dist

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ  # else a RANK there is some other program's
RANK, WORLD = (int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) if TORCHRUN else (0, 1)


def join(device_name=None):
    """Joins this process to the others, and returns its device: with CUDA, each has one of its own. Raises `UserError`
    when there are fewer."""
    if WORLD == 1:
        return pick_device(device_name)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- rank 0 speaks for all, to the end
    name, here = str(device_name or "cuda"), int(os.environ.get("LOCAL_WORLD_SIZE", WORLD))
    if torch.cuda.is_available() and name.startswith("cuda"):
        gpus = torch.cuda.device_count() if name == "cuda" else 1
        if here > gpus:
            raise UserError(f"{here} processes need a GPU each, and here {'is' if gpus == 1 else 'are'} {gpus}: start "
                            f"torchrun with --nproc-per-node {gpus}, or name --device cpu")
        if name == "cuda":
            device_name = f"cuda:{os.environ.get('LOCAL_RANK', RANK)}"
    device = pick_device(device_name)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


@contextlib.contextmanager
def one_for_all():
    """A block, or a decorator, of all that the processes do together: when one dies, the others end with one clear
    error. If there are several processes, they end with the block."""
    code = 0
    try:
        yield
    except SystemExit as end:
        if WORLD == 1 or not dist.is_initialized():
            raise
        code = end.code
    except RuntimeError as error:
        signs = ("Connection closed", "Connection reset", "Connection refused", "imed out")
        lost = isinstance(error, dist.DistNetworkError) or any(sign in str(error) for sign in signs)
        if WORLD == 1 or not (lost or isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        what = f"another of the {WORLD} processes is gone" if lost else f"the {WORLD} processes cannot work together"
        raise UserError(f"{what}: {first_line(error):.150}") from None
    if WORLD > 1 and dist.is_initialized():
        dist.destroy_process_group()
        # DDP keeps gloo's threads alive. One that lets go of a tensor while Python ends would abort the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def say(text):
    """Prints on standard error, by rank 0."""
    if not RANK:
        print(text, file=sys.stderr)


def share(n):
    """This process's shard of n items, a slice."""
    return slice(n * RANK // WORLD, n * (RANK + 1) // WORLD)


def wait():
    """Waits until every process is here."""
    if WORLD > 1:
        dist.barrier()


@contextlib.contextmanager
def rank_0_first():
    """Rank 0 runs the block before the others: a download, a folder."""
    if RANK:
        wait()
    yield
    if not RANK:
        wait()


def all_max(number):
    """The largest `number` among the processes."""
    if WORLD == 1:
        return number
    number = torch.tensor(number)  # on the CPU, where asking for it holds up no GPU
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def all_sum(tensor):
    """Replaces `tensor` by its sum over the processes."""
    if WORLD > 1:
        dist.all_reduce(tensor)


def share_gradients(network):
    """`network`, whose backward pass gives every process the mean of all processes' gradients (DDP)."""
    if WORLD == 1:
        return network
    DDP = torch.nn.parallel.DistributedDataParallel
    names = inspect.signature(DDP).parameters  # newer versions of torch have another name for it
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return DDP(network, **{sync: False})  # the positions, its one buffer, never change


def gather(array):
    """The arrays (N, ...) of all processes, in the order of ranks. N may differ, and be 0."""
    if WORLD == 1:
        return array
    arrays = [None] * WORLD
    dist.all_gather_object(arrays, array)
    return np.concatenate([array for array in arrays if len(array)])
