"""Diffusion processes: how images fade into noise, what the network learns from that, and how noise becomes an image.

    python diffusion.py      writes diffusion.png: a digit that fades into noise, on the path of each process
"""

from support.commands import run

import itertools
import math

import torch

MIN_TAU = 0.2  # the velocity's loss is not divided by less: nearly clean images teach little


def per_image(values, x):
    """values (B,), one for each image of x (B, ...), in a shape that multiplies x."""
    return values.view(-1, *[1] * (x.ndim - 1))


class Process:
    """A path from image to noise in T steps, and what the network predicts on it.

    x_t = signal[t] x_0 + noise[t] eps,  eps ~ N(0, 1)

    x_0 (B, C, *size) is the clean image, in [-1, 1] if it holds pixels. t is a step 0..T-1; 0 has the least noise.
    signal, noise (T,), float64: the shares of image and noise in x_t.
    error_scale (T,), float64: the loss multiplies the network's error at t by it.
    bound: every predicted x_0 is clamped to [-bound, bound], which the data must lie within.
    """

    bound = 1.0

    def __init__(self, signal, noise, error_scale, device="cpu"):
        self.T = len(signal)
        self.path = [*zip(signal.tolist(), noise.tolist(), strict=True), (1.0, 0.0)]  # t = -1: the clean image
        self.signal, self.noise, self.error_scale = (a.float().to(device) for a in (signal, noise, error_scale))

    def forward_add_noise(self, x, t, noise=None):
        """Adds noise to images x (B, C, *size), up to steps t (B,). Returns x_t and the noise, both like x."""
        noise = torch.randn_like(x) if noise is None else noise
        return per_image(self.signal[t], x) * x + per_image(self.noise[t], x) * noise, noise

    def losses(self, model, x_0, t, y, noise, loss="l2"):
        """What training minimises: the loss of each image (B,).

        mean over an image's values of |error_scale[t] (model(x_t, t, y) - target)|^2    (DDPM, equation 14)

        loss: l2, or l1 for the absolute value instead of the square.
        """
        x_t, _ = self.forward_add_noise(x_0, t, noise)
        error = per_image(self.error_scale[t], x_0) * (model(x_t, t, y) - self.target(x_0, noise))
        return (error.abs() if loss == "l1" else error.square()).flatten(1).mean(dim=1)

    def predict(self, model, x, t, y, guidance, without=None):
        """The network's output for x (B, C, *size) at steps t (B,), for labels y (B,), guided.

        guidance: the scale of classifier-free guidance (2207.12598): 0 ignores the labels, 1 follows them, above 1
            exaggerates them. Both predictions go through the network as one batch.
        without: what the prediction without labels sees instead of x.
        """
        null = torch.full_like(y, model.null_label)
        if guidance in (0, 1):
            return model(x, t, y if guidance else null)
        cond, uncond = model(torch.cat([x, x if without is None else without]), torch.cat([t, t]),
                             torch.cat([y, null])).chunk(2)
        return self.guide(cond, uncond, guidance)

    def guide(self, cond, uncond, guidance):
        """The guided prediction, from those with and without labels, like either (2207.12598, equation 6)."""
        return uncond + guidance * (cond - uncond)

    def denoise(self, model, x, t, y, guidance, bound=None, without=None):
        """The clean images x_0 that the network sees in x (B, C, *size) at the one step t, for labels y (B,).

        guidance, without: as for `predict`. bound: instead of `self.bound`. x_t is never clamped: on the true marginal
        a good part of its pixels lie outside [-1, 1].
        """
        output = self.predict(model, x, torch.full((len(x),), t, device=x.device), y, guidance, without)
        bound = self.bound if bound is None else bound
        return self.to_x_0(output, x, t).clamp(-bound, bound)

    def descending_steps(self, count, strength=1.0):
        """`count` of the T steps from T-1 down, evenly spaced (2305.08891, table 2, "trailing"), for the samplers: a
        list of (t, (signal, noise) at t, (signal, noise) at the next step). The last leads to the clean image.

        strength: in (0, 1]: take them from this share of the T steps, the least noisy ones. There may be fewer than
            `count` of these.
        """
        top = max(1, round(strength * self.T))
        count = min(count, top)
        return self.pairs([round(top - i * top / count) - 1 for i in range(count)])

    def pairs(self, steps):
        """These steps as the list that `descending_steps` returns."""
        return [(t, self.path[t], self.path[after]) for t, after in itertools.pairwise([*steps, -1])]


