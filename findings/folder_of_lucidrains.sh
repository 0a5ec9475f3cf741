#!/usr/bin/env bash
# Versions: denoising-diffusion-pytorch 2.3.4, torch 2.14.1
#
# Expected: its Trainer learns all images of a folder, as they are.
# Seen:     of ten images that Pillow reads it takes four, in silence: names that end in .png, .jpg, .jpeg and .tiff, in
#           lower case. Camera names (.JPG), .webp, .bmp, .gif and .tif are left out. And the Trainer mirrors half of the
#           images unless augment_horizontal_flip=False is said: digits too.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" denoising-diffusion-pytorch==2.3.4 torch==2.14.1 pillow==13.0.0
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
import inspect
import os

from denoising_diffusion_pytorch import Trainer
from denoising_diffusion_pytorch.denoising_diffusion_pytorch import Dataset
from PIL import Image

os.mkdir("images")
for name in ("a.png", "b.PNG", "c.jpg", "d.jpeg", "e.JPG", "f.webp", "g.bmp", "h.gif", "i.tif", "j.tiff"):
    Image.effect_noise((8, 8), 50).convert("RGB").save(f"images/{name}")
taken = sorted(path.name for path in Dataset("images", 8).paths)
print(len(taken), "of 10:", *taken)
assert taken == ["a.png", "c.jpg", "d.jpeg", "j.tiff"]
mirror = inspect.signature(Trainer.__init__).parameters["augment_horizontal_flip"].default
assert mirror is True
image = Image.new("L", (8, 8))
image.putpixel((0, 0), 255)
os.mkdir("one")
image.save("one/a.png")
data = Dataset("one", 8, augment_horizontal_flip=mirror)
mirrored = sum(data[0][0, 0, 7].item() > 0.5 for _ in range(200))
print("mirrored:", mirrored, "of 200")
assert 60 < mirrored < 140
END
