"""A checkpoint: one file of plain values and tensors that rebuilds its model without any flag.

{format, config, step, seconds, model, ema, optimizers, window}: the configuration as a dict, how many steps were
trained and in how many seconds, the weights and their moving average by their plain names, the states of the
optimizers, and the losses not yet logged. Weights to share (`python checkpoint.py run/model.pth shared.pth`) hold the
average alone, without model, optimizers and window.
"""

from support.commands import Parser, UserError, resolve_precision, run
from support.files import write_atomically

import dataclasses
import math
import os
import warnings

import torch

from config import SAMPLING, Config, add_flags, given_flags
from diffusion import Diffusion, RectifiedFlow
from dit import DiT

FORMAT = "dit-checkpoint-1"


def build_model(config):
    """The untrained `DiT` of a configuration whose sizes are all known."""
    return DiT(config.image_size, config.patch_size, config.channels, config.num_classes, config.hidden_size,
               config.depth, config.num_heads, config.mlp_ratio, config.recompute)


def build_diffusion(config, device="cpu"):
    if config.process == "flow":
        return RectifiedFlow(config.T, config.shift, device)
    return Diffusion(config.T, config.beta_start, config.beta_end, device)


def save_checkpoint(path, config, step, seconds, ema, **state):
    """Writes a checkpoint; `ema` and, in `state`, model, optimizers and window as the module's docstring says."""
    content = {"format": FORMAT, "config": dataclasses.asdict(config), "step": step, "seconds": seconds, "ema": ema,
               **state}
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(path):
    """Reads a checkpoint onto the CPU. Returns its dict, with a checked `Config` under "config".

    Nothing in the file can run code (`weights_only=True`), and no model is built before every name and shape fits.
    Raises `UserError` for whatever is not a whole checkpoint of this project.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns of what it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: train.py makes one") from None
    except Exception as error:  # torch.load raises nearly anything when a file is not its own
        reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        raise UserError(f"{path} is not a checkpoint, or is cut short ({reason:.100})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project (no format {FORMAT!r} in it)")
    try:
        content["config"] = config = Config(**content["config"])
        with torch.device("meta"):  # shapes without memory, however large a size the file claims
            expected = build_model(config).state_dict()
        for weights in [content["ema"]] + ([content["model"]] if "model" in content else []):
            shapes = {name: tensor.shape for name, tensor in weights.items()}
            if shapes != {name: tensor.shape for name, tensor in expected.items()}:
                raise UserError("its weights do not fit its configuration")
            # A tensor can claim more elements than are stored (a stride of 0): loading it would fill the memory.
            if sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) > os.path.getsize(path):
                raise UserError("its weights claim more than the file holds")
        if type(content["step"]) is not int or content["step"] < 0:
            raise UserError("its step is not a number of steps")
        if type(content["seconds"]) is not float or not 0 <= content["seconds"] < math.inf:
            raise UserError("its seconds are not a time")
    except Exception as error:
        raise UserError(f"{path} is a damaged checkpoint: {type(error).__name__} {error!s:.150}") from None
    return content


def load_model(path, device="cpu", precision="auto"):
    """The averaged model of a checkpoint, ready to draw in that precision (see `Config`): returns (model, config)."""
    content = load_checkpoint(path)
    return averaged_model(content, device, precision), content["config"]


def averaged_model(content, device="cpu", precision="auto"):
    """The averaged model, ready to draw in that precision, of what `load_checkpoint` returned."""
    model = build_model(content["config"])
    model.load_state_dict(content["ema"])
    dtype = torch.bfloat16 if resolve_precision(precision, torch.device(device)) == "bf16" else torch.float32
    return model.to(device, dtype).eval().requires_grad_(False)


def main():
    parser = Parser(description="Makes a small file to share of a checkpoint: the averaged weights alone, in half "
                                "precision. How they draw when nothing else is asked for can be set anew.")
    parser.add_argument("checkpoint", help="a checkpoint that train.py wrote")
    parser.add_argument("out", help="the file to write")
    add_flags(parser, [name for name in SAMPLING if name not in ("seed", "precision")])
    args = parser.parse_args()
    content = load_checkpoint(args.checkpoint)
    ema = {name: tensor.half() for name, tensor in content["ema"].items()}
    # A path of this machine concerns nobody
    config = dataclasses.replace(content["config"], data_dir=Config.data_dir, **given_flags(args))
    save_checkpoint(args.out, config, content["step"], content["seconds"], ema)
    print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.1f} MB, trained for {content['step']:,} steps")


if __name__ == "__main__":
    run(main)
