"""Measures how many images a second this machine trains on and draws, and which share of its matrix rate that takes.

    python -m measure.benchmark                                     the default network and the article's
    python -m measure.benchmark --against diffusers                 the same networks built from diffusers as well
    python -m measure.benchmark --presets B L XL --batch-size 256   the paper's sizes, on 32 x 32 x 4 latents

Each variant runs in a process of its own. The variants take turns, so that other load on the machine slows all of them
alike.
"""

from support.commands import Parser, UserError, add_device_flag, dtype_of, pick_device, resolve_precision, run
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
    """The `Config` of a preset with these flags (a dict): of digits, or for the paper's sizes of latents."""
    sizes = DIGITS if preset in ("default", "article") else LATENTS
    config = Config(**sizes | PRESETS[preset] | flags)
    return config if config.patch_size else dataclasses.replace(config, patch_size=config.image_size[0] // 4)


def seconds_per_call(call, at_least):
    """The mean time of `call(i)`, i = 0, 1, ..., over `at_least` seconds, after a fifth of that to warm up. On a GPU,
    the work itself is timed, not its launch."""
    from torch.utils.benchmark import Timer  # here, since it logs a warning where there is a CUDA toolkit and no GPU

    timer = Timer("call(next(numbers))", globals=dict(call=call, numbers=itertools.count()),
                  num_threads=torch.get_num_threads())
    timer.blocked_autorange(min_run_time=at_least / 5)
    return timer.blocked_autorange(min_run_time=at_least).mean


def peak_memory(device):
    """The most memory that was in use so far, bytes: on a GPU, else of this process. NaN on Windows, which does not
    say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(ImportError):
        import resource  # here, since Windows has none

        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return math.nan


def matrix_rate(config, device, dtype, at_least):
    """The FLOP/s of bare matrix products in the shape that is most frequent in this network, tokens x D by D x 4 D,
    forward and backward."""
    rows = config.batch_size * math.prod(config.image_size) // math.prod(config.patch_size)
    D, M = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
    x, w, g = (torch.randn(shape, device=device, dtype=dtype) for shape in ((rows, D), (D, M), (rows, M)))
    return 6 * rows * D * M / seconds_per_call(lambda _: (x @ w, g @ w.T, x.T @ g), at_least)


def measure(what, config, device, at_least):
    """Times "train", "draw" or "diffusers" for `at_least` seconds, in this process.

    Returns a dict: images (a second), flops (FLOP/s), matrix_rate (FLOP/s), memory (peak, bytes), precision, and count
    (images of a batch)."""
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

        def call(_):  # one step of a sample, or its first noise: all of its steps may take longer than a turn
            next(states)
        steps = config.sample_steps + 1
        rows = math.ceil(count / FULL_BATCH) * FULL_BATCH  # `sample` fills the batch up to so many
        x, y = torch.zeros(rows, *config.input_shape, device=device), y[:1].expand(rows)
        operations = network_calls(config) * flops(lambda: model(x, 0, y))
    else:
        ways = [(diffusers_step(config, device, images, labels, bf16, fused), bf16)
                for bf16 in (False, True) for fused in (True, False)]
        call, bf16 = min(ways, key=lambda way: seconds_per_call(way[0], at_least / 8))
        dtype = torch.bfloat16 if bf16 else torch.float32
    if what != "draw":
        call(0)
        operations = flops(lambda: call(1))
    seconds = seconds_per_call(call, at_least) * steps
    rate = matrix_rate(config, device, dtype, at_least / 5)
    return {"images": count / seconds, "flops": operations / seconds, "matrix_rate": rate,
            "memory": peak_memory(device), "precision": str(dtype).removeprefix("torch."), "count": count}


def diffusers_step(config, device, images, labels, bf16, fused):
    """The training step that users of diffusers write: its DiT of the same sizes, its noise scheduler, and AdamW.

    bf16: compute under autocast. fused: use torch's fused attention, else plain matrix products. Which of the four is
    the fastest depends on the machine: the backward pass of fused attention is slow in bfloat16 on CPUs without AMX.
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
    """Seconds until `python inference.py` has drawn its first picture, with the weights in the repository."""
    with tempfile.TemporaryDirectory() as folder:
        before = time.perf_counter()
        subprocess.run([sys.executable, REPOSITORY / "inference.py", "--checkpoint", CHECKPOINTS[-1], "--device",
                        str(device), "--out", Path(folder) / "samples.png"], check=True, capture_output=True)
        return time.perf_counter() - before


def parse_args():
    parser = Parser(description="Measures how many images a second this machine trains on and draws.")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["default", "article"],
                        help="networks to measure (default: default article)")
    parser.add_argument("--against", choices=["diffusers"], help="measure the same networks built from this library, "
                        "too")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant (default: 3)")
    parser.add_argument("--seconds", type=float, default=10, help="length of a turn (default: 10)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # one turn: `take_turns` starts it in a process of its own
    add_flags(parser, Config, ("batch_size", "precision", "compile", "sample_steps", "guidance"))
    say_default(parser, ("batch_size", "sample_steps", "guidance"), "the preset's own")
    add_device_flag(parser)
    args = parser.parse_args()
    if args.rounds < 1 or not 0.01 <= args.seconds <= 3600:
        raise UserError("--rounds must be at least 1, and --seconds lie between 0.01 and 3600")
    return args


def take_turns(args):
    """Measures all variants in turns. Returns a dict from (preset, kind) to the list of its results; see `measure`."""
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


def table_row(title, results):
    """The row of a variant in the table: medians of its results. The spread is that of images/s, over the median."""
    images, operations, memory = (statistics.median(result[name] for result in results)
                                  for name in ("images", "flops", "memory"))
    rates = [result["images"] for result in results]
    reached = statistics.median(result["flops"] / result["matrix_rate"] for result in results)
    return (f"| {title} | {results[0]['count']:,} | {results[0]['precision']} | {images:,.1f} "
            f"| {(max(rates) - min(rates)) / images:.1%} | {operations / 1e9:,.1f} | {reached:.1%} "
            f"| {memory / 1e6:,.0f} |")


def main():
    args = parse_args()
    device = pick_device(args.device)
    if args.measure:
        config = configuration(args.presets[0], given_flags(args, Config))
        print(json.dumps(measure(args.measure, config, device, args.seconds)))
        return

    results = take_turns(args)
    starts = [cold_start(device) for _ in range(args.rounds)]
    print(f"{platform.machine()}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}; the median "
          f"of {args.rounds} turns of {args.seconds:g} s\n")
    print("| what | batch | precision | images/s | spread | GFLOP/s | of matrix rate | memory, MB |")
    print("|---" * 8 + "|")
    for (preset, kind), parts in results.items():
        print(table_row(f"{preset}: {'diffusers, train' if kind == 'diffusers' else kind}", parts))
    for preset in args.presets if args.against else ():
        ratio = statistics.median(ours["images"] / theirs["images"] for ours, theirs in zip(
            results[preset, "train"], results[preset, "diffusers"], strict=True))
        print(f"{preset}: trains at {ratio:.2f} times the rate of {args.against}")
    print(f"first picture after {statistics.median(starts):.1f} s (python inference.py, from a cold start)")


if __name__ == "__main__":
    run(main, alone=True)
