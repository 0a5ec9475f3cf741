"""Files of the statistics of a folder's images, for the FID."""

from support.commands import UserError
from support.files import write_atomically

import numpy as np

LARGEST = 16 * 2048**2 + 1000  # bytes of a covariance at most, in the widest floats


def read_stats(file, dims):
    """Mean (dims,), covariance (dims, dims) and number of images (None: not known) from a file of `save_stats` or of
    pytorch-fid, which calls them mu and sigma. Raises `UserError` when the file is neither, or of other dims."""
    try:
        with np.load(file, allow_pickle=False) as data:
            names = ("mu", "sigma") if "mu" in data else ("mean", "cov")
            if not {*data} >= {*names}:
                raise UserError(f"{file} holds {', '.join(data) or 'nothing':.80}, but no mean and cov, or mu and "
                                "sigma: perhaps features or pixels; give the folder of the images")
            if any(part.file_size > LARGEST for part in data.zip.infolist()
                   if part.filename.removesuffix(".npy") in (*names, "count", "dims")):
                raise ValueError  # before it is unpacked: a small file may hold gigabytes
            mean, cov = (np.asarray(data[name], dtype=np.float64) for name in names)
            count = int(data["count"]) if "count" in data else None
            size = int(data["dims"]) if "dims" in data else len(mean)
        if mean.shape != (size,) or cov.shape != (size, size) or not np.isfinite(mean.sum() + cov.sum()):
            raise ValueError
        tolerance = 1e-4 * abs(cov).max()  # a file may hold single precision
        if abs(cov - cov.T).max() > tolerance or cov.diagonal().min() < 0 or np.linalg.eigvalsh(cov)[0] < -tolerance:
            raise ValueError  # no images have such a covariance, and the distance to it can be 0
        if count is not None and count < 2:
            raise ValueError
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except Exception:  # a damaged file fails in too many ways to list
        raise UserError(f"{file} is damaged or no file of --save-stats: write it anew") from None
    if size != dims:
        raise UserError(f"{file} holds the statistics of {size} features, but --dims is {dims}")
    return mean, cov, count


def save_stats(file, mean, cov, count):
    """Writes what `read_stats` reads, whole or not at all. Raises `UserError` when it cannot."""
    write_atomically(file, lambda stream: np.savez(stream, mean=mean, cov=cov, count=count, dims=len(mean)))
