"""Makes a checkpoint of ours out of a file of DiT's official code (github.com/facebookresearch/DiT, arXiv 2212.09748):
the weights that its authors released, or what its train.py has saved.

    python -m latent.import_dit DiT-XL-2-256x256.pt xl.pth
    python -m latent.draw --checkpoint xl.pth --vae sd-vae-ft-ema --labels "golden retriever" 360

Files of codes with the same network are read too:

    fast-DiT        (github.com/chuanyangjin/fast-DiT) as DiT
    SiT             (github.com/willisma/SiT, 2401.08740) is known by the flags of its train.py, or because the half of
                    its output that is DiT's variance is zero. Draws as its sample.py does in the mode ODE with
                    --sampling-method euler --num-sampling-steps 251
    LightningDiT    (github.com/hustvl/LightningDiT, 2501.01423) without its changes to the network, as SiT
    REPA            (github.com/sihyun-yu/REPA, 2410.06940) is known by its projectors or its flags: a SiT with t turned
                    round and another sign. Draws as its generate.py does in the mode ode

The network of this project is the same. Where the codes differ, this bridges it:

    the network     frequencies of the time        config.time_spacing = "dit", which is our default too
                    cosines before sines           columns of time_embedding.mlp.0 change places here
                    a patch is (C, p, p)           columns of patch_embedding.linear change places here
                    GELU by tanh                   config.gelu = "tanh"
    the process     noise and v, 2C channels       config.variance = "learned": official.LearnedVarianceDDPM
    SiT's process   velocity, t = 1 is the image   config.process = "sit": official.SiT; the unused outputs are dropped
    REPA's process  its negative, t = 0 is the     the last layer is negated, columns of time_embedding.mlp.0 are turned
                    image                          by their frequencies; the projectors are dropped
    drawing         250 steps, the last is t = 0   config.spacing = "linspace"
                    guidance on 3 of 4 channels    config.guided_channels = 3
                    cfg_interval_start, a time     config.guidance_high, the share of the steps from there on
                    x_0 is not clamped             config.clamp = False
                    latents are z * 0.18215        config.latent_std
                    noise of one stream, twice     is not bridged: here each image has a stream of its own
    the file        argparse.Namespace             is read as plain values; nothing else but tensors and numbers is
                    module. or _orig_mod. before   is left out of the names
"""

from support.commands import Parser, UserError, first_line, run, some_path
from support.tensors import check_tensors, read_tensors

import argparse
import dataclasses
import math
import re
import shlex

import torch

from config import PAPER, PRESETS
from dit import sincos_positions
from latent.config import LatentConfig
from latent.vae import load_vae
from record.checkpoint import check_out, save_checkpoint

NAMES = (("patch_embedding.linear", "x_embedder.proj"), ("time_embedding", "t_embedder"),
         ("label_embedding", "y_embedder.embedding_table"), ("attention.out", "attn.proj"), ("attention", "attn"),
         (r"(blocks\.\d+\.mlp)\.0", r"\1.fc1"), (r"(blocks\.\d+\.mlp)\.2", r"\1.fc2"),
         ("modulation", "adaLN_modulation"))  # (ours, theirs)
# What LightningDiT and REPA can change in the network, by the names of its weights
CHANGES = (("mlp.w12", "SwiGLU"), ("norm1.weight", "RMSNorm"), ("q_norm.weight", "normalised queries and keys"),
           ("feat_rope", "rotary positions"))
SCALE = 0.18215  # of latents, in DiT's sample.py and train.py
VAE = "stabilityai/sd-vae-ft-mse"  # of sample.py; the FID of the paper was measured with sd-vae-ft-ema
FACTOR, CHANNELS = 8, 4  # of its latents


def official_name(name):
    """The name that a weight of ours has in DiT's code."""
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)
    return name


