#!/usr/bin/env bash
# Versions: flow-matching 1.0.10 (Meta's), torchcfm 1.0.7, torchdiffeq 0.2.5, torch 2.14.1
#
# What PORTING.md says of Meta's flow_matching and of torchcfm, seen by running them.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" flow-matching==1.0.10 torchcfm==1.0.7 torchdiffeq==0.2.5 torch==2.14.1
cd "$dir"
OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 "$dir/venv/bin/python" -W ignore - <<'END'
import math

import torch
from flow_matching.path import CondOTProbPath
from flow_matching.solver import ODESolver
from flow_matching.utils import ModelWrapper
from torchcfm.conditional_flow_matching import (ConditionalFlowMatcher, ExactOptimalTransportConditionalFlowMatcher)
from torchcfm.models.unet import UNetModel
from torchcfm.models.unet.nn import timestep_embedding

torch.manual_seed(0)
noise, x, t = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8), torch.tensor([0.0, 1.0])
sample = CondOTProbPath().sample(t=t, x_0=noise, x_1=x)
assert torch.equal(sample.x_t[0], noise[0]) and torch.equal(sample.x_t[1], x[1])  # t = 1 is the image
assert torch.allclose(sample.dx_t, x - noise)  # the velocity
_, at, velocity = ConditionalFlowMatcher().sample_location_and_conditional_flow(noise, x, t)
assert torch.allclose(at[0], noise[0]) and torch.allclose(at[1], x[1]) and torch.allclose(velocity, x - noise)


class Ones(ModelWrapper):
    def forward(self, x, t):
        self.seen.append(float(t))
        return torch.ones_like(x)


for options, calls, last in ((dict(step_size=None, method="euler"), 1, 0), (dict(step_size=None, method="midpoint"), 2, 0.5),
                             (dict(step_size=0.05, method="euler"), 20, 0.95),
                             (dict(step_size=0.3, method="euler"), 4, 0.9),
                             (dict(step_size=0.05, method="midpoint"), 40, 0.975)):
    model = Ones(torch.nn.Identity())
    model.seen = []
    out = ODESolver(model).sample(x_init=noise, **options)
    print(options, len(model.seen), "calls")
    assert len(model.seen) == calls and model.seen[0] == 0 and abs(model.seen[-1] - last) < 1e-5
    assert torch.allclose(out, noise + 1, atol=1e-5)  # no clamping, the last step ends at t = 1
waves = timestep_embedding(torch.tensor([0.7]), 64)[0]
assert abs(waves[0] - math.cos(0.7)) < 1e-6 and abs(waves[63] - math.sin(0.7 * 10000 ** (-31 / 32))) < 1e-6
unet = UNetModel(dim=(1, 32, 32), num_channels=32, num_res_blocks=1, num_classes=10, class_cond=True)
assert unet.label_emb.num_embeddings == 10  # no null label
matcher = ExactOptimalTransportConditionalFlowMatcher()
points = torch.arange(64.0)[:, None] + torch.zeros(64, 2)
used = [len(set(matcher.sample_location_and_conditional_flow(torch.randn(64, 2), points, t=torch.ones(64))[1][:, 0]
               .round().tolist())) for _ in range(100)]
print("images used of 64:", sum(used) / 100)
assert 39 < sum(used) / 100 < 43
END
