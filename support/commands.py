"""What makes a script a command: errors in one line, the flags that several share, the device, the memory."""

import support

import argparse
import contextlib
import ctypes
import os
import shlex
import signal
import sys
from pathlib import Path

import torch

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none


class UserError(Exception):
    """Bad input, in one line: what was wrong and what to do. `run` prints it without a traceback."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake as a `UserError`, in one line, instead of printing its usage."""

    def __init__(self, **options):
        name = getattr(sys.modules["__main__"].__spec__, "name", "")  # such as measure.score, with python -m
        if name.startswith(("demo.", "edit.", "few.", "latent.", "measure.", "text.", "video.")):
            options = {"prog": f"python -m {name}"} | options
        super().__init__(**options)

    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the flags)")


def some_path(word):
    """The type of a flag that names a file or a folder. An empty word is a mistake: an unset variable leaves it."""
    if not word:
        raise argparse.ArgumentTypeError("is empty: name something, or leave it out")
    return Path(word)


def some_word(word):
    """As `some_path`, but returns the word."""
    return some_path(word) and word


def flag_words(name, value):
    """A flag and its value as words of a command line. A value that begins with a dash would be taken for a flag."""
    return [f"{name}={value}"] if str(value).startswith("-") else [name, str(value)]


def add_device_flag(parser):
    parser.add_argument("--device", help="cuda, cpu, mps, cuda:1 ... (default: the fastest available)")


def pick_device(name=None):
    """The torch device called `name`, or the fastest one. Raises `UserError` when it cannot be used."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        probe = torch.ones(1, device=name)
        probe.item()  # meta has no values
        if probe.is_cuda:
            torch.cuda.set_device(probe.device)  # torch.cuda's functions ask for the current one
    except Exception as error:  # each kind of device fails in its own way
        raise UserError(f"--device {name} cannot be used here: {str(error).splitlines()[0]:.100}") from None
    return probe.device


def resolve_precision(precision, device):
    """What "auto" is on `device`: bf16 if the hardware multiplies its matrices faster, else fp32."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    # Intel's AVX-512 multiplies bf16 at half the rate of fp32; AMD's at twice.
    quick_vectors = features.get("avx512_bf16") and not features.get("cpu_name", "").startswith("Intel")
    return "bf16" if quick_vectors or features.get("amx_bf16") else "fp32"


def dtype_of(precision, device):
    """The torch dtype of "fp32", "bf16" or "auto"."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[resolve_precision(precision, device)]


@contextlib.contextmanager
def in_full_precision():
    """Within the block, or the function that it decorates, no gradients are kept, and cuDNN convolves in float32. By
    default it rounds to TF32 if the GPU can: a measurement would depend on the GPU."""
    conv = torch.backends.cudnn.conv
    before, conv.fp32_precision = conv.fp32_precision, "ieee"
    try:
        with torch.no_grad():
            yield
    finally:
        conv.fp32_precision = before


def keep_memory():
    """Makes glibc keep the memory that tensors of up to 32 MB free. Otherwise it gets it back from the system page by
    page, which takes a quarter of a training step on CPUs, and half of sampling."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: blocks above get pages of their own; this is its upper limit
        mallopt(-1, -1)          # M_TRIM_THRESHOLD: give nothing back


def silence(*streams):
    """From now on, what is written to these streams (1 standard output, 2 standard error) is lost without an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in streams:
        os.dup2(nowhere, number)
    os.close(nowhere)


@contextlib.contextmanager
def catch_signals():
    """Within the block, Ctrl-C, SIGTERM and SIGHUP (a lost terminal) do not end the process. Yields a list that gets
    each. A second one ends the process at once."""
    received = []

    def note(number, _):
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
        if number == HANGUP:  # to write to a lost terminal is an error
            silence(1, 2)
            return
        with contextlib.suppress(OSError):
            os.write(2, b"\nstopping: the last step is being saved; once more ends it at once\n")

    before = {}
    with contextlib.suppress(ValueError):  # only the main thread gets signals
        for number in (signal.SIGINT, signal.SIGTERM, HANGUP):
            if number and not (number == HANGUP and signal.getsignal(number) == signal.SIG_IGN):  # nohup
                before[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_stopped(done, number, *script):
    """Ends a command that signal `number` stopped after `done` steps: says how to go on, and exits with 128 + number.

    script: what stands between "python" and the flags; default: how the command was called.
    """
    words = [*(script or sys.argv[:1]), *(word for word in sys.argv[1:] if word != "--resume"), "--resume"]
    print(f"stopped after step {done:,}; go on with: {shlex.join(['python', *words])}")
    sys.exit(128 + number)


def say_end(done, stopped, run_dir, drawn_by="inference.py", script=()):
    """Prints what to do next after `done` steps; if a signal `stopped` them, as `end_stopped` does for `script`."""
    if stopped:
        end_stopped(done, stopped, *script)
    given = flag_words("--checkpoint", run_dir / "model.pth") if run_dir != Path("run") else []
    print(f"draw with: {shlex.join(['python', *drawn_by.split(), *given])}")


def first_line(error, most=150):
    """The first line of an exception's message, or its type if it has none; at most `most` characters, cut between two
    words."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= most else line[:most - 4].rsplit(" ", 1)[0] + " ..."


def is_out_of_memory(error):
    """Whether an exception of numpy, torch, CUDA or cuBLAS says that memory ran out."""
    signs = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))


def run(main, memory="--batch-size", alone=False):
    """Calls `main()` as a command. Every end but success is at most one line on standard error, without a traceback.

    memory: the flags to lower when memory runs out. alone: of several processes that torchrun started, the first does
    the work.
    Exit codes: 1 for bad input, for a file or a folder that the system refuses, and when memory runs out; 130 after
    Ctrl-C; 141 when nobody reads the output any more (`| head`).
    """
    if alone and os.environ.pop("TORCHELASTIC_RUN_ID", None):  # what it calls or starts then waits for no others
        if os.environ["RANK"] != "0":
            return
        parallel = sys.modules.get("support.parallel")
        if parallel:
            parallel.RANK, parallel.WORLD = 0, 1
    keep_memory()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="replace")  # a terminal may know ASCII alone
    try:
        main()
        sys.stdout.flush()
        if main.__module__ == "__main__":  # not called by another program
            support.DONE.append(main.__name__)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        silence(sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        sys.exit(f"error: {error.filename or 'the system'}: {error.strerror or first_line(error)}")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sys.exit(f"error: out of memory: lower {memory} ({first_line(error):.100})")
