"""The diffusion process: how images are noised, what the network learns from that, and how noise becomes an image."""

import itertools
import math

import torch


def linear_betas(T, beta_start=1e-4, beta_end=0.02):
    """Variances of the noise added at each step, float64 (T,) (DDPM, 2006.11239, section 4)."""
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)


class Diffusion:
    """The process of DDPM (2006.11239): over T steps an image fades into noise, and the network predicts the noise.

    x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps      (equation 4)

    The schedule is float64 on the CPU; what training gathers from it by t is float32 on `device`.
    """

    def __init__(self, T=1000, beta_start=1e-4, beta_end=0.02, device="cpu"):
        self.T = T
        self.betas = linear_betas(T, beta_start, beta_end)                    # (T,)
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        # The variance of q(x_{t-1} | x_t, x_0) (equation 7)
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.set_path(self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt(), torch.ones(T), device)

    def set_path(self, signal, noise, error_scale, device):
        """What the classes differ in, all (T,), float64: the shares of the image and of the noise in x_t, and what the
        network's error at t is multiplied with to give the loss."""
        self.path = [*zip(signal.tolist(), noise.tolist(), strict=True), (1.0, 0.0)]  # t = -1: the clean image
        self.signal, self.noise, self.error_scale = (a.float().to(device) for a in (signal, noise, error_scale))

    def forward_add_noise(self, x, t, noise=None):
        """Noises images to steps t in one go: x (B, C, H, W) in [-1, 1], t (B,) in 0..T-1 -> x_t and its noise."""
        noise = torch.randn_like(x) if noise is None else noise
        return self.signal[t].view(-1, 1, 1, 1) * x + self.noise[t].view(-1, 1, 1, 1) * noise, noise

    def random_t(self, u):
        """The steps (B,) to train on, from random numbers u (B,) in [0, 1): each step as often as any other."""
        return (u * self.T).long()

    def target(self, x, noise):
        """What the network should answer when shown x_t, (B, C, H, W)."""
        return noise

    def predict_x_0(self, output, x, t, bound):
        """The image that a network output for x_t at the one step t stands for, clamped to [-bound, bound].

        x_t itself is never clamped: on the true marginal a good part of its pixels lie outside [-1, 1].
        """
        signal, noise = self.path[t]
        return ((x - noise * output) / signal).clamp(-bound, bound)

    def timesteps(self, steps):
        """A descending subset of `steps` of the T steps, from T-1 on, evenly spaced (2305.08891, "trailing")."""
        return [round(self.T - i * self.T / steps) - 1 for i in range(steps)]


class RectifiedFlow(Diffusion):
    """A straight path from image to noise (2209.03003, 2210.02547), on which the network predicts the clean image.

    x_t = (1 - tau) x_0 + tau eps, logit(tau) = logit((t + 1) / (T + 1)) + log(shift)

    A shift above 1 has more of the T steps where there is much noise (2403.03206, equation 23). The steps to train on
    are logit-normal: most often in the midst of the T (section 3.1 there).
    The loss is that of the velocity eps - x_0 = (x_t - x_0) / tau all the same: the error of x_0, divided by tau, or by
    0.2 where tau is smaller: nearly clean images teach little. A network whose tokens are not much wider than a patch
    has pixels predicts images more easily than velocities (2511.13720).
    """

    def __init__(self, T=1000, shift=2.2, device="cpu"):
        self.T = T
        tau = (torch.logit(torch.arange(1, T + 1, dtype=torch.float64) / (T + 1)) + math.log(shift)).sigmoid()
        self.set_path(1 - tau, tau, 1 / tau.clamp(min=0.2), device)

    def random_t(self, u):
        return ((math.sqrt(2) * torch.erfinv(2 * u - 1)).sigmoid() * self.T).long().clamp(max=self.T - 1)

    def target(self, x, noise):
        return x

    def predict_x_0(self, output, x, t, bound):
        return output.clamp(-bound, bound)


# The samplers share one signature and are generators: they yield x after each step, so that the caller owns progress
# bars, strips and animations.
#   denoise(x, t): the network's output for x (B, C, H, W) at the one step t
#   x: noise (B, C, H, W) to start from         steps: how many of the T steps to take
#   noise(): fresh noise (B, C, H, W)           bound: images lie in [-bound, bound]; inf for no clamping


def ddpm(diffusion, denoise, x, steps, noise, bound=1.0):
    """Ancestral sampling (DDPM, 2006.11239, algorithm 2) over all T steps or any subset of them."""
    timesteps = diffusion.timesteps(steps)
    for t, t_prev in itertools.pairwise([*timesteps, -1]):
        x_0 = diffusion.predict_x_0(denoise(x, t), x, t, bound)
        (a, s), (a_prev, s_prev) = diffusion.path[t], diffusion.path[t_prev]
        beta = s**2 - (a / a_prev * s_prev) ** 2  # the noise that the one long step from t_prev to t adds
        mean = (a_prev * beta * x_0 + a / a_prev * s_prev**2 * x) / s**2  # equation 7
        x = mean + math.sqrt(beta) * s_prev / s * noise() if t_prev >= 0 else mean
        yield x


def ddim(diffusion, denoise, x, steps, noise, bound=1.0, eta=0.0):
    """DDIM (2010.02502, equation 12): eta = 0 is deterministic, eta = 1 as random as `ddpm`.

    With eta = 0 on a `RectifiedFlow` this is Euler's method.
    """
    timesteps = diffusion.timesteps(steps)
    for t, t_prev in itertools.pairwise([*timesteps, -1]):
        x_0 = diffusion.predict_x_0(denoise(x, t), x, t, bound)
        (a, s), (a_prev, s_prev) = diffusion.path[t], diffusion.path[t_prev]
        eps = (x - a * x_0) / s
        sigma = eta * s_prev / s * math.sqrt(s**2 - (a / a_prev * s_prev) ** 2)  # equation 16
        x = a_prev * x_0 + math.sqrt(s_prev**2 - sigma**2) * eps
        if sigma:
            x = x + sigma * noise()
        yield x


def dpm(diffusion, denoise, x, steps, noise, bound=1.0):
    """DPM-Solver++ 2M (2211.01095, algorithm 2): second order, deterministic, one network call a step."""
    timesteps = diffusion.timesteps(steps)
    x_0_last = h_last = None
    for t, t_prev in itertools.pairwise([*timesteps, -1]):
        x_0 = diffusion.predict_x_0(denoise(x, t), x, t, bound)
        if t_prev < 0:
            yield x_0
            return
        (a, s), (a_prev, s_prev) = diffusion.path[t], diffusion.path[t_prev]
        h = math.log(a_prev / s_prev) - math.log(a / s)  # the step in log signal-to-noise
        D = x_0 if x_0_last is None else x_0 + h / (2 * h_last) * (x_0 - x_0_last)
        x = s_prev / s * x - a_prev * math.expm1(-h) * D
        x_0_last, h_last = x_0, h
        yield x


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm": dpm}


def guided(model, y, scale):
    """Classifier-free guidance (2207.12598): a `denoise` for the samplers that follows labels y (B,).

    scale 0 ignores the labels, 1 follows them, above 1 exaggerates them. Both predictions of a step go through the
    network as one batch.
    """
    null = torch.full_like(y, model.null_label)

    def denoise(x, t):
        t = torch.full_like(y, t)
        if scale in (0, 1):
            return model(x, t, y if scale else null)
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        return uncond + scale * (cond - uncond)

    return denoise
