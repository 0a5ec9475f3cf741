"""Habits of DiT's official code (github.com/facebookresearch/DiT, 2212.09748): a learned variance, steps that end at
t = 0, guidance of the first channels alone; and of SiT's (github.com/willisma/SiT, 2401.08740): a velocity."""

import itertools
import math

import torch

from diffusion import DDPM, Process, RectifiedFlow, per_image, posterior


class Official:
    """Mixed into a `Process`: the habits of DiT's official code.

    spacing: which steps the samplers take: "trailing", or "linspace", evenly spaced and ending at step 0.
    guided_channels: how many channels, the first ones, are guided; 0 = all of x. The others follow the label.
    guidance_high: the share of the T steps that is guided, the least noisy ones (2404.07724); the others follow the
        label. Guidance that leads to given frames takes all steps.
    answers: the network answers with this many times the channels of x. Only the first answer is guided.
    """

    spacing, guided_channels, guidance_high, answers = "trailing", 0, 1.0, 1

    def denoise(self, model, x, t, y, guidance, bound=None, without=None):
        if without is None and t >= round(self.guidance_high * self.T):
            guidance = min(guidance, 1)
        return super().denoise(model, x, t, y, guidance, bound, without)

    def guide(self, cond, uncond, guidance):
        n = self.guided_channels or cond.shape[1] // self.answers
        return torch.cat([super().guide(cond[:, :n], uncond[:, :n], guidance), cond[:, n:]], dim=1)

    def descending_steps(self, count, strength=1.0):
        top = max(1, round(strength * self.T))
        count = min(count, top)
        if self.spacing == "trailing" or count == 1:
            return super().descending_steps(count, strength)
        strides = itertools.repeat((top - 1) / (count - 1), count - 1)
        return self.pairs([round(t) for t in itertools.accumulate(strides, initial=0.0)][::-1])


class OfficialDDPM(Official, DDPM):
    """DDPM with the habits of DiT's official code."""


class OfficialFlow(Official, RectifiedFlow):
    """The straight path with the habits of DiT's official code."""


class LearnedVarianceDDPM(Official, DDPM):
    """DDPM whose network also predicts the variance of each step (improved DDPM, 2102.09672). It answers with 2C
    channels: the noise, and v, which should lie in [-1, 1].

    log variance = f log(beta) + (1 - f) log(posterior variance),  f = (v + 1) / 2      (equation 15)
    """

    answers = 2

    def __init__(self, T=1000, beta_start=1e-4, beta_end=0.02, device="cpu"):
        super().__init__(T, beta_start, beta_end, device)
        before = torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        variance = self.betas * (1 - before) / (1 - self.alphas_cumprod)  # (T,), of equation 7 of DDPM
        variance[0] = variance[1]  # its logarithm would be infinite
        # What an error of the noise amounts to in the mean of the step before (DDPM, equation 11)
        error_to_mean = self.betas / (1 - self.alphas_cumprod).sqrt() / self.alphas.sqrt()
        self.log_posterior, self.log_betas, self.error_to_mean = (
            a.float().to(device) for a in (variance.log(), self.betas.log(), error_to_mean))

    def losses(self, model, x_0, t, y, noise, loss="l2"):
        """What training minimises: the loss of `DDPM`, and T / 1000 times the term at t of the variational bound in
        bits per value, which teaches the variance alone (equation 16)."""
        answer = []

        def predict_noise(*inputs):
            answer.extend(model(*inputs).chunk(2, dim=1))
            return answer[0]

        losses = super().losses(predict_noise, x_0, t, y, noise, loss)
        eps, v = answer
        return losses + self.T / 1000 * self.bound_terms(eps.detach() - noise, v, x_0, t)

    def bound_terms(self, error, v, x_0, t):
        """The terms at t (B,) of the variational bound, in bits per value, of each image (B,): the divergence of what
        the network predicts from the posterior (DDPM, equation 5), and at t = 0 the negative log likelihood of x_0
        among the 256 levels of pixels (DDPM, equation 13), which DiT's official code takes of latents as well.

        error: of the predicted noise, like x_0. v: the network's answer, like x_0.
        """
        low, high, scale = (per_image(a[t], x_0) for a in (self.log_posterior, self.log_betas, self.error_to_mean))
        f = (v + 1) / 2
        log_variance, gap = f * high + (1 - f) * low, scale * error  # gap: x_0 or the posterior's mean, less ours
        divergence = (log_variance - low - 1 + (low - log_variance).exp() + gap.square() / log_variance.exp()) / 2

        upper, lower = (0.5 + torch.erf((gap + half) * (-log_variance / 2).exp() / math.sqrt(2)) / 2
                        for half in (1 / 255, -1 / 255))
        upper, lower = upper.masked_fill(x_0 > 0.999, 1), lower.masked_fill(x_0 < -0.999, 0)  # the outermost levels
        unlikelihood = -(upper - lower).clamp(min=1e-12).log()
        return torch.where(per_image(t, x_0) == 0, unlikelihood, divergence).flatten(1).mean(dim=1) / math.log(2)

    def to_x_0(self, output, x, t):
        """The clean image that the network's output stands for, as in `DDPM`; keeps f in `self.spread`."""
        eps, v = output.chunk(2, dim=1)
        self.spread = (v + 1) / 2
        return super().to_x_0(eps, x, t)


class SiT(Official, Process):
    """The straight path as SiT's official code has it (2401.08740): the network predicts the velocity x_0 - eps, and is
    shown 1 - tau for a time: 0 is noise, 1 the image.

    x_t = (1 - tau) x_0 + tau eps,  tau = (t + 1) / T
    """

    def __init__(self, T=1000, device="cpu"):
        tau = torch.arange(1, T + 1, dtype=torch.float64).div(T).clamp(max=1 - 1e-6)  # `dpm` divides by the signal
        super().__init__(1 - tau, tau, torch.ones(T), device)

    random_t = DDPM.random_t

    def target(self, x_0, noise):
        """What the network should answer when shown x_t, like x_0."""
        return x_0 - noise

    def to_x_0(self, output, x, t):
        """The clean image that the network's output for x at the one step t stands for."""
        return x + self.path[t][1] * output

    def losses(self, model, *args, **options):
        return super().losses(lambda x, t, y: model(x, 1 - (t + 1) / self.T, y), *args, **options)

    def predict(self, model, x, t, *args):
        return super().predict(model, x, 1 - (t + 1) / self.T, *args)


def ddpm(process, denoise, x, steps, noise):
    """`diffusion.ddpm` with the variance that the network of a `LearnedVarianceDDPM` predicts: in logarithms it lies
    between the posterior's (`spread` 0) and the step's beta (1) (improved DDPM, 2102.09672, equation 15)."""
    for t, at, after in steps:
        x, variance = posterior(denoise(x, t), x, at, after)
        if variance:  # beta is (s / s_after)^2 times as large
            x = x + math.sqrt(variance) * (at[1] / after[1]) ** process.spread * noise()
        yield x
