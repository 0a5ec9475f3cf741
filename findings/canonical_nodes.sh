#!/usr/bin/env bash
# Versions: mosaicml-streaming 0.13.0, torch 2.14.1
#
# Expected: a StreamingDataset of 10 samples yields each of them once an epoch, and len() says how many it yields.
# Seen:     with num_canonical_nodes=4, which fixes the order for any number of machines, len() says 10 and it yields 12:
#           two samples come twice, to make four equal parts.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" mosaicml-streaming==0.13.0 torch==2.14.1
cd "$dir"
OMP_NUM_THREADS=1 "$dir/venv/bin/python" - <<'END'
from streaming import MDSWriter, StreamingDataset

with MDSWriter(out="mds", columns={"x": "int"}) as writer:
    for i in range(10):
        writer.write({"x": i})
data = StreamingDataset(local="mds", batch_size=4, num_canonical_nodes=4)
seen = [sample["x"] for sample in data]
print("len", len(data), "yields", sorted(seen))
assert len(data) == 10 and len(seen) == 12 and set(seen) == set(range(10))
END
