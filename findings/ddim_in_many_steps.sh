#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.14.1
#
# Expected: with the exact noise of data N(0, 0.5^2), DDIMScheduler ends the nearer to a deviation of 0.5 the more steps
#           it takes.
# Seen:     it goes from t to t - 1000 // steps, whatever its next time is. With the spacing "trailing" 100 steps end
#           with 0.485, 500 with 0.497, and 501 with 0.706: its times are two apart there, and each step takes the noise
#           of one away. With 499 it ends at t = -1, read as the last time of all, and with 0.001. "linspace" is as far
#           off at 501; "leading", the default, covers only the times 500..0 there and ends with 0.514.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" diffusers==0.42.1 torch==2.14.1 numpy==2.4.6
cd "$dir"
OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 "$dir/venv/bin/python" -W ignore - <<'END'
import torch
from diffusers import DDIMScheduler


def deviation(spacing, steps):
    """Of what is drawn from N(0, 1) with the exact noise, in closed form; and the times."""
    scheduler = DDIMScheduler(1000, 1e-4, 0.02, "linear", clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    x = torch.ones(1, dtype=torch.float64)
    for t in scheduler.timesteps:
        kept = scheduler.alphas_cumprod[t].double()
        x = scheduler.step((1 - kept) ** 0.5 / (kept * 0.25 + 1 - kept) * x, t, x).prev_sample
    return x.item(), scheduler.timesteps.tolist()


for spacing, expected in (("trailing", {100: 0.4854, 499: 0.0008, 500: 0.4970, 501: 0.7055, 1000: 0.4985}),
                          ("linspace", {100: 0.4892, 499: 0.4983, 500: 0.4972, 501: 0.7058, 1000: 0.4985}),
                          ("leading", {100: 0.4860, 499: 0.4971, 500: 0.4971, 501: 0.5137, 1000: 0.4985})):
    found = {steps: deviation(spacing, steps) for steps in expected}
    print(spacing, {steps: round(value, 4) for steps, (value, _) in found.items()})
    assert all(abs(found[steps][0] - value) < 2e-4 for steps, value in expected.items())
    if spacing == "trailing":
        assert found[501][1][:3] == [999, 997, 995] and found[499][1][-1] == -1
    if spacing == "leading":
        assert found[501][1][0] == 500 and found[501][1][-1] == 0
END