class DDPM(Process):
    """The process of DDPM (2006.11239): betas rise linearly, and the network predicts the noise.

    x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps      (equation 4)
    """

    def __init__(self, T=1000, beta_start=1e-4, beta_end=0.02, device="cpu"):
        self.betas = torch.linspace(beta_start, beta_end, T, dtype=torch.float64)  # (T,), of section 4
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        super().__init__(self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt(), torch.ones(T), device)

    def random_t(self, u):
        """The steps (B,) to train on, from random numbers u (B,) in [0, 1): each step as often as any other."""
        return (u * self.T).long()

    def target(self, x_0, noise):
        """What the network should answer when shown x_t, like x_0."""
        return noise

    def to_x_0(self, output, x, t):
        """The clean image that the network's output for x at the one step t stands for (equation 4, solved)."""
        signal, noise = self.path[t]
        return (x - noise * output) / signal


class RectifiedFlow(Process):
    """A straight path from image to noise (2209.03003, 2210.02747), on which the network predicts the clean image.

    x_t = (1 - tau) x_0 + tau eps,  logit(tau) = logit((t + 1) / (T + 1)) + log(shift)

    A shift above 1 places more of the T steps at high noise (2403.03206, equation 23). The loss is still that of the
    velocity eps - x_0 = (x_t - x_0) / tau: the error of x_0 divided by tau, but not by less than MIN_TAU.
    A network whose tokens are not much wider than a patch has pixels predicts images more easily than velocities
    (2511.13720).
    """

    def __init__(self, T=1000, shift=2.2, device="cpu"):
        tau = (torch.logit(torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)) + math.log(shift)).sigmoid()
        super().__init__(1 - tau, tau, 1 / tau.clamp(min=MIN_TAU), device)

    def random_t(self, u):
        """The steps (B,) to train on, from random numbers u (B,) in [0, 1): logit-normal, most often in the midst of
        the T (2403.03206, section 3.1)."""
        normal = math.sqrt(2) * torch.erfinv(2 * u - 1)
        return (normal.sigmoid() * self.T).long().clamp(max=self.T - 1)

    def target(self, x_0, noise):
        """What the network should answer when shown x_t, like x_0."""
        return x_0

    def to_x_0(self, output, x, t):
        """The clean image that the network's output stands for: the output."""
        return output


# The samplers share one signature and are generators: they yield x after each step, so that the caller owns progress
# bars, strips and animations.
#   denoise(x, t): the clean images x_0 that the network sees in x (B, C, *size) at the one step t; see
#       `Process.denoise`
#   x: noise (B, C, *size) to start from      steps: of `Process.descending_steps`
#   noise(): fresh noise like x


def posterior(x_0, x_t, at, after):
    """Mean and variance of x at the step after t, given x_t and x_0 (DDPM, equation 7).

    at, after: (signal, noise) at the two steps, which need not be neighbours.
    """
    (a, s), (a_after, s_after) = at, after
    beta = s**2 - (a / a_after * s_after) ** 2  # the variance that the one long step adds on the way to t
    mean = (a_after * beta * x_0 + a / a_after * s_after**2 * x_t) / s**2
    return mean, beta * s_after**2 / s**2


