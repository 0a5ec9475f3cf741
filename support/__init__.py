"""What every command needs and no reader of the article looks for.

Each command imports this package first. Importing it prepares the process for what must be settled before torch is
imported, which takes a second or two, and imports that.
"""

import atexit
import contextlib
import gc
import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036 -- older Pythons can read this file and every command
    sys.exit(f"error: this needs Python 3.11 or newer, and this Python is {sys.version_info[0]}.{sys.version_info[1]}: "
             "make the environment with a newer one, such as python3.12 -m venv .venv")

# Threads that wait for work spin at first: another program's thread waits for them, and they for it. This is the
# shortest spin that costs nothing where the machine is ours alone (EXPERIMENTS.md). OpenMP reads it as torch loads it.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "3000"

# A closed standard stream (`python train.py 2>&-`) is None, and the next file to be opened would take its place.
for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:
        stream = open(os.devnull, "w" if number else "r")  # noqa: SIM115 -- open to the end of the process
        if stream.fileno() != number:
            os.dup2(stream.fileno(), number)
        setattr(sys, name, stream)


def report(kind, error, traceback, report_other=sys.excepthook):
    """Ctrl-C while the modules are still being imported, and a library that is not there, in one line instead of a
    traceback. See `sys.excepthook`."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        sys.exit(130)
    if issubclass(kind, ModuleNotFoundError):
        print(f"error: {error}: activate the environment (. .venv/bin/activate), or install into it: pip install -r "
              "requirements.txt, or -r requirements-dev.txt for tests and comparisons", file=sys.stderr)
        sys.exit(1)
    report_other(kind, error, traceback)


sys.excepthook = report

DONE = []  # of a command that has come to its end, a word


@atexit.register
def leave():
    """Ends a command that has succeeded, after all that others have registered: without taking torch's libraries down,
    for which the system would read 120 MB of them, and take a fifth of a second."""
    if DONE:
        with contextlib.suppress(Exception):  # where that fails, Python says so
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


# Python searches hundreds of times for garbage while torch is imported, and later, and at the end, among all that torch
# is made of, none of which is any: a fifth of the time to the first picture.
if "torch" not in sys.modules and gc.isenabled():
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.collect()  # frames that errors within it were raised in, and all that these hold
        gc.freeze()
        gc.enable()
