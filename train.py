"""Trains a DiT. Everything that step i learns from is a function of (seed, i): a resumed run is the same run."""

from support import parallel
from support.commands import (
    Parser,
    UserError,
    add_device_flag,
    catch_signals,
    dtype_of,
    end_stopped,
    first_line,
    flag_words,
    resolve_precision,
    run,
    some_path,
)
from support.files import MARK, check_output, lock_dir, make_dir
from support.muon import Muon, split_parameters
from support.pictures import frames_of, grid, save_animation
from support.run_log import LOG, RunLog, plot_loss
from support.run_page import write_page
from support.sizes import show_divisors, show_size, show_sizes

import contextlib
import copy
import dataclasses
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checkpoint import load_checkpoint, save_checkpoint
from config import PRESETS, SIZES, Config, add_flags, check_eta, check_names, given_flags
from diffusion import Process, build_process
from dit import build_model
from inference import FRAME, sample, say_default, to_images
from latent.cache import open_data
from video.clips import CLIPS

# What a resumed run may change: where things are and how often they are written, and how far it goes.
CHANGEABLE = ("steps", "data_dir", "log_every", "sample_every", "checkpoint_every", "sampler", "sample_steps",
              "guidance", "eta", "spacing", "guided_channels", "clamp", "compile", "recompute", "shard")
ADAMW_BETAS = (0.9, 0.99)
EMA_WARMUP = 10  # the first averages are those of about the last 1/10 of the steps so far
COMPILE_FROM = 10_000  # steps: a shorter run ends before what compilation takes is won back
AUTOMATIC = ("precision", "image_size", "channels", "patch_size", "num_classes", "classes", "latent_shape",
             "latent_mean", "latent_std", "vae_hash")  # "auto", 0 or nothing: as resolved at the start


@dataclasses.dataclass
class Run:
    """A training run: what it learns, and what that takes."""

    config: Config
    model: torch.nn.Module          # fp32 weights
    worker: Any                     # computes the gradients: the model, or its bfloat16 copy; perhaps wrapped
    ema: torch.nn.Module            # the moving average of the weights, which draws every sample
    optimizers: list
    process: Process


