"""The diffusion process: how images are noised, what the network learns from that, and how noise becomes an image."""

import math

import torch


def linear_betas(T, beta_start=1e-4, beta_end=0.02):
    """Variances of the noise added at each step, float64 (T,) (DDPM, 2006.11239, section 4)."""
    return torch.linspace(beta_start, beta_end, T, dtype=torch.float64)


def cosine_betas(T, s=0.008, largest=0.999):
    """Betas whose alphas_cumprod fall as a squared cosine, float64 (T,) (improved DDPM, 2102.09672, equation 17)."""
    t = torch.arange(T + 1, dtype=torch.float64) / T
    alphas_cumprod = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=largest)


class Diffusion:
    """The forward process over T steps and what the network is asked to predict of it.

    x_t = sqrt(alphas_cumprod[t]) x_0 + sqrt(1 - alphas_cumprod[t]) eps      (DDPM, 2006.11239, equation 4)

    schedule: "linear" or "cosine". prediction: "eps" (the noise), or "v" = sqrt(alphas_cumprod) eps -
    sqrt(1 - alphas_cumprod) x_0 (2202.00512), which stays informative where x_t is nearly all noise.
    The schedule is float64 on the CPU; what training gathers from it by t is float32 on `device`.
    """

    def __init__(self, T=1000, schedule="linear", prediction="eps", beta_start=1e-4, beta_end=0.02, device="cpu"):
        self.T, self.prediction = T, prediction
        self.betas = linear_betas(T, beta_start, beta_end) if schedule == "linear" else cosine_betas(T)  # (T,)
        self.alphas = 1 - self.betas
        self.alphas_cumprod = self.alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod[:-1]])
        # The variance of q(x_{t-1} | x_t, x_0) (DDPM, equation 7)
        self.posterior_variance = self.betas * (1 - self.alphas_cumprod_prev) / (1 - self.alphas_cumprod)
        self.signal = self.alphas_cumprod.sqrt().to(device, torch.float32)
        self.noise = (1 - self.alphas_cumprod).sqrt().to(device, torch.float32)

    def forward_add_noise(self, x, t, noise=None):
        """Noises images to steps t in one go: x (B, C, H, W) in [-1, 1], t (B,) in 0..T-1 -> x_t and its noise."""
        noise = torch.randn_like(x) if noise is None else noise
        return self.mix(x, noise, self.signal[t], self.noise[t]), noise

    def target(self, x, t, noise):
        """What the network should answer to `forward_add_noise(x, t, noise)`, (B, C, H, W)."""
        return noise if self.prediction == "eps" else self.mix(noise, x, self.signal[t], -self.noise[t])

    @staticmethod
    def mix(x, y, a, b):
        """a x + b y, with one a and b per image."""
        return a.view(-1, 1, 1, 1) * x + b.view(-1, 1, 1, 1) * y

    def coefficients(self, t):
        """The share of signal and of noise in x_t as two floats; t = -1 is the clean image."""
        alpha_cumprod = self.alphas_cumprod[t].item() if t >= 0 else 1.0
        return math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod)

    def predict_x_0(self, output, x, t, bound):
        """The image that a network output for x_t at the one step t stands for, clamped to [-bound, bound].

        x_t itself is never clamped: on the true marginal a good part of its pixels lie outside [-1, 1].
        """
        a, s = self.coefficients(t)
        x_0 = (x - s * output) / a if self.prediction == "eps" else a * x - s * output
        return x_0.clamp(-bound, bound)

    def timesteps(self, steps):
        """A descending subset of `steps` of the T steps, from T-1 on, evenly spaced (2305.08891, "trailing")."""
        return [round(self.T - i * self.T / steps) - 1 for i in range(steps)]


# The samplers share one signature and are generators: they yield x after each step, so that the caller owns progress
# bars, strips and animations.
#   denoise(x, t): the network's output for x (B, C, H, W) at the one step t
#   x: noise (B, C, H, W) to start from         steps: how many of the T steps to take
#   noise(): fresh noise (B, C, H, W)           bound: images lie in [-bound, bound]; inf for no clamping


def ddpm(diffusion, denoise, x, steps, noise, bound=1.0):
    """Ancestral sampling (DDPM, 2006.11239, algorithm 2) over all T steps or any subset of them."""
    timesteps = diffusion.timesteps(steps)
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        x_0 = diffusion.predict_x_0(denoise(x, t), x, t, bound)
        (a, s), (a_prev, s_prev) = diffusion.coefficients(t), diffusion.coefficients(t_prev)
        alpha = (a / a_prev) ** 2  # of the one long step from t_prev to t
        mean = (a_prev * (1 - alpha) * x_0 + math.sqrt(alpha) * s_prev**2 * x) / s**2  # equation 7
        variance = (1 - alpha) * s_prev**2 / s**2
        x = mean + math.sqrt(variance) * noise() if t_prev >= 0 else mean
        yield x


def ddim(diffusion, denoise, x, steps, noise, bound=1.0, eta=0.0):
    """DDIM (2010.02502, equation 12): eta = 0 is deterministic, eta = 1 as random as `ddpm`."""
    timesteps = diffusion.timesteps(steps)
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        x_0 = diffusion.predict_x_0(denoise(x, t), x, t, bound)
        (a, s), (a_prev, s_prev) = diffusion.coefficients(t), diffusion.coefficients(t_prev)
        eps = (x - a * x_0) / s
        sigma = eta * s_prev / s * math.sqrt(1 - (a / a_prev) ** 2)  # equation 16
        x = a_prev * x_0 + math.sqrt(s_prev**2 - sigma**2) * eps
        if sigma:
            x = x + sigma * noise()
        yield x


def dpm(diffusion, denoise, x, steps, noise, bound=1.0):
    """DPM-Solver++ 2M (2211.01095, algorithm 2): second order, deterministic, one network call a step."""
    timesteps = diffusion.timesteps(steps)
    x_0_last = h_last = None
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        x_0 = diffusion.predict_x_0(denoise(x, t), x, t, bound)
        if t_prev < 0:
            yield x_0
            return
        (a, s), (a_prev, s_prev) = diffusion.coefficients(t), diffusion.coefficients(t_prev)
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
