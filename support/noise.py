"""Standard normal numbers of many random streams at once."""

import functools
import itertools
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.random.bit_generator import ISeedSequence

WORTH = 2**17  # numbers, about a millisecond: another thread is worth no less


class Key(ISeedSequence):
    """The key of a Philox generator. Given as `key=`, numpy would ask the system for a random one first, which takes
    twice as long as all the rest."""

    def __init__(self, *words):
        self.words = words

    def generate_state(self, n_words, dtype=np.uint32):
        return np.array(self.words, dtype)


def random_stream(seed, k):
    """The random stream number k of a seed, a `np.random.Generator`."""
    return np.random.Generator(np.random.Philox(Key(seed, k)))


def fill_with_noise(streams, numbers):
    """Fills row i of `numbers`, a float32 array (B, ...), with the next numbers of stream i. It uses as many threads as
    torch has: numpy releases Python's lock."""
    def fill_rows(rows):
        for stream, row in zip(streams[rows], numbers[rows], strict=True):
            stream.standard_normal(out=row, dtype=np.float32)

    B, threads = len(numbers), max(1, min(torch.get_num_threads(), numbers.size // WORTH))
    if threads == 1:
        fill_rows(slice(None))
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill_rows, (slice(B * i // threads, B * (i + 1) // threads) for i in range(threads))))


def noise_source(seed, indices, shape, device, calls=1):
    """A function that returns fresh standard normal noise (B, *shape) at each call, one random stream per image:
    what image k gets is a function of (seed, k) alone, whatever else is in its batch.

    calls: how many may come. Only what is not first is drawn ahead, since most samplers ask for no more.
    """
    streams = [random_stream(seed, k) for k in indices]
    ahead = max(1, min(8, 2**24 // (len(streams) * math.prod(shape))))  # at most 64 MB

    def noises():
        for done in itertools.chain([0], itertools.count(1, ahead)):
            block = torch.empty(len(streams), min(ahead, max(1, calls - done)) if done else 1, *shape,
                                pin_memory=torch.device(device).type == "cuda")
            fill_with_noise(streams, block.numpy())
            for noise in block.to(device, non_blocking=True).unbind(1):
                yield noise.contiguous()

    return functools.partial(next, noises())
