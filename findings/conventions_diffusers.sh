#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.14.1
#
# What PORTING.md says of diffusers' DiT, its schedulers, AutoencoderKL and EMAModel, seen by running them.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" diffusers==0.42.1 torch==2.14.1 numpy==2.4.6
cd "$dir"
OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 "$dir/venv/bin/python" -W ignore - <<'END'
import math

import torch
from diffusers import (AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, EulerDiscreteScheduler,
                       FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler)
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.training_utils import EMAModel

torch.manual_seed(0)
torch.set_grad_enabled(False)
x, noise = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
noised = DDPMScheduler().add_noise(x, noise, torch.tensor([0, 999]))
assert (noised - x)[0].std() < 0.02 and (noised - noise)[1].std() < 0.02  # t = 0 is the image
flow = FlowMatchEulerDiscreteScheduler()
flow.set_timesteps(1000)
assert torch.equal(flow.scale_noise(x, flow.timesteps[:1], noise), noise)  # t = 1000 is the noise
calls = {}
for kind in (DDPMScheduler, DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler):
    scheduler = kind()
    scheduler.set_timesteps(50)
    calls[kind.__name__] = (len(scheduler.timesteps), float(scheduler.timesteps[0]), float(scheduler.timesteps[-1]))
print(calls)
assert calls == {"DDPMScheduler": (50, 980, 0), "DDIMScheduler": (50, 980, 0), "EulerDiscreteScheduler": (50, 999, 0),
                 "HeunDiscreteScheduler": (99, 999, 0), "PNDMScheduler": (59, 980, 0)}
flow.set_timesteps(2)
print("flow, 2 steps:", flow.timesteps.tolist(), flow.sigmas.tolist())
assert flow.timesteps.tolist() == [1000, 1] and flow.sigmas[-1] == 0
assert DDPMScheduler().config.clip_sample and DDIMScheduler().config.clip_sample
# The network
waves = get_timestep_embedding(torch.tensor([7.0]), 256)[0]
assert abs(waves[0] - math.sin(7)) < 1e-6  # sines first, unless flipped
dit = DiTTransformer2DModel(num_attention_heads=3, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2,
                            sample_size=8, patch_size=2, num_embeds_ada_norm=10)
time_proj = dit.transformer_blocks[0].norm1.emb.time_proj
waves = time_proj(torch.tensor([7.0]))[0]
assert abs(waves[0] - math.cos(7)) < 1e-6  # its DiT flips them: cosines first
assert abs(waves[127] - math.cos(7 / 10000)) < 1e-6  # log(10000) / (half - 1), not the official code's half
assert dit(x, timestep=torch.tensor([1, 1]), class_labels=torch.tensor([0, 10])).sample.shape == (2, 8, 8, 8)
tokens = torch.randn(2, 16, 48)
block = dit.transformer_blocks[0]
out = block(tokens, timestep=torch.tensor([1, 1]), class_labels=torch.tensor([1, 2]))
changed = (out - tokens).norm() / tokens.norm()
print(f"an untrained block changes its input by {changed:.0%}")
assert changed > 0.01
labels = [block.norm1.emb.class_embedder for block in dit.transformer_blocks]
dropped = torch.stack([label.token_drop(torch.zeros(20000).long()) == 10 for label in labels])
assert 0.09 < dropped.float().mean() < 0.11 and (dropped[0] != dropped[1]).float().mean() > 0.15  # block by block
# The average
ema = EMAModel([torch.nn.Parameter(torch.zeros(1))], decay=0.9999)
decays, ones = {}, [torch.nn.Parameter(torch.ones(1))]
for n in range(1, 10001):
    ema.step(ones)
    decays[n] = ema.cur_decay_value
print("decays", decays[1], decays[2], decays[100], decays[10000])
assert decays[1] == 0 and abs(decays[2] - 2 / 11) < 1e-9 and abs(decays[100] - 100 / 109) < 1e-9
assert abs(decays[10000] - 10000 / 10009) < 1e-9
assert AutoencoderKL().config.scaling_factor == 0.18215
vae = AutoencoderKL(block_out_channels=(32,) * 4, down_block_types=["DownEncoderBlock2D"] * 4,
                    up_block_types=["UpDecoderBlock2D"] * 4)
for side, back in ((24, 24), (28, 24), (31, 24), (32, 32)):  # of factor 8
    assert vae(torch.randn(1, 3, side, side)).sample.shape == (1, 3, back, back)
print("28 x 28 pixels come back from the VAE as 24 x 24")
END
