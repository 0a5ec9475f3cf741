"""Several processes that work as one, started by torchrun: which share of the work is whose, and who speaks.

Started without torchrun a process is the only one, and everything here does nothing.
"""

from support.commands import UserError, pick_device

import contextlib
import os
import sys

import numpy as np
import torch
import torch.distributed as dist

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join(device_name=None):
    """Joins this process to the others, and returns its device: with CUDA each process has one of its own."""
    if WORLD == 1:
        return pick_device(device_name)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 -- one of them speaks, to the end
    if torch.cuda.is_available() and device_name in (None, "cuda"):
        device_name = f"cuda:{os.environ['LOCAL_RANK']}"
    device = pick_device(device_name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def share(n):
    """The slice of n things that is this process's."""
    return slice(n * RANK // WORLD, n * (RANK + 1) // WORLD)


def wait():
    """Until all have come here."""
    if WORLD > 1:
        dist.barrier()


@contextlib.contextmanager
def first_process_first():
    """What is done in this block the first process does before the others: a download, a folder."""
    if RANK:
        wait()
    yield
    if not RANK:
        wait()


def largest(number):
    """The largest `number` that any of the processes has."""
    if WORLD == 1:
        return number
    number = torch.tensor(number)  # on the CPU, where asking for it holds up no GPU
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def add_up(tensor):
    """Replaces `tensor` by the sum of those that all processes have."""
    if WORLD > 1:
        dist.all_reduce(tensor)


def own_parts(weights):
    """What of weights that are split among the processes this one holds; other weights as they are."""
    return [weight.to_local() if hasattr(weight, "to_local") else weight for weight in weights]


def whole(value):
    """`value`, dicts and lists of tensors, with what is split among the processes put together; all must call it."""
    if hasattr(value, "full_tensor"):
        return value.full_tensor()
    if isinstance(value, dict):
        return {name: whole(part) for name, part in value.items()}
    return [whole(part) for part in value] if isinstance(value, list) else value


def split_state(state, weights):
    """The state of an optimizer, put together by `whole`, split as the `weights` that it belongs to are."""
    from torch.distributed.tensor import distribute_tensor  # here, since few need it

    def split(value, weight):
        if value.shape != weight.shape:
            return value
        return distribute_tensor(value.to(weight.device), weight.device_mesh, weight.placements)

    parts = {i: {name: split(value, weights[i]) for name, value in values.items()}
             for i, values in state["state"].items()}
    return state | {"state": parts}


def gather(array):
    """The arrays (N, ...) of all processes, one after the other; N may differ, and be 0."""
    if WORLD == 1:
        return array
    arrays = [None] * WORLD
    dist.all_gather_object(arrays, array)
    return np.concatenate([array for array in arrays if len(array)])


@contextlib.contextmanager
def one_for_all():
    """What is done in this block, or in a function decorated with it, ends with one clear error when another process
    has died."""
    try:
        yield
    except RuntimeError as error:
        if WORLD == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(f"another of the {WORLD} processes is gone: {str(error).splitlines()[0]:.150}") from None
