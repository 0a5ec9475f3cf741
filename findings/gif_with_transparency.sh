#!/usr/bin/env bash
# Versions: imageio 2.38.1, PyAV 18.1.0, Pillow 13.0.0
#
# Expected: two transparent frames that Pillow saves as a GIF are read by imageio.v3 as (2, H, W, 4); and as RGB, Pillow
#           and PyAV show the same colour where nothing is drawn.
# Seen:     imageio reads the first frame as RGB and the second as RGBA, and imread raises ValueError: they do not stack.
#           Where nothing is drawn, Pillow's RGB is black and PyAV's rgb24 is white: the same sprites, on two grounds.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" imageio==2.38.1 av==18.1.0 pillow==13.0.0 numpy==2.4.6
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
import av
import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageSequence

sprites = np.zeros((2, 16, 16, 4), np.uint8)
sprites[0, 2:6, 2:6] = 200, 30, 30, 255
sprites[1, 8:12, 8:12] = 30, 30, 200, 255
first, second = map(Image.fromarray, sprites)
first.save("a.gif", save_all=True, append_images=[second], duration=100, disposal=2)
shapes = [frame.shape for frame in iio.imiter("a.gif")]
print("imageio:", shapes)
assert shapes == [(16, 16, 3), (16, 16, 4)]
try:
    iio.imread("a.gif")
except ValueError as error:
    print("imread:", error)
else:
    raise SystemExit("imread reads it")
with Image.open("a.gif") as image:
    pillow = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(image)]
with av.open("a.gif") as container:
    pyav = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
for a, b in zip(pillow, pyav, strict=True):
    print("ground: Pillow", a[0, 0], "PyAV", b[0, 0])
    assert a[0, 0].tolist() == [0, 0, 0] and b[0, 0].tolist() == [255, 255, 255]
END
