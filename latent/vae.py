"""The autoencoder of latent diffusion (2112.10752, section 3.1): an image as a small grid of latents, and back.

The names of the weights and the format of the folder (config.json, diffusion_pytorch_model.safetensors) are those of
diffusers' AutoencoderKL: either reads what the other wrote. A VAE with a patch_size above 1, such as latent.train_vae
makes by default, is to diffusers a VAE of patches: images go through torch's pixel_unshuffle on the way in and through
pixel_shuffle on the way out. AutoencoderKL cannot do that itself: its decoder doubles an image by repeating each value
and convolves it with the same kernel everywhere, so that it cannot put different channels into neighbouring pixels.
The letters: B batch, C channels, H W pixels, h w latents, f = H / h.
"""

from support.commands import UserError, first_line, in_full_precision
from support.files import fingerprint, make_dir, write_atomically
from support.tensors import misfit, read_tensors

import contextlib
import functools
import inspect
import itertools
import json
import os
import re
import sys
from collections import OrderedDict
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# What else diffusers calls the weights
OTHER_WEIGHTS = ("diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin",
                 "diffusion_pytorch_model.fp16.bin")
STABILITY = ("sd-vae-ft-ema", "sd-vae-ft-mse", "sdxl-vae")  # names that need no owner's
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of the attention's layers
# How many images go through at once, at most, and how many pixels: 16 of 64 x 64, or one of 256 x 256; on a GPU 32
LIMITS = {"cpu": (16, 2**16), "cuda": (256, 2**21)}


class ResidualBlock(nn.Module):
    """x plus two convolutions of it. forward: (B, C, H, W) -> (B, C_out, H, W)"""

    def __init__(self, channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x):
        update = self.conv1(F.silu(self.norm1(x)))       # (B, C_out, H, W)
        update = self.conv2(F.silu(self.norm2(update)))  # (B, C_out, H, W)
        return self.conv_shortcut(x) + update