def read_official(path):
    """The weights in a file of DiT's code, and the flags of its train.py that are numbers or words: two dicts. Weights
    of a large file are not in memory yet. Nothing in it can run code. Raises `UserError` when it is another file, or
    when its network is known to be another one."""
    try:
        content = read_tensors(path, [argparse.Namespace], mmap=True)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}: download it as the README of facebookresearch/DiT says") from None
    except Exception as error:  # torch.load raises nearly anything when a file is not its own
        raise UserError(f"{path} is no file of DiT's code, is cut short, or holds more than weights and flags "
                        f"({first_line(error)})") from None
    content = content if isinstance(content, dict) else {}
    if "format" in content:
        raise UserError(f"{path} is a checkpoint of this project already, or of another one, but no file of DiT's code")
    weights = next((content[name] for name in ("ema", "model") if isinstance(content.get(name), dict)), content)
    if not weights or not all(isinstance(name, str) and isinstance(value, torch.Tensor)
                              for name, value in weights.items()):
        raise UserError(f"{path} is no file of DiT's code: it holds no weights by name")
    # The prefixes are DistributedDataParallel's and torch.compile's
    weights = {re.sub(r"^((module|_orig_mod)\.)+", "", name): weight for name, weight in weights.items()}
    changes = [what for part, what in CHANGES if any(part in name for name in weights)]
    if changes:
        raise UserError(f"{path} is no DiT: its network has {', '.join(changes)}. Of LightningDiT and REPA, only "
                        "models whose network is DiT's are known here")
    flags = content.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else lightning_flags(content.get("config"))
    flags = {name: value for name, value in flags.items() if isinstance(value, str | int | float)}
    kept = {name: weight for name, weight in weights.items() if not name.startswith("projectors.")}
    if len(kept) < len(weights):  # of REPA, which needs them for training alone
        flags = dict(path_type="linear", prediction="v") | flags
    return kept, flags


def lightning_flags(settings):
    """What LightningDiT's train.py saves of its settings as `config`, as flags: a dict, empty for anything else."""
    if not isinstance(settings, dict) or not isinstance(settings.get("transport"), dict):
        return {}
    flags = dict(latent_multiplier=SCALE, downsample_ratio=16)  # the defaults of its train.py
    for name in ("transport", "data", "vae", "sample"):
        flags |= settings[name] if isinstance(settings.get(name), dict) else {}
    return flags


def read_sizes(weights):
    """The fields of `LatentConfig` that the shapes of `weights`, by their official names, tell: a dict. Raises
    `UserError` when they are not those of a DiT."""
    try:
        D, C, p, _ = weights["x_embedder.proj.weight"].shape
        side = math.isqrt(weights["pos_embed"].shape[1])
        depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        hidden = len(weights["blocks.0.mlp.fc1.weight"])
        learned = len(weights["final_layer.linear.weight"]) == 2 * p * p * C
        classes = len(weights["y_embedder.embedding_table.weight"]) - 1  # the last is the null label
        return dict(hidden_size=D, patch_size=p, depth=depth, mlp_ratio=hidden / D, num_classes=classes,
                    latent_shape=(C, side * p, side * p), variance="learned" if learned else "fixed")
    except (LookupError, ValueError, TypeError, ArithmeticError) as error:
        what = f"{type(error).__name__}: {first_line(error, 80)}"
        raise UserError(f"these are not the weights of a DiT ({what})") from None


def heads_of(sizes):
    """The attention heads of one of the paper's sizes, which the weights do not tell."""
    for name in ("S", "B", "L", "XL"):
        if all(PRESETS[name][key] == sizes[key] for key in ("hidden_size", "depth")):
            return PRESETS[name]["num_heads"]
    raise UserError(f"a width of {sizes['hidden_size']} and {sizes['depth']} blocks are no size of the paper (S, B, L, "
                    "XL): say with --num-heads how many attention heads it has")


def class_names(count):
    """The names of ImageNet's 1,000 classes; of another number of classes, none are known."""
    if count != 1000:
        return ()
    from torchvision.models import get_weight  # here: it takes a second, and no other command needs it

    return tuple(get_weight("ResNet18_Weights.IMAGENET1K_V1").meta["categories"])


