"""Trains a DiT. Everything that step i learns from is a function of (seed, i): a resumed run is the same run."""

from support import parallel
from support.commands import (
    Parser,
    UserError,
    add_device_flag,
    catch_signals,
    dtype_of,
    resolve_precision,
    run,
    say_end,
    some_path,
)
from support.files import lock_dir, make_dir
from support.graphs import Replay, can_compile, directly
from support.muon import AdamW, Muon, flatten, split_parameters
from support.pictures import grid, save_picture, warned
from support.settings import Settings, add_flags, given_flags, say_default

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import PRESETS, Config
from diffusion import Process
from inference import sample
from record.checkpoint import save_checkpoint
from record.log import RunLog, announce, plot_loss
from record.page import show_run
from record.resume import COMPILE_FROM, configure, open_run

EMA_WARMUP = 10  # at first the average covers about the last 1/10 of the steps so far


@dataclasses.dataclass
class Run:
    """A training run: what it learns, and what that takes."""

    config: Settings
    model: torch.nn.Module          # fp32 weights
    worker: Any                     # computes the gradients: the model, or its bfloat16 copy; perhaps wrapped
    ema: torch.nn.Module            # the moving average of the weights, which draws every sample
    optimizers: list
    process: Process | None
    replay: Any = directly          # calls a step: `Replay` on a GPU
    data: Any = None                # what it learns from, on its device

    def __post_init__(self):
        self.pairs = list(zip(self.model.parameters(), self.worker.parameters(), strict=True))
        self.weights, self.averages = flatten(self.model), flatten(self.ema)
        own = self.pairs[0][0] is not self.pairs[0][1]
        self.copies = flatten(self.worker) if own else self.weights
        self.lr = torch.zeros((), device=self.weights.device)  # where a CUDA graph can read it
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.lr