class Attention(nn.Module):
    """x plus self-attention of one head over its pixels. forward: (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).mT                                           # (B, HW, C)
        q, k, v = (layer(tokens)[:, None] for layer in (self.to_q, self.to_k, self.to_v))   # each (B, 1, HW, C)
        update = self.to_out[0](F.scaled_dot_product_attention(q, k, v)[:, 0])              # (B, HW, C)
        return update.mT.reshape(x.shape) + x  # in this order: the sum's memory has channels last, as in diffusers


class Middle(nn.Module):
    """Two residual blocks, with attention between them or without. forward: (B, C, h, w) -> (B, C, h, w)"""

    def __init__(self, channels, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))
        self.attentions = nn.Sequential(*(Attention(channels, groups) for _ in range(attention)))

    def forward(self, x):
        return self.resnets[1](self.attentions(self.resnets[0](x)))


def chain(**layers):
    """Layers that follow one another, by their names."""
    return nn.Sequential(OrderedDict(layers))


def halve(channels):
    """(B, C, H, W) -> (B, C, H / 2, W / 2)"""
    return chain(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=nn.Conv2d(channels, channels, 3, stride=2))


def double(channels):
    """(B, C, H, W) -> (B, C, 2 H, 2 W)"""
    return chain(repeat=nn.Upsample(scale_factor=2), conv=nn.Conv2d(channels, channels, 3, padding=1))


def levels(widths, depth, groups, **step):
    """Residual blocks of each width. A step to the next resolution follows all but the last: step is its name, and
    `halve` or `double`. (B, widths[0], H, W) -> (B, widths[-1], h, w)"""
    parts, before = [], widths[0]
    for i, width in enumerate(widths):
        blocks = [ResidualBlock(width if k else before, width, groups) for k in range(depth)]
        steps = {name: nn.Sequential(make(width)) for name, make in step.items() if i < len(widths) - 1}
        parts.append(chain(resnets=nn.Sequential(*blocks), **steps))
        before = width
    return nn.Sequential(*parts)


def encoder(in_channels, latent_channels, widths, depth, groups, attention):
    """Images (B, C, H, W) in [-1, 1] -> mean and log variance of their latents (B, 2 C_latent, h, w)"""
    return chain(conv_in=nn.Conv2d(in_channels, widths[0], 3, padding=1),
                 down_blocks=levels(widths, depth, groups, downsamplers=halve),
                 mid_block=Middle(widths[-1], groups, attention),
                 conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6), silu=nn.SiLU(),
                 conv_out=nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1))


def decoder(out_channels, latent_channels, widths, depth, groups, attention):
    """Latents (B, C_latent, h, w) -> images (B, C, H, W), about in [-1, 1]"""
    return chain(conv_in=nn.Conv2d(latent_channels, widths[-1], 3, padding=1),
                 mid_block=Middle(widths[-1], groups, attention),
                 up_blocks=levels(widths[::-1], depth + 1, groups, upsamplers=double),
                 conv_norm_out=nn.GroupNorm(groups, widths[0], eps=1e-6), silu=nn.SiLU(),
                 conv_out=nn.Conv2d(widths[0], out_channels, 3, padding=1))


class VAE(nn.Module):
    """A variational autoencoder: images (B, C, H, W), floats in [-1, 1], <-> latents (B, C_latent, h, w).

    `posterior` and `reconstruct` are the network as it is. `encode` and `decode` are what a diffusion model works with:
    their latents are normalized to (z - mean) / std, here and nowhere else. mean, std: (1 or C_latent, 1, 1).

    The settings have diffusers' names and defaults. block_out_channels: the width of each level; each level but the
    last halves the image. layers_per_block: residual blocks of a level (the decoder has one more).

    patch_size p is a setting of our own. Above 1 the network sees patches, whose pixels are channels, (B, C p^2, H / p,
    W / p), since convolutions of whole images cost most. in_channels and out_channels are then C p^2.
    """

    def __init__(self, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(64,), layers_per_block=1,
                 norm_num_groups=32, mid_block_add_attention=True, use_quant_conv=True, use_post_quant_conv=True,
                 patch_size=1):
        super().__init__()
        self.settings = dict(in_channels=in_channels, out_channels=out_channels, latent_channels=latent_channels,
                             block_out_channels=tuple(block_out_channels), layers_per_block=layers_per_block,
                             norm_num_groups=norm_num_groups, mid_block_add_attention=mid_block_add_attention,
                             use_quant_conv=use_quant_conv, use_post_quant_conv=use_post_quant_conv)
        if patch_size > 1:  # else the settings are diffusers' alone
            self.settings["patch_size"] = patch_size
        shape = tuple(block_out_channels), layers_per_block, norm_num_groups, mid_block_add_attention
        self.encoder = encoder(in_channels, latent_channels, *shape)
        self.decoder = decoder(out_channels, latent_channels, *shape)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1) if use_quant_conv else nn.Identity()
        self.post_quant_conv = (nn.Conv2d(latent_channels, latent_channels, 1) if use_post_quant_conv
                                else nn.Identity())
        self.patch_size = patch_size
        self.factor = patch_size * 2 ** (len(block_out_channels) - 1)
        self.image_channels = out_channels // patch_size**2
        self.normalize_by((0.0,), (1.0,))

    def normalize_by(self, mean, std):
        """Sets the statistics of `encode` and `decode`: sequences of one number, or of one for each latent channel."""
        device = self.encoder.conv_in.weight.device
        for name, numbers in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32, device=device).view(-1, 1, 1),
                                 persistent=False)

    def posterior(self, x):
        """Mean and standard deviation of the latents of images x, each (B, C_latent, h, w)."""
        mean, log_variance = self.quant_conv(self.encoder(F.pixel_unshuffle(x, self.patch_size))).chunk(2, dim=1)
        return mean, (log_variance.clamp(-30, 20) / 2).exp()

    def reconstruct(self, z):
        """The images (B, C, H, W) of latents z that are not normalized."""
        return F.pixel_shuffle(self.decoder(self.post_quant_conv(z)), self.patch_size)

    @in_full_precision()
    def moments(self, x):
        """Mean and standard deviation of `posterior`, for images x, (B, 2, C_latent, h, w). An image's are the same to
        the last bit in every batch, on one kind of CPU."""
        return in_full_batches(lambda part: torch.stack(self.posterior(part), dim=1), x, x.shape[2] * x.shape[3])

    def encode(self, x):
        """Mean and standard deviation of the normalized latents of images x, each (B, C_latent, h, w)."""
        mean, std = self.moments(x).unbind(1)
        return (mean - self.mean) / self.std, std / self.std

    @torch.no_grad()
    def decode(self, latents):
        """The images float (B, C, H, W) of normalized latents. An image is the same to the last bit in every batch, on
        one kind of CPU. Raises `UserError` for latents that are not finite."""
        if not latents.isfinite().all():
            raise UserError("the latents to decode are not all finite numbers: the model that drew them is broken, or "
                            "its guidance too strong")
        pixels = latents.shape[2] * latents.shape[3] * self.factor**2
        return in_full_batches(self.reconstruct, latents.float() * self.std + self.mean, pixels)

    @property
    def fingerprint(self):
        """A hash, 16 hexadecimal digits, of what makes latents: the encoder. The same latents can have several
        decoders, such as sd-vae-ft-ema's and -mse's."""
        return self.hash_of("encoder", "quant_conv")

    def settings_of_latents(self, name):
        """The fields of `LatentConfig` that this VAE, called `name`, says of its latents: a dict."""
        mean, std = (tuple(numbers.flatten().tolist()) for numbers in (self.mean, self.std))
        return dict(vae=name, vae_hash=self.fingerprint, latent_mean=mean, latent_std=std)

    def hash_of(self, *parts):
        """A hash (16 hexadecimal digits) of the settings and the weights of these children (default: all)."""
        weights = [(name, weight.cpu()) for name, weight in sorted(self.state_dict().items())
                   if not parts or name.partition(".")[0] in parts]
        return fingerprint(repr(sorted(self.settings.items())), *itertools.chain(*weights))


def each_frame(function, x):
    """`function`, which takes images (N, C, H, W), of images x or of every frame of clips x (B, C, T, H, W)."""
    frames = x.movedim(1, -3)                                                         # (B, T, C, H, W)
    return function(frames.flatten(0, -4)).unflatten(0, frames.shape[:-3]).movedim(-3, 1)


def in_full_batches(function, x, pixels):
    """`function` of x (B, ...), in batches of one size for images of so many pixels. On a CPU the last one is filled
    up: libraries compute a smaller batch in another order, and round otherwise."""
    most, room = LIMITS.get(x.device.type, LIMITS["cpu"])
    size = max(1, min(most, room // pixels))
    parts = []
    for part in x.split(size):
        fill = part[:1].expand((size - len(part)) * (x.device.type == "cpu"), *part.shape[1:])
        parts.append(function(torch.cat([part, fill]))[:len(part)])
    return torch.cat(parts)


# Its folder


def save_vae(vae, folder):
    """Writes a VAE as a folder that `load_vae` and diffusers read, in float16 where that changes nothing. Raises
    `UserError` when that cannot be done."""
    folder = Path(folder)
    make_dir(folder)
    mean, std = (numbers.flatten().expand(vae.settings["latent_channels"]).tolist() for numbers in (vae.mean, vae.std))
    config = {"_class_name": "AutoencoderKL", **vae.settings, **only_choices(vae.settings["block_out_channels"]),
              "scaling_factor": 1.0, "latents_mean": mean, "latents_std": std}
    state = {name: weight.detach().cpu().contiguous() for name, weight in vae.state_dict().items()}
    halves = {name: weight.half() for name, weight in state.items()}
    if all(torch.equal(halves[name].to(weight.dtype), weight) for name, weight in state.items()):
        state = halves
    write_atomically(folder / WEIGHTS, lambda file: file.write(safetensors.torch.save(state)))
    write_atomically(folder / CONFIG, lambda file: file.write(json.dumps(config, indent=2).encode()))


def load_vae(name, device="cpu"):
    """Reads a VAE, in float32. Nothing in it can run code. Raises `UserError`.

    name: a folder that diffusers or `save_vae` wrote; a pipeline's folder, which holds such a folder vae/; or a name on
    the Hugging Face hub (somebody/vae; `STABILITY`'s need no owner).
    """
    config_file, weights_file = find_files(name)
    settings, mean, std = read_config(config_file)
    with torch.device("meta"):  # shapes without memory, whatever sizes the file claims
        vae = VAE(**settings)
    vae.load_state_dict(read_weights(weights_file, vae), assign=True)
    vae.normalize_by(mean, std)
    return vae.to(device).eval().requires_grad_(False)


def open_vae(name, *asked):
    """`load_vae` for a model that has learned its latents. asked: `fingerprint` of that VAE, "" = not known; shapes of
    the images (C, H, W) and of the latents; mean and standard deviation that normalize these; the device. The last VAE
    stays in memory as long as its files stay the same. Raises `UserError` when it is another VAE."""
    if not name:
        raise UserError("this model draws latents: name the VAE that makes images of them with --vae FOLDER")
    states = [os.stat(file) for file in find_files(name)] if Path(name).is_dir() else []
    return open_again(name, *asked, tuple((state.st_ino, state.st_size, state.st_mtime_ns) for state in states))


@functools.lru_cache(maxsize=1)
def open_again(name, vae_hash, shape, latent_shape, mean, std, device, _):
    vae = load_vae(name, device)
    made = (vae.image_channels, *(side * vae.factor for side in latent_shape[1:]))
    if (vae.settings["latent_channels"], made) != (latent_shape[0], shape):
        raise UserError(f"{name} makes images {made} out of latents of {vae.settings['latent_channels']} channels, but "
                        f"this model's are images {shape} out of latents {latent_shape}")
    return normalize_as(name, vae, vae_hash, mean, std)


def normalize_as(name, vae, vae_hash, mean, std):
    """Gives the `VAE` called `name` the statistics of the latents that a model has learned, and returns it. Raises
    `UserError` if that model's VAE was another one. vae_hash: the `fingerprint` of that; "" = not known."""
    if vae_hash not in ("", vae.fingerprint):
        raise UserError(f"{name} is another VAE than the one whose latents this model has learned: its encoder has the "
                        f"hash {vae.fingerprint}, not {vae_hash:.16}")
    vae.normalize_by(mean, std)
    return vae


def check_shapes(name, vae, shape):
    """Raises `UserError` unless the `VAE` called `name` makes latents of images of this shape (C, H, W)."""
    C, *size = shape
    if vae.image_channels != C:
        raise UserError(f"the VAE {name} reads images of {vae.image_channels} channels, but these have {C}: set "
                        f"--channels {vae.image_channels}, or choose another VAE")
    if any(side % vae.factor for side in size):
        near = "x".join(str(max(1, round(side / vae.factor)) * vae.factor) for side in size)
        raise UserError(f"the VAE {name} makes one latent of {vae.factor} x {vae.factor} pixels, which do not divide "
                        f"{size[0]} x {size[1]}: set --image-size {near}")


def find_files(name):
    """The paths of config.json and of the weights of the VAE called `name`; see `load_vae`."""
    folder = Path(name)
    if folder.is_dir():
        folder = next((part for part in (folder, folder / "vae") if (part / CONFIG).is_file()), folder)
        weights = [folder / file for file in (WEIGHTS, *OTHER_WEIGHTS)]
        files = [folder / CONFIG, next(filter(Path.is_file, weights), weights[0])]
        for file in files:
            if not file.is_file():
                raise UserError(f"{folder} holds no {file.name}: a VAE is a folder of diffusers' AutoencoderKL, with "
                                f"{CONFIG} and {WEIGHTS}")
        return files
    if str(name) in STABILITY:
        return download(f"stabilityai/{name}")
    # The hub knows a VAE as owner/name. If there is a folder of the owner's name, a path is meant
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(name)) or folder.parent.is_dir():
        raise UserError(f"there is no folder {str(name)!r:.200}: a VAE is a folder of diffusers' AutoencoderKL, or the "
                        "name of one on the Hugging Face hub, with its owner's: somebody/vae")
    return download(str(name))


