"""Folders and files on disk: checked before the work, locked, and written whole or not at all."""

from support import parallel
from support.commands import UserError, first_line

import contextlib
import errno
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np

MARK = b"A Diffusion Transformer, from nothing"  # in each picture and page that this project writes

try:
    import fcntl
except ImportError:
    fcntl = None

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # what file systems say that have none, some network ones


def fingerprint(*parts):
    """A hash, 16 hexadecimal digits, of strings and of arrays, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    return digest.hexdigest()[:16]


def make_dir(path):
    """Makes a folder and checks that it can be written, before any work is done. Raises `UserError`."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"the folder {path} cannot be written: {error.strerror}") from None


def check_file(path):
    """Raises `UserError` unless `write_atomically` can write to `path`."""
    path = Path(path)
    try:
        if not path.parent.is_dir():
            raise OSError(None, f"there is no folder {path.parent}")
        if path.exists() and not path.is_file():  # a device, such as /dev/null, would become a file
            raise OSError(None, "it is a folder" if path.is_dir() else "it is no file")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def check_output(path, own=MARK, inputs=()):
    """Raises `UserError` if a command may not write to `path`: it never replaces a file that it reads, nor one that it
    has not written itself.

    own: bytes that all files of this kind hold among their first or last 4,096; b"": none is replaced. inputs: paths of
    what the command reads, files or folders (None: not given).
    """
    path = Path(path)
    check_file(path)
    if not path.exists() or not path.stat().st_size:
        return
    for other in map(Path, filter(None, inputs)):
        if other.exists() and (path.samefile(other) or other.resolve() in path.resolve().parents):
            raise UserError(f"{path} is read by this command, which would write over it: choose another name")
    try:
        with path.open("rb") as file:
            ends = file.read(4096)
            file.seek(max(0, path.stat().st_size - 4096))
            ends += file.read()
    except OSError as error:
        raise UserError(f"{path} cannot be read, to see whose it is: {error.strerror}") from None
    if not own or own not in ends:
        why = ", and nothing in it says that this command wrote it" if own else ""
        raise UserError(f"{path} exists{why}: choose another name, or remove it")


@contextlib.contextmanager
def lock_dir(path):
    """Within the block the folder `path` is that of rank 0: another process that asks for it gets a `UserError`. The
    system takes the lock away when the process ends, however it ends. Does nothing without flock: on Windows, and on
    file systems without it."""
    if parallel.RANK or not fcntl:
        yield
        return
    lock = Path(path) / ".lock"
    try:
        file = lock.open("a")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
            raise BlockingIOError  # whoever had it has just removed it, and another has made it anew
    except (BlockingIOError, FileNotFoundError):
        raise UserError(f"{path} is in use by another process: wait for it, or choose another folder") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise UserError(f"{lock} cannot be written: {error.strerror}") from None
    with file:
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # while it is held: nobody can have it


def write_atomically(path, write):
    """Calls `write(file)` on a temporary file beside `path`, then moves that to `path`: whatever goes wrong, it holds
    either the old content or all of the new. If `path` is a link, the file that it leads to is written. Raises
    `UserError` when the file cannot be written."""
    path = Path(path)
    check_file(path)
    real = Path(os.path.realpath(path))
    temporary = real.with_name(real.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, real)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # torch reports a failed write as a RuntimeError of its own
        if isinstance(error, (OSError, RuntimeError)):
            reason = getattr(error, "strerror", None) or first_line(error)
            raise UserError(f"{path} cannot be written: {reason:.150}") from None
        raise
