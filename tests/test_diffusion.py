import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from diffusion import DDPM, SAMPLERS, RectifiedFlow, ddim, ddpm, dpm, heun, per_image, posterior

PROCESSES = {"ddpm": DDPM, "flow": RectifiedFlow}


def scheduler(kind, **options):
    return kind(1000, 1e-4, 0.02, "linear", **options)


def exact_denoiser(process, mean, std):
    """The denoiser of a perfect network on data that are N(mean, std^2), pixel by pixel: E[x_0 | x_t]."""

    def denoise(x, t):
        a, s = process.path[t]
        return mean + a * std**2 / (a**2 * std**2 + s**2) * (x - a * mean)

    return denoise


def deviation(sampler, process, std, steps):
    """The standard deviation of what a sampler draws with the exact denoiser of N(0, std^2)."""
    x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    *_, x = sampler(exact_denoiser(process, 0.0, std), x, process.descending_steps(steps), None)
    return x.item()


class Network(torch.nn.Module):
    """A made-up network of one value, that keeps what it was asked and its answers."""

    null_label = 10

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, y):
        self.calls.append((t[0].item(), torch.sin(3 * x + t[0].item() / 100), x))
        return self.calls[-1][1]


def each_step(sampler, process, x, steps, noise, bound=1.0, **options):
    """The (t, output, x before, x after) at each step of a sampler of one call a step, for a made-up network."""
    network, y = Network(), torch.zeros(len(x), dtype=torch.long)

    def denoise(x, t):
        return process.denoise(network, x, t, y, 1, bound)

    states = list(sampler(denoise, x, process.descending_steps(steps), noise, **options))
    return [(*call, state) for call, state in zip(network.calls, states, strict=True)]


def set_trailing_timesteps(theirs, steps):
    theirs.set_timesteps(steps)
    return theirs.timesteps.tolist()


