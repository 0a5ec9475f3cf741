#!/usr/bin/env bash
# Versions: lpips 0.1.4, torch 2.14.1, torchvision 0.29.2 (random weights: shapes are the point)
#
# Expected: LPIPS compares images of any size, such as MNIST's 28 x 28.
# Seen:     with net="alex", its default, 30 x 30 is too small: the third pooling has nothing to pool, RuntimeError. From
#           31 x 31 on it works; "vgg" works from 16 x 16 on, and "squeeze" from 17 x 17.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" lpips==0.1.4 torch==2.14.1 torchvision==0.29.2
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
import lpips
import torch

torch.set_grad_enabled(False)
least = {}
for net in ("alex", "vgg", "squeeze"):
    metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    for side in range(8, 40):
        x = torch.rand(1, 3, side, side) * 2 - 1
        try:
            metric(x, -x)
        except RuntimeError:
            continue
        least[net] = side
        break
print(least)
assert least == {"alex": 31, "vgg": 16, "squeeze": 17}
END