def ddpm(denoise, x, steps, noise):
    """Ancestral sampling (DDPM, 2006.11239, algorithm 2): over all T steps or any subset of them."""
    for t, at, after in steps:
        x, variance = posterior(denoise(x, t), x, at, after)
        if variance:
            x = x + math.sqrt(variance) * noise()
        yield x


def ddim(denoise, x, steps, noise, eta=0.0):
    """DDIM (2010.02502, equation 12): eta = 0 is deterministic, eta = 1 as random as `ddpm`.

    With eta = 0 on a `RectifiedFlow` this is Euler's method.
    """
    for t, (a, s), (a_after, s_after) in steps:
        x_0 = denoise(x, t)
        eps = (x - a * x_0) / s
        sigma = eta * s_after / s * math.sqrt(s**2 - (a / a_after * s_after) ** 2)  # equation 16
        x = a_after * x_0 + math.sqrt(s_after**2 - sigma**2) * eps
        if sigma:
            x = x + sigma * noise()
        yield x


def dpm(denoise, x, steps, noise):
    """DPM-Solver++ 2M (2211.01095, algorithm 2): second order, deterministic, one network call a step.

    A step more than twice as long as the one before is of first order. It would extrapolate too far: so would the step
    to t = 0 of the spacing "linspace".
    """
    x_0_last = h_last = None
    for t, (a, s), (a_after, s_after) in steps:
        x_0 = denoise(x, t)
        if not s_after:  # the clean image
            yield x_0
            return
        h = math.log(a_after / s_after) - math.log(a / s)  # the step in log signal-to-noise
        first_order = x_0_last is None or h > 2 * h_last
        D = x_0 if first_order else x_0 + h / (2 * h_last) * (x_0 - x_0_last)
        x = s_after / s * x - a_after * math.expm1(-h) * D
        x_0_last, h_last = x_0, h
        yield x


def heun(denoise, x, steps, noise):
    """Heun's method (EDM, 2206.00364, algorithm 1): second order, deterministic, two network calls a step, but one at
    the last.

    It moves x / (a + s), which lies on a straight path from image to noise, by the mean of the velocities eps - x_0 at
    both ends of a step.
    """
    def velocity(x, t, a, s):
        return (x - (a + s) * denoise(x, t)) / s

    for (t, (a, s), (a_after, s_after)), following in itertools.pairwise([*steps, None]):
        v, span = velocity(x, t, a, s), s_after / (a_after + s_after) - s / (a + s)
        end = (a_after + s_after) * (x / (a + s) + span * v)  # Euler's
        if following:
            v = (v + velocity(end, following[0], a_after, s_after)) / 2
            end = (a_after + s_after) * (x / (a + s) + span * v)
        x = end
        yield x


# All that knows a sampler's name takes it from here: settings, flags and their help, tables, counts of network calls.
SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm": dpm, "heun": heun}


def from_noise(process, sampler, denoise, noise, count):
    """Draws new images in `count` steps of a sampler: yields the noise, then x after each step."""
    x = noise()
    yield x
    yield from sampler(denoise, x, process.descending_steps(count), noise)


def main():
    from support.pictures import grid, save_picture

    from dataset import load_dataset, to_float, to_uint8

    torch.manual_seed(0)
    image = to_float(load_dataset("mnist").images[:1])
    noise, steps, rows = torch.randn_like(image), torch.linspace(0, 999, 11).long(), []
    for process in (DDPM(), RectifiedFlow()):
        x_t, _ = process.forward_add_noise(image.expand(11, -1, -1, -1), steps, noise)
        rows.append(to_uint8(x_t))
        print(f"{type(process).__name__}: what is left of the image at t = "
              + ", ".join(f"{t}: {process.signal[t]:.2f}" for t in steps.tolist()))
    save_picture("diffusion.png", grid(torch.cat(rows), columns=11, captions=[f"t = {t}" for t in steps.tolist()]))
    print("diffusion.png: one digit and one noise, on the path of DDPM (above) and of the rectified flow (below)")


if __name__ == "__main__":
    run(main)