def download(repository):
    """The same two paths of a VAE on the Hugging Face hub, from its cache if they are there already."""
    import huggingface_hub as hub  # here, since few need it
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with contextlib.suppress(LocalEntryNotFoundError):
            return [Path(hub.hf_hub_download(repository, file, local_files_only=True)) for file in (CONFIG, WEIGHTS)]
        print(f"downloading the VAE {repository} ...", file=sys.stderr)
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, CONFIG))  # fails at once, where a download tries for 23 s
        return [Path(hub.hf_hub_download(repository, file)) for file in (CONFIG, WEIGHTS)]
    except Exception as error:  # each of its layers fails in its own way
        raise UserError(f"the VAE {repository} cannot be had from the Hugging Face hub ({first_line(error, 100)}), and "
                        f"is no folder here: point --vae at a folder that holds {CONFIG} and {WEIGHTS}") from None


def read_config(file):
    """The settings of a `VAE`, a dict, and its statistics mean and std, two tuples, from a config.json."""
    try:
        config = json.loads(file.open("rb").read(2**20))
        kind = config.get("_class_name")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {first_line(error, 100)}") from None
    if kind != "AutoencoderKL":
        raise UserError(f"{file} is the configuration of {kind!r:.60}, not of an AutoencoderKL")
    names = inspect.signature(VAE).parameters
    settings = {name: config.get(name, names[name].default) for name in names}
    try:
        check_settings(settings, config)
        return settings, *read_statistics(config, settings["latent_channels"])
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def check_settings(settings, config):
    """Raises `UserError` unless the settings make a `VAE`, and it can do what else is in `config`."""
    widths, groups = settings["block_out_channels"], settings["norm_num_groups"]
    for name, value in settings.items():
        values = value if value is widths else [value]
        low, high, kind = (0, 1, bool) if name.startswith(("use_", "mid_")) else (
            1, 16 if name in ("layers_per_block", "patch_size") else 8192, int)
        if not isinstance(values, (list, tuple)) or not 1 <= len(values) <= 8 or not all(
                type(n) is kind and low <= n <= high for n in values):
            raise UserError(f"{name} is {value!r:.60}")
    if any(settings[f"{side}_channels"] % settings["patch_size"] ** 2 for side in ("in", "out")):
        raise UserError(f"in_channels {settings['in_channels']} and out_channels {settings['out_channels']} are not "
                        f"those of patches of {settings['patch_size']} x {settings['patch_size']} pixels")
    if any(width % groups for width in widths):
        raise UserError(f"norm_num_groups {groups} does not divide block_out_channels {list(widths)}")
    for name, known in only_choices(widths).items():
        if config.get(name, known) != known:
            raise UserError(f"{name} is {config[name]!r:.100}, but only {known} is known here")


