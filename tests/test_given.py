import pytest
import torch

from diffusion import DDPM, SAMPLERS, RectifiedFlow, heun
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


@pytest.mark.parametrize("sampler", SAMPLERS.values())
def test_completions_see_what_is_known(sampler):
    """At every step, without noise; and end with it to the last bit."""
    picture, known, shown = torch.randn(3, 1, 4, 2, 2), (torch.arange(4) < 2)[:, None, None], []

    def denoise(x, t):
        shown.append(x)
        return torch.tanh(x)

    states = list(complete(RectifiedFlow(), sampler, denoise, lambda: torch.randn(3, 1, 4, 2, 2), 5, picture, known))
    assert len(states) == 6 and len(shown) == (9 if sampler is heun else 5)
    assert all(torch.equal(x[:, :, :2], picture[:, :, :2]) for x in (*states, *shown))
    assert not torch.equal(states[-1][:, :, 2:], picture[:, :, 2:])
