"""Trains a DiT. Everything that step i draws is a function of (seed, i): a resumed run is the same run."""

from support import parallel
from support.commands import Parser, UserError, add_device_flag, resolve_precision, run
from support.files import make_dir, write_atomically
from support.muon import Muon
from support.pictures import grid, save_picture

import contextlib
import copy
import csv
import dataclasses
import itertools
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoint import build_diffusion, build_model, load_checkpoint, save_checkpoint
from config import PRESETS, Config, add_flags, given_flags
from dataset import load_dataset, to_uint8
from inference import sample

NOISE_LEVELS = 4  # the loss is also logged by quarters of 0..T-1
# What a resumed run may change: where things are and how often they are written, and how far it goes.
CHANGEABLE = ("steps", "data_dir", "log_every", "sample_every", "checkpoint_every", "sampler", "sample_steps",
              "guidance", "eta", "compile", "recompute", "shard")


def draw_batch(images, labels, diffusion, config, step, part=slice(None)):
    """What step `step` learns from: images x_0 (B, C, H, W) in [-1, 1], labels y (B,) some of which are the null label,
    times t (B,) and noise, all made on the device of `images`. part: which of these B, where processes share them."""
    device, B = images.device, config.batch_size
    seed = np.random.SeedSequence([config.seed, step]).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(seed))
    index = torch.randint(len(images), (B,), generator=generator, device=device)
    t = diffusion.random_t(torch.rand(B, generator=generator, device=device))
    noise = torch.randn((B, *images.shape[1:]), generator=generator, device=device)
    dropped = torch.rand(B, generator=generator, device=device) < config.label_dropout
    x_0 = images[index[part]].float() / 127.5 - 1
    y = torch.where(dropped[part], config.num_classes, labels[index[part]])
    return x_0, y, t[part], noise[part]


def learning_rate(config, step):
    """Linear warm-up; then constant, or a decay to zero at the last step."""
    left = 1 - step / config.steps
    decay = {"constant": 1.0, "linear": left, "sqrt": left**0.5}[config.lr_decay]
    return config.lr * min(1, (step + 1) / (config.warmup + 1)) * decay


def build_training(config, device, saved=None):
    """What a run consists of, in the order in which `train_step` takes it: the model, the worker that computes its
    gradients, its moving average, the optimizers and the diffusion process. saved: the checkpoint to go on from."""
    model = build_model(config).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    if saved:
        model.load_state_dict(saved["model"])
        ema.load_state_dict(saved["ema"])
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    if config.shard:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # here, since few need it

        for network in (model, ema):
            for part in (*network.blocks, network):
                fully_shard(part, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
        worker = model
    else:
        worker = copy.deepcopy(model).bfloat16() if config.precision == "bf16" else model
        if config.compile:
            worker.compile(mode="reduce-overhead" if device.type == "cuda" else None)
        if parallel.WORLD > 1:
            worker = DistributedDataParallel(worker)
    matrices, others = [], []
    for name, weight in model.named_parameters():
        inner = name.startswith("blocks.") and weight.ndim == 2 and ".modulation." not in name
        (matrices if inner and config.optimizer == "muon" else others).append(weight)
    optimizers = [torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)]
    if matrices:
        optimizers.append(Muon(matrices, weight_decay=config.weight_decay, dtype=dtype))
    if saved:
        for optimizer, state, weights in zip(optimizers, saved["optimizers"], (others, matrices), strict=False):
            optimizer.load_state_dict(parallel.split_state(state, weights) if config.shard else state)
    return model, worker, ema, optimizers, build_diffusion(config, device)


