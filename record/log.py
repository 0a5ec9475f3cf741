"""The log of a training run: log.csv, the progress bar, and the losses since the last row."""

from support import parallel
from support.commands import UserError, first_line, silence
from support.files import write_atomically
from support.pictures import write_figure

import contextlib
import itertools
import os
import sys

import torch
from tqdm import tqdm

LOG = b"step,loss,"  # how a log.csv of ours begins


def noise_levels(T):
    """The number of equal parts of 0..T-1 whose losses are logged apart: 4, or 1 without noise (T = 1)."""
    return min(4, T)


class Bar(tqdm):
    """A progress bar that ends no run: a pipe that nobody reads or a full disk ends the bar alone."""

    def display(self, *args, **options):
        try:
            super().display(*args, **options)
        except OSError:
            silence(2)


def announce(config, data, model, device, start, run_dir):
    """Prints what the run is about to do. data: one line about the data."""
    print(f"device    {device}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
          + (f", {parallel.WORLD} processes" if parallel.WORLD > 1 else ""))
    print(f"data      {data}")
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters: {config.describe(model)}")
    print(f"training  steps {start:,} to {config.steps:,} of {config.batch_size} images, {config.precision}, "
          f"seed {config.seed}" + (", compiled at the first step" if config.compile else ""))
    print(f"results   {run_dir}/index.html (a page to watch it by), model.pth, log.csv, loss.png, samples_*.png",
          flush=True)


class RunLog:
    """Logs the mean loss of the steps since the last row, in all and by noise level. A context manager.

    Every process has one and adds its share of the batch; rank 0 alone writes and shows the bar.
    path: log.csv. A new run (start 0) begins a new one; a resumed run keeps the rows up to `start`.
    T: diffusion steps. start, steps: where this run begins and ends. batch_size: images per step.
    window: `self.window` of the checkpoint of step `start`: the losses that were not logged yet.
    hook: called after each row with the step and a dict of the row's other numbers. Raises `UserError` when the file
    cannot be written.
    """

    def __init__(self, path, T, start, steps, batch_size, device, window=None, hook=None):
        self.path, self.T, self.batch_size, self.levels = path, T, batch_size, noise_levels(T)
        self.window = torch.zeros(self.levels, 2, device=device)  # sum and number of the losses, by noise level
        self.hook, writes = hook, parallel.RANK == 0
        if writes:
            if window is not None:
                self.window.copy_(window)
            edges = [-(-level * T // self.levels) for level in range(self.levels + 1)]
            by_level = [f"loss_t{low}-{high - 1}" for low, high in itertools.pairwise(edges)]
            self.names = ["step", "loss", *(by_level if len(by_level) > 1 else ()), "lr"]
            rows = kept_rows(path, self.names, start)
            write_atomically(path, lambda file: file.write(to_csv([self.names, *rows])))
        self.bar = Bar(total=steps * batch_size, initial=start * batch_size, unit=" images", unit_scale=True,
                       desc="training", mininterval=0.2 if sys.stderr.isatty() else 20, disable=not writes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def add(self, losses, t):
        """Counts the losses (B,) of a step, at t (B,) in 0..T-1."""
        level = torch.arange(self.levels, device=t.device)[:, None] == t * self.levels // self.T    # (levels, B)
        # A product, since a GPU's index_add_ adds in another order each time.
        self.window += level.float() @ torch.stack([losses, torch.ones_like(losses)], dim=1)
        self.bar.update(self.batch_size)

    def collect(self):
        """Adds up the losses of all processes in rank 0's window. Returns whether all are finite."""
        parallel.all_sum(self.window)
        finite = bool(self.window.isfinite().all())
        if parallel.RANK:
            self.window.zero_()
        return finite

    def write(self, step, lr):
        """Writes the row of `step`, after `collect`, and begins a new one."""
        if parallel.RANK:
            return
        (total, number), by_level = self.window.sum(0).tolist(), (self.window[:, 0] / self.window[:, 1]).tolist()
        row = [total / number, *(by_level if self.levels > 1 else ()), lr]
        try:
            there = self.path.is_file() and self.path.stat().st_size
            if not there:
                put_aside(self.path, f"is gone while the run writes it: a new one begins at step {step:,}")
            with self.path.open("ab") as file:  # anew for each row: somebody may have moved or removed it
                file.write(to_csv([*([] if there else [self.names]), [step, *(f"{value:.6g}" for value in row)]]))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror}") from None
        if self.hook:
            self.hook(step, dict(zip(self.names[1:], row, strict=True)))
        self.bar.set_postfix(loss=f"{total / number:.4f}", refresh=False)
        self.window.zero_()


def to_csv(rows):
    return "".join(",".join(map(str, row)) + "\r\n" for row in rows).encode()


def kept_rows(path, names, last_step):
    """The rows of log.csv up to `last_step`: what a killed run logged after its last checkpoint comes again. A file
    that is damaged, or has other columns than `names`, is put aside; its rows before the damage are kept."""
    if not last_step:
        return []
    found, rows, whole = read_log(path)
    kept = [row for row in rows if int(row[0]) <= last_step] if found == names else []
    if not whole or found != names:
        put_aside(path, f"is damaged or gone: {len(kept)} of its rows are in the new one, up to step {last_step:,}")
    return kept


def put_aside(path, reason):
    """Renames what lies in the place of log.csv, if anything, so that nothing is lost. Warns with the reason."""
    kept = ""
    if os.path.lexists(path):
        names = (path.with_name(f"{path.stem}_damaged{i}{path.suffix}") for i in ("", *range(2, 10_000)))
        aside = next(name for name in names if not os.path.lexists(name))
        path.rename(aside)
        kept = f"; what was there is kept as {aside}"
    print(f"\nwarning: {path} {reason}{kept}", file=sys.stderr)  # below the bar


def read_log(path):
    """The names of log.csv's columns; its rows, lists of words, up to the first that is damaged; whether none is."""
    text, rows, step = "", [], 0
    with contextlib.suppress(OSError):  # it may not be read
        text = path.read_text(errors="replace") if path.is_file() else ""
    head, _, body = text.partition("\n")
    names, (*lines, cut) = head.split(","), body.split("\n")
    if names[:2] != ["step", "loss"]:
        return names, [], False
    with contextlib.suppress(ValueError):  # a word may be no number
        for row in (line.split(",") for line in lines):
            if len([float(word) for word in row]) != len(names) or int(row[0]) <= step:
                break
            rows.append(row)
            step = int(row[0])
    return names, rows, len(rows) == len(lines) and not cut


def plot_loss(log, path):
    """Plots the losses of log.csv, in all and by noise level. Without rows there is no picture. Raises `UserError`."""
    try:
        from matplotlib.figure import Figure  # here, so that a run starts sooner
    except Exception as error:  # a broken installation fails in its own way
        raise UserError(f"{path} cannot be drawn: matplotlib does not work ({first_line(error):.100})") from None

    names, rows, _ = read_log(log)
    if not rows:
        return
    steps, *columns = zip(*[map(float, row) for row in rows], strict=True)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    axes.plot(steps, columns[0], label="all t" if names[3:] else "loss", color="black", linewidth=2)
    for name, column in zip(names[2:-1], columns[1:-1], strict=True):
        axes.plot(steps, column, label=f"t = {name.removeprefix('loss_t')}", linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend()
    write_figure(figure, path)
