"""The log of a training run: log.csv, the progress bar, and the losses since the last row."""

from support import parallel
from support.commands import UserError, silence
from support.files import write_atomically
from support.pictures import write_figure

import csv
import io
import itertools
import sys

import torch
from tqdm import tqdm

LOG = b"step,loss,"  # how a log.csv of ours begins
NOISE_LEVELS = 4  # the loss is also logged by quarters of 0..T-1


class Bar(tqdm):
    """A progress bar that ends no run: a pipe that nobody reads any more or a full disk only ends the bar."""

    def display(self, *args, **options):
        try:
            super().display(*args, **options)
        except OSError:
            silence(2)


class RunLog:
    """Logs the mean loss of the steps since the last row, in all and by noise level. Used by `with`.

    Every process has one and adds its share of the batch; rank 0 alone writes and shows the bar.

    path: log.csv. A new run (start 0) begins a new one; a resumed run keeps the rows up to `start`.
    T: the diffusion steps. start, steps: where this run begins and ends. batch_size: images of a step.
    window: the losses that the checkpoint of step `start` had not logged yet, as `self.window` was then.
    Raises `UserError` when the file cannot be written.
    """

    def __init__(self, path, T, start, steps, batch_size, device, window=None):
        self.path, self.T, self.batch_size = path, T, batch_size
        self.window = torch.zeros(NOISE_LEVELS, 2, device=device)  # sum and number of the losses, by noise level
        self.file, writes = None, parallel.RANK == 0
        if writes:
            if window is not None:
                self.window.copy_(window)
            edges = [-(-level * T // NOISE_LEVELS) for level in range(NOISE_LEVELS + 1)]
            names = ["step", "loss", *(f"loss_t{low}-{high - 1}" for low, high in itertools.pairwise(edges)), "lr"]
            write_atomically(path, lambda file: file.write(to_csv([names, *kept_rows(path, names, start)])))
            self.file = path.open("a", newline="", buffering=1)
        self.bar = Bar(total=steps * batch_size, initial=start * batch_size, unit=" images", unit_scale=True,
                       desc="training", mininterval=0.2 if sys.stderr.isatty() else 20, disable=not writes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()
        if self.file:
            self.file.close()

    def add(self, losses, t):
        """Counts the losses (B,) of a step, at t (B,) in 0..T-1."""
        self.window.index_add_(0, t * NOISE_LEVELS // self.T, torch.stack([losses, torch.ones_like(losses)], dim=1))
        self.bar.update(self.batch_size)

    def collect(self):
        """Adds up what all processes have counted, in rank 0's window. Returns whether all of it is finite."""
        parallel.all_sum(self.window)
        finite = bool(self.window.isfinite().all())
        if parallel.RANK:
            self.window.zero_()
        return finite

    def write(self, step, lr):
        """Writes the row of `step`, after `collect`, and begins a new one."""
        if not self.file:
            return
        (total, number), by_level = self.window.sum(0).tolist(), (self.window[:, 0] / self.window[:, 1]).tolist()
        try:
            self.file.write(to_csv([[step, *(f"{loss:.6g}" for loss in (total / number, *by_level)),
                                     f"{lr:.6g}"]]).decode())
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        self.bar.set_postfix(loss=f"{total / number:.4f}", refresh=False)
        self.window.zero_()


def to_csv(rows):
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def kept_rows(path, names, last_step):
    """The rows of log.csv up to `last_step`, lists of words: what a killed run logged after its last checkpoint comes
    again. A file that is not whole, or not ours, is put aside; of its rows those that are whole are kept."""
    if not last_step:
        return []
    if not path.exists():
        print(f"warning: {path} is gone: a new one begins at step {last_step:,}", file=sys.stderr)
        return []
    text = path.read_text(errors="replace")
    kept, whole = sound_rows(text, names)
    if not whole:
        aside = path.with_name(path.stem + "_damaged" + path.suffix)
        path.replace(aside)
        print(f"warning: {path} was damaged: it is kept as {aside}, and {len(kept)} of its rows in the new one",
              file=sys.stderr)
    return [row for row in kept if int(row[0]) <= last_step]


def sound_rows(text, names):
    """The rows of a log's text that are whole, and whether all are."""
    lines = text.splitlines(keepends=True)
    rows = [next(csv.reader([line]), []) for line in lines if line.endswith("\n")]
    if rows[:1] != [names]:
        return [], False
    kept, last = [], 0
    for row in rows[1:]:
        try:
            numbers = [float(word) for word in row]
            if len(row) == len(names) and int(row[0]) > last:
                kept.append(row)
                last = int(numbers[0])
        except ValueError:
            continue
    return kept, len(kept) + 1 == len(lines)


def read_log(path):
    """The names of log.csv's columns, and its rows that are whole, lists of floats. None where it is no log."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return [], []
    names = next(csv.reader([text.partition("\n")[0]]), [])
    if names[:2] != ["step", "loss"]:
        return [], []
    return names, [[float(word) for word in row] for row in sound_rows(text, names)[0]]


def plot_loss(log, path):
    """Plots the losses of log.csv, in all and by noise level, as a picture. No rows, no picture."""
    from matplotlib.figure import Figure  # here, so that a run starts sooner

    names, rows = read_log(log)
    if not rows:
        return
    columns = list(zip(*rows, strict=True))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    axes.plot(columns[0], columns[1], label="all t", color="black", linewidth=2)
    for name, column in zip(names[2:-1], columns[2:-1], strict=True):
        axes.plot(columns[0], column, label=f"t = {name.removeprefix('loss_t')}", linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(figure, path)
