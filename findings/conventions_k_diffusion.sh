#!/usr/bin/env bash
# Versions: k-diffusion 0.1.1.post1, torch 2.14.1, setuptools 80.10.2 (without which it does not import)
#
# What PORTING.md says of k-diffusion, seen by running it.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" k-diffusion==0.1.1.post1 torch==2.14.1 setuptools==80.10.2
cd "$dir"
OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 "$dir/venv/bin/python" -W ignore - <<'END'
import k_diffusion as K
import torch

torch.manual_seed(0)
x, noise = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)


class Network(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value, self.seen = value, []

    def forward(self, x, sigma):
        self.seen.append((x, sigma))
        return self.value


sigma, data = torch.tensor([3.0, 0.1]), 0.5
scale = sigma.view(-1, 1, 1, 1)
noised = x + scale * noise  # sigma 0 is the image
target = (x - data**2 / (scale**2 + data**2) * noised) * (scale**2 + data**2).sqrt() / (scale * data)
network = Network(target)
assert K.layers.Denoiser(network, sigma_data=data).loss(x, noise, sigma).max() < 1e-9  # EDM's target
assert torch.allclose(network.seen[0][0], noised / (scale**2 + data**2).sqrt(), atol=1e-5)
assert torch.equal(network.seen[0][1], sigma)
layer = K.layers.FourierFeatures(1, 256)
assert torch.allclose(layer(torch.tensor([[0.7]]))[0, :128], (2 * torch.pi * 0.7 * layer.weight[:, 0]).cos(), atol=1e-5)
assert layer.weight.std() > 0.5  # random frequencies, cosines first
counts = {}
for name in ("euler", "heun", "dpmpp_2m", "dpm_2", "lms", "dpmpp_2s_ancestral"):
    seen = []

    def denoise(x, sigma):
        seen.append(float(sigma[0]))
        return x * 0 + 5

    sigmas = K.sampling.get_sigmas_karras(10, 0.02, 10)
    out = getattr(K.sampling, f"sample_{name}")(denoise, x * 10, sigmas, disable=True)
    counts[name] = len(seen)
    assert abs(seen[0] - 10) < 1e-4 and sigmas[-1] == 0 and abs(sigmas[-2] - 0.02) < 1e-5
    assert torch.allclose(out, torch.full_like(out, 5), atol=1e-3)  # the last step ends at the image; no clamping
print("calls of 10 steps:", counts)
assert counts == {"euler": 10, "heun": 19, "dpmpp_2m": 10, "dpm_2": 19, "lms": 10, "dpmpp_2s_ancestral": 19}
warmup = K.utils.EMAWarmup(power=2 / 3, max_value=0.9999)
decays = {}
for n in range(1, 10001):
    decays[n] = warmup.get_value()
    warmup.step()
print("EMA decays:", decays[1], decays[100], decays[10000])
assert decays[1] == 0 and abs(decays[100] - 0.9536) < 1e-3 and abs(decays[10000] - 0.9978) < 1e-3
a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
K.utils.ema_update(a, b, 0.0)
assert torch.equal(a.weight, b.weight)
END
