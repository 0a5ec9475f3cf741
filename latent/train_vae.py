"""Trains a small VAE from nothing.

    python -m latent.train_vae --dataset folder --data-dir X     ten minutes on two CPU cores, for 64 x 64 images

What it minimises is `losses`; the loop is that of train.py.
"""

from support.commands import Parser, UserError, add_device_flag, end_stopped, flag_words, run, some_path
from support.folders import has_test_part
from support.pictures import grid, psnr, save_picture, warned
from support.settings import Settings, add_flags, flag, given_flags
from support.sizes import show_size

import argparse
import dataclasses
import functools
import math
import shlex
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import train as root
from dataset import Dataset, to_float, to_uint8
from latent.config import LatentConfig
from latent.sprites import load_images
from latent.vae import CONFIG, VAE, WEIGHTS, save_vae

HELD_OUT = 1000      # test images, at most
MEASURED = 4000      # training images, at most, that the statistics of the latents are measured on
DECODER_ALONE = 0.2  # share of the steps, the last ones, in which the latents stay and the decoder alone learns


def like(name):
    """A field like that of `LatentConfig`."""
    field = LatentConfig.__dataclass_fields__[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


def next_command(config, out):
    """The command that learns the latents of the VAE in the folder `out`."""
    data_dir = flag_words("--data-dir", config.data_dir) if config.data_dir else []
    return "python -m latent.train_dit " + shlex.join([*flag_words("--vae", out), "--dataset", config.dataset,
                                                       *data_dir, "--image-size", show_size(config.image_size)])


def commands(config, out, script):
    """What the page of a run says to do with it; see `record.page.run_commands`."""
    return {"Go on where it was stopped:": f"python {script} {shlex.join(flag_words('--out', out))} --resume",
            "Learn its latents, once it is finished:": next_command(config, out)}


@dataclasses.dataclass(frozen=True)
class VAEConfig(Settings):
    """All settings of a VAE and its training. They answer the questions that a `Config` answers. Raises `UserError`
    when a value has the wrong type or is out of range."""

    kind, trained_by = "vae", "-m latent.train_vae"
    CHANGEABLE = ("steps", "data_dir", "log_every", "sample_every", "checkpoint_every")
    T = num_classes = 1  # it sees no noise, and no labels
    optimizer, weight_decay, grad_clip, lr_decay, ema_decay = "muon", 0.0, 1.0, "linear", 0.995
    adamw_betas = (0.9, 0.95)
    page = (("network", "VAE"), ("commands", commands),
            ("columns", "held-out images, and below each what its latents decode to"))

    # Data
    dataset: str = like("dataset")
    data_dir: str = like("data_dir")
    image_size: tuple = like("image_size")
    channels: int = like("channels")
    ground: str = like("ground")

    # Network
    factor: int = flag(0, "a latent covers factor x factor pixels; 0 = 4 for images of up to 32 pixels, else 8", 0,
                       256)
    latent_channels: int = flag(8, "channels of a latent", 1, 256)
    # Each level but the last halves the image; patches do the rest of the factor
    widths: tuple = dataclasses.field(default=(96, 48), metadata=dict(read=tuple))
    layers_per_block: int = flag(1, "residual blocks of a level of the encoder; the decoder has one more", 1, 16)

    # Loss
    noise: float = flag(0.1, "standard deviation of the posterior; 0 = learned", 0, 10)
    kl: float = flag(0.02, "weight of the KL divergence of a latent from a standard normal", 0, 10)

    # Training
    steps: int = flag(10_000, "optimizer steps", 1, 100_000_000)
    batch_size: int = flag(16, "images per step", 1, 1_000_000)
    lr: float = flag(6e-3, "peak learning rate, which decays to zero", 0, 10)
    warmup: int = like("warmup")
    precision: str = like("precision")
    compile: bool = False
    seed: int = like("seed")
    log_every: int = like("log_every")
    sample_every: int = flag(1000, "steps between two pictures of reconstructions", 1, 100_000_000)
    checkpoint_every: int = like("checkpoint_every")

    def check(self):
        self.check_size("image_size", self.image_size)
        if not 1 <= len(self.widths) <= 8 or not all(type(n) is int and 1 <= n <= 8192 for n in self.widths):
            raise UserError(f"widths are {self.widths!r:.80}, but must be 1 to 8 numbers between 1 and 8192")

    @property
    def halvings(self):
        """How many times smaller the levels make the image; patches do the rest of the factor."""
        return 2 ** (len(self.widths) - 1)

    @property
    def latent_shape(self):
        """The shape (C, h, w) of an image's latents."""
        return (self.latent_channels, *(side // self.factor for side in self.image_size))

    def resolve(self, data):
        """These settings, completed with those that the data decide. Raises `UserError`."""
        C, *size = data.shape
        factor = self.factor or max(4 if max(size) <= 32 else 8, self.halvings)
        possible = range(self.halvings, min(256, 16 * self.halvings) + 1, self.halvings)
        if factor not in possible or any(side % factor for side in size):
            fit = [n for n in possible if not any(side % n for side in size)]
            near = [max(1, round(side / factor)) * factor for side in size]
            ways = [*([f"--factor to one of {fit}"] if fit else []),
                    *([f"--image-size to {show_size(near)}"] if factor in possible else [])]
            raise UserError(f"images of {show_size(size)} cannot become latents {factor} times smaller with "
                            f"{len(self.widths)} widths, each but the last of which halves them, and patches of up to "
                            f"16 pixels: set {' or '.join(ways) or 'fewer --widths'}")
        return dataclasses.replace(self, dataset=data.name, image_size=tuple(size), channels=C, factor=factor)

    def describe(self, model):
        numbers, latents = self.channels * math.prod(self.image_size), math.prod(self.latent_shape)
        return f"{numbers:,} numbers of an image become {' x '.join(map(str, self.latent_shape))} = {latents:,}"

    def build_model(self):
        """An untrained `VAE`; its posterior has the standard deviation `noise`, if that is set."""
        patch_size = self.factor // self.halvings
        channels = self.channels * patch_size**2
        vae = VAE(channels, channels, self.latent_channels, self.widths, self.layers_per_block,
                  norm_num_groups=math.gcd(16, *self.widths), mid_block_add_attention=False, patch_size=patch_size)
        if self.noise:
            with torch.no_grad():
                vae.quant_conv.weight[self.latent_channels:] = 0
                vae.quant_conv.bias[self.latent_channels:] = 2 * math.log(self.noise)
        return vae

    def build_process(self, device="cpu"):
        """None: nothing is diffused."""

    def open_data(self, device):
        """The images, a `HeldOut`. Those to test on are the test part. A folder that has none, and too few images of
        each class to hold some out, gives every 20th image. Raises `UserError`."""
        how = self.image_size, self.channels, self.ground
        data = load_images(self.dataset, self.data_dir, True, *how)
        images, labels = data.images, data.labels
        if data.held_out or has_test_part(data.name, self.data_dir):
            tests = load_images(data.name, self.data_dir, False, *how).images
        elif len(images) < 2:
            raise UserError(f"{self.data_dir} holds a single image: training needs some, and others to test on")
        else:
            apart = torch.arange(len(images)) % 20 == 0
            images, labels, tests = images[~apart], labels[~apart], images[apart]
        return HeldOut(data.name, images, labels, data.classes, tests=some(tests, HELD_OUT))


@dataclasses.dataclass(frozen=True)
class HeldOut(Dataset):
    """A `Dataset` to learn from, and images to test on, uint8 (N, C, H, W)."""

    tests: torch.Tensor = None

    @property
    def summary(self):
        C, height, width = self.shape
        return (f"{self.name}: {len(self.images):,} images of {height} x {width} to train, {len(self.tests):,} to "
                f"test, {'grey' if C == 1 else 'colour'}")


def some(images, count):
    """At most `count` of the images, evenly spaced."""
    return images[torch.linspace(0, len(images) - 1, min(count, len(images))).round().long()]


# What it learns


def reconstruction_loss(made, x):
    """The mean absolute error of images `made` of x, each (B, C, H, W), and half of that of their averages over 2 x 2
    and 4 x 4 pixels, which see the shapes that single pixels do not. One for each image, (B,)."""
    loss = 0
    for size, weight in ((1, 1.0), (2, 0.5), (4, 0.5)):
        if min(x.shape[2:]) >= size:
            loss = loss + weight * F.avg_pool2d(made - x, size).abs().mean(dim=(1, 2, 3))
    return loss


def kl_divergence(mean, std):
    """The KL divergence of normal numbers from standard normal ones, each (B, ...): the mean over an image's, (B,)."""
    return ((mean**2 + std**2 - 1) / 2 - std.log()).flatten(1).mean(dim=1)


def losses(run, x, noise, alone):
    """What training minimises, (B,), for images x float (B, C, H, W) in [-1, 1]: the loss of their reconstruction, and
    `kl` times the divergence of their latents.

    noise: standard normal, of the latents' shape. alone: the decoder learns alone.
    """
    config, worker, dtype = run.config, run.worker, run.worker.quant_conv.weight.dtype
    with torch.set_grad_enabled(not alone):
        mean, std = (part.float() for part in worker.posterior(x.to(dtype)))    # each (B, C_latent, h, w)
    std = std.detach() if config.noise else std
    made = worker.reconstruct((mean + std * noise).to(dtype)).float()           # (B, C, H, W)
    return reconstruction_loss(made, x) + config.kl * kl_divergence(mean, std)


def make_batch(data, config, step):
    """The batch of step `step`, on the device of the data: images float (B, C, H, W) and the noise of their latents."""
    device, B = data.labels.device, config.batch_size
    generator = root.step_generator(config.seed, step, device)
    index = torch.randint(len(data.images), (B,), generator=generator, device=device)
    x = data.x_0(index, slice(None), generator)
    noise = torch.randn((B, *config.latent_shape), generator=generator, device=device)
    return x.contiguous(memory_format=torch.channels_last) if device.type == "cuda" else x, noise


def prepare(run, data, step):
    """As `train.prepare`. There is no noise level: all times are 0."""
    alone = step >= run.config.steps - int(DECODER_ALONE * run.config.steps)
    if alone:  # from here on the latents are those that are kept
        for part in ("encoder", "quant_conv"):
            getattr(run.model, part).load_state_dict(getattr(run.ema, part).state_dict())
    x, noise = make_batch(data, run.config, step)
    return losses, (x, noise, alone), torch.zeros(len(x), dtype=torch.long, device=x.device)


# What it shows and leaves


def reconstructions(vae, images):
    """What a VAE makes of images uint8 (N, C, H, W), through the means of their posteriors."""
    device = vae.mean.device
    return torch.cat([to_uint8(vae.decode(vae.encode(to_float(part.to(device)))[0])).cpu()
                      for part in images.split(100)])


def show(run, path, stop):
    """Draws some of the held-out images, and below each its reconstruction; prints the PSNR of all, dB."""
    tests = run.data.tests
    made = reconstructions(run.ema, tests)
    rows = [row for pair in zip(some(tests, 30).split(10), some(made, 30).split(10), strict=True) for row in pair]
    with warned():
        save_picture(path, grid(torch.cat(rows), columns=min(10, len(tests))))
    tqdm.write(f"{path.name}: PSNR {psnr(made, tests):.2f} dB on {len(tests):,} held-out images")


def measure_latents(vae, images):
    """Sets the statistics of a VAE to those of the latents of images uint8 (N, C, H, W), drawn from their posteriors:
    each channel's numbers then have mean 0 and standard deviation 1."""
    C, device = vae.settings["latent_channels"], vae.mean.device
    vae.normalize_by([0.0] * C, [1.0] * C)
    sums = torch.zeros(2, C, dtype=torch.float64)
    for part in images.split(100):
        mean, std = (numbers.double().cpu() for numbers in vae.encode(to_float(part.to(device))))  # (B, C, h, w)
        sums += torch.stack([mean.sum(dim=(0, 2, 3)), (mean**2 + std**2).sum(dim=(0, 2, 3))])
    mean, square = sums / (len(images) * math.prod(side // vae.factor for side in images.shape[2:]))
    std = (square - mean**2).sqrt()
    if not (std > 1e-6).all():
        raise UserError("the latents of these images are all the same: train for longer, or on images that differ")
    vae.normalize_by(mean.tolist(), std.tolist())


def finish(out, run):
    """Measures the latents, and writes the VAE into the folder `out`. Only then the checkpoint goes."""
    vae, tests = run.ema.half().float().eval(), run.data.tests  # what is measured now is what the file holds
    measure_latents(vae, some(run.data.images, MEASURED))
    quality = psnr(reconstructions(vae, tests), tests)
    save_vae(vae, out)
    (out / "model.pth").unlink(missing_ok=True)
    mean, std = (", ".join(f"{number:.3f}" for number in part.flatten().tolist()) for part in (vae.mean, vae.std))
    print(f"{out}: PSNR {quality:.2f} dB on {len(tests):,} held-out images; its latents' channels have mean {mean} and "
          f"std {std}")
    if vae.patch_size > 1:
        print(f"it sees patches: with diffusers, torch's pixel_unshuffle goes before its encoder, and pixel_shuffle "
              f"behind its decoder, each by {vae.patch_size}; a VAE of more --widths needs neither")
    print(f"train on its latents with: {next_command(run.config, out)}")


def train_vae(settings, out="vae", resume=False, device=None):
    """Trains a VAE, and leaves it in the folder `out`, for `load_vae`, with what `train.train` leaves except model.pth.

    settings: a `VAEConfig`, or a dict of those that are not the defaults; when resuming, settings that must match.
    resume, device, what it returns and raises: as for `train.train`.
    """
    out = Path(out)
    there = next((name for name in (CONFIG, WEIGHTS) if (out / name).exists()), None)
    if there and not (resume and (out / "model.pth").exists()):
        raise UserError(f"the VAE in {out} is finished: train another one in another --out" if resume else
                        f"{out} holds a {there} already: choose another --out, or remove it")
    if isinstance(settings, dict):
        settings = {"compile": False} | settings
    return root.train(settings, out, resume, device, prepare=prepare, show=show, finish=functools.partial(finish, out),
                      of=VAEConfig)


def main():
    parser = Parser(description="Trains a small autoencoder (VAE), whose latents latent.train_dit learns to draw.")
    parser.add_argument("--out", type=some_path, default=Path("vae"), help="the folder to write (default: vae)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out, exactly where it was")
    add_flags(parser, VAEConfig)
    parser.add_argument("--widths", type=int, nargs="+", default=argparse.SUPPRESS, metavar="N",
                        help="channels of each level; each level but the last halves the image, and pixel_unshuffle "
                        f"does the rest of the factor (default: {' '.join(map(str, VAEConfig.widths))})")
    add_device_flag(parser)
    args = parser.parse_args()
    done, stopped = train_vae(given_flags(args, VAEConfig), args.out, args.resume, args.device)
    if stopped:
        end_stopped(done, stopped, "-m", "latent.train_vae")


if __name__ == "__main__":
    run(main, memory="--batch-size or --image-size", alone=True)