def train_step(model, worker, ema, optimizers, diffusion, config, batch, step):
    """One optimizer step on a batch of `draw_batch`. Returns the loss of each image (B,), not averaged.

    worker: what computes the gradients: `model` itself, or a copy of it in bfloat16, rounded anew at each step. Nothing
    is then cast within the network, where autocast casts at every layer. Either may be wrapped, to be shared by several
    processes: each has a part of the batch.
    """
    x_0, y, t, noise = batch
    weights, copies = list(model.parameters()), list(worker.parameters())
    copied = copies[0] is not weights[0]
    if copied:
        with torch.no_grad():
            torch._foreach_copy_(copies, weights)
    x_t, _ = diffusion.forward_add_noise(x_0, t, noise)
    output = worker(x_t, t, y)
    error = (output - diffusion.target(x_0, noise)) * diffusion.error_scale[t].view(-1, 1, 1, 1)
    losses = (error.abs() if config.loss == "l1" else error.square()).mean(dim=(1, 2, 3))
    # The mean over the whole batch, once the processes' gradients are averaged
    (losses.sum() * (parallel.WORLD / config.batch_size)).backward()
    if copied:
        for weight, copy_ in zip(weights, copies, strict=True):
            weight.grad, copy_.grad = copy_.grad.float(), None

    if config.grad_clip:
        torch.nn.utils.clip_grad_norm_(weights, config.grad_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
    decay = min(config.ema_decay, (step + 1) / (step + 10))  # the first, useless weights are soon forgotten
    with torch.no_grad():
        torch._foreach_lerp_(parallel.own_parts(ema.parameters()), parallel.own_parts(weights), 1 - decay)
    return losses.detach()


def open_log(path, config, last_step):
    """Opens log.csv to append to it, without what a run that was killed logged after its last checkpoint: that comes
    again. Returns the file and its csv writer."""
    edges = [-(-level * config.T // NOISE_LEVELS) for level in range(NOISE_LEVELS + 1)]
    rows = list(csv.reader(path.open(newline=""))) if last_step and path.exists() else []
    file = path.open("w", newline="", buffering=1)
    writer = csv.writer(file)
    writer.writerow(["step", "loss", *(f"loss_t{low}-{high - 1}" for low, high in itertools.pairwise(edges)), "lr"])
    writer.writerows(row for row in rows[1:] if int(row[0]) <= last_step)
    return file, writer


def draw_loss(log, path):
    """Draws the losses of log.csv, in all and by noise level, as a picture."""
    from matplotlib.figure import Figure  # here, so that a run starts sooner

    with log.open(newline="") as file:
        names, *rows = csv.reader(file)
    if not rows:
        return
    columns = [[float(value) if value else float("nan") for value in column] for column in zip(*rows, strict=True)]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    axes.plot(columns[0], columns[1], label="all t", color="black", linewidth=2)
    for name, column in zip(names[2:-1], columns[2:-1], strict=True):
        axes.plot(columns[0], column, label=f"t = {name.removeprefix('loss_t')}", linewidth=1)
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def can_compile(device):
    """Whether torch.compile works here. It needs a compiler: where there is none, says so, once."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except Exception as error:  # whatever a compiler can do wrong
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        if parallel.RANK == 0:
            print(f"warning: nothing can be compiled here ({reason:.100}): training without", file=sys.stderr)
        return False
    return True


def resolve(config, data, device):
    """The configuration with all filled in that the data set and the device decide."""
    C, H = data.images.shape[1:3]
    if not config.patch_size and H % 4:
        raise UserError(f"image_size {H} cannot be cut into 4 x 4 patches: set --patch-size, or --image-size")
    return dataclasses.replace(config, dataset=data.name, image_size=H, channels=C, num_classes=len(data.classes),
                               classes=tuple(data.classes), patch_size=config.patch_size or H // 4,
                               precision=resolve_precision(config.precision, device),
                               compile=config.compile and can_compile(device))


def parse_args():
    parser = Parser(description="Trains a diffusion transformer; on MNIST unless told otherwise.")
    parser.add_argument("--preset", choices=PRESETS, help="named settings, which the flags below override")
    parser.add_argument("--run-dir", type=Path, default=Path("run"), help="folder that gets model.pth, log.csv, "
                        "loss.png and the sample grids (default: run)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run-dir, exactly where its "
                        "last checkpoint is")
    add_flags(parser)
    add_device_flag(parser)
    return parser.parse_args()


def configure(args):
    """The configuration that the flags ask for and, with --resume, the checkpoint to go on from (else None)."""
    wanted = {**PRESETS[args.preset or "default"], **given_flags(args)}
    path = args.run_dir / "model.pth"
    if not args.resume:
        if path.exists():
            raise UserError(f"{path} exists: go on with it (--resume), choose another --run-dir, or remove it")
        return Config(**wanted), None
    saved = load_checkpoint(path)
    if "optimizers" not in saved:
        raise UserError(f"{path} holds weights to share, without the state of the optimizers that training on needs")
    config = saved["config"]
    differences = [f"{name} {getattr(config, name)} -> {value}" for name, value in wanted.items()
                   if name not in CHANGEABLE and value != getattr(config, name)]
    if differences:
        raise UserError(f"{path} cannot be resumed with other settings: {', '.join(differences)}")
    config = dataclasses.replace(config, **{name: wanted[name] for name in CHANGEABLE if name in wanted})
    if saved["step"] >= config.steps:
        raise UserError(f"{path} is trained for all of its {saved['step']:,} steps: ask for more with --steps")
    return config, saved


def announce(config, data, model, device, start, run_dir):
    """Says what the run is about to do."""
    print(f"device    {device}" + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
          + (f", {parallel.WORLD} processes" if parallel.WORLD > 1 else ""))
    print(f"data      {config.dataset}: {len(data.images):,} images of {config.image_size} x {config.image_size}, "
          f"classes {', '.join(data.classes[:10])}{' ...' if len(data.classes) > 10 else ''}")
    print(f"model     {sum(p.numel() for p in model.parameters()):,} parameters: {config.depth} blocks of width "
          f"{config.hidden_size}, {(config.image_size // config.patch_size) ** 2} tokens")
    print(f"training  steps {start:,} to {config.steps:,} of {config.batch_size} images, {config.precision}, "
          f"seed {config.seed}" + (", compiled at the first step" if config.compile else ""))
    print(f"results   {run_dir}/model.pth, log.csv, loss.png, samples_*.png", flush=True)


@parallel.one_for_all()
def main():
    args = parse_args()
    device = parallel.join(args.device)
    config, saved = configure(args)
    if config.batch_size < parallel.WORLD:
        raise UserError(f"{parallel.WORLD} processes cannot share a batch of {config.batch_size}: set --batch-size")
    if config.shard and (parallel.WORLD == 1 or config.optimizer == "muon" or config.compile):
        raise UserError("--shard splits the weights among the processes that torchrun starts, and needs --optimizer "
                        "adamw, since Muon looks at whole matrices, and no --compile; --no-shard does without")
    make_dir(args.run_dir)
    with parallel.first_process_first():
        data = load_dataset(config.dataset, config.data_dir, image_size=config.image_size, channels=config.channels)
    config = resolve(config, data, device)
    images, labels = data.images.to(device), data.labels.to(device)

    torch.manual_seed(config.seed)
    model, worker, ema, optimizers, diffusion = build_training(config, device, saved)
    window = torch.zeros(NOISE_LEVELS, 2, device=device)  # sum and number of the losses since the log's last row
    first = parallel.RANK == 0  # the one process that writes
    start, seconds = 0, 0.0
    if saved:
        start, seconds = saved["step"], saved["seconds"]
        if first:
            window.copy_(saved["window"])

    announce(config, data, model, device, start, args.run_dir)
    path = args.run_dir / "model.pth"
    last_good = f"{path}, step {start:,}" if saved else "none"
    log_file, log = open_log(args.run_dir / "log.csv", config, start) if first else (contextlib.nullcontext(), None)
    sample_labels = torch.arange(10, device=device).remainder(config.num_classes).repeat(6)
    signals = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: (signals.append(number), signal.signal(number, signal.SIG_DFL)))

    def demand_finite(what, finite):
        if not finite:
            raise UserError(f"the {what} not finite at step {done:,}, learning rate {learning_rate(config, step):.2g}; "
                            f"last good checkpoint: {last_good}")

    bar = tqdm(total=config.steps, initial=start, unit=" images", unit_scale=config.batch_size, desc="training",
               mininterval=0.2 if sys.stderr.isatty() else 20, disable=not first)
    began = time.monotonic() - seconds
    with log_file, bar:
        for step in range(start, config.steps):
            batch = draw_batch(images, labels, diffusion, config, step, parallel.share(config.batch_size))
            losses = train_step(model, worker, ema, optimizers, diffusion, config, batch, step)
            level = batch[2] * NOISE_LEVELS // config.T
            window.index_add_(0, level, torch.stack([losses, torch.ones_like(losses)], dim=1))
            bar.update()
            stopped = parallel.largest(signals[0] if signals else 0)
            done, last = step + 1, step + 1 == config.steps or stopped

            log_now = done % config.log_every == 0 or done == config.steps
            save_now = done % config.checkpoint_every == 0 or last
            if log_now or save_now:
                parallel.add_up(window)
                demand_finite("loss is", window.isfinite().all())
                if log_now and first:
                    (total, number), by_level = window.sum(0).tolist(), (window[:, 0] / window[:, 1]).tolist()
                    log.writerow([done, f"{total / number:.6g}", *(f"{loss:.6g}" for loss in by_level),
                                  f"{learning_rate(config, step):.6g}"])
                    bar.set_postfix(loss=f"{total / number:.4f}", refresh=False)
                if log_now or not first:
                    window.zero_()
            if save_now:
                broken = any(not part.isfinite().all() for part in parallel.own_parts(ema.parameters()))
                demand_finite("weights are", not parallel.largest(int(broken)))
                content = [ema.state_dict(), model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]]
                averages, weights, states = parallel.whole(content) if config.shard else content
                if first:
                    save_checkpoint(path, config, done, time.monotonic() - began, averages, model=weights,
                                    optimizers=states, window=window)
                last_good = f"{path}, step {done:,}"
            if (done % config.sample_every == 0 or last) and (first or config.shard):
                *_, drawn = sample(ema, config, sample_labels)
                if first:
                    save_picture(args.run_dir / f"samples_{done:06d}.png", grid(to_uint8(drawn), columns=10))
            if stopped:
                break
    if first:
        draw_loss(args.run_dir / "log.csv", args.run_dir / "loss.png")
    if stopped:
        again = shlex.join(["python", *(word for word in sys.argv if word != "--resume"), "--resume"])
        print(f"stopped after step {done:,}; go on with: {again}")
        sys.exit(128 + stopped)
    print(f"trained in {time.monotonic() - began:.0f} s: {path}; draw with: python inference.py --checkpoint {path}")


if __name__ == "__main__":
    run(main)
