"""Writes the page: one HTML file that draws with the network in a browser, from a double click, without a network.

    python -m demo.export                                       dit.html, of run/model.pth or weights/mnist.pth
    python -m demo.export --checkpoint run_mine --out mine.html
"""

from support.commands import Parser, UserError, run, some_path
from support.files import check_output, write_atomically

import base64
import functools
import json
import math
import re
import zlib
from pathlib import Path

import torch

from config import Config
from diffusion import SAMPLERS, from_noise
from dit import DiT
from edit.ways import edit, inpaint
from record.checkpoint import averaged_model, find_checkpoint, load_checkpoint

LARGEST = 6_000_000  # bytes of the page, which a phone loads in a few seconds
MOST_STEPS = 100  # of the page's slider
NOISES = 7  # of the reference: a completion in 2 steps of 2 rounds asks for so many
GUIDANCE = 2.0  # the least that a page with guidance opens with: at 1.1 one date of eight digits in ten has a bad one
KNOWN = 9.8528  # `probe` of the network that dit.js computes
SETTINGS = ("image_size", "patch_size", "channels", "num_classes", "hidden_size", "depth", "num_heads", "T",
            "time_spacing", "process", "beta_start", "beta_end", "shift", "sampler", "sample_steps", "guidance")
HERE = Path(__file__).parent


def pack(tensor, dtype):
    """The values of a tensor as base64 of little-endian numbers."""
    return base64.b64encode(tensor.contiguous().to(dtype).numpy().tobytes()).decode()


@torch.no_grad()
def probe():
    """The output of a small `DiT` as one number. Its weights follow from their names and shapes. It tells whether
    dit.py still computes what dit.js does."""
    model = DiT((4, 2), (2, 1), 1, 2, 8, 1, 2)
    for name, weight in model.named_parameters():
        weight.copy_((torch.arange(weight.numel()) + zlib.crc32(name.encode()) % 1000).sin().view_as(weight))
    return (model(torch.arange(8.0).view(1, 1, 4, 2) / 8, 500, 1).flatten() * torch.arange(1, 9)).sum().item()


@torch.no_grad()
def reference(content):
    """What the page must compute as well (`check` of worker.js), from the same weights in float32: the network's output
    at one step, and the images that the samplers, an edit and a completion draw from the same noise. A dict for JSON.
    """
    model, config = averaged_model(content, precision="fp32"), content["config"]
    process, label, t = config.build_process(), torch.tensor([config.num_classes // 2]), config.T // 2
    noise = torch.randn(NOISES, 1, config.channels, *config.image_size, generator=torch.Generator().manual_seed(0))

    def denoise(x, t):
        return process.denoise(model, x, t, label, config.guidance)

    def draw(way, sampler, count, *arguments):
        *_, image = way(process, SAMPLERS[sampler], denoise, functools.partial(next, iter(noise)), count, *arguments)
        return image

    steps = min(config.sample_steps, MOST_STEPS)
    picture, H = draw(from_noise, "dpm", steps), config.image_size[0]
    upper = torch.arange(H)[:, None] < H / 2
    images = {"output": model(noise[0], t, label), "dpm": picture,
              "ddim": draw(from_noise, "ddim", 4), "ddpm": draw(from_noise, "ddpm", 4),
              "edit": draw(edit, "dpm", 4, picture, 0.6), "inpaint": draw(inpaint, "dpm", 2, picture, upper, 2)}
    return {"label": label.item(), "t": t, "guidance": config.guidance, "steps": steps,
            "noise": pack(noise, torch.float32), "images": {name: pack(x, torch.float32) for name, x in images.items()}}


def export(path):
    """The page of a checkpoint, a string. Raises `UserError` when the page could not draw what the network draws, or
    would be too large."""
    if not math.isclose(probe(), KNOWN, rel_tol=1e-3):
        raise UserError("the network of dit.py is no longer the one that demo/dit.js computes, and the page would draw "
                        "something else: change demo/dit.js too, then KNOWN in demo/export.py")
    content = load_checkpoint(path, (Config,))
    config = content["config"]
    if f"*{config.sampler}(" not in (HERE / "diffusion.js").read_text(encoding="utf-8"):
        raise UserError(f"{path} draws with the sampler {config.sampler}, which the page does not know: "
                        "python -m demo.share --sampler writes it with another")
    if config.channels not in (1, 3):
        raise UserError(f"{path} draws {config.channels} channels, but the page shows grey (1 channel) or colour (3)")
    halves = {name: weight.half() for name, weight in content["ema"].items()}
    if not all(weight.isfinite().all() for weight in halves.values()):
        raise UserError(f"{path} has weights that half precision cannot hold")
    parts = {file.name: file.read_text(encoding="utf-8") for file in HERE.iterdir()
             if file.suffix in (".css", ".html", ".js")}
    count = sum(weight.numel() for weight in halves.values())
    size = 4 * -(-2 * count // 3) + sum(len(part.encode()) for part in parts.values())
    if size > LARGEST:
        raise UserError(f"{path} has {count:,} weights, a page of {size / 1e6:.1f} MB; {LARGEST / 1e6:.0f} MB is the "
                        "most: train a smaller network (--hidden-size, --depth)")
    content["ema"] = {name: weight.float() for name, weight in halves.items()}
    settings = {name: getattr(config, name) for name in SETTINGS}
    # Bytes of a folder's name that are no text are shown as their numbers.
    settings["class_names"] = [name.encode(errors="backslashreplace").decode() for name in config.class_names]
    if config.guidance > 1:
        settings["guidance"] = max(GUIDANCE, config.guidance)
    model = {"config": settings, "most_steps": min(MOST_STEPS, config.T), "count": count,
             "weights": [[name, list(weight.shape)] for name, weight in halves.items()],
             "reference": reference(content)}
    parts["model"] = json.dumps(model, ensure_ascii=False).replace("<", "\\u003c")  # a name may be </script>
    parts["numbers"] = pack(torch.cat([weight.flatten() for weight in halves.values()]), torch.float16)
    return re.sub(r"\{\{([\w.]+)\}\}", lambda match: parts[match[1]], parts["page.html"])


def main():
    parser = Parser(description="Writes one HTML file that draws with the network in a browser. It needs no server, no "
                                "network and no installation: double-click it, or send it to someone.")
    parser.add_argument("--checkpoint", type=some_path, help="the model to draw with, a file or a run folder (default: "
                        "run/model.pth, else weights/mnist.pth)")
    parser.add_argument("--out", type=some_path, default="dit.html", help="the page to write (default: dit.html)")
    args = parser.parse_args()
    checkpoint = find_checkpoint(args.checkpoint)
    check_output(args.out, inputs=[checkpoint])
    page = export(checkpoint).encode()
    write_atomically(args.out, lambda file: file.write(page))
    print(f"{args.out}: {len(page) / 1e6:.1f} MB, draws with {checkpoint}; open it in a browser")


if __name__ == "__main__":
    run(main)
