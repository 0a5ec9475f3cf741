import math

import pytest
import torch
from diffusers import DDPMScheduler
from test_diffusion import LabelEcho, deviation, scheduler, set_trailing_timesteps

from diffusion import DDPM, SAMPLERS, dpm, per_image, posterior
from latent.config import LatentConfig
from latent.official import LearnedVarianceDDPM, OfficialDDPM, OfficialFlow, SiT, ddpm


@pytest.mark.parametrize("count", [8, 20, 50])
def test_dpm_does_not_overshoot_on_any_spacing(count):
    """The last step of linspace, to t = 0, is several times as long as the one before. Imported weights have it."""
    deviations = {}
    for spacing in ("trailing", "linspace"):
        diffusion = OfficialDDPM()
        diffusion.spacing = spacing
        deviations[spacing] = deviation(dpm, diffusion, 0.5, count)
    assert abs(deviations["linspace"] - deviations["trailing"]) < 0.025 and deviations["linspace"] < 0.505


class TwoAnswers(torch.nn.Module):
    """A made-up network that answers with noise and v, which goes beyond [-1, 1] as the network of DiT does."""

    null_label = 10

    def forward(self, x, t, y):
        t, y = per_image(t, x), per_image(y, x)
        return torch.cat([torch.sin(3 * x + t / 100), 1.3 * torch.cos(5 * x + y)], dim=1)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [1000, 250, 7])
def test_steps_of_learned_variance_equal_diffusers(steps, spacing, monkeypatch):
    """Its "learned_range": the bounds are those of the steps taken, not of all T. Not clamped."""
    theirs = scheduler(DDPMScheduler, clip_sample=False, timestep_spacing=spacing, variance_type="learned_range")
    timesteps = set_trailing_timesteps(theirs, steps)
    process, network, y = LearnedVarianceDDPM(), TwoAnswers(), torch.tensor([3, 4])
    process.spacing = spacing
    theirs.alphas_cumprod = process.alphas_cumprod  # theirs are float32, which x_0 is divided by
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    draws = [torch.randn_like(x) for _ in range(steps - 1)] + [torch.zeros_like(x)]  # none is on the clean image
    noise = iter(draws)

    def denoise(x, t):
        return process.denoise(network, x, t, y, 1, math.inf)

    states = [x, *ddpm(process, denoise, x, process.descending_steps(steps), lambda: next(noise))]
    assert [t for t, *_ in process.descending_steps(steps)] == timesteps
    for i in (0, 1, steps // 2, steps - 2, steps - 1):
        t, x = timesteps[i], states[i]
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, d=draws[i], **__: d)
        expected = theirs.step(network(x, torch.full((2,), t), y), t, x).prev_sample
        torch.testing.assert_close(states[i + 1], expected, atol=1e-9, rtol=1e-6)


def test_learned_variance_by_its_formula():
    """2102.09672, equation 15, in the chain of the steps taken: f = 0 and 1 are the bounds, and between them the
    logarithm is linear."""
    process, x_0, x = LearnedVarianceDDPM(), torch.zeros(1), torch.zeros(1)
    process.spacing = "linspace"
    (t, at, after), (next_t, *_), *_ = process.descending_steps(250)
    assert (t, next_t) == (999, 995)
    kept, kept_after = process.alphas_cumprod[[999, 995]].tolist()
    beta = 1 - kept / kept_after
    smallest = beta * (1 - kept_after) / (1 - kept)
    for f, variance in ((0.0, smallest), (1.0, beta), (0.3, math.exp(0.3 * math.log(beta) + 0.7 * math.log(smallest))),
                        (1.2, math.exp(1.2 * math.log(beta) - 0.2 * math.log(smallest)))):
        process.spread = f
        after_step = next(ddpm(process, lambda x, t: x_0, x, [(t, at, after)], lambda: torch.ones(1)))
        assert after_step.item() ** 2 == pytest.approx(variance, rel=1e-5)
    for v in (-1.0, 0.0, 0.5):
        process.to_x_0(torch.cat([torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), v)], dim=1), torch.zeros(1), 5)
        assert torch.equal(process.spread, torch.full((1, 4, 2, 2), (v + 1) / 2))


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_other_samplers_ignore_the_learned_variance(name):
    learned, plain = LearnedVarianceDDPM(), DDPM()
    x, y = torch.randn(2, 4, 4, 4), torch.tensor([3, 4])

    def end(process, network):
        *_, last = SAMPLERS[name](lambda x, t: process.denoise(network, x, t, y, 1, 1.0), x,
                                  process.descending_steps(5), None)
        return last

    class FirstAnswer(TwoAnswers):
        def forward(self, *args):
            return super().forward(*args).chunk(2, dim=1)[0]

    assert torch.equal(end(learned, TwoAnswers()), end(plain, FirstAnswer()))


