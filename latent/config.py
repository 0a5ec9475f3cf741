"""The settings of a run on images in colour or on latents: those of `Config`, the VAE's, and the habits of DiT's
official code."""

from support.commands import UserError
from support.settings import flag

import dataclasses
import functools
import math
from pathlib import Path

from config import Config
from dataset import TORCHVISION
from latent.cache import open_data
from latent.official import LearnedVarianceDDPM, OfficialDDPM, OfficialFlow, SiT, ddpm
from latent.vae import each_frame, open_vae


@dataclasses.dataclass(frozen=True)
class LatentConfig(Config):
    """All settings of a run of `latent.train_dit`; see `Config`."""

    kind = "latents"
    trained_by, drawn_by = "-m latent.train_dit", "-m latent.draw"
    SAMPLING = (*Config.SAMPLING, "vae", "spacing", "guided_channels", "guidance_high", "clamp")

    # Data
    dataset: str = flag("sprites", "sprites (64x64, in colour: 9 actions); mnist; folder: one folder per class; or a "
                        "data set that torchvision downloads", choices=("sprites", "mnist", "folder", *TORCHVISION))
    flips: bool = flag(False, "mirror half of the images, left to right: for photographs in folders")
    vae: str = flag("", "VAE of the latents (2112.10752): a folder that latent.train_vae or diffusers wrote, or a "
                    "name on the Hugging Face hub, such as sd-vae-ft-ema; empty: pixels, no VAE")
    latents: str = flag("latents", "folder that stores the latents, for this run and others")
    # These have no flag: the VAE says them.
    vae_hash: str = ""        # `fingerprint` of the VAE; "" = not known
    latent_shape: tuple = ()  # (C, h, w) of an image's latents
    latent_mean: tuple = ()   # latents are normalized to (z - latent_mean) / latent_std: one number each, or one for
    latent_std: tuple = ()    # each channel

    # Without a flag, for official weights: the MLP's GELU, exact (none) or by its tanh formula
    gelu: str = dataclasses.field(default="none", metadata=dict(choices=("none", "tanh")))

    # Diffusion
    process: str = flag("flow", "ddpm: linear betas, the network predicts the noise (2006.11239); flow: a straight "
                        "path, the network predicts the image (2209.03003, 2511.13720); sit: that path as SiT's code "
                        "has it, the network predicts the velocity (2401.08740)", choices=("ddpm", "flow", "sit"))
    variance: str = flag("fixed", "variance of a step of the ddpm sampler: fixed; or learned (2102.09672): the network "
                         "of process ddpm then predicts it beside the noise", choices=("fixed", "learned"))
    clamp: bool = flag(True, "clamp each predicted clean image to the range of pixels; latents have no such range")

    # Sampling
    spacing: str = flag("trailing", "which of the T steps sampling takes: trailing, evenly spaced from the last one on "
                        "(2305.08891); or linspace, evenly from the last to the first, as DiT's official code does",
                        choices=("trailing", "linspace"))
    guided_channels: int = flag(0, "number of channels, the first ones, that are guided; 0 = all. DiT's official code "
                                "guides 3 of its 4", 0, 1024)
    guidance_high: float = flag(1.0, "share of the T steps that is guided, the least noisy ones; the others cost half "
                                "and follow the labels (2404.07724)", 0, 1)

    def check(self):
        super().check()
        if self.variance == "learned" and self.process != "ddpm":
            raise UserError(f"variance is learned for process ddpm alone, not for {self.process}")
        if not (self.latent_shape or self.vae_hash or self.latent_mean or self.latent_std):
            return
        C, *size = self.latent_shape or (0,)
        if not size or not all(type(n) is int and 1 <= n <= 1024 for n in self.latent_shape):
            raise UserError(f"latent_shape is {self.latent_shape!r:.80}, but must be channels, height and width")
        for name, numbers in (("latent_mean", self.latent_mean), ("latent_std", self.latent_std)):
            if len(numbers) not in (1, C) or not all(type(n) is float and math.isfinite(n) for n in numbers) or (
                    name == "latent_std" and min(numbers) <= 0):
                raise UserError(f"{name} is {numbers!r:.80}, but must be one number, or one for each of {C} channels")
        if self.clamp:
            raise UserError("clamp is for pixels, and latents have no bounds: --no-clamp")

    @property
    def CHANGEABLE(self):
        vae = ("vae",) if self.vae else ()  # it may have moved
        clamp = () if self.latent_shape else ("clamp",)
        return (*super().CHANGEABLE, *vae, *clamp, "latents", "spacing", "guided_channels", "guidance_high")

    @property
    def input_name(self):
        return "latent_shape" if self.latent_shape else "image_size"

    @property
    def input_shape(self):
        """The shape (C, *size) of what the network sees: of latents, or of the images themselves."""
        return self.latent_shape or super().input_shape

    def network_options(self):
        learned = {"out_channels": 2 * self.input_shape[0]} if self.variance == "learned" else {}
        return super().network_options() | learned

    def build_model(self):
        model = super().build_model()
        for block in model.blocks:
            block.mlp[1].approximate = self.gelu
        return model

    def build_process(self, device="cpu"):
        if self.process == "flow":
            process = OfficialFlow(self.T, self.shift, device)
        elif self.process == "sit":
            process = SiT(self.T, device)
        else:
            kind = LearnedVarianceDDPM if self.variance == "learned" else OfficialDDPM
            process = kind(self.T, self.beta_start, self.beta_end, device)
        process.spacing, process.guided_channels = self.spacing, self.guided_channels
        process.guidance_high = self.guidance_high
        process.bound = process.bound if self.clamp else math.inf
        return process

    def build_sampler(self, process):
        learned = self.variance == "learned" and self.sampler == "ddpm"
        return functools.partial(ddpm, process) if learned else super().build_sampler(process)

    def open_data(self, device):
        """The images, a `Dataset`, or their `Latents`. Raises `UserError`."""
        return open_data(self, device)

    def ready(self, checkpoint, device):
        """See `Config`. The VAE may lie beside the checkpoint that was shared with it."""
        if not self.latent_shape:
            if self.vae:
                raise UserError(f"{checkpoint} draws images without a VAE: leave --vae out")
            return self
        beside = Path(checkpoint).parent / self.vae
        moved = not Path(self.vae).exists() and beside.is_dir()
        found = dataclasses.replace(self, vae=str(beside)) if moved else self
        found.find_vae(device)
        return found

    def find_vae(self, device):
        """The `VAE` of the latents, with the statistics that the model has learned with. Raises `UserError` when it is
        not there or is another one."""
        image, latent = ((shape[0], *shape[-2:]) for shape in ((self.channels, *self.image_size), self.latent_shape))
        return open_vae(self.vae, self.vae_hash, image, latent, self.latent_mean, self.latent_std, device)

    def drawn_how(self, device):
        decoder = self.find_vae(device).hash_of("decoder", "post_quant_conv") if self.latent_shape else ""
        return super().drawn_how(device) | {"vae": decoder}

    def to_images(self, x):
        return super().to_images(each_frame(self.find_vae(x.device).decode, x) if self.latent_shape else x)

    def from_images(self, x):
        if not self.latent_shape:
            return x
        vae = self.find_vae(x.device)
        return each_frame(lambda images: vae.encode(images)[0], x)


IMAGES = (Config, LatentConfig)  # the kinds of models that draw images
