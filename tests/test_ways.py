import math

import pytest
import torch
from test_diffusion import PROCESSES, exact_denoiser

from diffusion import SAMPLERS, RectifiedFlow, ddim, dpm, from_noise
from edit.ways import between, edit, inpaint


def last(states):
    *_, x = states
    return x


@pytest.mark.parametrize("strength", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_law_of_an_edited_picture(process, sampler, strength):
    """Of a picture x, on data N(m, std^2), with the exact denoiser. An edit noises it to x_t = a x + s eps, whose
    variance over all data is v = a^2 std^2 + s^2. Then ddim shifts and scales x_t to the data's law, and ddpm draws
    from the posterior N(m + a std^2 / v (x_t - a m), std^2 s^2 / v)."""
    process, m, std, picture = PROCESSES[process](), 0.3, 0.4, torch.full((1, 1, 1, 1), -0.8, dtype=torch.float64)
    a, s = process.path[round(strength * 1000) - 1]
    v = a**2 * std**2 + s**2
    slope = a * std / math.sqrt(v) if sampler == "ddim" else a**2 * std**2 / v
    variance = std**2 * s**2 / v * (1 if sampler == "ddim" else 1 + a**2 * std**2 / v)
    x = last(edit(process, SAMPLERS[sampler], exact_denoiser(process, m, std),
                  lambda: torch.randn(1, 1, 100, 100, dtype=torch.float64), 300, picture, strength))
    assert x.mean().item() == pytest.approx(m + slope * (-0.8 - m), abs=0.025)
    assert x.std().item() == pytest.approx(math.sqrt(variance), rel=0.04)


def test_an_edit_begins_where_its_strength_says():
    process, seen = RectifiedFlow(), []
    picture, noise = torch.rand(1, 1, 2, 2), torch.randn(3, 1, 2, 2)

    def denoise(x, t):
        seen.append(t)
        return x

    states = list(edit(process, ddim, denoise, lambda: noise, 4, picture, 0.5))
    assert seen == [499, 374, 249, 124] and len(states) == 5
    a, s = process.path[499]
    torch.testing.assert_close(states[0], a * picture + s * noise)
    assert [t for t, *_ in RectifiedFlow(T=10).descending_steps(8, 0.3)] == [2, 1, 0]  # there are no more
    assert [t for t, *_ in process.descending_steps(8, 1e-9)] == [0]
    assert process.descending_steps(7, 1.0) == process.descending_steps(7)


def completed(process, sampler, steps, rounds, hidden=0.0):
    """A pixel completed from its neighbour, which is 0.6: both N(0, 0.6^2) of correlation 0.8, 1,000 times."""
    covariance = 0.36 * torch.tensor([[1, 0.8], [0.8, 1]], dtype=torch.float64)
    picture, known = torch.tensor([[0.6, hidden]], dtype=torch.float64), torch.tensor([[True, False]])
    generator = torch.Generator().manual_seed(0)

    def denoise(x, t):
        a, s = process.path[t]
        return x @ (a * covariance @ torch.linalg.inv(a**2 * covariance + s**2 * torch.eye(2))).T

    return last(inpaint(process, SAMPLERS[sampler], denoise, lambda: torch.randn(
        1000, 2, dtype=torch.float64, generator=generator), steps, picture, known, rounds))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("process", PROCESSES)
def test_what_is_completed_depends_on_what_is_known(process, sampler):
    """Of a correlated Gaussian the law given the known is N(0.48, 0.36^2). Rounds bring the mean towards it: on equally
    many calls they do better than more steps, and many come near; without any the mean is about half of it."""
    process = PROCESSES[process]()
    few, plain, many = (completed(process, sampler, *how) for how in ((8, 4), (32, 1), (40, 8)))
    assert all((x[:, 0] == 0.6).all() for x in (few, plain, many))
    few, plain, many = few[:, 1], plain[:, 1], many[:, 1]
    assert 0.15 < plain.mean() < 0.33 and 0.27 < few.mean() < 0.4
    assert few.mean() > plain.mean() + 0.02
    assert many.mean().item() == pytest.approx(0.48, rel=0.15)
    assert many.std().item() == pytest.approx(0.36, rel=0.3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_step_is_taken_four_times_unless_told_otherwise(sampler):
    """From the same noise level, with what is known put in anew, as noisy as the rest is there."""
    process, seen = RectifiedFlow(), []
    picture, known = torch.full((1, 1, 2, 30_000), 0.5), torch.tensor([[True], [False]])

    def denoise(x, t):
        seen.append((t, x[0, 0, 0]))
        return torch.zeros_like(x)

    last(inpaint(process, SAMPLERS[sampler], denoise, lambda: torch.randn(1, 1, 2, 30_000), 3, picture, known))
    assert [t for t, _ in seen] == [t for t, *_ in process.descending_steps(3) for _ in range(4)]
    for t, x in seen:
        signal, noise = process.path[t]
        assert (x.mean().item(), x.std().item()) == pytest.approx((signal * 0.5, noise), abs=0.02)
    assert not torch.equal(seen[0][1], seen[1][1])


def test_what_lies_under_the_mask_does_not_matter():
    process = RectifiedFlow()
    assert torch.equal(completed(process, "dpm", 6, 2), completed(process, "dpm", 6, 2, hidden=500.0))


def test_ways_yield_their_start_and_every_step():
    process, x, picture = RectifiedFlow(), torch.randn(2, 1, 2, 2), torch.rand(1, 1, 2, 2)
    known = torch.tensor([[[[True, False], [False, True]]]])
    a, s = process.path[999]
    starts = {from_noise: x, edit: a * picture + s * x, inpaint: torch.where(known, a * picture + s * x, x)}
    for way, options in ((from_noise, {}), (edit, dict(picture=picture, strength=1)),
                         (inpaint, dict(picture=picture, known=known))):
        states = list(way(process, dpm, lambda x, t: x.clamp(-1, 1), lambda: x, 5, **options))
        assert len(states) == 6 and torch.equal(states[0], starts[way])
    assert torch.equal(states[-1][..., known[0, 0]], picture.expand_as(x)[..., known[0, 0]])


def test_between_is_standard_normal_all_the_way():
    a, b, share = torch.randn(5, 1, 200, 200), torch.randn(5, 1, 200, 200), torch.arange(5) / 4
    x = between(a, b, share)
    assert torch.equal(x[0], a[0])
    torch.testing.assert_close(x[4], b[4], atol=1e-6, rtol=1e-6)
    assert x.mean(dim=(1, 2, 3)).abs().max() < 0.03 and (x.std(dim=(1, 2, 3)) - 1).abs().max() < 0.03
    towards = [torch.corrcoef(torch.stack([x[i].flatten(), b[i].flatten()]))[0, 1] for i in range(5)]
    assert towards == sorted(towards)