def test_schedule_equals_diffusers():
    ours, theirs = DDPM(), scheduler(DDPMScheduler)
    torch.testing.assert_close(ours.betas.float(), theirs.betas, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    for t in (0, 1, 500, 999):
        _, variance = posterior(torch.zeros(1), torch.zeros(1), ours.path[t], ours.path[t - 1])
        assert variance == pytest.approx(theirs._get_variance(t).item(), rel=1e-3, abs=1e-19)


def test_schedule_of_the_article():
    diffusion = DDPM(T=1000)
    assert diffusion.betas.dtype == torch.float64
    assert diffusion.betas[0].item() == pytest.approx(1e-4) and diffusion.betas[-1].item() == pytest.approx(0.02)
    torch.testing.assert_close(diffusion.alphas_cumprod[1:] / diffusion.alphas_cumprod[:-1], 1 - diffusion.betas[1:])
    assert diffusion.alphas_cumprod[0] == 1 - diffusion.betas[0]
    assert diffusion.alphas_cumprod[-1] < 1e-4


def test_moments_of_the_forward_process_at_every_t():
    """One step at a time, x_t = sqrt(alpha_t) x_{t-1} + sqrt(beta_t) eps, has the moments of the direct jump."""
    diffusion = DDPM(T=100, beta_end=0.1)
    mean, variance = 1.0, 0.0
    x_0, samples = torch.full((1, 1, 100, 100), 0.5), torch.randn(100, 1, 100, 100)
    for t in range(100):
        mean *= math.sqrt(diffusion.alphas[t])
        variance = diffusion.alphas[t].item() * variance + diffusion.betas[t].item()
        x_t, _ = diffusion.forward_add_noise(x_0, torch.tensor([t]), samples[t:t + 1])
        assert x_t.mean().item() == pytest.approx(0.5 * mean, abs=0.05)
        assert x_t.var().item() == pytest.approx(variance, rel=0.08)
        assert diffusion.signal[t].item() == pytest.approx(mean, rel=1e-5)
        assert diffusion.noise[t].item() ** 2 == pytest.approx(variance, rel=1e-5)


def test_path_of_the_flow_is_straight():
    flow = RectifiedFlow(shift=1)
    torch.testing.assert_close(flow.signal + flow.noise, torch.ones(1000))
    torch.testing.assert_close(flow.noise.diff(), torch.full((999,), 1 / 1001), atol=1e-6, rtol=0)
    u, shifted = torch.arange(1, 1001) / 1001, RectifiedFlow(shift=3).noise
    torch.testing.assert_close(shifted, 3 * u / (1 + 2 * u))  # 2403.03206, equation 23
    x, noise = torch.rand(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    early, _ = flow.forward_add_noise(x, torch.tensor([100, 100]), noise)
    late, _ = flow.forward_add_noise(x, torch.tensor([900, 900]), noise)
    velocity = noise - x
    torch.testing.assert_close((late - early) * 1001 / 800, velocity)
    # The loss is the error of the velocity that the predicted image stands for
    prediction, t = torch.rand(2, 1, 3, 3), torch.tensor([900, 900])
    error = (prediction - flow.target(x, noise)) * flow.error_scale[t].view(-1, 1, 1, 1)
    torch.testing.assert_close(error, velocity - (late - prediction) / flow.noise[900], atol=1e-5, rtol=1e-4)
    assert flow.error_scale.max() == 5  # it does not grow without bound where there is no noise left


def test_times_to_train_on():
    """Uniform for ddpm; for flow the logit of the time is normal around the logarithm of the shift."""
    u = (torch.arange(100_000) + 0.5) / 100_000
    t = DDPM(T=10).random_t(u)
    assert t.bincount().tolist() == [10_000] * 10
    for shift in (0.5, 1, 3):
        flow = RectifiedFlow(shift=shift)
        t = flow.random_t(u)
        logit = torch.logit(flow.noise[t])
        assert logit.mean().item() == pytest.approx(math.log(shift), abs=0.01)
        assert logit.std().item() == pytest.approx(1, abs=0.01)
        first, last = flow.random_t(torch.tensor([0.0, 1 - 2**-24])).tolist()
        assert first == 0 and 900 < last < 1000
        assert flow.random_t(torch.ones(1)).item() == 999  # rounding may make a 1


def test_forward_noise_is_drawn_when_none_is_given():
    x = torch.zeros(4, 1, 50, 50)
    x_t, noise = DDPM().forward_add_noise(x, torch.full((4,), 999))
    assert noise.std().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(x_t, noise, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("process", PROCESSES)
def test_target_leads_back_to_the_image(process):
    diffusion = PROCESSES[process]()
    x_0, noise = torch.rand(5, 1, 4, 4) * 2 - 1, torch.randn(5, 1, 4, 4)
    t = torch.tensor([0, 10, 400, 700, 900])
    x_t, _ = diffusion.forward_add_noise(x_0, t, noise)
    target = diffusion.target(x_0, noise)
    for i in range(5):
        recovered = diffusion.to_x_0(target[i], x_t[i], t[i].item())
        torch.testing.assert_close(recovered, x_0[i], atol=2e-4, rtol=1e-3)
    if process == "ddpm":
        torch.testing.assert_close(x_t, scheduler(DDPMScheduler).add_noise(x_0, noise, t), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [1000, 50])
def test_ddpm_steps_equal_diffusers(steps, monkeypatch):
    theirs = scheduler(DDPMScheduler, clip_sample=True, timestep_spacing="trailing")
    timesteps = set_trailing_timesteps(theirs, steps)
    draws = []

    def noise():
        draws.append(torch.randn(1, 1, 4, 4))
        return draws[-1]

    ours = each_step(ddpm, DDPM(), torch.randn(1, 1, 4, 4), steps, noise)
    assert [t for t, *_ in ours] == timesteps
    for i in (0, 1, steps // 2, steps - 2, steps - 1):
        t, output, before, after = ours[i]
        draw = draws[i] if i < len(draws) else torch.zeros(1, 1, 4, 4)
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, d=draw, **__: d)
        expected = theirs.step(output, t, before).prev_sample
        torch.testing.assert_close(after, expected, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1000, 50])
def test_ddim_steps_equal_diffusers(eta, steps):
    theirs = scheduler(DDIMScheduler, clip_sample=True, timestep_spacing="trailing")
    timesteps = set_trailing_timesteps(theirs, steps)
    draws = []

    def noise():
        draws.append(torch.randn(1, 1, 4, 4))
        return draws[-1]

    ours = each_step(ddim, DDPM(), torch.randn(1, 1, 4, 4), steps, noise, eta=eta)
    assert [t for t, *_ in ours] == timesteps
    for i in (0, 1, steps // 2, steps - 2, steps - 1):
        t, output, before, after = ours[i]
        draw = draws[i] if i < len(draws) else torch.zeros(1, 1, 4, 4)
        expected = theirs.step(output, t, before, eta=eta, use_clipped_model_output=True, variance_noise=draw)
        torch.testing.assert_close(after, expected.prev_sample, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("steps", [20, 7])
def test_dpm_equals_diffusers(steps):
    theirs = scheduler(DPMSolverMultistepScheduler, timestep_spacing="trailing", final_sigmas_type="zero",
                       algorithm_type="dpmsolver++", solver_order=2)
    theirs.set_timesteps(steps)
    x = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    ours = each_step(dpm, DDPM(), x, steps, None, bound=math.inf)
    assert [t for t, *_ in ours] == theirs.timesteps.tolist()
    for t, output, before, after in ours:
        expected = theirs.step(output, t, before).prev_sample
        torch.testing.assert_close(after, expected, atol=1e-3, rtol=1e-3)


def test_ddim_on_a_flow_is_euler_as_in_diffusers():
    flow = RectifiedFlow()
    theirs = FlowMatchEulerDiscreteScheduler()
    theirs.set_timesteps(sigmas=[s for _, (_, s), _ in flow.descending_steps(8)])
    x = torch.randn(1, 1, 4, 4)
    steps = each_step(ddim, flow, x, 8, None, bound=math.inf)
    for (t, output, before, after), their_t in zip(steps, theirs.timesteps, strict=True):
        velocity = (before - output) / flow.path[t][1]
        torch.testing.assert_close(after, theirs.step(velocity, their_t, before).prev_sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("steps", [100, 9])
def test_ddim_with_eta_1_is_ddpm(process, steps):
    diffusion = PROCESSES[process](T=100)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)

    def run(sampler, **options):
        generator = torch.Generator().manual_seed(1)
        return each_step(sampler, diffusion, x, steps, lambda: torch.randn(2, 1, 4, 4, generator=generator), **options)

    for a, b in zip(run(ddpm), run(ddim, eta=1.0), strict=True):
        torch.testing.assert_close(a[3], b[3])


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("process", PROCESSES)
def test_samplers_recover_a_gaussian(name, process):
    """With the exact denoiser of N(mean, std^2), samples have that mean and standard deviation."""
    diffusion = PROCESSES[process]()
    x = torch.randn(1, 1, 200, 200, dtype=torch.float64)
    steps = 1000 if name == "ddpm" else 100
    *_, x = SAMPLERS[name](exact_denoiser(diffusion, 0.3, 0.4), x, diffusion.descending_steps(steps),
                           lambda: torch.randn_like(x))
    assert x.mean().item() == pytest.approx(0.3, abs=0.02)
    assert x.std().item() == pytest.approx(0.4, rel=0.03)


@pytest.mark.parametrize("process", PROCESSES)
def test_second_order_is_more_exact(process):
    """On the Gaussian above, ddim's error halves with twice the steps, dpm's is a fraction of it, and heun's is
    quartered, once steps are short."""
    diffusion = PROCESSES[process](T=1000)

    def error(sampler, steps, diffusion=diffusion):
        return abs(deviation(sampler, diffusion, 0.4, steps) - 0.4)

    assert 1.5 < error(ddim, 25) / error(ddim, 50) < 2.5
    assert error(dpm, 50) < error(ddim, 50) / 3
    assert error(heun, 50) < error(ddim, 100) / 2  # of as many network calls
    if process == "flow":
        fine = RectifiedFlow(T=100_000)
        for steps in (50, 100, 200):
            assert 3.8 < error(heun, steps, fine) / error(heun, 2 * steps, fine) < 4.3


@pytest.mark.parametrize("process", PROCESSES)
def test_more_steps_are_more_exact(process):
    """Also where their number does not divide T, and the times are one apart here and two there."""
    counts = (50, 100, 334, 499, 500, 501, 750, 1000)
    found = [0.5 - deviation(ddim, PROCESSES[process](), 0.5, count) for count in counts]
    assert found == sorted(found, reverse=True)
    assert 0 < found[-1] < found[1] / 8


@pytest.mark.parametrize("process", PROCESSES)
def test_heun_takes_two_calls_a_step_and_one_at_the_last(process):
    """And its first step is the mean of two slopes: done by hand on the straight path x / (a + s)."""
    diffusion, asked = PROCESSES[process](), []
    denoiser = exact_denoiser(diffusion, 0.3, 0.4)
    steps, x = diffusion.descending_steps(3), torch.randn(1, 1, 2, 2, dtype=torch.float64)
    states = list(heun(lambda x, t: asked.append((t, x)) or denoiser(x, t), x, steps, None))
    times = [t for t, *_ in steps]
    assert [t for t, _ in asked] == [times[0], times[1], times[1], times[2], times[2]]
    (t, (a, s), (b, r)), y = steps[0], x / sum(steps[0][1])
    span, slope = r / (b + r) - s / (a + s), (y - denoiser(x, t)) * (a + s) / s
    guess = (y + span * slope) * (b + r)
    torch.testing.assert_close(asked[1][1], guess)
    slope = (slope + (guess / (b + r) - denoiser(guess, times[1])) * (b + r) / r) / 2
    torch.testing.assert_close(states[0], (y + span * slope) * (b + r))
    torch.testing.assert_close(states[-1], denoiser(states[-2], times[2]))  # the last step is Euler's


def test_dpm_is_of_second_order_on_every_usual_step():
    """Each step of the spacing trailing is less than twice as long as the one before, in log signal-to-noise."""
    for process, count in itertools.product((DDPM(), RectifiedFlow(), RectifiedFlow(shift=9.0)), (3, 6, 50, 1000)):
        at = [math.log(a / s) for _, (a, s), _ in process.descending_steps(count)]
        spans = [b - a for a, b in itertools.pairwise(at)]
        assert all(b < 1.75 * a for a, b in itertools.pairwise(spans))


def test_x_t_is_never_clamped():
    """Half of the noise lies outside of [-1, 1]; only the predicted image is cut there."""
    process, network, y = DDPM(), Network(), torch.zeros(1, dtype=torch.long)
    for sampler in SAMPLERS.values():
        states = list(sampler(lambda x, t: process.denoise(network, x, t, y, 1, 1.0), torch.full((1, 1, 2, 2), 3.0),
                              process.descending_steps(10), lambda: torch.zeros(1)))
        assert states[0].abs().max() > 1
        assert states[-1].abs().max() <= 1


@pytest.mark.parametrize("process", PROCESSES)
def test_data_without_bounds_are_not_clamped(process):
    """Those of latents; and where there is a bound, the clean image ends just there."""
    process, network, x = PROCESSES[process](), LabelEcho(), torch.full((2, 4, 1, 1), 50.0)
    y = torch.tensor([2, 7])
    free = process.denoise(network, x, 900, y, 1, math.inf)
    torch.testing.assert_close(free, process.to_x_0(network(x, None, y), x, 900))
    for bound in (1.0, 3.0):
        assert torch.equal(process.denoise(network, x, 900, y, 1, bound), free.clamp(-bound, bound))
    assert free.abs().max() > 100


@pytest.mark.parametrize(("T", "steps"), [(1000, 1000), (1000, 1), (1000, 7), (10, 10), (10, 3)])
def test_timesteps(T, steps):
    process = DDPM(T=T)
    timesteps = [t for t, *_ in process.descending_steps(steps)]
    assert [at for _, at, _ in process.descending_steps(steps)] == [process.path[t] for t in timesteps]
    afters = [after for *_, after in process.descending_steps(steps)]
    assert afters == [*(process.path[t] for t in timesteps[1:]), (1.0, 0.0)]
    assert len(set(timesteps)) == steps and timesteps == sorted(timesteps, reverse=True)
    assert timesteps[0] == T - 1 and timesteps[-1] >= 0
    if steps == T:
        assert timesteps == list(range(T))[::-1]


class LabelEcho(torch.nn.Module):
    """A network whose output differs in every channel and tells the label it saw."""

    null_label = 10

    def forward(self, x, t, y):
        return x * 0 + y.view(-1, 1, 1, 1) * torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 4, 1, 1)


@pytest.mark.parametrize("scale", [0, 1, 2.5, -1])
def test_guidance(scale):
    """0 is unconditional, 1 conditional, beyond it extrapolates, over all channels."""
    y = torch.tensor([2, 7])
    output = RectifiedFlow().denoise(LabelEcho(), torch.randn(2, 4, 3, 3), 5, y, scale, math.inf)
    expected = 10 + scale * (y - 10)
    torch.testing.assert_close(output[:, 0, 0, 0], expected.float())
    torch.testing.assert_close(output[:, 3, 0, 0], 1000.0 * expected)


@pytest.mark.parametrize(("scale", "expected"), [(2.5, 2.5 * 3 - 1.5 * 5), (1, 3), (0, 3)])
def test_guidance_away_from_what_something_else_would_be(scale, expected):
    """Without labels the network sees `without`; where only one prediction is asked for, x."""
    class Echo(torch.nn.Module):
        null_label = 10

        def forward(self, x, t, y):
            return x

    x, without = torch.full((2, 1, 3, 3), 3.0), torch.full((2, 1, 3, 3), 5.0)
    output = RectifiedFlow().denoise(Echo(), x, 5, torch.tensor([2, 7]), scale, math.inf, without)
    torch.testing.assert_close(output, torch.full_like(x, expected))


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("process", PROCESSES)
def test_losses_by_hand(process, loss):
    """Of each image alone, with the weights of its own step, on images and on clips."""
    diffusion = PROCESSES[process]()
    for shape in ((3, 1, 4, 4), (3, 2, 2, 4, 6)):
        x_0, noise, t, y = torch.rand(shape) * 2 - 1, torch.randn(shape), torch.tensor([3, 500, 999]), torch.arange(3)
        seen = []

        def network(x, t, y, seen=seen):
            seen.append((x, t, y))
            return 0.5 * x

        losses = diffusion.losses(network, x_0, t, y, noise, loss)
        (x_t, t_seen, y_seen), = seen
        assert torch.equal(t_seen, t) and torch.equal(y_seen, y) and losses.shape == (3,)
        for i in range(3):
            a, s = diffusion.path[t[i]]
            expected_x_t = a * x_0[i] + s * noise[i]
            torch.testing.assert_close(x_t[i], expected_x_t)
            target, scale = (noise[i], 1) if process == "ddpm" else (x_0[i], 1 / max(s, 0.2))
            error = scale * (0.5 * expected_x_t - target)
            torch.testing.assert_close(losses[i], (error.abs() if loss == "l1" else error**2).mean())


def test_posterior_is_that_of_gaussians():
    """Equation 7 against Bayes' rule for x_{t-1}: its prior given x_0 times the likelihood of x_t."""
    process = DDPM()
    for t in (1, 10, 500, 999):
        at, after = process.path[t], process.path[t - 1]
        prior_mean, prior_variance = after[0] * 0.7, after[1] ** 2
        alpha, beta = process.alphas[t].item(), process.betas[t].item()
        precision = 1 / prior_variance + alpha / beta
        mean = (prior_mean / prior_variance + math.sqrt(alpha) * -1.3 / beta) / precision
        ours_mean, ours_variance = posterior(torch.tensor(0.7).double(), torch.tensor(-1.3).double(), at, after)
        assert ours_variance == pytest.approx(1 / precision, rel=1e-6)
        assert ours_mean.item() == pytest.approx(mean, rel=1e-6)


def test_per_image():
    x, values = torch.randn(3, 2, 4, 5, 6), torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(per_image(values, x) * x, torch.stack([x[0], 2 * x[1], 3 * x[2]]))
