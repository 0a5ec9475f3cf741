"""What every command needs and no reader of the article looks for.

Each command imports this package first. It prepares the process for torch, and imports it: that takes a second or two.
"""

import atexit
import contextlib
import gc
import os
import sys

if sys.version_info < (3, 11):  # noqa: UP036 -- older Pythons can read this file and every command
    sys.exit(f"error: this needs Python 3.11 or newer, and this Python is {sys.version_info[0]}.{sys.version_info[1]}: "
             "make the environment with a newer one, such as python3.12 -m venv .venv")

# Threads that wait for work spin at first, which holds up other programs. This is the shortest spin that costs nothing
# on a machine of our own (EXPERIMENTS.md). OpenMP reads it as torch loads it.
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
    """Says in one line, without a traceback, that Ctrl-C was pressed during the imports, or that a library is missing.
    See `sys.excepthook`."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
        sys.exit(130)
    if issubclass(kind, ModuleNotFoundError):
        print(f"error: {error}: activate the environment (. .venv/bin/activate), or install into it: pip install -r "
              "requirements.txt, or -r requirements-dev.txt for tests and comparisons", file=sys.stderr)
        sys.exit(1)
    report_other(kind, error, traceback)


sys.excepthook = report

DONE = []  # gets the name of a command that has succeeded


@atexit.register
def leave():
    """Ends a command that has succeeded at once, after all that others have registered: to unload torch's libraries
    takes a fifth of a second."""
    if DONE:
        with contextlib.suppress(Exception):  # if that fails, Python says so
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


# Nothing that torch is made of becomes garbage. Without this, Python looks through it hundreds of times: a fifth of the
# time to the first picture.
if "torch" not in sys.modules:
    gc.disable()
    import torch  # noqa: F401

    gc.collect()  # what errors during the import have left
    gc.freeze()
    gc.enable()
