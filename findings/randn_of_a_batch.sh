#!/usr/bin/env bash
# Versions: torch 2.14.1, on a CPU
#
# Expected: with one seed, torch.randn(3, 1, H, W)[0] is torch.randn(1, 1, H, W)[0] for any H and W, or for none: the
#           first picture of a batch is the picture drawn alone.
# Seen:     it is at 28 x 28 and at 4 x 8 x 8, where an image has a multiple of 16 numbers. At 27 x 27 the last 16 numbers
#           of the lone image differ by up to 2, and at 3 x 3 all of them do.
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

for shape, same in (((1, 28, 28), 784), ((4, 8, 8), 256), ((1, 27, 27), 713), ((1, 3, 3), 0)):
    torch.manual_seed(0)
    alone = torch.randn(1, *shape)[0].flatten()
    torch.manual_seed(0)
    first = torch.randn(3, *shape)[0].flatten()
    equal = alone == first
    print(shape, f"{int(equal.sum())} of {equal.numel()} numbers are the same")
    assert int(equal.sum()) == same and bool(equal[:same].all())
END
