#!/usr/bin/env bash
# Versions: x-transformers 2.31.10, torch 2.14.1
#
# Expected: with use_adaptive_layernorm and use_adaptive_layerscale, DiT's adaLN-Zero, an untrained block is the identity.
# Seen:     the condition changes nothing yet, as in DiT, but the gates start at 0.12 and not at 0: two blocks of an
#           encoder change their input by 40 %.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" x-transformers==2.31.10 torch==2.14.1 numpy==2.4.6
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
import torch
from x_transformers import Encoder

torch.manual_seed(0)
torch.set_grad_enabled(False)
encoder = Encoder(dim=16, depth=2, heads=2, use_adaptive_layernorm=True, use_adaptive_layerscale=True, dim_condition=16)
x = torch.randn(8, 5, 16)
one, other = (encoder(x, condition=condition) for condition in (torch.randn(8, 16), torch.zeros(8, 16)))
changed = (one - x).abs().mean() / x.abs().mean()
gate = [module.to_gamma.bias.sigmoid().mean().item() for module in encoder.modules() if hasattr(module, "to_gamma")
        and getattr(module.to_gamma, "bias", None) is not None]
print(f"the input is changed by {changed:.0%}; gates {gate[:2]}")
assert torch.equal(one, other) and 0.2 < changed < 0.6
assert gate and all(abs(value - 0.1192) < 1e-3 for value in gate)
END
