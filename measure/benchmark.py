"""How fast is this machine? Rates of training and drawing, and the share of its matrix rate that they reach.

    python -m measure.benchmark                                 the default network and the article's
    python -m measure.benchmark --against diffusers             and the same networks built from diffusers
    python -m measure.benchmark --presets B L XL --batch-size 256   the paper's sizes on 32 x 32 x 4 latents

Every variant runs in a process of its own, and they take turns, so that what else the machine does hits them all alike.
"""

from support.commands import (
    Parser,
    UserError,
    add_device_flag,
    dtype_of,
    pick_device,
    resolve_precision,
    run,
    some_path,
)
from support.files import check_output, write_atomically
from support.flops import flops
from support.settings import add_flags, given_flags, say_default

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm

from config import PRESETS, Config
from dataset import Dataset, to_float
from inference import FULL_BATCH, sample
from measure.results import network_calls
from record.checkpoint import CHECKPOINTS
from train import prepare, start_run, take_step

REPOSITORY = Path(__file__).parent.parent
LATENTS = dict(image_size=32, channels=4, num_classes=1000)  # of a 256 x 256 image, as in the DiT paper
DIGITS = dict(image_size=28, channels=1, num_classes=10)


def configuration(preset, flags):
    sizes = DIGITS if preset in ("default", "article") else LATENTS
    config = Config(**sizes | PRESETS[preset] | flags)
    return config if config.patch_size else dataclasses.replace(config, patch_size=config.image_size[0] // 4)


def seconds_per_call(call, device, at_least):
    """The mean time of `call(i)` over `at_least` seconds, after a fifth of that to warm up."""
    def calls(first, seconds):
        start, done = time.perf_counter(), 0
        while done < 3 or time.perf_counter() - start < seconds:
            call(first + done)
            done += 1
            if device.type == "cuda" and done % 10 == 0:  # else the calls would only be queued
                torch.cuda.synchronize(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return done, time.perf_counter() - start

    done, _ = calls(0, at_least / 5)
    done, seconds = calls(done, at_least)
    return seconds / done


def peak_memory(device):
    """The peak of the bytes in use on `device`, or by this process; None if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):
        import resource  # here, since Windows has none

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def matrix_rate(config, device, dtype, batch_size, at_least):
    """FLOP/s of plain matrix products of this network's most frequent shape: tokens by D by 4 D, forward and
    backward."""
    rows, D, M = (batch_size * math.prod(config.image_size) // math.prod(config.patch_size), config.hidden_size,
                  int(config.hidden_size * config.mlp_ratio))
    x, w, g = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, D), (D, M), (rows, M)))
    seconds = seconds_per_call(lambda _: (x @ w, g @ w.T, x.T @ g), device, at_least)
    return 6 * rows * D * M / seconds


def measure(what, config, device, at_least):
    """What one process measures: a dict of images/s, FLOP/s, the matrix rate and the peak memory in bytes."""
    config = dataclasses.replace(config, precision=resolve_precision(config.precision, device))
    dtype = dtype_of(config.precision, device)
    torch.manual_seed(config.seed)
    count, steps = config.batch_size, 1
    images = torch.randint(256, (4096, config.channels, *config.image_size), dtype=torch.uint8)
    images, labels = images.to(device), torch.randint(config.num_classes, (4096,)).to(device)
    if what == "train":
        training, data = start_run(config, device), Dataset("random", images, labels, [])

        def call(i):
            losses, batch, _ = prepare(training, data, i)
            take_step(training, i, losses, *batch)
    elif what == "draw":
        model = config.build_model().to(device, dtype).eval()
        y = labels[:count]
        states = itertools.chain.from_iterable(sample(model, config, y) for _ in itertools.count())

        def call(_):  # one step of a sample, or the noise that it starts from: a thousand steps outlast any turn
            next(states)
        steps = config.sample_steps + 1
        rows = math.ceil(count / FULL_BATCH) * FULL_BATCH  # as `sample` fills them up
        x, y = torch.zeros(rows, *config.input_shape, device=device), y[:1].expand(rows)
        operations = network_calls(config) * flops(lambda: model(x, 0, y))
    else:
        ways = [(diffusers_step(config, device, images, labels, bf16, fused), bf16)
                for bf16 in (False, True) for fused in (True, False)]
        call, bf16 = min(ways, key=lambda way: seconds_per_call(way[0], device, at_least / 8))
        dtype = torch.bfloat16 if bf16 else torch.float32
    if what != "draw":
        call(0)
        operations = flops(lambda: call(1))
    seconds = seconds_per_call(call, device, at_least) * steps
    rate = matrix_rate(config, device, dtype, count, at_least / 5)
    return {"images": count / seconds, "flops": operations / seconds, "matrix_rate": rate,
            "memory": peak_memory(device), "precision": str(dtype).removeprefix("torch."), "count": count}


def diffusers_step(config, device, images, labels, bf16, fused):
    """The training step that users of diffusers write, for the same geometry: its DiT, its noise scheduler, AdamW.

    bf16: under autocast. fused: with torch's attention, else with plain products. Which is the quickest depends on the
    machine: torch's attention is slow backward in bfloat16 on CPUs without AMX.
    """
    from diffusers import DDPMScheduler, DiTTransformer2DModel
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    model = DiTTransformer2DModel(
        num_attention_heads=config.num_heads, attention_head_dim=config.hidden_size // config.num_heads,
        in_channels=config.channels, out_channels=config.channels, num_layers=config.depth,
        sample_size=config.image_size[0], patch_size=config.patch_size[0],
        num_embeds_ada_norm=config.num_classes).to(device)
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor2_0() if fused else AttnProcessor())
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = DDPMScheduler(config.T)

    def step(_):
        index = torch.randint(len(images), (config.batch_size,), device=device)
        x, y = to_float(images[index]), labels[index]
        noise = torch.randn_like(x)
        t = torch.randint(config.T, (len(x),), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            output = model(scheduler.add_noise(x, noise, t), timestep=t, class_labels=y).sample
        torch.nn.functional.mse_loss(output.float(), noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def cold_start(device):
    """Seconds from nothing to the first picture, drawn with the weights that come with the repository."""
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        subprocess.run([sys.executable, REPOSITORY / "inference.py", "--checkpoint", CHECKPOINTS[-1], "--device",
                        str(device), "--out", Path(folder) / "samples.png"], check=True, capture_output=True)
        return time.perf_counter() - before


def parse_args():
    parser = Parser(description="Measures the rates of training and drawing on this machine.")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["default", "article"],
                        help="the networks to measure (default: default article)")
    parser.add_argument("--against", choices=["diffusers"], help="also the same networks built from this library")
    parser.add_argument("--rounds", type=int, default=3, help="how often every variant has its turn (default: 3)")
    parser.add_argument("--seconds", type=float, default=10, help="length of a turn (default: 10)")
    parser.add_argument("--json", type=some_path, help="a file that gets the figures as well")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # what a process of its own is started with
    add_flags(parser, Config, ("batch_size", "precision", "compile", "sample_steps", "guidance"))
    say_default(parser, ("batch_size", "sample_steps", "guidance"), "the preset's own")
    add_device_flag(parser)
    args = parser.parse_args()
    if args.rounds < 1 or not 0.01 <= args.seconds <= 3600:
        raise UserError("--rounds must be at least 1, and --seconds lie between 0.01 and 3600")
    if args.json:
        check_output(args.json, b'"cold_start"')
    return args


def take_turns(args):
    """What every variant measures, each time it has its turn: a dict from (preset, kind) to lists of results."""
    kinds = ("train", "draw", "diffusers") if args.against else ("train", "draw")
    results = {(preset, kind): [] for preset in args.presets for kind in kinds}
    turns = tqdm(itertools.product(range(args.rounds), results), total=args.rounds * len(results), leave=False,
                 disable=None)
    for _, (preset, kind) in turns:
        turns.set_description(f"{preset}, {kind}")
        command = [sys.executable, "-m", "measure.benchmark", *sys.argv[1:], "--measure", kind, "--presets", preset]
        process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if process.returncode:
            last = (process.stderr.splitlines() or ["failed"])[-1].removeprefix("error: ")
            raise UserError(f"{preset}, {kind}: {last:.200}")
        result = json.loads(process.stdout.splitlines()[-1])
        results[preset, kind].append(result)
        turns.write(f"{preset}, {kind}: {result['images']:,.1f} images/s", sys.stderr)
    return results


def summarize(what, results):
    """One row of the table: the medians of the `results` of a variant."""
    def middle(name):
        return statistics.median(result[name] for result in results)

    rates = [result["images"] for result in results]
    return {
        "what": what, "batch": results[0]["count"], "precision": results[0]["precision"],
        "images/s": round(middle("images"), 1), "spread": round((max(rates) - min(rates)) / middle("images"), 3),
        "GFLOP/s": round(middle("flops") / 1e9, 1),
        "of matrix rate": round(statistics.median(result["flops"] / result["matrix_rate"] for result in results), 3),
        "memory, MB": "-" if results[0]["memory"] is None else round(middle("memory") / 1e6)}


def print_table(rows):
    print("| " + " | ".join(rows[0]) + " |\n" + "|---" * len(rows[0]) + "|")
    for row in rows:
        print("| " + " | ".join(format(value, ".1%") if name in ("spread", "of matrix rate") else format(value, ",")
                                if not isinstance(value, str) else value for name, value in row.items()) + " |")


def main():
    args = parse_args()
    device = pick_device(args.device)
    if args.measure:
        config = configuration(args.presets[0], given_flags(args, Config))
        print(json.dumps(measure(args.measure, config, device, args.seconds)))
        return

    results = take_turns(args)
    starts = [cold_start(device) for _ in range(args.rounds)]
    table = [summarize(f"{preset}: {'diffusers, train' if kind == 'diffusers' else kind}", parts)
             for (preset, kind), parts in results.items()]
    ratios = {preset: round(statistics.median(ours["images"] / theirs["images"] for ours, theirs in zip(
        results[preset, "train"], results[preset, "diffusers"], strict=True)), 2)
        for preset in args.presets if args.against}
    machine = f"{platform.machine()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{machine}; the median of {args.rounds} turns of {args.seconds:g} s\n")
    print_table(table)
    for preset, ratio in ratios.items():
        print(f"{preset}: trains at {ratio:.2f} times the rate of {args.against}")
    print(f"first picture after {statistics.median(starts):.1f} s (python inference.py, from a cold start)")
    if args.json:
        content = {"machine": machine, "rows": table, "ratios": ratios, "cold_start": statistics.median(starts)}
        write_atomically(args.json, lambda file: file.write(json.dumps(content, indent=1).encode()))


if __name__ == "__main__":
    run(main, alone=True)
