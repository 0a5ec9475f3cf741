#!/usr/bin/env bash
# Versions: torch 2.14.1, on a CPU without AMX
#
# Expected: in bfloat16, scaled_dot_product_attention takes backward about twice what it takes forward, and no longer
#           than in fp32.
# Seen:     64 images of 16 tokens, 4 heads of width 32, on one core of an AMD EPYC (Zen 4, AVX-512 with bfloat16) that
#           others used too: 0.7 to 0.8 ms forward, 15 to 24 ms backward, 18 to 30 times as long and 7 to 16 times what
#           fp32 takes backward. 300 images of 49 tokens, heads of width 16: 13 to 16 times and 6.6 to 8 times.
# Exits with 0 while this holds: with more than 5 times and more than 3 times.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" torch==2.14.1 numpy==2.4.6
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
import statistics
import time

import torch
import torch.nn.functional as F

features = torch.cpu.get_capabilities()
assert not features.get("amx_bf16"), "this CPU has AMX: nothing is shown on it"
print(features.get("cpu_name"), "AVX-512 with bfloat16:", bool(features.get("avx512_bf16")))
torch.manual_seed(0)


def turn(shape, dtype):
    """Seconds forward and backward."""
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(shape, dtype=dtype)
    start = time.perf_counter()
    out = F.scaled_dot_product_attention(q, k, v)
    middle = time.perf_counter()
    out.backward(gradient)
    return middle - start, time.perf_counter() - middle


for shape in ((64, 4, 16, 32), (300, 4, 49, 16)):
    turns = [(turn(shape, torch.float32), turn(shape, torch.bfloat16)) for _ in range(15)]  # one after the other
    (_, fp32), (forward, backward) = [[statistics.median(way[part] for way in ways) for part in (0, 1)]
                                      for ways in zip(*turns)]
    print(f"{shape}: forward {1000 * forward:.1f} ms, backward {1000 * backward:.1f} ms, in fp32 {1000 * fp32:.1f} ms")
    assert backward > 5 * forward and backward > 3 * fp32
END
