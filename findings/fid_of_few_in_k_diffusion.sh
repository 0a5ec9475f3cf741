#!/usr/bin/env bash
# Versions: k-diffusion 0.1.1.post1, torchmetrics 1.9.0, torch 2.14.1, setuptools 80.10.2
#
# Expected: the package imports after pip install; and its FID of a set with itself is 0 to 1e-5, its KID about 0.
# Seen:     with setuptools 84 the import ends in "No module named 'pkg_resources'", of a package that it needs: 80 brings
#           it. For 40 images and 64 features the FID of a set with itself is below zero, -0.04 (torchmetrics: -1e-6), and
#           the KID -0.37: a set with itself looks better than perfect, and by more than runs differ.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" k-diffusion==0.1.1.post1 torchmetrics==1.9.0 torch==2.14.1 setuptools==84.2.0
cd "$dir"
if "$dir/venv/bin/python" -c 'import k_diffusion' 2>"$dir/err"; then echo "it imports"; exit 1; fi
grep "No module named 'pkg_resources'" "$dir/err"
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" setuptools==80.10.2
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W ignore - <<'END'
import torch
from k_diffusion import evaluation
from torchmetrics.image.fid import FrechetInceptionDistance


class Features(torch.nn.Module):
    num_features = 64

    def forward(self, x):
        return x.flatten(1)[:, :64]


torch.manual_seed(0)
x = torch.randn(40, 64)
fid, kid = evaluation.fid(x, x).item(), evaluation.kid(x, x).item()
metric = FrechetInceptionDistance(feature=Features(), input_img_size=(3, 8, 8))
for real in (True, False):
    metric.update(torch.nn.functional.pad(x, (0, 128)).view(-1, 3, 8, 8), real=real)
print(f"k-diffusion: FID {fid:.4f}, KID {kid:.3f}; torchmetrics: FID {metric.compute():.1e}")
assert fid < -0.01 and kid < -0.2 and abs(metric.compute()) < 1e-4
END
