"""Folders and files on disk: found out early whether they can be written, and written whole or not at all."""

from support.commands import UserError

import contextlib
import os
import tempfile
from pathlib import Path


def make_dir(path):
    """Makes a folder, and finds out before the first minute of work whether it can be written: else `UserError`."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"the folder {path} cannot be written: {error.strerror}") from None


def write_atomically(path, write):
    """Calls `write(file)` on a temporary file beside `path`, then puts that in its place: whatever goes wrong, `path`
    holds either what it held or all of the new. What a killed process left is written over by the next. Raises
    `UserError` when it cannot be written."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch reports a failed write as a RuntimeError of its own
        if isinstance(error, (OSError, RuntimeError)):
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise UserError(f"{path} cannot be written: {reason:.150}") from None
        raise
