#!/usr/bin/env bash
# Versions: torchvision 0.29.2, torch 2.14.1, Pillow 13.0.0
#
# Expected: torchvision.io.decode_gif returns (T, 3, H, W) for any GIF.
# Seen:     a GIF of one frame is (3, H, W): a folder of clips, one of which stands still, does not stack.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" torchvision==0.29.2 torch==2.14.1 pillow==13.0.0 numpy==2.4.6
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
import torch
import torchvision
from PIL import Image

images = [Image.new("L", (16, 12), level) for level in (0, 90, 180)]


def read(count):
    images[0].save("a.gif", save_all=True, append_images=images[1:count])
    with open("a.gif", "rb") as file:
        return tuple(torchvision.io.decode_gif(torch.frombuffer(bytearray(file.read()), dtype=torch.uint8)).shape)


print("one frame", read(1), "three frames", read(3))
assert read(1) == (3, 12, 16) and read(3) == (3, 3, 12, 16)
END
