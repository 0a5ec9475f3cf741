#!/usr/bin/env bash
# From nothing to a scored model, in about five minutes on two CPU cores: makes an environment, trains on MNIST, draws,
# scores, and opens what came out. Needs Python 3.11 or newer. Flags are those of train.py:
#     bash speedrun.sh
#     bash speedrun.sh --steps 900        # a quicker, worse model
set -euo pipefail
cd "$(dirname "$0")"
run=run_speedrun

# 1. The environment: .venv, or the one that is active.
if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -d .venv ] || python3 -m venv .venv
    . .venv/bin/activate
fi
python -m pip install --quiet -r requirements.txt

# 2. Train. Its page is run_speedrun/index.html. A run that was stopped goes on.
resume=()
[ -e $run/model.pth ] && resume=(--resume)
python train.py --run-dir $run "${resume[@]}" "$@"

# 3. Draw: a grid of digits, and their denoising.
python inference.py --checkpoint $run --out $run/digits.png
python inference.py --checkpoint $run --strip --out $run/strip.png

# 4. Score 10,000 digits against MNIST's test images; the nearest training images and the worst digits are pictures.
python -m measure.score --checkpoint $run --pictures $run

# 5. The page that draws in a browser.
python -m demo.export --checkpoint $run --out $run/dit.html

# 6. Open the pictures and pages, where there is a desktop.
for file in $run/index.html $run/digits.png $run/worst.png $run/dit.html; do
    echo "$file"
    python -m webbrowser "file://$PWD/$file" > /dev/null 2>&1 || true
done
