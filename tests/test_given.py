import pytest
import torch

from diffusion import DDPM, SAMPLERS, RectifiedFlow, ddpm, heun
from video.given import complete, losses


class Seen(torch.nn.Module):
    """A network that keeps what it was shown, and answers with it."""

    null_label = 10

    def forward(self, x, t, y):
        self.x = x
        return 0.5 * x


@pytest.mark.parametrize("process", [DDPM(), RectifiedFlow()])
@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_what_is_known_is_seen_without_noise_and_not_learned(process, loss):
    x_0, noise = torch.randn(2, 6, 1, 4, 3, 3)
    t, y = torch.tensor([0, 99, 400, 600, 900, 999]), torch.zeros(6, dtype=torch.int64)
    known = torch.rand(6, 1, 4, 1, 1) < 0.5
    known[:, :, 0], known[0] = False, False
    model = Seen()
    found = losses(process, model, x_0, t, y, noise, known, loss)
    x_t, _ = process.forward_add_noise(x_0, t, noise)
    expanded = known.expand_as(x_0)
    assert torch.equal(model.x[expanded], x_0[expanded]) and torch.equal(model.x[~expanded], x_t[~expanded])
    error = process.error_scale[t].view(-1, 1, 1, 1, 1) * (0.5 * x_t - process.target(x_0, noise))
    error = error.abs() if loss == "l1" else error.square()
    for i in range(6):
        torch.testing.assert_close(found[i], error[i][~expanded[i]].mean())
    torch.testing.assert_close(found[0], process.losses(model, x_0, t, y, noise, loss)[0])


def test_what_errs_alike_in_all_frames_costs_nothing_in_motion():
    """Of frames that are not known: an error in the second of four frames differs twice, in the last once."""
    process, x_0, t, y = RectifiedFlow(), torch.zeros(4, 1, 4, 2, 3), torch.full((4,), 300), torch.zeros(4)
    error = torch.zeros_like(x_0)
    error[0], error[1, :, 1], error[2, :, 3], error[3, :, 1:] = 1, 1, 1, 1
    known = torch.zeros(4, 1, 4, 1, 1, dtype=torch.bool)
    known[3, :, 0] = True

    def added(loss):
        with_term, without = (losses(process, lambda *_: error, x_0, t, y, x_0, known, loss, motion) for motion in
                              (0.5, 0.0))
        return with_term - without

    scale = process.error_scale[300]
    for loss, size in (("l1", scale), ("l2", scale**2)):
        torch.testing.assert_close(added(loss), 0.5 * size * torch.tensor([0, 2 / 4, 1 / 4, 1 / 3]))


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_completions_see_what_is_known(sampler):
    """At every step, without noise; and end with it to the last bit. Guidance leads away from what follows from it
    where it is as noisy as the rest of x."""
    picture, known, shown = torch.randn(3, 1, 4, 2, 2), (torch.arange(4) < 2)[:, None, None], []
    process, noise = RectifiedFlow(), torch.randn(3, 1, 4, 2, 2)

    def denoise(x, t, without):
        shown.append(x)
        noisy = process.path[t][0] * picture + process.path[t][1] * noise
        if sampler is not ddpm:  # which adds fresh noise
            torch.testing.assert_close(without[:, :, :2], noisy[:, :, :2], atol=0.01, rtol=0)
        assert torch.equal(without[:, :, 2:], x[:, :, 2:]) and not torch.equal(without, x)
        return torch.tanh(x)

    states = list(complete(process, sampler, denoise, lambda: noise, 5, picture, known))
    assert len(states) == 6 and len(shown) == (9 if sampler is heun else 5)
    assert all(torch.equal(x[:, :, :2], picture[:, :, :2]) for x in (*states, *shown))
    assert not torch.equal(states[-1][:, :, 2:], picture[:, :, 2:])
