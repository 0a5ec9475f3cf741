#!/usr/bin/env bash
# Versions: denoising-diffusion-pytorch 2.3.4, rectified-flow-pytorch 0.14.0, ema-pytorch 0.8.3, torch 2.14.1
#
# What PORTING.md says of these packages, seen by running them.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" denoising-diffusion-pytorch==2.3.4 rectified-flow-pytorch==0.14.0 ema-pytorch==0.8.3 torch==2.14.1
cd "$dir"
OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 "$dir/venv/bin/python" -W ignore - <<'END'
import math

import torch
from denoising_diffusion_pytorch import GaussianDiffusion
from denoising_diffusion_pytorch.classifier_free_guidance import Unet
from denoising_diffusion_pytorch.denoising_diffusion_pytorch import SinusoidalPosEmb
from ema_pytorch import EMA
from rectified_flow_pytorch import RectifiedFlow

torch.manual_seed(0)


class Network(torch.nn.Module):
    """Answers with what it is told to, and remembers its times."""

    channels, out_dim, self_condition, random_or_learned_sinusoidal_cond = 1, 1, False, False

    def __init__(self, value=None):
        super().__init__()
        self.value, self.seen, self.weight = value, [], torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t=None, *_, times=None):
        self.seen.append(float((times if t is None else t).flatten()[0]))
        return (x * 0 + 5 if self.value is None else self.value) + 0 * self.weight


process = GaussianDiffusion(Network(), image_size=8)
x, noise = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
t = torch.tensor([0, 999])
noised = process.q_sample(x, t, noise)
assert (noised - x)[0].std() < 0.1 and (noised - noise)[1].std() < 0.1  # t = 0 is the image
v = process.predict_v(x, t, noise)
process.model = Network(v)
assert process.p_losses(x, t, noise) < 1e-10  # v, of progressive distillation, by default
waves = SinusoidalPosEmb(64)(torch.tensor([7.0]))[0]
assert abs(waves[0] - math.sin(7)) < 1e-6 and abs(waves[31] - math.sin(7 / 10000)) < 1e-6  # sines first, half - 1
for steps, calls, following in ((None, 1000, 998), (250, 250, 995), (10, 10, 899)):
    process = GaussianDiffusion(Network(), image_size=8, sampling_timesteps=steps)
    out = process.sample(1)
    seen = process.model.seen
    print("steps", steps, "calls", len(seen), "times", seen[:2], seen[-1])
    assert len(seen) == calls and seen[:2] == [999, following]
    assert 0 <= out.min() and out.max() <= 1  # x_0 is clamped, images are in 0..1
    assert seen[-1] == {None: 0, 250: 3, 10: 99}[steps]
unet = Unet(dim=8, num_classes=10, dim_mults=(1,), cond_drop_prob=0.5)
image, classes = torch.randn(1, 3, 8, 8), torch.tensor([3])
unet.eval()
with torch.no_grad():
    label, null = (unet(image, torch.tensor([5]), classes, cond_drop_prob=p) for p in (0.0, 1.0))
    one = unet.forward_with_cond_scale(image, torch.tensor([5]), classes, cond_scale=1.0)
    three = unet.forward_with_cond_scale(image, torch.tensor([5]), classes, cond_scale=3.0, rescaled_phi=0.0)
    one, three = (a[0] if isinstance(a, tuple) else a for a in (one, three))
assert torch.equal(one, label) and unet.null_classes_emb.shape == (8,)
update = label - null  # of which only what is orthogonal to the prediction for the label is exaggerated, by default
assert not torch.allclose(three, null + 3 * update, atol=1e-4)
with torch.no_grad():
    whole = unet.forward_with_cond_scale(image, torch.tensor([5]), classes, cond_scale=3.0, rescaled_phi=0.0,
                                         remove_parallel_component=False)
assert torch.allclose(whole[0] if isinstance(whole, tuple) else whole, null + 3 * update, atol=1e-4)

flow = RectifiedFlow(Network(), data_shape=(1, 8, 8))
flow.model = Network(2 * x - 1 - noise)  # images in 0..1 are scaled to -1..1
assert flow(x, noise=noise, times=torch.tensor([0.0, 1.0])) < 1e-10  # the velocity: image - noise
for steps, calls in ((1, 0), (2, 2), (16, 30)):
    flow = RectifiedFlow(Network(), data_shape=(1, 8, 8))
    start = torch.randn(1, 1, 8, 8)
    out = flow.sample(noise=start, steps=steps)
    print("rectified flow, steps", steps, "calls", len(flow.model.seen), "times", flow.model.seen[:2])
    assert len(flow.model.seen) == calls  # midpoint: two calls, and steps counts points
    assert torch.allclose(out, ((start + (5 if calls else 0)) + 1) / 2, atol=1e-3)  # t = 1 is the image; no clamping
    assert not calls or flow.model.seen[0] == 0

network = torch.nn.Linear(1, 1, bias=False)
ema = EMA(network)
decays = {}
for n in range(1, 10001):
    before = ema.ema_model.weight.item()
    with torch.no_grad():
        network.weight.fill_(n)
    ema.update()
    now = ema.ema_model.weight.item()
    decays[n] = None if now == before else round((n - now) / (n - before), 4) if n != before else 0
print("EMA decays", {n: decays[n] for n in (1, 2, 11, 100, 101, 111, 121, 9991)})
assert decays[1] == 0 and decays[2] is None and decays[11] == 0 and decays[102] is None  # every 10th, copies up to 100
assert 0.3 < decays[121] < 0.98 and 0.99 < decays[9991] < 0.9999
assert "online_model.weight" in ema.state_dict() and "ema_model.weight" in ema.state_dict()
END
