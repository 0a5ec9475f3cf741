#!/usr/bin/env bash
# Versions: facebookresearch/DiT ed81ce2, chuanyangjin/fast-DiT 0ddbd64, timm 1.0.31, diffusers 0.42.1, torch 2.14.1
#
# What PORTING.md says of DiT's official code and of fast-DiT, seen by running them.
# Exits with 0 while this holds.
set -euo pipefail
# Whoever has the repositories already names the folder that holds them as owner+name: bash findings/conventions_dit.sh FOLDER
source=${1:+$(realpath "$1")}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" torch==2.14.1 torchvision==0.29.2 timm==1.0.31 diffusers==0.42.1 accelerate==1.15.0
cd "$dir"
take() {  # owner/name commit: its Python files
    local from=https://github.com/$1
    if [ -n "$source" ]; then from=$source/${1/\//+}; fi
    if [ -d "$from/repo" ]; then from=$from/repo; fi
    git clone --quiet --no-checkout "$from" "$dir/${1#*/}"
    git -C "$dir/${1#*/}" checkout --quiet "$2" -- "*.py"
}
take facebookresearch/DiT ed81ce2229091fd4ecc9a223645f95cf379d582b
take chuanyangjin/fast-DiT 0ddbd642f47057d5ec6145529237e1043a335942
OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 "$dir/venv/bin/python" -W ignore - <<'END'
import subprocess
import sys

CHECK = """
import math
import torch
from diffusion import create_diffusion
from models import DiT, TimestepEmbedder
from train import update_ema

torch.manual_seed(0)
torch.set_grad_enabled(False)
process, x = create_diffusion(""), torch.randn(4, 4, 8, 8)
t, noise = torch.tensor([0, 0, 999, 999]), torch.randn(4, 4, 8, 8)
noised = process.q_sample(x, t, noise)
assert (noised - x)[:2].std() < 0.02 and (noised - noise)[2:].std() < 0.02  # t = 0 is the image
losses = process.training_losses(lambda *a, **k: torch.cat([noise, noise], 1), x, t, {}, noise)
assert losses["mse"].abs().max() == 0 and "vb" in losses  # the noise, and a variance
waves = TimestepEmbedder.timestep_embedding(torch.tensor([7.0]), 256)[0]
assert abs(waves[0] - math.cos(7)) < 1e-6 and abs(waves[128] - math.sin(7)) < 1e-6  # cosines first
assert abs(waves[255] - math.sin(7 * 10000 ** (-127 / 128))) < 1e-6  # log(10000) / half
model = DiT(input_size=8, hidden_size=48, depth=2, num_heads=3, num_classes=10)
drop = model.y_embedder.token_drop(torch.zeros(20000).long())
assert set(drop.tolist()) == {0, 10} and 0.09 < (drop == 10).float().mean() < 0.11
tokens, c = torch.randn(4, 16, 48), torch.randn(4, 48)
assert torch.equal(model.blocks[0](tokens, c), tokens)  # the identity
for p in model.parameters():
    p.normal_(0, 0.1)
model.eval()
x2, y = torch.cat([x[:2], x[:2]]), torch.tensor([1, 2, 10, 10])
plain, one, four = (model(x2, t, y), model.forward_with_cfg(x2, t, y, 1.0), model.forward_with_cfg(x2, t, y, 4.0))
assert torch.allclose(one[:2], plain[:2], atol=1e-5)  # 1: conditional
assert torch.allclose(four[:2, 3:], plain[:2, 3:]) and not torch.allclose(four[:2, :3], plain[:2, :3], atol=0.1)
seen, spaced = [], create_diffusion("250")
def network(x, t):
    seen.append(int(t[0]))
    return torch.cat([x * 0 + 5, x * 0], 1)
*_, last = spaced.p_sample_loop_progressive(network, (1, 4, 8, 8), clip_denoised=False, device="cpu")
assert len(seen) == 250 and (seen[0], seen[1], seen[-1]) == (999, 995, 0)
assert torch.allclose(last["sample"], last["pred_xstart"], atol=1e-5)  # the last step returns x_0
assert last["pred_xstart"].abs().max() > 1  # not clamped
ema, now = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
ema.weight.fill_(0)
now.weight.fill_(1)
for n in range(1, 10001):
    update_ema(ema, now)
    if n in (1, 100, 10000):
        assert abs(ema.weight.item() - (1 - 0.9999 ** n)) < 1e-3  # a decay of 0.9999 from the first update
"""
for name in ("DiT", "fast-DiT"):
    subprocess.run([sys.executable, "-W", "ignore", "-c", CHECK], cwd=name, check=True, stdout=subprocess.DEVNULL)
    sample, train = open(f"{name}/sample.py").read(), open(f"{name}/train.py").read()
    assert "clip_denoised=False" in sample and "decode(samples / 0.18215)" in sample
    for key in ('"model": ', '"ema": ', '"opt": ', '"args": '):
        assert key in train
    print(name, "is as PORTING.md says")
END
