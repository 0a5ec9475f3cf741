"""A checkpoint: one file of plain values and tensors that rebuilds its model without any flag.

    format       FORMAT
    kind         what it draws, or "vae": the `kind` of its class of settings
    config       the settings, a dict
    step         training steps so far
    seconds      training time so far
    ema          the moving average of the weights, by the plain model's names: what every sample is drawn with
To resume the run:
    data         the fingerprint of its data set
    model        the weights
    optimizers   the state of AdamW and of Muon: a dict for each, by the index of the weight
    window       the losses that are not in log.csv yet
Weights to share (`python -m demo.share run/model.pth shared.pth`) have only the first six. In shared.safetensors the
weights are its tensors, and the other five are JSON in its metadata, under "checkpoint".
"""

from support.commands import UserError, dtype_of, first_line
from support.files import check_output, write_atomically
from support.muon import split_parameters
from support.tensors import check_tensors, misfit, read_tensors

import contextlib
import dataclasses
import json
import math
import os
from pathlib import Path

import safetensors.torch
import torch

from record.log import noise_levels

# The model just trained, else the weights that come with the repository
CHECKPOINTS = (Path("run/model.pth"), Path(__file__).parents[1] / "weights" / "mnist.pth")
FORMAT = "dit-checkpoint-3"
OLDER = ("dit-checkpoint-1", "dit-checkpoint-2")
COMMANDS = {"images": ("inference.py", "train.py"), "latents": ("-m latent.draw", "-m latent.train_dit"),
            "clips": ("-m video.draw", "-m video.train_dit"), "text": ("-m text.draw", "-m text.train"),
            "vae": ("-m latent.draw, by a model of its latents", "-m latent.train_vae")}
TO_RESUME = ("data", "model", "optimizers", "window")
OPTIMIZER_STATES = (("step", "exp_avg", "exp_avg_sq"), ("momentum",))  # AdamW's and Muon's, of one weight


def save_checkpoint(path, config, step, seconds, ema, **to_resume):
    """Writes a checkpoint with the contents that the module's docstring lists. `to_resume` is all of `TO_RESUME` or
    nothing, which it is of a path that ends in .safetensors. Raises `UserError` when the file cannot be written; what
    was there stays."""
    content = {"format": FORMAT, "kind": config.kind, "config": dataclasses.asdict(config), "step": step,
               "seconds": seconds}
    if Path(path).suffix == ".safetensors":
        shared = safetensors.torch.save({name: weight.contiguous() for name, weight in ema.items()},
                                        {"checkpoint": json.dumps(content)})
        write_atomically(path, lambda file: file.write(shared))
        return
    write_atomically(path, lambda file: torch.save(content | {"ema": ema} | to_resume, file))


def check_out(path, source):
    """Finds out before the work whether weights to draw with, made of the file `source`, may be written to `path`: else
    `UserError`. They replace others of their kind, and never what a run goes on from."""
    own = b""
    with contextlib.suppress(Exception):  # read_tensors raises nearly anything when it is another file
        own = b"" if "optimizers" in read_tensors(path) else b"dit-checkpoint-"
    check_output(path, own, [source])


def find_checkpoint(path=None):
    """The file of a checkpoint: `path`, or model.pth in it when it is a run folder; by default the first of
    `CHECKPOINTS` that exists. Raises `UserError` when there is none."""
    if path is None:
        path = next(filter(Path.is_file, CHECKPOINTS), None)
    if path is None:
        raise UserError("no checkpoint: run train.py first, or point --checkpoint at one")
    if not Path(path).is_dir():
        return path
    path = Path(path) / "model.pth"
    if not path.is_file():
        raise UserError(f"{path.parent} holds no model.pth: name a checkpoint or a run folder")
    return path


