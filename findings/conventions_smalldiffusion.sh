#!/usr/bin/env bash
# Versions: smalldiffusion 0.5.0, torch 2.14.1
#
# What PORTING.md says of smalldiffusion, seen by running it.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" smalldiffusion==0.5.0 torch==2.14.1 torchvision==0.29.2 einops==0.8.2
cd "$dir"
OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 "$dir/venv/bin/python" -W ignore - <<'END'
import math

import torch
from smalldiffusion import DiT, ScheduleDDPM, ScheduleFlow, samples
from smalldiffusion.model import CondEmbedderLabel, get_sigma_embeds

torch.manual_seed(0)
torch.set_grad_enabled(False)
schedule = ScheduleDDPM()
assert abs(schedule.sigmas[0] - 0.01) < 1e-3 and abs(schedule.sigmas[-1] - 157.4) < 0.1  # sigma 0.01 is the image
x, noise = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)
model = DiT(in_dim=8, channels=1, patch_size=2, depth=2, head_dim=16, num_heads=2)


class Exact(DiT):
    seen = []

    def forward(self, x, sigma, cond=None):
        self.seen.append((x, float(sigma.flatten()[0])))
        return noise


exact = Exact(in_dim=8, channels=1, patch_size=2, depth=1, head_dim=16, num_heads=2)
assert exact.get_loss(x, torch.full((2, 1, 1, 1), 3.0), noise) == 0  # it predicts the noise ...
assert torch.equal(exact.seen[0][0], x + 3 * noise)  # ... in x_0 + sigma eps
waves = get_sigma_embeds(1, torch.tensor(7.0))[0]
expected = torch.tensor([math.sin(math.log(7) / 2), math.cos(math.log(7) / 2)])
assert torch.allclose(waves, expected)  # two numbers, of log sigma
for n in (1, 10, 1000):
    Exact.seen.clear()
    sigmas = schedule.sample_sigmas(n)
    *_, last = samples(exact, sigmas, batchsize=2)
    assert len(Exact.seen) == n and sigmas[0] == schedule.sigmas[-1]
    assert sigmas[-1] == schedule.sigmas[0] and len(sigmas) == n + 1  # the last is 0.01, not 0
assert schedule.sample_sigmas(1000)[-2] == schedule.sample_sigmas(1000)[-1]  # the last of 1000 steps does nothing
assert ScheduleFlow().sample_sigmas(10)[-1] == 0
tokens = torch.randn(2, 16, 32)
changed = (model.blocks[0](tokens, torch.randn(2, 32)) - tokens).norm() / tokens.norm()
print(f"an untrained block changes its input by {changed:.0%}")
assert changed > 0.05
label = CondEmbedderLabel(32, 10, dropout_prob=0.1)
assert label.null_cond == 10
shown = []
hook = next(m for m in label.modules() if isinstance(m, torch.nn.Embedding))
hook.register_forward_pre_hook(lambda module, inputs: shown.append(inputs[0]))
label.train()
label(torch.zeros(20000).long())
print(f"labels dropped: {(shown[0] == 10).float().mean():.1%}")
assert 0.09 < (shown[0] == 10).float().mean() < 0.11


class Guided(Exact):
    def forward(self, x, sigma, cond=None):
        return cond.view(-1, 1, 1, 1).float() + 0 * x


guided = Guided(in_dim=8, channels=1, patch_size=2, depth=1, head_dim=16, num_heads=2, cond_embed=label)
for scale, value in ((0, 2), (1, 2 + 1 * (2 - 10)), (3, 2 + 3 * (2 - 10))):  # 0: the label alone; 1 is guided already
    got = guided.predict_eps_cfg(x, torch.tensor(1.0), torch.tensor([2, 2]), scale)
    assert torch.all(got == value)
print("smalldiffusion is as PORTING.md says")
END
