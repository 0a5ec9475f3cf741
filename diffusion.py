"""Diffusion processes: how images fade into noise, what the network learns from that, and how noise becomes an image.

    python diffusion.py      writes diffusion.png: a digit that fades into noise, on the path of each process
"""

from support.commands import run

import itertools
import math

import torch

from config import SAMPLERS

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
    spacing: which steps the samplers take, see `descending_steps`.
    spread: where the variance of the step last denoised lies between the two bounds of the sampler `ddpm`.
    """

    spacing, spread = "trailing", 0.0

    def __init__(self, signal, noise, error_scale, device="cpu"):
        self.T = len(signal)
        self.path = [*zip(signal.tolist(), noise.tolist(), strict=True), (1.0, 0.0)]  # t = -1: the clean image
        self.signal, self.noise, self.error_scale = (a.float().to(device) for a in (signal, noise, error_scale))

    def forward_add_noise(self, x, t, noise=None):
        """Adds noise to images x (B, C, *size), up to steps t (B,). Returns x_t and the noise, both like x."""
        noise = torch.randn_like(x) if noise is None else noise
        return per_image(self.signal[t], x) * x + per_image(self.noise[t], x) * noise, noise

    def losses(self, model, x_0, t, y, noise, loss="l2", known=None):
        """What training minimises: the loss of each image (B,).

        mean over an image's values of |error_scale[t] (model(x_t, t, y) - target)|^2    (DDPM, equation 14)

        loss: l2, or l1 for the absolute value instead of the square. known: bool, broadcasts over x_0: what the network
            sees without noise, and need not predict (RaMViD, 2206.07696); not all of an image.
        """
        x_t, _ = self.forward_add_noise(x_0, t, noise)
        x_t = x_t if known is None else torch.where(known, x_0, x_t)
        error = per_image(self.error_scale[t], x_0) * (model(x_t, t, y) - self.target(x_0, noise))
        losses = error.abs() if loss == "l1" else error.square()
        if known is None:
            return losses.flatten(1).mean(dim=1)
        return losses.masked_fill(known, 0).flatten(1).mean(dim=1) / (~known).flatten(1).float().mean(dim=1)

    def predict(self, model, x, t, y, guidance, guided_channels=0):
        """The network's output for x (B, C, *size) at steps t (B,), for labels y (B,), guided.

        guidance: the scale of classifier-free guidance (2207.12598): 0 ignores the labels, 1 follows them, above 1
            exaggerates them. Both predictions go through the network as one batch.
        guided_channels: how many of the C channels, the first ones, are guided; 0 = all. The others take the
            conditional prediction.
        """
        null = torch.full_like(y, model.null_label)
        if guidance in (0, 1):
            return model(x, t, y if guidance else null)
        cond, uncond = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        n = guided_channels or x.shape[1]
        return torch.cat([uncond[:, :n] + guidance * (cond[:, :n] - uncond[:, :n]), cond[:, n:]], dim=1)

    def denoise(self, model, x, t, y, guidance, bound, guided_channels=0):
        """The clean images x_0 that the network sees in x (B, C, *size) at the one step t, for labels y (B,).

        guidance, guided_channels: as for `predict`.
        bound: x_0 is clamped to [-bound, bound], which the data must lie within; inf for data without bounds. x_t is
            never clamped: on the true marginal a good part of its pixels lie outside [-1, 1].
        """
        output = self.predict(model, x, torch.full_like(y, t), y, guidance, guided_channels)
        return self.to_x_0(output, x, t).clamp(-bound, bound)

    def descending_steps(self, count, strength=1.0):
        """`count` of the T steps from T-1 down, for the samplers: a list of (t, (signal, noise) at t, (signal, noise)
        at the next step). The last leads to the clean image. `self.spacing` says which steps: "trailing", evenly spaced
        (2305.08891, table 2), or "linspace", evenly spaced and ending at step 0, as in DiT's official code.

        strength: in (0, 1]: take them from this share of the T steps, the least noisy ones. There may be fewer than
            `count` of these.
        """
        top = max(1, round(strength * self.T))
        count = min(count, top)
        if self.spacing == "linspace" and count > 1:
            strides = itertools.repeat((top - 1) / (count - 1), count - 1)
            steps = [round(t) for t in itertools.accumulate(strides, initial=0.0)][::-1]
        else:
            steps = [round(top - i * top / count) - 1 for i in range(count)]
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


class LearnedVarianceDDPM(DDPM):
    """DDPM whose network also predicts the variance of each step (improved DDPM, 2102.09672). It answers with 2C
    channels: the noise, and v, which should lie in [-1, 1].

    log variance = f log(beta) + (1 - f) log(posterior variance),  f = (v + 1) / 2      (equation 15)
    """

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
        """What training minimises: the loss of the noise, that of `DDPM`, and T / 1000 times the term at t of the
        variational bound in bits per value, which teaches the variance alone (equation 16)."""
        answer = []

        def predict_noise(*inputs):
            answer.extend(model(*inputs).chunk(2, dim=1))
            return answer[0]

        losses = super().losses(predict_noise, x_0, t, y, noise, loss)
        eps, v = answer
        return losses + self.T / 1000 * self.bound_terms(eps.detach() - noise, v, x_0, t)

    def bound_terms(self, error, v, x_0, t):
        """The terms at t (B,) of the variational bound, in bits per value, of each image (B,): the divergence of what
        the network says from the posterior (DDPM, equation 5), and at t = 0 the negative log likelihood of x_0 among
        the 256 levels of pixels (DDPM, equation 13), which DiT's official code takes of latents as well.

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