def step_generator(seed, step, device):
    """The generator of all that step `step` of a run draws."""
    # Injective: seeds of 64 bits are two words, and no two pairs of seed and step share their words.
    words = np.random.SeedSequence([seed % 2**32, step, seed // 2**32]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(words[0]))


def make_batch(data, process, config, step, part=slice(None)):
    """The batch of step `step`, on the device of the data: x_0 (B, C, *size), labels y (B,), some of them the null
    label, times t (B,) and noise; and where frames are given, which are. part: this process's shard of the B images."""
    device, B = data.labels.device, config.batch_size
    generator = step_generator(config.seed, step, device)
    if config.sizes:
        data = data.at((data.shape[1:], *config.sizes)[generator.initial_seed() % (1 + len(config.sizes))])
    index = torch.randint(len(data.labels), (B,), generator=generator, device=device)
    t = process.random_t(torch.rand(B, generator=generator, device=device))
    noise = torch.randn((B, *data.shape), generator=generator, device=device)
    dropped = torch.rand(B, generator=generator, device=device) < config.label_dropout
    y = torch.where(dropped[part], config.num_classes, data.labels[index[part]])
    known = [given_frames(B, data.shape[1], config.given, generator)[part]] if config.given else []
    return (data.x_0(index, part, generator), y, t[part], noise[part], *known)


def given_frames(B, T, share, generator):
    """Which frames are given of this share of B clips of T, bool (B, 1, T, 1, 1): the first, the last, those at both
    ends, or any, of each kind as many, and between one and all but one."""
    device = generator.device
    count, kind, chosen = torch.rand(3, B, generator=generator, device=device)
    any_order = torch.rand(B, T, generator=generator, device=device).argsort(dim=1)                    # (B, T)
    place = torch.arange(T, device=device).expand(B, T)
    both = torch.minimum(2 * place, 2 * (T - 1 - place) + 1)  # from the ends inwards
    orders = torch.stack([place, T - 1 - place, both, any_order], dim=1)                               # (B, 4, T)
    ranks = orders[torch.arange(B, device=device), (4 * kind).long()]                                  # (B, T)
    count = (1 + ((T - 1) * count).long()).clamp(max=T - 1) * (chosen < share)
    return (ranks < count[:, None])[:, None, :, None, None]


def learning_rate(config, step):
    """Linear warm-up; then constant, or a decay to zero at the last step."""
    left = 1 - step / config.steps
    decay = {"constant": 1.0, "linear": left, "sqrt": left**0.5}[config.lr_decay]
    return config.lr * min(1, (step + 1) / (config.warmup + 1)) * decay


def start_run(config, device, saved=None):
    """The `Run` of a configuration, at its start, or at the checkpoint `saved`."""
    torch.manual_seed(config.seed)
    model = build_model(config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
    if config.shard:
        for network in (model, ema):
            parallel.shard_network(network, device, dtype_of(config.precision, device))
    worker, optimizers = make_worker(model, config, device), make_optimizers(model, config, device, saved)
    return Run(config, model, worker, ema, optimizers, build_process(config, device))


def make_worker(model, config, device):
    """What computes the gradients of `model`: see `Run`."""
    if config.shard:
        return model
    worker = copy.deepcopy(model).bfloat16() if config.precision == "bf16" else model
    if config.compile:
        worker.compile(mode="reduce-overhead" if device.type == "cuda" else None)
    return parallel.share_gradients(worker)


def make_optimizers(model, config, device, saved=None):
    """AdamW and, if the configuration has it, Muon: in their states at the checkpoint `saved`."""
    others, matrices = split_parameters(model, config.optimizer == "muon")
    optimizers = [torch.optim.AdamW(others, betas=ADAMW_BETAS, weight_decay=config.weight_decay, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, weight_decay=config.weight_decay, dtype=dtype_of(config.precision, device)))
    for optimizer, state, weights in zip(optimizers, saved["optimizers"] if saved else (), (others, matrices),
                                         strict=False):
        state = parallel.shard_state(state, weights) if config.shard else state
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return optimizers


def round_weights(run):
    """Copies the weights into the worker's bfloat16 copy, where there is one. Nothing is then cast within the network;
    autocast casts at every layer."""
    weights, copies = list(run.model.parameters()), list(run.worker.parameters())
    if copies[0] is not weights[0]:
        with torch.no_grad():
            torch._foreach_copy_(copies, weights)


def take_gradients(run):
    """Moves the gradients of the worker's bfloat16 copy, where there is one, to the weights."""
    for weight, copied in zip(run.model.parameters(), run.worker.parameters(), strict=True):
        if copied is not weight and copied.grad is not None:
            weight.grad, copied.grad = copied.grad.float(), None


def train_step(run, batch, step):
    """One optimizer step on a batch of `make_batch`. Returns the loss of each image (B,), not averaged."""
    x_0, y, t, noise, *known = batch
    round_weights(run)
    return descend(run, run.process.losses(run.worker, x_0, t, y, noise, run.config.loss, *known), step)


def descend(run, losses, step):
    """One optimizer step down the losses (B,) that the worker has, after `round_weights`. Returns them."""
    config = run.config

    # Compute the gradients: of the mean over the whole batch, once those of all processes are averaged.
    (losses.sum() * (parallel.WORLD / config.batch_size)).backward()
    take_gradients(run)
    weights = list(run.model.parameters())  # not before: until then, those that are split among processes are whole
    if config.grad_clip:
        torch.nn.utils.clip_grad_norm_(weights, config.grad_clip)

    # Update the weights.
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()

    update_average(run.ema, weights, step, config.ema_decay)
    return losses.detach()


@torch.no_grad()
def update_average(ema, weights, step, largest):
    """Moves the averaged weights of the network `ema` towards `weights`, a list, after step number `step`. The decay
    grows up to `largest`; before, a step's share in the average is a power of its number (2312.02696)."""
    decay = min(largest, (step + 1) / (step + EMA_WARMUP))
    torch._foreach_lerp_(parallel.own_shards(ema.parameters()), parallel.own_shards(weights), 1 - decay)


def not_finite(what, config, step):
    return UserError(f"the {what} not finite at step {step:,}, learning rate {learning_rate(config, step - 1):.2g}")


def save(run, path, step, seconds, data, window):
    """Writes the checkpoint; every process must call it, rank 0 writes."""
    broken = any(not part.isfinite().all() for part in parallel.own_shards(run.ema.parameters()))
    if parallel.all_max(int(broken)):
        raise not_finite("weights are", run.config, step)
    content = [run.ema.state_dict(), run.model.state_dict(), [o.state_dict()["state"] for o in run.optimizers]]
    ema, model, optimizers = parallel.unshard(content) if run.config.shard else content
    if parallel.RANK == 0:
        save_checkpoint(path, run.config, step, seconds, ema, data=data, model=model, optimizers=optimizers,
                        window=window)


def samples_path(run_dir, step):
    return run_dir / f"samples_{step:06d}.png"


@contextlib.contextmanager
def warned():
    """A picture that cannot be written ends no run: within the block, a `UserError` is a warning."""
    try:
        yield
    except UserError as error:
        print(f"\nwarning: {error}", file=sys.stderr)  # below the bar


def draw_samples(run, path, device, stop):
    """Writes the grid of samples: the same noise and labels at every step of training. Clips move in it. Gives up when
    `stop()`."""
    config = run.config
    if parallel.RANK and not config.shard:
        return
    labels = torch.arange(10, device=device).remainder(config.num_classes).repeat(6)
    for state in sample(run.ema, config, labels):
        if stop():
            return
        x = state
    if parallel.RANK == 0:
        with warned():
            save_animation(path, [grid(view, columns=10) for view in frames_of(to_images(x, config))], FRAME)


def show_setting(name, value):
    """The value of a field of `Config`, in a few words."""
    if name == "sizes":
        return show_sizes(value) or "0"
    if name in SIZES:
        return show_size(value) if value else "0"
    return f"{', '.join(value[:10])}{' ...' if len(value) > 10 else ''}" if name == "classes" else str(value)


def show_run(config, run_dir, seconds=0.0, script="train.py"):
    """Writes the page of the run, index.html. seconds: of training so far. script: the command that trains it, without
    the run folder."""
    if parallel.RANK:
        return
    settings, defaults = ({name: show_setting(name, value) for name, value in dataclasses.asdict(of).items()}
                          for of in (config, Config()))
    columns = ", ".join(config.class_names[i % config.num_classes] for i in range(10))
    folder, checkpoint = ("" if run_dir == Path("run") else " " + shlex.join(flag_words(*words)) for words in (
        ("--run-dir", run_dir), ("--checkpoint", run_dir)))
    commands = {"Draw with its last checkpoint:": f"python inference.py{checkpoint}",
                "Go on where it was stopped:": f"python {script}{folder} --resume",
                "Train it for longer:": f"python {script}{folder} --resume --steps {2 * config.steps}"}
    data = Path(config.data_dir).resolve().name if config.dataset == "folder" else config.dataset
    with warned():
        write_page(run_dir / "index.html", f"A DiT learns {data}, in {run_dir.resolve().name}", config.steps, seconds,
                   columns, settings, defaults, commands)


def can_compile(device):
    """Whether torch.compile works here. It needs a compiler: where there is none, says so, once."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # whatever a compiler can do wrong
        if parallel.RANK == 0:
            print(f"warning: nothing can be compiled here ({first_line(error):.100}): training without",
                  file=sys.stderr)
        return False
    return True


def resolve(config, data, device):
    """The configuration with all filled in that the data set and the device decide."""
    config, patch = dataclasses.replace(config, **data.settings, patch_size=()), config.patch_size
    for size in config.sizes:
        data.at(size)  # or it says that it cannot
    name, size = ("latents of" if config.latent_shape else "image_size"), config.input_shape[1:]
    if not patch and any(side % 4 for side in size):
        near = show_size([max(1, round(side / 4)) * 4 * image // side
                          for side, image in zip(size, config.image_size, strict=True)])
        raise UserError(f"{name} {show_size(size)} cannot be cut into 4 x 4 patches: set --patch-size to one of "
                        f"{show_divisors(size)}, or --image-size to {near}")
    return dataclasses.replace(config, patch_size=patch or tuple(side // 4 for side in size),
                               precision=resolve_precision(config.precision, device),
                               compile=config.compile and can_compile(device))


def change_settings(config, settings, path, changeable, automatic):
    """The configuration of the run saved at `path`, with those of `settings` (a dict) that are `changeable`. Raises
    `UserError` when others contradict it; "auto" or 0 for what is `automatic` contradicts nothing."""
    differences = [f"{name} {getattr(config, name)} -> {value}" for name, value in settings.items()
                   if name not in changeable and SIZES.get(name, lambda value: value)(value) != getattr(config, name)
                   and not (name in automatic and value in ("auto", 0, (), ""))]
    if differences:
        raise UserError(f"{path} cannot be resumed with other settings: {', '.join(differences)}")
    return dataclasses.replace(config, **{name: settings[name] for name in changeable if name in settings})


def open_run(run_dir):
    """Makes a folder ready for a new run. Raises `UserError` when a run has left a checkpoint there, or another program
    a file where the run will write. The grids of an earlier run without a checkpoint go: a page shows one run's."""
    path = run_dir / "model.pth"
    grids = sorted(file for file in run_dir.glob("samples_*.png") if file.stem.removeprefix("samples_").isdecimal())
    if path.exists():
        raise UserError(f"{path} exists: go on with it (--resume), choose another --run-dir, or remove it")
    for file, own in ((run_dir / "log.csv", LOG), *((file, MARK) for file in (
            run_dir / "loss.png", run_dir / "index.html", *grids))):
        check_output(file, own)
    if grids:
        print(f"{len(grids)} sample grids of an earlier run, whose checkpoint is gone, are removed from {run_dir}")
    for file in grids:
        file.unlink()


def configure(settings, path, resume, changeable=CHANGEABLE):
    """The configuration that `settings` (a dict) ask for and, to resume, the checkpoint to go on from (else None)."""
    if not resume:
        long = settings.get("steps", Config.steps) >= COMPILE_FROM
        fit = not settings.get("shard") and not settings.get("sizes")  # split weights cannot be; each size would anew
        return Config(**{"compile": long and fit} | settings), None
    saved = load_checkpoint(path)
    if "optimizers" not in saved:
        raise UserError(f"{path} holds weights to draw with, without what training on needs: train a new run")
    config = saved["config"]
    changeable = (*changeable, *(["vae"] if config.vae else []))  # it may have moved
    config = change_settings(config, settings, path, changeable, AUTOMATIC)
    if saved["step"] > config.steps:
        raise UserError(f"{path} is trained for {saved['step']:,} steps already: ask for more with --steps")
    return config, saved


def announce(config, data, model, device, start, run_dir):
    """Says what the run is about to do; of the data, what the string `data` says."""
    print(f"device    {device}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
          + (f", {parallel.WORLD} processes" if parallel.WORLD > 1 else ""))
    print(f"data      {data}")
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters: {config.depth} blocks of width "
          f"{config.hidden_size}, {math.prod(model.grid)} tokens")
    print(f"training  steps {start:,} to {config.steps:,} of {config.batch_size} images, {config.precision}, "
          f"seed {config.seed}" + (", compiled at the first step" if config.compile else ""))
    print(f"results   {run_dir}/index.html (a page to watch it by), model.pth, log.csv, loss.png, samples_*.png",
          flush=True)


def train(config, run_dir="run", resume=False, device=None, latents="latents", until=None, log=None):
    """Trains, and leaves model.pth, log.csv, loss.png, grids of samples and a page that shows them, index.html, in the
    folder `run_dir`.

    config: a `Config`, or a dict of the settings that are not the defaults; of a resumed run, those to hold it to. By
        default of a dict, runs of `COMPILE_FROM` steps or more are compiled.
    resume: go on with the run in `run_dir`, exactly where its checkpoint is. device: a name; None: the fastest.
    latents: the folder that keeps the latents of images, where the configuration names a VAE.
    until: stop after this step, with a checkpoint to resume from; None: after the last one.
    log: called with each row of log.csv, as log(step, values), a dict of numbers by the names of the columns: for
        TensorBoard, say.
    Returns the step that was reached, and the number of the signal that ended it there (0: none).
    Raises `UserError`.
    """
    settings = dataclasses.asdict(config) if isinstance(config, Config) else config
    check_names(settings, Config.__dataclass_fields__)
    device = parallel.join(device)
    run_dir = Path(run_dir)
    path = run_dir / "model.pth"
    config, saved = configure(settings, path, resume)
    check_eta(config, settings)
    if until is not None and not 1 <= until <= config.steps:
        raise UserError(f"until={until}: must lie between 1 and the run's {config.steps:,} steps")
    if saved and len(saved["data"]) > 16:  # a hash of its teacher, and not a fingerprint of images
        raise UserError(f"{path} is a student: go on with it by python -m few.distill --resume")
    if config.batch_size < parallel.WORLD:
        raise UserError(f"{parallel.WORLD} processes cannot share a batch of {config.batch_size}: set --batch-size")
    if config.shard and (parallel.WORLD == 1 or config.optimizer == "muon" or config.compile):
        raise UserError("--shard splits the weights among the processes that torchrun starts, and needs --optimizer "
                        "adamw, since Muon looks at whole matrices, and no --compile; --no-shard does without")
    make_dir(run_dir)
    with lock_dir(run_dir) if parallel.RANK == 0 else contextlib.nullcontext():
        if not resume:
            open_run(run_dir)
        data = CLIPS.get(config.dataset, open_data)(config, device, latents)
        config = resolve(config, data, device)
        data = data.load()
        if saved and saved["data"] != data.fingerprint:
            raise UserError(f"{path} was trained on other data: images, labels or names of classes have changed since; "
                            "bring them back, or train a new run")
        return train_on(config, data, saved, run_dir, device, config.steps if until is None else until, log)


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


def train_on(config, data, saved, run_dir, device, until, log=None):
    """Trains on data; see `train`."""
    run = start_run(config, device, saved)
    fingerprint = saved["data"] if saved else data.fingerprint  # `train` has compared them
    announce(config, data.summary, run.model, device, saved["step"] if saved else 0, run_dir)
    data = data.to(device)

    def learn(step):
        batch = make_batch(data, run.process, config, step, parallel.share(config.batch_size))
        return train_step(run, batch, step), batch[2]

    return loop(run, learn, fingerprint, saved, run_dir, until, hook=log)


def loop(run, learn, fingerprint, saved, run_dir, until, save=save, script="train.py", hook=None):
    """The training loop; see `train`. learn(step): takes the step, returns losses (B,) and their times t (B,).
    fingerprint: of what it learns from. saved: the checkpoint that `run` starts at, or None. save, script: as for
    `log_and_save` and `show_run`. hook: as for `RunLog`."""
    config, device = run.config, next(run.model.parameters()).device
    start, before = (saved["step"], saved["seconds"]) if saved else (0, 0.0)
    path, began = run_dir / "model.pth", time.monotonic() - before
    done, last_good, stopped = start, f"{path}, step {start:,}" if saved else "none", 0
    log = RunLog(run_dir / "log.csv", config.T, start, config.steps, config.batch_size, device,
                 saved and saved["window"], hook)
    with log, catch_signals() as signals:
        def stop():
            return parallel.all_max(signals[0] if signals else 0) if config.shard else bool(signals)

        if saved and due(config, done, config.sample_every) and not samples_path(run_dir, done).exists():
            draw_samples(run, samples_path(run_dir, done), device, stop)  # it was killed before it could
        for step in range(start, until):
            # Learn.
            log.add(*learn(step))
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
                draw_samples(run, samples_path(run_dir, done), device, stop)
                show_run(config, run_dir, time.monotonic() - began, script)
    if parallel.RANK == 0:
        with warned():
            plot_loss(run_dir / "log.csv", run_dir / "loss.png")
    show_run(config, run_dir, time.monotonic() - began, script)
    stopped = stopped or parallel.all_max(signals[0] if signals else 0)
    if not stopped:
        print(f"trained in {time.monotonic() - began:.0f} s: {path}")
    return done, stopped


def parse_args():
    parser = Parser(description="Trains a diffusion transformer; on MNIST unless told otherwise.")
    parser.add_argument("--preset", choices=PRESETS, help="named settings, which the flags below override")
    parser.add_argument("--run-dir", type=some_path, default=Path("run"), help="folder that gets model.pth, log.csv, "
                        "loss.png, the sample grids and index.html, a page of them all (default: run)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, exactly where its "
                        "last checkpoint is")
    parser.add_argument("--latents", type=some_path, default=Path("latents"), help="of --vae: the folder that keeps "
                        "the latents, for this run and others (default: latents)")
    add_flags(parser)
    say_default(parser, ["compile"], f"from {COMPILE_FROM:,} steps on, where there is a compiler")
    add_device_flag(parser)
    return parser.parse_args()


def say_end(done, stopped, run_dir, *script):
    """Says what to do next after `done` steps; where a signal `stopped` them, as `end_stopped` does for `script`."""
    if stopped:
        end_stopped(done, stopped, *script)
    given = flag_words("--checkpoint", run_dir / "model.pth") if run_dir != Path("run") else []
    print(f"draw with: {shlex.join(['python', 'inference.py', *given])}")


@parallel.one_for_all()
def main():
    args = parse_args()
    done, stopped = train(PRESETS[args.preset or "default"] | given_flags(args), args.run_dir, args.resume, args.device,
                          args.latents)
    say_end(done, stopped, args.run_dir)


if __name__ == "__main__":
    run(main, memory="--batch-size, --image-size or --hidden-size, or try --recompute")
