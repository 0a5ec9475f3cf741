"""Networks compiled, and CUDA graphs: what a function launches on a GPU, launched at once."""

from support import parallel
from support.commands import first_line

from collections import Counter

import torch

WARM_UP = 3  # calls until a graph is recorded: libraries choose kernels, networks are compiled, optimizers make states


def can_compile(device):
    """Whether torch.compile works here. Without a compiler it does not, and says so, once."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # whatever a compiler can do wrong
        parallel.say(f"warning: nothing can be compiled here ({first_line(error):.100}): training without")
        return False
    return True


def directly(function, run, *args):
    return function(run, *args)


class Replay:
    """Calls function(run, *args). From the fourth call on, all that it launches on the GPU is one CUDA graph, recorded
    once and replayed: a small network's step launches 500 kernels, which takes longer than they run.

    args: tensors on the GPU, and other values; each new shape or value has its own graph. Anything else that changes
    from call to call must be a tensor that is written in place. The function may not wait for the GPU. Its Python runs
    no more once it is recorded, and its result is good until the next call.
    """

    def __init__(self):
        self.stream, self.calls, self.graphs = torch.cuda.Stream(), Counter(), {}

    def __call__(self, function, run, *args):
        key = function, *((arg.shape, arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args)
        self.calls[key] += 1
        if self.calls[key] <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = function(run, *args)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if key not in self.graphs:
            graph, inputs = torch.cuda.CUDAGraph(), [arg.clone() if isinstance(arg, torch.Tensor) else arg
                                                     for arg in args]
            with torch.cuda.graph(graph, stream=self.stream):
                result = function(run, *inputs)
            self.graphs[key] = graph, inputs, result
        graph, inputs, result = self.graphs[key]
        for mine, given in zip(inputs, args, strict=True):
            if isinstance(given, torch.Tensor):
                mine.copy_(given)
        graph.replay()
        return result