def load_checkpoint(path, kinds):
    """Reads a checkpoint onto the CPU. Returns its dict, with checked settings under "config", of that one of the
    classes `kinds` which it names.

    Nothing in the file can run code (`weights_only=True`). No model is built before every name, type, shape and value
    fits. What does not belong there is dropped. Raises `UserError` for a file that is not a whole checkpoint of this
    project.
    """
    try:
        content = read_tensors(path)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: {kinds[0].trained_by.removeprefix('-m ')} makes one") from None
    except Exception as error:  # torch.load raises nearly anything when a file is not its own
        raise UserError(f"{path} is not a checkpoint, or is cut short ({first_line(error)})") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found in OLDER:
        raise UserError(f"{path} was made by an older version of this code, and can be used with that one")
    if found != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this project (no format {FORMAT!r} in it)")
    kind = content.get("kind")
    of = next((of for of in kinds if of.kind == kind), None)
    if not isinstance(kind, str) or kind not in COMMANDS:
        raise UserError(f"{path} is a damaged checkpoint: its kind is {kind!r:.20}")
    if of is None:
        drawn, trained = COMMANDS[kind]
        raise UserError(f"{path} is a model of {kind}: draw with it by python {drawn}, train it by python {trained}")
    settings = content.get("config")
    strange = [name for name in settings if name not in of.__dataclass_fields__] if isinstance(settings, dict) else []
    if strange:
        raise UserError(f"{path} was made by another version of this code, and can be used with that one: its setting "
                        f"{strange[0]!r:.50} is not known here")
    names = ("config", "step", "seconds", "ema", *(TO_RESUME if any(name in content for name in TO_RESUME) else ()))
    try:
        content = {name: content[name] for name in names}
        content["config"] = of(**{name: tuple(value) if isinstance(value, list) else value
                                  for name, value in settings.items()})
        with torch.device("meta"):  # shapes without memory, however large a size the file claims
            network = content["config"].build_model()
        shapes = {name: weight.shape for name, weight in network.state_dict().items()}
        different = misfit(content["ema"], shapes)
        if not different:
            check_content(content, network, shapes, os.path.getsize(path))
    except Exception as error:
        raise UserError(f"{path} is a damaged checkpoint: {type(error).__name__} {first_line(error)}") from None
    if different:
        raise UserError(f"{path} holds the weights of another network than dit.py makes ({different}): use it with the "
                        "code that made it, or train anew")
    return content


def check_content(content, network, shapes, file_size):
    """Raises an exception unless everything in `content` fits the `network` of its configuration, whose weights have
    these `shapes`, and is no larger than its file."""
    config, step, seconds = content["config"], content["step"], content["seconds"]
    if type(step) is not int or step < 0 or type(seconds) is not float or not 0 <= seconds < math.inf:
        raise UserError("its steps or seconds are not a number")
    if not config.num_classes:
        raise UserError("it knows no class that could be asked for")
    size = check_tensors("averaged weights", content["ema"], shapes, (torch.float32, torch.float16, torch.bfloat16))
    if "model" in content:
        if type(content["data"]) is not str:
            raise UserError("its data have no fingerprint")
        size += check_tensors("weights", content["model"], shapes)
        size += check_tensors("log", {"window": content["window"]}, {"window": (noise_levels(config.T), 2)})
        if content["window"].min() < 0:
            raise UserError("its log holds losses or numbers below 0")
        groups = [group for group in split_parameters(network, config.optimizer == "muon") if group]
        if not isinstance(content["optimizers"], list):
            raise UserError("its optimizers are no list")
        for state, weights, names in zip(content["optimizers"], groups, OPTIMIZER_STATES[:len(groups)], strict=True):
            if set(state) != set(range(len(weights))):
                raise UserError("its optimizers do not fit its weights")
            for i, weight in enumerate(weights):
                expected = {name: () if name == "step" else weight.flatten(1).shape if name == "momentum" else
                            weight.shape for name in names}
                size += check_tensors("optimizers", state[i], expected)
                if any((state[i][name] < 0).any() for name in ("step", "exp_avg_sq") if name in expected):
                    raise UserError("its optimizers hold negative squares or steps")
    # Many tensors can share what is stored: loading them would fill the memory.
    if size > file_size:
        raise UserError("its weights claim more than the file holds")


def load_model(path, device="cpu", precision="auto", *, kinds):
    """Loads the averaged model of a checkpoint to sample in that precision ("fp32", "bf16" or "auto"). kinds: as for
    `load_checkpoint`. Returns (model, config)."""
    content = load_checkpoint(path, kinds)
    return averaged_model(content, device, precision), content["config"]


def averaged_model(content, device="cpu", precision="auto"):
    """The averaged model in the dict of `load_checkpoint`, to sample in that precision. Its weights are those in the
    dict, where their type and device can stay."""
    with torch.device("meta"):  # random weights would be wasted: 20 s and 3 GB for a large network
        model = content["config"].build_model()
    model.load_state_dict(content["ema"], assign=True)
    return model.to(device, dtype_of(precision, torch.device(device))).eval().requires_grad_(False)