def only_choices(widths):
    """The settings of diffusers that a `VAE` with levels of these widths has no choice of, as config.json has them."""
    return dict(act_fn="silu", down_block_types=["DownEncoderBlock2D"] * len(widths),
                up_block_types=["UpDecoderBlock2D"] * len(widths))


def read_statistics(config, channels):
    """Mean and standard deviation of the latents, tuples of one number or of `channels`, from a config.json of
    diffusers: a diffusion model sees (z - latents_mean) * scaling_factor / latents_std. shift_factor may stand for
    latents_mean."""
    scale = [config.get("scaling_factor", 0.18215)]
    mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0]
    std = config.get("latents_std") or [1.0]
    for name, numbers, low in (("scaling_factor", scale, 1e-15), ("latents_mean or shift_factor", mean, -1e15),
                               ("latents_std", std, 1e-15)):
        if not isinstance(numbers, list) or len(numbers) not in (1, channels) or not all(
                type(n) in (int, float) and low <= n < 1e15 for n in numbers):  # float32 holds what is made of these
            raise UserError(f"{name} is {numbers!r:.60}, with {channels} latent channels")
    return tuple(map(float, mean)), tuple(number / scale[0] for number in std)


def read_weights(file, vae):
    """The weights of a `VAE` in float32, by their present names. Raises `UserError` unless they are those of `vae`."""
    try:
        state = safetensors.torch.load_file(file) if file.suffix == ".safetensors" else read_tensors(file)
        state = {re.sub(r"(attentions\.0)\.(\w+)", lambda m: f"{m[1]}.{OLD_NAMES.get(m[2], m[2])}", name): weight
                 for name, weight in state.items()}
    except Exception as error:  # torch.load raises nearly anything when a file is not its own
        raise UserError(f"{file} is damaged or cut short ({first_line(error, 100)})") from None
    wrong = misfit(state, {name: weight.shape for name, weight in vae.state_dict().items()})
    if wrong:
        raise UserError(f"{file} does not fit its {CONFIG}: {wrong}")
    for name, weight in state.items():
        plain = weight.is_floating_point() and weight.layout == torch.strided and weight.is_contiguous()
        if plain:
            state[name] = weight.to(torch.float32, copy=True)  # float8 knows no isfinite
        if not plain or not state[name].isfinite().all():
            raise UserError(f"{file} is damaged: {name} does not hold finite numbers")
    return state
