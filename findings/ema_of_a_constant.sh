#!/usr/bin/env bash
# Versions: torch 2.14.1; the update is that of the official DiT, SiT and REPA: ema.mul_(d).add_(p, alpha=1 - d)
#
# Expected: the average of weights that never change stays at them to rounding, 1e-6: DiT averages its fixed positions
#           too, which are sines and cosines.
# Seen:     in float32 it drifts by 1.6e-4 at a decay of 0.9999 and by 1.3e-3 at 0.99999, and stays there: an official
#           checkpoint's ema holds no exact sines. ema.lerp_(p, 1 - d) does not drift at all.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" torch==2.14.1 numpy==2.4.6
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
import torch

torch.set_num_threads(1)
constant = torch.linspace(-1, 1, 20001)
for decay, steps, least, most in ((0.9999, 60_000, 1e-4, 3e-4), (0.99999, 400_000, 1e-3, 3e-3)):
    ema = constant.clone()
    for _ in range(steps):
        ema.mul_(decay).add_(constant, alpha=1 - decay)
    drift = (ema - constant).abs().max().item()
    print(f"decay {decay}, {steps} updates: drift {drift:.1e}")
    assert least < drift < most
ema = constant.clone()
for _ in range(60_000):
    ema.lerp_(constant, 1 - 0.9999)
assert torch.equal(ema, constant)
print("lerp_: no drift")
END
