#!/usr/bin/env bash
# Versions: torch 2.14.1, on a CPU, one process
#
# Expected: torch's own AveragedModel averages a network that torch's own fully_shard has sharded (FSDP2), as its average
#           is one of parameters; and a state dict that one process has saved can be loaded by one without shards.
# Seen:     AveragedModel begins with a deepcopy, which fully_shard forbids: AssertionError. What torch.save writes of
#           the network holds DTensors, whole as they are in one process: torch.load refuses them (weights_only), and a
#           plain network refuses to copy them. full_tensor() of each is what must be saved.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" torch==2.14.1 numpy==2.4.6
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
import os
import subprocess
import sys

import torch

make = "torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))"
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel

dist.init_process_group("gloo", init_method=f"file://{os.path.abspath('store')}", rank=0, world_size=1)
network = eval(make)
fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
try:
    AveragedModel(network)
except AssertionError as error:
    print("AveragedModel:", error)
else:
    raise SystemExit("it is averaged")
torch.save(network.state_dict(), "a.pt")
torch.save({name: weight.full_tensor() for name, weight in network.state_dict().items()}, "b.pt")
dist.destroy_process_group()


def load(name, only):
    code = f"import torch; {make}.load_state_dict(torch.load('{name}', weights_only={only}))"
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    return process.stderr


assert "DTensor" in load("a.pt", True) and "Error" in load("a.pt", True)
assert "mixed torch.Tensor and DTensor" in load("a.pt", False)
assert "Error" not in load("b.pt", True)
print("DTensors: refused; full tensors: loaded")
END