def test_the_loss_of_learned_variance():
    """The noise's error, and the variational bound in bits (2102.09672, equation 16), by torch's own distributions: the
    divergence between two Gaussians and, at t = 0, of the 256 levels of a pixel. It teaches the variance alone."""
    process, T = LearnedVarianceDDPM(), 1000
    noise, y = torch.randn(6, 4, 4, 4).double(), torch.arange(6)
    x_0 = (torch.randint(0, 256, (6, 4, 4, 4)) / 127.5 - 1).double()
    x_0[0, 0], x_0[0, 1] = -1, 1  # the outermost levels
    t = torch.tensor([0, 0, 1, 500, 998, 999])
    v = torch.randn(6, 4, 4, 4).double().requires_grad_()
    error = torch.randn(6, 4, 4, 4).double() * 0.3
    eps = (noise + error).requires_grad_()
    losses = process.losses(lambda *_: torch.cat([eps, v], dim=1), x_0, t, y, noise)
    plain = DDPM().losses(lambda *_: eps, x_0, t, y, noise)
    kept = process.alphas_cumprod
    for i, step in enumerate(t.tolist()):
        x_t = kept[step].sqrt() * x_0[i] + (1 - kept[step]).sqrt() * noise[i]
        guess = (x_t - (1 - kept[step]).sqrt() * eps[i]) / kept[step].sqrt()
        first = max(step, 1)  # whose posterior has a variance above 0
        low, high = (process.betas[first] * (1 - kept[first - 1]) / (1 - kept[first])).log(), process.betas[step].log()
        f = (v[i] + 1) / 2
        std = ((f * high + (1 - f) * low) / 2).exp()
        if step:
            def mean(x, step=step, x_t=x_t):
                at, after = process.path[step], process.path[step - 1]
                return posterior(x, x_t, at, after)[0]

            said, true = torch.distributions.Normal(mean(guess), std), torch.distributions.Normal(
                mean(x_0[i]), (low / 2).exp().expand_as(std))
            term = torch.distributions.kl_divergence(true, said)
        else:
            level = torch.distributions.Normal(guess, std)
            upper = torch.where(x_0[i] > 0.999, 1, level.cdf(x_0[i] + 1 / 255))
            lower = torch.where(x_0[i] < -0.999, 0, level.cdf(x_0[i] - 1 / 255))
            term = -(upper - lower).clamp(min=1e-12).log()
        expected = error[i].square().mean() + term.mean() / math.log(2)
        torch.testing.assert_close(losses[i], expected, rtol=1e-4, atol=1e-5)
    of_noise, of_variance = torch.autograd.grad(losses.sum(), (eps, v))
    assert of_variance.flatten(1).any(1).all()
    torch.testing.assert_close(of_noise, torch.autograd.grad(plain.sum(), eps)[0])
    half = LearnedVarianceDDPM(T=T // 2)
    only_bound = half.losses(lambda *_: torch.cat([noise, v], dim=1), x_0, t // 2, y, noise)
    torch.testing.assert_close(only_bound, half.bound_terms(0 * noise, v, x_0, t // 2) / 2)  # T / 1000


def official_timesteps(T, count):
    """DiT's `space_timesteps`: strides are added up, and each sum is rounded."""
    place, steps = 0.0, []
    for _ in range(count):
        steps.append(round(place))
        place += (T - 1) / (count - 1)
    return steps[::-1]


@pytest.mark.parametrize("count", [2, 7, 21, 35, 50, 250, 999, 1000])
def test_timesteps_of_the_official_code(count):
    process = OfficialDDPM()
    process.spacing = "linspace"
    timesteps = [t for t, *_ in process.descending_steps(count)]
    assert timesteps == official_timesteps(1000, count) and len(set(timesteps)) == count
    assert (timesteps[0], timesteps[-1]) == (999, 0)
    if count in (50, 250, 1000):  # no sum lies halfway
        assert timesteps == torch.linspace(999, 0, count, dtype=torch.float64).round().long().tolist()
    assert process.descending_steps(count)[-1][2] == (1.0, 0.0)
    if count < 1000:
        assert timesteps != [t for t, *_ in DDPM().descending_steps(count)]
    assert [t for t, *_ in process.descending_steps(1)] == [999]
    # From the midst, as an edit does it
    some = min(count, 500)
    assert [t for t, *_ in process.descending_steps(count, 0.5)] == official_timesteps(500, some)


@pytest.mark.parametrize(("process", "network"), [
    (OfficialFlow(), LabelEcho()),
    (LearnedVarianceDDPM(), lambda *args: LabelEcho()(*args).repeat(1, 2, 1, 1))])
def test_guidance_of_some_channels(process, network):
    """The others, and the variance, are what the network answers for the label. At 0 no channel sees the label."""
    y, x = torch.tensor([2, 7]), torch.randn(2, 4, 3, 3)
    seen = []

    class Named(torch.nn.Module):
        null_label = 10

        def forward(self, *args):
            return network(*args)

    process.to_x_0 = lambda output, x, t: seen.append(output[:, :, 0, 0].tolist()) or output[:, :4]
    for scale, n in ((2.5, 3), (2.5, 4), (2.5, 0), (-1, 1), (1, 3), (0, 3)):
        process.guided_channels = n
        process.denoise(Named(), x, 5, y, scale, math.inf)
        guided = n or 4
        for row, label in zip(seen.pop(), (2.0, 7.0), strict=True):
            label = label if scale else 10.0
            expected = [(10 + scale * (label - 10) if c < guided and scale else label) * 10**c for c in range(4)]
            assert row[:4] == pytest.approx(expected)
            assert row[4:] in ([], [label * 10**c for c in range(4)])


def test_guidance_of_the_less_noisy_steps():
    """Of 50 steps, 30 is the last of the 62 % that are guided; above it the label is followed, or, at 0, none."""
    process, seen = OfficialFlow(50), []
    process.guidance_high = 0.62
    process.to_x_0 = lambda output, x, t: seen.append(output[0, 0, 0, 0].item()) or output
    for scale, t, expected in ((2.5, 0, -10), (2.5, 30, -10), (2.5, 31, 2), (2.5, 49, 2), (0.5, 49, 6), (0, 49, 10),
                               (-1, 49, 18)):
        x = torch.randn(2, 4, 3, 3)
        process.denoise(LabelEcho(), x, t, torch.tensor([2, 7]), scale, math.inf)
        assert seen.pop() == pytest.approx(expected), (scale, t)
        process.denoise(LabelEcho(), x, t, torch.tensor([2, 7]), scale, math.inf, x)  # guidance to given frames: all
        assert seen.pop() == pytest.approx(10 - 8 * scale), (scale, t)
    process = OfficialFlow(100)
    process.guidance_high = 0.29  # 100 times this, in floats, is less than 29
    guided = [process.denoise(LabelEcho(), x, t, torch.tensor([2, 7]), 0.5, math.inf)[0, 0, 0, 0] for t in range(100)]
    assert guided == pytest.approx([6.0] * 100)
    guided = [process.denoise(LabelEcho(), x, t, torch.tensor([2, 7]), 2, math.inf)[0, 0, 0, 0] for t in range(100)]
    assert guided == pytest.approx([-6.0] * 29 + [2.0] * 71)


@pytest.mark.parametrize(("settings", "kind"), [
    (dict(process="ddpm"), OfficialDDPM), (dict(process="ddpm", variance="learned"), LearnedVarianceDDPM),
    (dict(process="flow"), OfficialFlow), (dict(process="sit"), SiT)])
def test_settings_reach_the_process(settings, kind):
    """The habits that the settings name, and which sampler draws from a learned variance."""
    config = LatentConfig(T=50, sampler="ddpm", spacing="linspace", guided_channels=3, guidance_high=0.7, **settings)
    process = config.build_process()
    assert process.guidance_high == 0.7
    assert (type(process), process.T, process.spacing, process.guided_channels) == (kind, 50, "linspace", 3)
    assert process.bound == 1 and LatentConfig(clamp=False, **settings).build_process().bound == math.inf
    assert [t for t, *_ in process.descending_steps(2)] == [49, 0]
    sampler = config.build_sampler(process)
    learned = "variance" in settings
    assert (sampler.func, sampler.args) == ((ddpm, (process,)) if learned else (SAMPLERS["ddpm"], ()))
