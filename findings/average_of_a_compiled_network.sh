#!/usr/bin/env bash
# Versions: torch 2.14.1
#
# Expected: the average of a network that was compiled in place, by network.compile(), runs compiled as the network does.
# Seen:     its deepcopy, and with it AveragedModel and every EMA that begins with a deepcopy, lost the compiled call and
#           runs eagerly, without a word. deepcopy(torch.compile(network)) stays compiled, but names its weights
#           _orig_mod.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" torch==2.14.1 numpy==2.4.6
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
import copy

import torch
from torch.optim.swa_utils import AveragedModel

compiled = []


def backend(graph, inputs):
    compiled.append(1)
    return graph.forward


x = torch.ones(1, 2)
network = torch.nn.Sequential(torch.nn.Linear(2, 2))
network.compile(backend=backend)
network(x)
assert len(compiled) == 1
average = AveragedModel(network)
average.update_parameters(network)
average(x)
copy.deepcopy(network)(x)
print("compiled", len(compiled), "of 3 networks")
assert len(compiled) == 1 and average.module._compiled_call_impl is None
wrapped = AveragedModel(torch.compile(torch.nn.Linear(2, 2), backend=backend))
wrapped(x)
assert len(compiled) == 2 and "module._orig_mod.weight" in wrapped.state_dict()
END