def step_generator(seed, step, device):
    """The generator of all that step `step` of a run draws."""
    # Injective: seeds of 64 bits are two words, and no two pairs of seed and step share their words.
    words = np.random.SeedSequence([seed % 2**32, step, seed // 2**32]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]))


def make_batch(data, process, config, step, part=slice(None)):
    """The batch of step `step`, on the device of the data: x_0 (B, C, *size), labels y (B,), some of them the null
    label, times t (B,) and noise. part: this process's shard of the B images."""
    device, B = data.labels.device, config.batch_size
    generator = step_generator(config.seed, step, device)
    index = torch.randint(len(data.labels), (B,), generator=generator, device=device)
    t = process.random_t(torch.rand(B, generator=generator, device=device))
    noise = torch.randn((B, *data.shape), generator=generator, device=device)
    dropped = torch.rand(B, generator=generator, device=device) < config.label_dropout
    y = torch.where(dropped[part], config.num_classes, data.labels[index[part]])
    return data.x_0(index, part, generator), y, t[part], noise[part]


def learning_rate(config, step):
    """Linear warm-up; then constant, or a decay to zero at the last step."""
    left = 1 - step / config.steps
    decay = {"constant": 1.0, "linear": left, "sqrt": left**0.5}[config.lr_decay]
    return config.lr * min(1, (step + 1) / (config.warmup + 1)) * decay


def start_run(config, device, saved=None):
    """The `Run` of a configuration, at its start, or at the checkpoint `saved`."""
    torch.manual_seed(config.seed)
    model = config.build_model().to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
    worker = copy.deepcopy(model).bfloat16() if config.precision == "bf16" else model
    if config.compile:
        worker.compile()
    worker, optimizers = parallel.share_gradients(worker), make_optimizers(model, config, device, saved)
    replay = Replay() if device.type == "cuda" and parallel.WORLD == 1 else directly
    return Run(config, model, worker, ema, optimizers, config.build_process(device), replay)


def make_optimizers(model, config, device, saved=None):
    """AdamW and, if the configuration has it, Muon: in their states at the checkpoint `saved`."""
    others, matrices = split_parameters(model, config.optimizer == "muon")
    optimizers = [AdamW(others, betas=config.adamw_betas, weight_decay=config.weight_decay, fused=True,
                        capturable=device.type == "cuda")]
    if matrices:
        optimizers.append(Muon(matrices, weight_decay=config.weight_decay, dtype=dtype_of(config.precision, device)))
    for optimizer, state in zip(optimizers, saved["optimizers"] if saved else (), strict=False):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return optimizers


def round_weights(run):
    """Copies the weights into the worker's bfloat16 copy, if it has one. Nothing is then cast within the network;
    autocast casts at every layer."""
    if run.copies is not run.weights:
        run.copies.copy_(run.weights)


def take_gradients(run):
    """Moves the worker's gradients to the weights, as parts of one float32 tensor, which is returned."""
    pairs = [(weight, copied) for weight, copied in run.pairs if copied.grad is not None]
    gradient = torch.cat([copied.grad.flatten() for _, copied in pairs]).float()
    for (weight, copied), part in zip(pairs, gradient.split([copied.numel() for _, copied in pairs]), strict=True):
        copied.grad = None
        weight.grad = part.view_as(weight)
    return gradient


def prepare(run, data, step):
    """What step `step` learns from: the function `losses`, which it minimises; the batch of `data` that this takes; and
    the times (B,) of the images, for the log."""
    x_0, y, t, noise = make_batch(data, run.process, run.config, step, parallel.share(run.config.batch_size))
    return losses, (x_0, y, t, noise), t


def losses(run, x_0, y, t, noise):
    """What a step minimises, of each image (B,)."""
    return run.process.losses(run.worker, x_0, t, y, noise, run.config.loss)


def take_step(run, step, losses, *batch):
    """One optimizer step down losses(run, *batch) (B,), which may not depend on `step`, since a GPU replays it. Returns
    the losses."""
    run.lr.fill_(learning_rate(run.config, step))
    each = run.replay(descend, run, losses, *batch)

    # Move the averaged weights towards the new ones. The decay grows up to its limit; before, a step's share in the
    # average is a power of its number (2312.02696).
    decay = min(run.config.ema_decay, (step + 1) / (step + EMA_WARMUP))
    run.averages.lerp_(run.weights, 1 - decay)
    return each


def descend(run, losses, *batch):
    """Moves the weights down the losses (B,), which it returns; see `take_step`."""
    # Compute the gradients of the mean over the whole batch. They are averaged over all processes.
    round_weights(run)
    each = losses(run, *batch)
    (each.sum() * (parallel.WORLD / run.config.batch_size)).backward()
    gradient = take_gradients(run)
    if run.config.grad_clip:
        gradient *= (run.config.grad_clip / (gradient.norm() + 1e-6)).clamp(max=1)

    # Update the weights.
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return each.detach()


def not_finite(what, config, step):
    return UserError(f"the {what} not finite at step {step:,}, learning rate {learning_rate(config, step - 1):.2g}")


def save(run, path, step, seconds, data, window):
    """Writes the checkpoint, by rank 0."""
    if not run.averages.isfinite().all():
        raise not_finite("weights are", run.config, step)
    if parallel.RANK == 0:
        save_checkpoint(path, run.config, step, seconds, run.ema.state_dict(), data=data, model=run.model.state_dict(),
                        optimizers=[optimizer.state_dict()["state"] for optimizer in run.optimizers], window=window)


def samples_path(run_dir, step):
    return run_dir / f"samples_{step:06d}.png"


def save_grid(path, images):
    save_picture(path, grid(images, columns=10))


def show(run, path, stop, save=save_grid, labels=None):
    """Writes the grid of samples: the same noise and labels (10, ...) at every step of training, six of each. Gives up
    when `stop()`."""
    if labels is None:
        labels = torch.arange(10, device=run.weights.device).remainder(run.config.num_classes)
    for state in sample(run.ema, run.config, torch.cat([labels] * 6)):
        if stop():
            return
        x = state
    with warned():
        save(path, run.config.to_images(x))


def train(config, run_dir="run", resume=False, device=None, until=None, log=None, prepare=prepare,
          show=show, finish=None, of=Config):
    """Trains, and leaves model.pth, log.csv, loss.png, grids of samples and a page that shows them, index.html, in the
    folder `run_dir`.

    config: a `Config`, or a dict of the settings that are not the defaults; when resuming, settings that must match. By
        default of a dict, runs of `COMPILE_FROM` steps or more are compiled.
    resume: go on with the run in `run_dir`, exactly where its checkpoint is. device: a name; None: the fastest.
    until: stop after this step, with a checkpoint to resume from; None: after the last one.
    log: called with each row of log.csv, as log(step, values), a dict of numbers by the names of the columns: for
        TensorBoard, say.
    prepare, show: make what a step learns from, and draw the grid; see these functions. finish: called with the run
        after its last step. of: the class of the settings in a dict.
    Returns the step that was reached, and the number of the signal that ended it there (0: none).
    Raises `UserError`.
    """
    device, run_dir = parallel.join(device), Path(run_dir)
    path = run_dir / "model.pth"
    config, saved = configure(config, path, resume, of)
    if config.batch_size < parallel.WORLD:
        raise UserError(f"{parallel.WORLD} processes cannot share a batch of {config.batch_size}: set --batch-size")
    if until is not None and not 1 <= until <= config.steps:
        raise UserError(f"until={until}: must lie between 1 and the run's {config.steps:,} steps")
    if saved and len(saved["data"]) > 16:  # a hash of its teacher, and not a fingerprint of images
        raise UserError(f"{path} is a student: go on with it by python -m few.distill --resume")
    make_dir(run_dir)
    with lock_dir(run_dir):
        if not resume:
            open_run(run_dir)
        data = config.open_data(device)
        config = dataclasses.replace(config.resolve(data), precision=resolve_precision(config.precision, device),
                                     compile=config.compile and can_compile(device))
        data = data.load()
        if saved and saved["data"] != data.fingerprint:
            raise UserError(f"{path} was trained on other data: images, labels or names of classes have changed since; "
                            "bring them back, or train a new run")
        run = start_run(config, device, saved)
        fingerprint, summary, run.data = data.fingerprint, data.summary, data.to(device)
        announce(config, summary, run.model, device, saved["step"] if saved else 0, run_dir)
        done, stopped = loop(run, lambda step: prepare(run, run.data, step), fingerprint, saved, run_dir,
                             config.steps if until is None else until, show, hook=log)
        if finish and done == config.steps and not stopped:
            finish(run)
        return done, stopped


def due(config, done, every):
    """Whether what happens every `every` steps happens after `done` steps. After the last step all of it does."""
    return done % every == 0 or done == config.steps


def log_and_save(run, log, path, done, seconds, data, stops, save):
    """Writes the row of the log and the checkpoint that are due after `done` steps; a run that `stops` there saves.
    save: `save`, or what writes more. Returns whether it saved. Raises `UserError` when the loss is not finite, or a
    file cannot be written."""
    config = run.config
    log_now, save_now = due(config, done, config.log_every), stops or due(config, done, config.checkpoint_every)
    if (log_now or save_now) and not log.collect():
        raise not_finite("loss is", config, done)
    if log_now:
        log.write(done, learning_rate(config, done - 1))
    if save_now:
        save(run, path, done, seconds, data, log.window)
    return bool(save_now)


def loop(run, prepare, fingerprint, saved, run_dir, until, show=show, save=save, script=None, hook=None):
    """The training loop; see `train`. prepare(step): what `prepare` returns. fingerprint: of what it learns from.
    saved: the checkpoint that `run` starts at, or None. save: `save`, or what writes more. script: the command that
    trains so, if not the settings' own. hook: as for `RunLog`."""
    config, device = run.config, next(run.model.parameters()).device
    start, before = (saved["step"], saved["seconds"]) if saved else (0, 0.0)
    path, began = run_dir / "model.pth", time.monotonic() - before
    done, last_good, stopped = start, f"{path}, step {start:,}" if saved else "none", 0
    log = RunLog(run_dir / "log.csv", config.T, start, config.steps, config.batch_size, device,
                 saved and saved["window"], hook)
    with log, catch_signals() as signals:
        def page():
            with warned():
                plot_loss(run_dir / "log.csv", run_dir / "loss.png")
            with warned():
                show_run(config, run_dir, done, time.monotonic() - began, script or config.trained_by)

        def draw():
            if parallel.RANK == 0:
                show(run, samples_path(run_dir, done), lambda: bool(signals))
                if done < until:  # after the last step it is written below
                    page()

        if saved and due(config, done, config.sample_every) and not samples_path(run_dir, done).exists():
            draw()  # it was killed before it could
        for step in range(start, until):
            # Learn.
            losses, batch, t = prepare(step)
            log.add(take_step(run, step, losses, *batch), t)
            done, stopped = step + 1, parallel.all_max(signals[0] if signals else 0)

            # Log and save.
            try:
                if log_and_save(run, log, path, done, time.monotonic() - began, fingerprint, stopped or done == until,
                                save):
                    last_good = f"{path}, step {done:,}"
            except UserError as error:
                raise UserError(f"{error}; last good checkpoint: {last_good}") from None

            # Stop, or show.
            if stopped:
                break
            if due(config, done, config.sample_every):
                draw()
    if parallel.RANK == 0:
        page()
    stopped = stopped or parallel.all_max(signals[0] if signals else 0)
    if not stopped:
        print(f"trained in {time.monotonic() - began:.0f} s: {path}")
    return done, stopped


def train_parser(description, of=Config, presets=PRESETS, run_dir=Path("run")):
    """The flags of every command that trains."""
    parser = Parser(description=description)
    parser.add_argument("--preset", choices=presets, help="named settings, which the flags below override")
    parser.add_argument("--run-dir", type=some_path, default=run_dir, help="folder that gets model.pth, log.csv, "
                        f"loss.png, the sample grids and index.html, a page of them all (default: {run_dir})")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir from its last "
                        "checkpoint, exactly")
    add_flags(parser, of)
    say_default(parser, ["compile"], f"from {COMPILE_FROM:,} steps on, if there is a compiler")
    add_device_flag(parser)
    return parser


@parallel.one_for_all()
def main(what="images: MNIST", of=Config, presets=PRESETS, train=train, script=(), run_dir=Path("run")):
    parser = train_parser(f"Trains a diffusion transformer on {what} unless told otherwise.", of, presets, run_dir)
    args = parser.parse_args()
    settings = presets[args.preset or "default"] | given_flags(args, of)
    done, stopped = train(settings, args.run_dir, args.resume, args.device)
    say_end(done, stopped, args.run_dir, of.drawn_by, script)


if __name__ == "__main__":
    run(main, memory="--batch-size, --image-size or --hidden-size, or try --recompute")
