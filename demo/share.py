"""Makes a small file of a checkpoint, to share: the averaged weights alone, in half precision.

    python -m demo.share run/model.pth shared.pth     or shared.safetensors
"""

from support.commands import Parser, run, some_path
from support.settings import add_flags, given_flags

import dataclasses
import os
import shlex
from pathlib import Path

from config import Config
from latent.config import LatentConfig
from record.checkpoint import check_out, find_checkpoint, load_checkpoint, save_checkpoint
from text.config import TextConfig
from video.config import ANY, ClipConfig


def main():
    parser = Parser(description="Makes a small file of a checkpoint, to share: the averaged weights alone, in half "
                                "precision. The flags change the defaults that it draws with.")
    parser.add_argument("checkpoint", type=some_path, help="a checkpoint that train.py wrote, or its run folder")
    parser.add_argument("out", type=some_path, help="the file to write, .pth or .safetensors")
    add_flags(parser, ClipConfig, [name for name in ClipConfig.SAMPLING if name not in ("seed", "precision", "vae")])
    args = parser.parse_args()
    args.checkpoint = find_checkpoint(args.checkpoint)
    check_out(args.out, args.checkpoint)
    content = load_checkpoint(args.checkpoint, (*ANY, TextConfig))
    halves, config = {name: weight.half() for name, weight in content["ema"].items()}, content["config"]
    wide = [name for name, weight in halves.items() if not weight.isfinite().all()]
    ema = halves | {name: content["ema"][name] for name in wide}
    changes, folder = {"data_dir": Config.data_dir}, None
    if getattr(config, "vae", ""):  # without the path on this machine: a model looks for its VAE beside itself
        places = (Path(config.vae), Path(args.checkpoint).parent / config.vae)
        folder = next((place.resolve() for place in places if place.is_dir()), None)
        changes |= {"vae": folder.name if folder else config.vae, "latents": LatentConfig.latents}
    given = given_flags(args, ClipConfig)
    config.check_given(given)
    config = dataclasses.replace(config, **changes, **given)
    save_checkpoint(args.out, config, content["step"], content["seconds"], ema)
    print(f"{args.out}: {os.path.getsize(args.out) / 1e6:.1f} MB, trained for {content['step']:,} steps")
    if wide:
        print(f"{len(wide)} of {len(ema)} tensors hold numbers that half precision cannot, and stay as they are")
    if folder and folder.parent != Path(args.out).resolve().parent:
        print(f"it draws with its VAE, and looks for it beside itself: cp -r {shlex.quote(str(folder))} "
              f"{shlex.quote(str(Path(args.out).parent))}/")


if __name__ == "__main__":
    run(main, alone=True)