def latents_of(vae, shape, flags):
    """The fields of `LatentConfig` that the VAE called `vae` tells of latents of this shape; None: Stability's, as in
    DiT's code. flags: of a train.py, a dict."""
    if flags.get("latent_norm"):
        raise UserError("its latents were normalised by a file latents_stats.pt beside its data: the checkpoint does "
                        "not hold it")
    if vae is None:
        C, factor = 3, flags.get("downsample_ratio", FACTOR)
        if (factor, shape[0]) != (FACTOR, CHANNELS):
            raise UserError(f"it was trained on latents of {shape[0]} channels, {factor!r:.9} times smaller than "
                            f"images, but Stability's VAE has {CHANNELS} and {FACTOR}: say with --vae which VAE it was")
        found = dict(vae=VAE, latent_mean=(0.0,), latent_std=(1 / SCALE,))
    else:
        loaded = load_vae(vae)
        C, factor, found = loaded.image_channels, loaded.factor, loaded.settings_of_latents(vae)
        if loaded.settings["latent_channels"] != shape[0]:
            raise UserError(f"the latents of {vae} have {loaded.settings['latent_channels']} channels, but the model's "
                            f"{shape[0]}")
    if "latent_multiplier" in flags:
        multiplier = flags["latent_multiplier"]
        if type(multiplier) not in (int, float) or not 0 < multiplier < math.inf:
            raise UserError(f"its latent_multiplier is {multiplier!r:.40}, not a number above 0")
        found |= dict(latent_mean=(0.0,), latent_std=(1 / multiplier,))
    return found | dict(image_size=tuple(factor * side for side in shape[1:]), channels=C)


def make_config(weights, flags, num_heads=None, vae=None):
    """The `LatentConfig` of official weights, that draws as DiT's sample.py does. flags: of DiT's train.py, a dict."""
    sizes = read_sizes(weights)
    if flags.get("num_classes") == sizes["num_classes"] + 1:
        raise UserError("it has no null label, which guidance needs: it was trained without dropping labels")
    start = flags.get("cfg_interval_start", 0)  # of LightningDiT: where the guidance begins, from 0, noise, to 1
    if type(start) not in (int, float) or not 0 <= start <= 1:
        raise UserError(f"its cfg_interval_start is {start!r:.40}, not a number from 0 to 1")
    return LatentConfig(**PAPER | sizes | latents_of(vae, sizes["latent_shape"], flags), dataset="folder",
                        num_heads=num_heads or heads_of(sizes), classes=class_names(sizes["num_classes"]),
                        process="ddpm", sampler="ddpm", sample_steps=250, spacing="linspace", guidance=4.0,
                        guided_channels=3 if sizes["latent_shape"][0] > 3 else 0, guidance_high=1.0 - start,
                        clamp=False, gelu="tanh")


