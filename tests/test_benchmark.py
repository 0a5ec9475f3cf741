import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import timeit
from types import SimpleNamespace

import forks
import pytest
import torch
from conftest import REPOSITORY, assert_refused

from config import Config
from measure import benchmark

CPU = torch.device("cpu")


def test_bench_measures_what_train_runs(call, monkeypatch):
    """One short turn of every variant, one of them in a process of its own, as is the first picture; speed itself is
    not tested here."""
    def run(words, **options):
        if "draw" in words or "-m" not in words:
            return forks.run(words[1:], REPOSITORY, dict(os.environ))
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[2:])
            benchmark.main()
        return SimpleNamespace(returncode=0, stdout=out.getvalue())

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    code, out, err = call(benchmark, "--presets", "default", "--against", "diffusers", "--rounds", 1, "--seconds", 0.05,
                          "--batch-size", 4, "--device", "cpu")
    assert code == 0, err
    for word in ("| default: train | 4 |", "| default: draw | 4 |", "| default: diffusers, train | 4 |",
                 "times the rate of diffusers", "first picture after"):
        assert word in out


@pytest.fixture
def clock(monkeypatch):
    """A list of the seconds that have passed; they pass when a test adds to it."""
    passed = [0.0]
    monkeypatch.setattr(timeit, "default_timer", lambda: sum(passed))
    return passed


def test_calls_are_timed_by_the_clock(clock):
    """After a fifth of the time to warm up, with numbers that go on. One more call each time tells how long one is."""
    for warm, calls in ((0.25, 1 + 8 + 1 + 20), (5.0, 1 + 1 + 1 + 20)):
        numbers = []

        def call(i, warm=warm, calls=calls, numbers=numbers):
            numbers.append(i)
            clock.append(warm if i < calls - 20 else 0.5)

        assert benchmark.seconds_per_call(call, 10) == 0.5
        assert numbers == [*range(calls)]


CONFIG = Config(image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=2, num_heads=2,
                batch_size=8, precision="fp32", sample_steps=4, guidance=1.0, optimizer="adamw", mlp_ratio=2.0)


def test_matrix_rate_is_that_of_the_products_of_the_clock(monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark, "seconds_per_call",
                        lambda call, *_: seen.append(benchmark.flops(lambda: call(0))) or 4)
    assert benchmark.matrix_rate(CONFIG, CPU, torch.float32, 1) == 6 * (8 * 16) * 32 * 64 / 4
    assert seen == [6 * (8 * 16) * 32 * 64]


def test_rates_are_those_of_the_clock(monkeypatch):
    """Of a drawing, the noise is one call more than there are steps."""
    monkeypatch.setattr(benchmark, "seconds_per_call", lambda call, *_: (call(2), 0.5)[1])
    monkeypatch.setattr(benchmark, "matrix_rate", lambda *_: 7.0)
    drawn, trained = (benchmark.measure(what, CONFIG, CPU, 1) for what in ("draw", "train"))
    assert drawn["images"] == 8 / (0.5 * 5) and trained["images"] == 8 / 0.5 and drawn["matrix_rate"] == 7
    model = CONFIG.build_model()
    forward = benchmark.flops(lambda: model(torch.randn(16, 1, 8, 8), 5, 1))  # a batch of 8 is filled up to 16
    assert drawn["flops"] * 0.5 * 5 == 4 * forward
    assert (drawn["count"], drawn["precision"], trained["count"]) == (8, "float32", 8)


def test_the_table_holds_the_middle_of_the_turns(call, monkeypatch):
    rates = {"train": [100, 110, 120], "draw": [7, 5, 6], "diffusers": [50, 44, 40]}
    left = {kind: iter(values) for kind, values in rates.items()}

    def run(words, **_):
        rate = next(left[words[words.index("--measure") + 1]])
        part = dict(images=rate, flops=rate * 1e9, matrix_rate=1e12, memory=rate * 1e6, precision="float32", count=4)
        return SimpleNamespace(returncode=0, stdout="something\n" + json.dumps(part), stderr="")

    starts = iter([3.0, 1.0, 2.0])
    monkeypatch.setattr(benchmark, "cold_start", lambda device: next(starts))
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    code, out, err = call(benchmark, "--presets", "default", "--against", "diffusers", "--rounds", 3, "--device", "cpu")
    assert code == 0, err
    assert "default, train: 110.0 images/s" in err and "default, diffusers: 40.0 images/s" in err  # turn by turn
    assert "| default: train | 4 | float32 | 110.0 | 18.2% | 110.0 | 11.0% | 110 |" in out
    assert "| default: draw | 4 | float32 | 6.0 | 33.3% | 6.0 | 0.6% | 6 |" in out
    assert "default: trains at 2.50 times the rate of diffusers" in out and "first picture after 2.0 s" in out
    assert "| default: diffusers, train | 4 | float32 | 44.0 |" in out


def test_each_flag_reaches_the_turns(call, monkeypatch):
    """Rounds by presets by kinds; each turn is a process with the same flags, which measures what they say."""
    words, seen = [], []
    part = dict(images=1, flops=1, matrix_rate=1, memory=math.nan, precision="float32", count=4)

    def run(command, **_):
        words.append(command[3:])
        return SimpleNamespace(returncode=0, stdout=json.dumps(part), stderr="")

    monkeypatch.setattr(benchmark, "cold_start", lambda device: 1.0)
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    flags = ["--presets", "default", "S", "--rounds", 2, "--seconds", 0.5, "--batch-size", 3, "--precision", "bf16",
             "--compile", "--sample-steps", 4, "--guidance", 2, "--device", "cpu"]
    assert call(benchmark, *flags)[0] == 0
    assert [(turn[-1], turn[-3]) for turn in words] == 2 * [(preset, kind) for preset in ("default", "S")
                                                            for kind in ("train", "draw")]
    monkeypatch.setattr(benchmark, "measure", lambda *args: seen.append(args) or {})
    assert call(benchmark, *words[-1])[0] == 0
    (kind, config, device, seconds), = seen
    assert (kind, device, seconds, config.channels, config.depth) == ("draw", CPU, 0.5, 4, 12)
    assert (config.batch_size, config.precision, config.compile, config.sample_steps, config.guidance) == (
        3, "bf16", True, 4, 2.0)


def test_operations_are_counted():
    """Of a matrix product 2 M N K; of a whole step more than three times what the forward pass has."""
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert benchmark.flops(lambda: a @ b) == 2 * 3 * 5 * 7
    drawn, trained = (benchmark.measure(what, CONFIG, CPU, 0.01) for what in ("draw", "train"))
    forward = drawn["flops"] / drawn["images"] / 4  # per image and step; a batch of 8 is filled up to 16
    assert 2.7 < trained["flops"] / trained["images"] / (forward / 2) < 3.3
    heun = benchmark.measure("draw", dataclasses.replace(CONFIG, sampler="heun"), CPU, 0.01)
    assert heun["flops"] / heun["images"] == pytest.approx(7 * forward)  # two calls in three of the four steps


@pytest.mark.parametrize(("flags", "word"), [(["--rounds", 0], "--rounds"), (["--seconds", "nan"], "--seconds"),
                                             (["--against", "nothing"], "nothing"), (["--presets", "Z"], "Z")])
def test_mistakes(call, flags, word):
    assert_refused(call(benchmark, *flags), word)
