#!/usr/bin/env bash
# Versions: willisma/SiT 947f95b, hustvl/LightningDiT 2725fed, sihyun-yu/REPA 67f7145, timm 1.0.31, torchdiffeq 0.2.5,
#           torch 2.14.1
#
# What PORTING.md says of SiT's, LightningDiT's and REPA's code, seen by running them.
# Exits with 0 while this holds.
set -euo pipefail
# Whoever has the repositories already names the folder that holds them as owner+name: bash findings/conventions_sit.sh FOLDER
source=${1:+$(realpath "$1")}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" torch==2.14.1 torchvision==0.29.2 timm==1.0.31 torchdiffeq==0.2.5 fairscale==0.4.13 einops==0.8.2 scipy==1.17.1
cd "$dir"
take() {  # owner/name commit: its Python files
    local from=https://github.com/$1
    if [ -n "$source" ]; then from=$source/${1/\//+}; fi
    if [ -d "$from/repo" ]; then from=$from/repo; fi
    git clone --quiet --no-checkout "$from" "$dir/${1#*/}"
    git -C "$dir/${1#*/}" checkout --quiet "$2" -- "*.py"
}
take willisma/SiT 947f95bd3a510e9af441d38c1e9f72e0eee873c5
take hustvl/LightningDiT 2725fed42a14898744433809949834e26957bcdd
take sihyun-yu/REPA 67f714503e3892f993844aab088ffc5791c92613
OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 "$dir/venv/bin/python" -W ignore - <<'END'
import subprocess
import sys

SIT = """
import math
import torch
from transport import Sampler, create_transport
%s

torch.manual_seed(0)
torch.set_grad_enabled(False)
transport = create_transport("Linear", "velocity", None, None, None)
noise, x, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([0.0, 1.0])
_, at, velocity = transport.path_sampler.plan(t, noise, x)
assert torch.equal(at[0], noise[0]) and torch.equal(at[1], x[1])  # t = 1 is the image
assert torch.equal(velocity, x - noise)
waves = TimestepEmbedder.timestep_embedding(torch.tensor([0.7]), 256)[0]
assert abs(waves[0] - math.cos(0.7)) < 1e-6 and abs(waves[128] - math.sin(0.7)) < 1e-6  # t in 0..1, cosines first
for method, steps, calls in (("euler", 250, 249), ("euler", 251, 250), ("euler", 2, 1), ("heun2", 250, 498)):
    seen = []
    def network(x, t):
        seen.append(round(float(t[0]), 4))
        return torch.ones_like(x)
    sample = Sampler(transport).sample_ode(sampling_method=method, num_steps=steps)(noise, network)[-1]
    assert len(seen) == calls and seen[0] == 0
    assert torch.allclose(sample, noise + 1, atol=1e-4)
    if method == "euler" and steps > 2:
        assert seen[-1] == round(1 - 1 / calls, 4)
model = Model(input_size=8, hidden_size=48, depth=2, num_heads=3, num_classes=10, in_channels=4)
drop = model.y_embedder.token_drop(torch.zeros(20000).long())
assert set(drop.tolist()) == {0, 10} and 0.09 < (drop == 10).float().mean() < 0.11
tokens, c = torch.randn(2, 16, 48), torch.randn(2, 48)
assert torch.equal(model.blocks[0](tokens, c), tokens)
for p in model.parameters():
    p.normal_(0, 0.1)
model.eval()
x2, y, t = torch.cat([x, x]), torch.tensor([1, 2, 10, 10]), torch.full((4,), 0.5)
plain, one, four = (model(x2, t, y), model.forward_with_cfg(x2, t, y, 1.0), model.forward_with_cfg(x2, t, y, 4.0))
assert plain.shape == x2.shape and torch.allclose(one[:2], plain[:2], atol=1e-5)
assert torch.allclose(four[:2, 3:], plain[:2, 3:]) and not torch.allclose(four[:2, :3], plain[:2, :3], atol=0.1)
"""
PLAIN = "from models import SiT as Model, TimestepEmbedder"
LIGHTNING = "from models.lightningdit import LightningDiT as Model, TimestepEmbedder"
MORE = """
full = Model(input_size=8, hidden_size=48, depth=2, num_heads=3, num_classes=10, in_channels=4, use_swiglu=True,
             use_rope=True, use_rmsnorm=True).state_dict()
assert {"feat_rope.freqs_cos", "blocks.0.norm1.weight", "blocks.0.mlp.w12.weight"} <= full.keys()  # another network
shifted = []
def network(x, t):
    shifted.append(float(t[0]))
    return x
Sampler(transport).sample_ode(sampling_method="euler", num_steps=5, timestep_shift=0.3)(noise, network)
assert all(abs(t - 0.3 * s / (1 - 0.7 * s)) < 1e-6 for t, s in zip(shifted, (0, 0.25, 0.5, 0.75)))
half = model.forward_with_cfg(x2, t, y, 4.0, cfg_interval=True, cfg_interval_start=0.6)
assert torch.allclose(half[:2], plain[:2])  # before that time, the label alone
"""
REPA = """
import math
import torch
from loss import SILoss
from models.sit import SiT, TimestepEmbedder
from samplers import euler_sampler

torch.manual_seed(0)
torch.set_grad_enabled(False)
noised = []
def network(x, t, **_):
    noised.append((x, t))
    return x, [torch.ones(4, 2, 3)]
x = 100 * torch.ones(4, 4, 8, 8)
SILoss(prediction="v", path_type="linear")(network, x, {}, [torch.ones(4, 2, 3)])
at, t = noised[0]
assert torch.allclose(at.mean((1, 2, 3)), 100 * (1 - t), atol=1)  # t = 0 is the image
_, _, d_alpha, d_sigma = SILoss().interpolant(t)
assert (d_alpha, d_sigma) == (-1, 1)  # the velocity eps - x_0
waves = TimestepEmbedder.positional_embedding(torch.tensor([0.7]), 256)[0]
assert abs(waves[0] - math.cos(0.7)) < 1e-6 and abs(waves[128] - math.sin(0.7)) < 1e-6
for heun, calls in ((False, 50), (True, 99)):
    seen = []
    def ones(x, t, y):
        seen.append(round(float(t[0]), 4))
        return torch.ones_like(x) * y.view(-1, 1, 1, 1), None
    z = torch.randn(2, 4, 8, 8)
    out = euler_sampler(ones, z, torch.tensor([2.0, 3.0]), num_steps=50, heun=heun, cfg_scale=1.0)
    assert len(seen) == calls and (seen[0], min(seen)) == (1, 0.02)
    assert torch.allclose(out.float(), z - torch.tensor([2.0, 3.0]).view(-1, 1, 1, 1), atol=1e-4)
out = euler_sampler(ones, z, torch.tensor([2.0, 3.0]), num_steps=50, cfg_scale=2.0)  # all channels: 1000 + 2 (y - 1000)
assert torch.allclose(out.float(), z - (2 * torch.tensor([2.0, 3.0]) - 1000).view(-1, 1, 1, 1), atol=1e-1)
model = SiT(path_type="linear", input_size=8, hidden_size=48, decoder_hidden_size=48, encoder_depth=1, depth=2,
            num_heads=3, num_classes=10, z_dims=[16], projector_dim=32, qk_norm=False)
assert any(name.startswith("projectors.0.") for name in model.state_dict())
tokens, c = torch.randn(2, 16, 48), torch.randn(2, 48)
assert torch.equal(model.blocks[0](tokens, c), tokens)
drop = model.y_embedder.token_drop(torch.zeros(20000).long())
assert set(drop.tolist()) == {0, 10} and 0.09 < (drop == 10).float().mean() < 0.11
"""
for name, code in (("SiT", SIT % PLAIN), ("LightningDiT", SIT % LIGHTNING + MORE), ("REPA", REPA)):
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=name, check=True, stdout=subprocess.DEVNULL)
    train = open(f"{name}/train.py").read()
    assert "decay=0.9999" in train and ".mul_(decay).add_(param.data, alpha=1 - decay)" in train
    keys = {"SiT": ("args",), "LightningDiT": ("config",), "REPA": ("args", "steps")}[name]
    assert all(f'"{key}": ' in train for key in ("model", "ema", "opt", *keys))
    print(name, "is as PORTING.md says")
assert "0.18215" in open("SiT/sample.py").read() and "0.18215" in open("REPA/generate.py").read()
assert "latents_stats.pt" in open("LightningDiT/datasets/img_latent_dataset.py").read()
END
