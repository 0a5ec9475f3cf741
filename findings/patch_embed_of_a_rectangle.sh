#!/usr/bin/env bash
# Versions: diffusers 0.42.1, torch 2.14.1
#
# Expected: PatchEmbed(height=8, width=16, patch_size=2) embeds images of 8 x 16.
# Seen:     its table has int(sqrt(32))^2 = 25 positions for 32 patches, and it raises on the one size it was made for.
#           It embeds 16 x 8, 16 x 16 and 8 x 8, for which it computes positions anew; and 8 x 16 with
#           pos_embed_max_size.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" diffusers==0.42.1 torch==2.14.1 numpy==2.4.6
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
import torch
from diffusers.models.embeddings import PatchEmbed

sizes = dict(height=8, width=16, patch_size=2, in_channels=3, embed_dim=8)
embed = PatchEmbed(**sizes)
print("positions:", tuple(embed.pos_embed.shape))
assert embed.pos_embed.shape[1] == 25
try:
    embed(torch.zeros(1, 3, 8, 16))
except RuntimeError as error:
    print("8 x 16:", error)
else:
    raise SystemExit("8 x 16 is embedded")
for height, width in ((16, 8), (16, 16), (8, 8)):
    assert embed(torch.zeros(1, 3, height, width)).shape[1] == height * width // 4
assert PatchEmbed(**sizes, pos_embed_max_size=16)(torch.zeros(1, 3, 8, 16)).shape[1] == 32
END