class RectifiedFlow(Process):
    """A straight path from image to noise (2209.03003, 2210.02747), on which the network predicts the clean image.

    x_t = (1 - tau) x_0 + tau eps,  logit(tau) = logit((t + 1) / (T + 1)) + log(shift)

    A shift above 1 has more of the T steps where there is much noise (2403.03206, equation 23). The loss is that of the
    velocity eps - x_0 = (x_t - x_0) / tau all the same: the error of x_0 divided by tau, but not by less than MIN_TAU.
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

    def matching_losses(self, x_0, t, y, noise, teacher, fake, guidance, guided_channels=0):
        """What a student minimises that draws x_0 (B, C, *size) with a gradient, for labels y (B,), so that what it
        draws spreads as what its teacher draws: a loss of each image (B,), whose gradient is

        (fake(x_t) - teacher(x_t)) / mean |x_0 - teacher(x_t)|      (DMD, 2311.18828, equations 7 and 8)

        over the number of an image's values; half the mean of its squares is the loss's value. Either network knows the
        score of a distribution at noise of t (B,): the teacher, guided, of the one to match, and `fake`, which is
        trained on x_0 all the while (2405.14867), of the student's. Where these are one, the gradient is 0 on average.
        """
        with torch.no_grad():
            x_t, _ = self.forward_add_noise(x_0, t, noise)
            real = self.predict(teacher, x_t, t, y, guidance, guided_channels)
            error = fake(x_t, t, y) - real
            gradient = error / per_image((x_0 - real).abs().flatten(1).mean(dim=1), x_0)
        return (x_0 - (x_0 - gradient).detach()).square().flatten(1).mean(dim=1) / 2


class SiT(Process):
    """The straight path as SiT's official code has it (2401.08740): the network predicts the velocity x_0 - eps, and is
    shown 1 - tau for a time: 0 is noise, 1 the image.

    x_t = (1 - tau) x_0 + tau eps,  tau = (t + 1) / T
    """

    def __init__(self, T=1000, device="cpu"):
        tau = torch.arange(1, T + 1, dtype=torch.float64).div(T).clamp(max=1 - 1e-6)  # `dpm` divides by the signal
        super().__init__(1 - tau, tau, torch.ones(T), device)

    def random_t(self, u):
        """The steps (B,) to train on, from random numbers u (B,) in [0, 1): each step as often as any other."""
        return (u * self.T).long()

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


def build_process(config, device="cpu"):
    """The process of a `Config`."""
    if config.process == "flow":
        process = RectifiedFlow(config.T, config.shift, device)
    elif config.process == "sit":
        process = SiT(config.T, device)
    else:
        kind = LearnedVarianceDDPM if config.variance == "learned" else DDPM
        process = kind(config.T, config.beta_start, config.beta_end, device)
    process.spacing = config.spacing
    return process


# The samplers share one signature and are generators: they yield x after each step, so that the caller owns progress
# bars, strips and animations.
#   denoise(x, t): the clean images x_0 that the network sees in x (B, C, *size) at the one step t
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


def ddpm(denoise, x, steps, noise, spread=lambda: 0.0):
    """Ancestral sampling (DDPM, 2006.11239, algorithm 2): over all T steps or any subset of them.

    spread(): where the variance of the step just denoised lies between its bounds, in logarithms: 0 is the posterior's,
        1 the step's beta (improved DDPM, 2102.09672, equation 15). A number, or one for each value of x.
    """
    for t, at, after in steps:
        x, posterior_variance = posterior(denoise(x, t), x, at, after)
        if posterior_variance:  # beta is (s / s_after)^2 times as large
            x = x + math.sqrt(posterior_variance) * (at[1] / after[1]) ** spread() * noise()
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
SAMPLERS.update(ddpm=ddpm, ddim=ddim, dpm=dpm, heun=heun)


# What to do with a sampler: these share one signature as well, and yield what they start from, then x after each step.
#   process, sampler, count: whose steps to take, how, and how many      denoise, noise: as for the samplers


def from_noise(process, sampler, denoise, noise, count):
    """Draws new images."""
    x = noise()
    yield x
    yield from sampler(denoise, x, process.descending_steps(count), noise)


def edit(process, sampler, denoise, noise, count, picture, strength):
    """SDEdit (2108.01073, algorithm 1): noises `picture`, like x or (1, C, *size), to a share `strength` of the T
    steps, and denoises it from there. What the noise hides is drawn anew; of 1 that is nearly everything."""
    steps = process.descending_steps(count, strength)
    a, s = steps[0][1]
    x = a * picture + s * noise()
    yield x
    yield from sampler(denoise, x, steps, noise)


def inpaint(process, sampler, denoise, noise, count, picture, known, rounds=4):
    """RePaint (2201.09865, algorithm 1): draws what `picture`, like x or (1, C, *size), is not `known` to be.

    The known pixels are put in after each step, as noisy as x is by then. So they shape the next step, but what was
    drawn beside them did not know them: each step is noised again and repeated, `rounds` times in all.
    known: bool, broadcasts over x. x ends with just these pixels. The rest is drawn from about, not from just, the
    conditional distribution: on Gaussians its mean is closer to the pixels' own mean than it should be.
    """
    steps = process.descending_steps(count)
    (a, s), x = steps[0][1], noise()
    x = torch.where(known, a * picture + s * x, x)
    yield x
    for t, (a, s), (a_after, s_after) in steps:
        for left in reversed(range(rounds)):
            *_, x = sampler(denoise, x, [(t, (a, s), (a_after, s_after))], noise)
            x = torch.where(known, a_after * picture + s_after * noise(), x)
            if left:
                x = a / a_after * x + math.sqrt(s**2 - (a / a_after * s_after) ** 2) * noise()
        yield x


def complete(process, sampler, denoise, noise, count, picture, known):
    """Draws what `picture`, like x or (1, C, *size), is not `known` to be, with a network that has learned to (RaMViD,
    2206.07696): it sees what is known without noise. known: bool, broadcasts over x. x ends with just that."""
    def put_in(x):
        return torch.where(known, picture, x)

    x = noise()
    yield put_in(x)
    steps = process.descending_steps(count)
    yield from map(put_in, sampler(lambda x, t: denoise(put_in(x), t), x, steps, noise))


def between(a, b, share):
    """Noise on the way from noise a (share 0) to noise b (share 1), both (B, ...), by shares (B,): on a quarter of a
    circle, where it is standard normal all the way. On a straight line it would be weaker midway."""
    angle = per_image(share, a) * (math.pi / 2)
    return angle.cos() * a + angle.sin() * b


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
