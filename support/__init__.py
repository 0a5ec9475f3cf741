"""What every command needs and no reader of the article looks for.

Each command imports this package first. Importing it prepares the process for what must be settled before torch is
imported, which takes a second or two.
"""

import os
import sys

# Threads that wait for work spin at first: another program's thread waits for them, and they for it. A short spin costs
# nothing where the machine is ours alone. OpenMP reads this when torch loads it.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"

# A closed standard stream (`python train.py 2>&-`) is None, and the next file to be opened would take its place.
for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:
        stream = open(os.devnull, "w" if number else "r")  # noqa: SIM115 -- open to the end of the process
        if stream.fileno() != number:
            os.dup2(stream.fileno(), number)
        setattr(sys, name, stream)


def report_interrupt(kind, error, traceback, report=sys.excepthook):
    """Ctrl-C while the modules are still being imported: one word instead of a traceback. See `sys.excepthook`."""
    if not issubclass(kind, KeyboardInterrupt):
        return report(kind, error, traceback)
    print("stopped", file=sys.stderr)
    sys.exit(130)


sys.excepthook = report_interrupt
