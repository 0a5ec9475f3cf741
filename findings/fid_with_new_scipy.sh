#!/usr/bin/env bash
# Versions: pytorch-fid 0.3.0, clean-fid 0.1.35, SciPy 1.18.1, torch 2.14.1, torchvision 0.29.2, Python 3.12
#
# Expected: both install beside the newest SciPy, which they do not bound, and so compute a FID with it.
# Seen:     once all features are there, both end in "TypeError: sqrtm() got an unexpected keyword argument 'disp'",
#           which SciPy 1.18 no longer knows. With SciPy 1.17.1 both compute the distance. (1.18 needs Python 3.12.)
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" pytorch-fid==0.3.0 clean-fid==0.1.35 scipy==1.18.1 torch==2.14.1 torchvision==0.29.2 numpy==2.4.6
cat >"$dir/distance.py" <<'END'
import numpy as np
from cleanfid.fid import frechet_distance
from pytorch_fid.fid_score import calculate_frechet_distance
from scipy import __version__

generator = np.random.default_rng(0)
features = [generator.normal(mean, 1, (500, 8)) for mean in (0, 1)]
statistics = [part for f in features for part in (f.mean(0), np.cov(f, rowvar=False))]
for distance in (calculate_frechet_distance, frechet_distance):
    try:
        found = distance(*statistics)
    except TypeError as error:
        found = str(error)
    print("SciPy", __version__, distance.__module__, found)
    if __version__ == "1.17.1":
        assert 7 < found < 9  # 8 features, each 1 apart
    else:
        assert found == "sqrtm() got an unexpected keyword argument 'disp'"
END
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W ignore distance.py
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" scipy==1.17.1
OMP_NUM_THREADS=1 "$dir/venv/bin/python" -W ignore distance.py