def convert(weights, config):
    """Official weights by our names, for a `DiT` of `config`. Only what differs is copied. Raises `UserError` unless
    names, shapes, types and positions are those of the official code."""
    with torch.device("meta"):  # shapes without memory, however large a size the file claims
        shapes = {name: weight.shape for name, weight in config.build_model().state_dict().items()}
    names = {official_name(name): name for name in shapes}
    (C, *size), (p, _), D = config.latent_shape, config.patch_size, config.hidden_size
    grid = [side // p for side in size]
    expected = {official: shapes[name] for official, name in names.items()} | {
        "x_embedder.proj.weight": (D, C, p, p), "pos_embed": (1, math.prod(grid), D)}
    check_tensors("weights", weights, expected, (torch.float32, torch.float16, torch.bfloat16))
    # The average of positions that never change drifts from them by 1.3e-3 if its decay is 0.99999, since each update
    # is rounded; in bf16 they are 2e-3 off
    if not torch.allclose(weights["pos_embed"].float(), sincos_positions(grid, D), rtol=0, atol=1e-2):
        raise UserError("pos_embed does not hold DiT's sines and cosines")

    ours = {name: weights[official].detach() for official, name in names.items()}
    cosines, sines = ours["time_embedding.mlp.0.weight"].chunk(2, dim=1)
    ours["time_embedding.mlp.0.weight"] = torch.cat([sines, cosines], dim=1)
    patches = ours["patch_embedding.linear.weight"]                                           # (D, C, p, p)
    ours["patch_embedding.linear.weight"] = patches.permute(0, 2, 3, 1).reshape(D, p * p * C)
    return ours


def process_of(weights, config, flags):
    """Whose process weights by our names, of a `DiT` of `config`, were trained on: "DiT", "SiT" or "REPA". flags: of a
    train.py, a dict. Raises `UserError` when the network predicts what is not known here."""
    if flags.keys() & {"path_type", "prediction"}:
        path, prediction = flags.get("path_type", "Linear"), flags.get("prediction", "velocity")
        known = {("Linear", "velocity"): "SiT", ("linear", "v"): "REPA"}
        if (path, prediction) not in known:
            raise UserError(f"it predicts {prediction!r:.40} on the path {path!r:.40}: known here are 'velocity' on "
                            "the path 'Linear' (SiT, LightningDiT) and 'v' on the path 'linear' (REPA)")
        return known[path, prediction]
    if config.variance == "fixed":
        return "DiT"
    eps, v = weights["final_layer.linear.weight"].unflatten(0, (-1, 2, config.latent_shape[0])).unbind(1)
    return "SiT" if eps.any() and not v.any() else "DiT"  # SiT has no use for the second half: it stays as it began


def as_sit(weights, config):
    """Weights of SiT's, by our names, and their `Config` so that they draw as its sample.py does."""
    if config.variance == "learned":
        weights = weights | {name: weights[name].unflatten(0, (-1, 2, config.latent_shape[0]))[:, 0].flatten(0, 1)
                             for name in ("final_layer.linear.weight", "final_layer.linear.bias")}
    return weights, dataclasses.replace(config, process="sit", variance="fixed", sampler="ddim", spacing="trailing")


def as_repa(weights, config):
    """Weights of REPA's, by our names, and their `Config` so that they draw as its generate.py does.

    Its network answers with eps - x_0, and is shown 0 for the image: t = 1 - s for the s that ours is shown. Sines and
    cosines of f t are those of f s turned by the angle f, which the first layer can do.
    """
    weights, config = as_sit(weights, config)
    waves = weights["time_embedding.mlp.0.weight"]                                            # (D, 256)
    frequencies = torch.exp(torch.arange(128, dtype=torch.float64) * (-math.log(10000) / 128))
    (sines, cosines), sin, cos = waves.double().chunk(2, dim=1), frequencies.sin(), frequencies.cos()
    turned = torch.cat([cosines * sin - sines * cos, cosines * cos + sines * sin], dim=1).to(waves.dtype)
    negated = {f"final_layer.linear.{part}": -weights[f"final_layer.linear.{part}"] for part in ("weight", "bias")}
    config = dataclasses.replace(config, sample_steps=50, guidance=1.5, guided_channels=0)
    return weights | negated | {"time_embedding.mlp.0.weight": turned}, config


def main():
    parser = Parser(description="Converts a file of the official code of DiT, SiT or REPA, or of LightningDiT's "
                                "if its network is DiT's, to a checkpoint: the released weights, or what its train.py "
                                "has saved. The checkpoint then draws as the official code does.")
    parser.add_argument("official", type=some_path, help="the file, such as DiT-XL-2-256x256.pt")
    parser.add_argument("out", type=some_path, help="the checkpoint to write")
    parser.add_argument("--num-heads", type=int, help="attention heads (default: those of DiT-S, B, L or XL)")
    parser.add_argument("--vae", help="the VAE that it was trained with, a folder or a name on the Hugging Face hub, "
                        f"if that is not Stability's (default: {VAE})")
    args = parser.parse_args()
    check_out(args.out, args.official)
    weights, flags = read_official(args.official)
    try:
        config = make_config(weights, flags, args.num_heads, args.vae)
        ours = convert(weights, config)
        of = process_of(ours, config, flags)
        if of != "DiT":
            ours, config = (as_sit if of == "SiT" else as_repa)(ours, config)
    except UserError as error:
        raise UserError(f"{args.official}: {error}") from None
    save_checkpoint(args.out, config, 0, 0.0, ours)
    height, width = config.image_size
    print(f"{args.out}: {sum(weight.numel() for weight in ours.values()):,} parameters, {config.depth} blocks of width "
          f"{config.hidden_size}; images of {height} x {width}, {config.num_classes:,} classes")
    if of != "DiT":
        print(f"it is a {of}: the network predicts the velocity on the way from noise to image")
    if flags.get("timestep_shift"):
        print("it draws without timestep_shift: not known here")
    vae = args.vae or "sd-vae-ft-ema"
    print(f"draw with: python -m latent.draw --checkpoint {shlex.quote(str(args.out))} --vae {shlex.quote(vae)} "
          f"--labels {'207 360' if config.classes else '0'}")


if __name__ == "__main__":
    run(main, alone=True)
