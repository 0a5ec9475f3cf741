#!/usr/bin/env bash
# Versions: huggingface_hub 2.4.0, httpx2 2.16.2
#
# Expected: hf_hub_download of a file that is not in the cache fails at once where nobody can be reached.
# Seen:     at an address that refuses the connection it tries once, and six times more, with pauses of 1 + 2 + 4 + 8 +
#           8 = 23 seconds. get_hf_file_metadata tries once, and local_files_only=True never: both at once.
# Exits with 0 while this holds.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet uv==0.13.9  # installs from a cache in seconds
"$dir/venv/bin/uv" pip install --quiet --python "$dir/venv/bin/python" huggingface_hub==2.4.0 httpx2==2.16.2
cd "$dir"
export HF_HUB_OFFLINE=0 HF_HOME="$dir/hub" HF_ENDPOINT=http://127.0.0.1:9 NO_PROXY='*' no_proxy='*'
"$dir/venv/bin/python" - <<'END'
import time

import httpx2
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import LocalEntryNotFoundError

asked, send = [], httpx2.Client.send


def counted(client, request, *args, **options):
    if request.url.path.endswith("config.json"):
        asked.append(request.method)
    return send(client, request, *args, **options)


httpx2.Client.send = counted


def outcome(call):
    """How `call` fails, how often the file was asked for, and the seconds."""
    asked.clear()
    start = time.monotonic()
    try:
        call()
    except Exception as error:
        found = type(error), len(asked), time.monotonic() - start
        print(found)
        return found


kind, tries, seconds = outcome(lambda: hf_hub_download("somebody/vae", "config.json"))
assert kind is LocalEntryNotFoundError and tries == 7 and 22 < seconds < 40
kind, tries, seconds = outcome(lambda: get_hf_file_metadata(hf_hub_url("somebody/vae", "config.json")))
assert kind is httpx2.ConnectError and tries == 1 and seconds < 5
kind, tries, seconds = outcome(lambda: hf_hub_download("somebody/vae", "config.json", local_files_only=True))
assert kind is LocalEntryNotFoundError and tries == 0 and seconds < 5
END
