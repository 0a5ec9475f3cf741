#!/usr/bin/env bash
# Versions: imageio 2.38.1, PyAV 18.1.0, Pillow 13.0.0
#
# Expected: 8 frames written by imageio.v3, some of which are like the one before, are 8 frames when read again; and what
#           Pillow reads, PyAV reads.
# Seen:     a GIF and an animated PNG come back as 4 frames, without a word: equal neighbours became one of twice or three
#           times the duration, so a clip is shorter and moves at another speed. PyAV then names a rate of 5 frames per
#           second for the GIF (10 were asked for). MP4 keeps all 8. An animated WebP, which Pillow reads, PyAV refuses.
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

clip = np.stack([np.full((16, 16, 3), level, np.uint8) for level in (0, 0, 80, 80, 80, 160, 240, 240)])
for name in ("a.gif", "a.png", "a.webp"):
    iio.imwrite(name, clip, duration=100, loop=0)
iio.imwrite("a.mp4", clip, fps=10, plugin="pyav", codec="libx264")
for name, count in (("a.gif", 4), ("a.png", 4), ("a.mp4", 8)):
    frames = iio.imread(name, index=None) if name != "a.mp4" else iio.imread(name, plugin="pyav")
    with av.open(name) as container:
        decoded, rate = sum(1 for _ in container.decode(video=0)), container.streams.video[0].average_rate
    print(name, "imageio", len(frames), "PyAV", decoded, "rate", rate)
    assert len(frames) == decoded == count
    assert rate == {"a.gif": 5, "a.mp4": 10}.get(name, rate)
try:
    with av.open("a.webp") as container:
        list(container.decode(video=0))
except av.error.InvalidDataError as error:
    print("a.webp:", error)
else:
    raise SystemExit("PyAV reads the animated WebP")
END
