#!/usr/bin/env bash
# Versions: owenliang/mnist-dits 1de158f (the article's own code), torch 2.14.1
#
# What PORTING.md says of the article's code, seen by running it.
# Exits with 0 while this holds.
set -euo pipefail
# Whoever has the repositories already names the folder that holds them as owner+name: bash findings/conventions_article.sh FOLDER
source=${1:+$(realpath "$1")}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" torch==2.14.1 torchvision==0.29.2 matplotlib==3.11.2
cd "$dir"
take() {  # owner/name commit: its Python files
    local from=https://github.com/$1
    if [ -n "$source" ]; then from=$source/${1/\//+}; fi
    if [ -d "$from/repo" ]; then from=$from/repo; fi
    git clone --quiet --no-checkout "$from" "$dir/${1#*/}"
    git -C "$dir/${1#*/}" checkout --quiet "$2" -- "*.py"
}
take owenliang/mnist-dits 1de158fdad282fe8a8567f9043163243dc617227
OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 "$dir/venv/bin/python" -W ignore - <<'END'
import math
import sys

sys.path.insert(0, "mnist-dits")
import torch
from diffusion import alphas_cumprod, forward_add_noise
from dit import DiT
from dit_block import DiTBlock
from time_emb import TimeEmbedding

torch.manual_seed(0)
torch.set_grad_enabled(False)
x = torch.randn(2, 1, 28, 28)
noised, noise = forward_add_noise(x, torch.tensor([0, 999]))
assert (noised - x)[0].std() < 0.02 and (noised - noise)[1].std() < 0.02 and len(alphas_cumprod) == 1000
waves = TimeEmbedding(64)(torch.tensor([7]))[0]
assert abs(waves[0] - math.sin(7)) < 1e-6 and abs(waves[32] - math.cos(7)) < 1e-6  # sines first
assert abs(waves[31] - math.sin(7 / 10000)) < 1e-6  # log(10000) / (half - 1)
model = DiT(img_size=28, patch_size=4, channel=1, emb_size=64, label_num=10, dit_num=3, head=4)
assert model.label_emb.num_embeddings == 10  # no null label
tokens, c = torch.randn(2, 49, 64), torch.randn(2, 64)
changed = (DiTBlock(64, 4)(tokens, c) - tokens).norm() / tokens.norm()
assert changed > 0.1  # no identity
code, start = open("mnist-dits/inference.py").read(), "model=DiT("
scope = {"__name__": "article"}
exec(code[:code.index(start)], scope)
seen = []


class Network(torch.nn.Module):
    def forward(self, x, t, y):
        seen.append(int(t[0]))
        return x * 0


steps = scope["backward_denoise"](Network(), x, torch.tensor([1, 2]))
assert seen == list(range(999, -1, -1)) and all(step.abs().max() <= 1 for step in steps[1:])  # x_t is clamped
train = open("mnist-dits/train.py").read()
assert "L1Loss" in train and "loss_fn(pred_noise,noise" in train and "torch.save(model.state_dict()" in train
assert "ema" not in train.lower()
print("mnist-dits is as PORTING.md says; a block changes its input by", f"{changed:.0%}")
END
