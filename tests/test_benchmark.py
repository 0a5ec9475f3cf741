import json

import pytest
import torch
from conftest import assert_refused

from config import Config
from measure import benchmark

CPU = torch.device("cpu")


def test_bench_measures_what_train_runs(command, tmp_path):
    """One short turn of every variant; speed itself is not tested here."""
    process = command("measure.benchmark", "--presets", "default", "--against", "diffusers", "--rounds", 1,
                      "--seconds", 0.05, "--batch-size", 4, "--device", "cpu", "--json", tmp_path / "bench.json")
    assert process.returncode == 0, process.stderr
    for word in ("| default: train | 4 |", "| default: draw | 4 |", "| default: diffusers, train | 4 |",
                 "times the rate of diffusers", "first picture after"):
        assert word in process.stdout
    content = json.loads((tmp_path / "bench.json").read_text())
    assert [row["batch"] for row in content["rows"]] == [4, 4, 4]
    assert all(row["of matrix rate"] > 0 and row["images/s"] > 0 for row in content["rows"])


def test_operations_are_counted():
    """Of a matrix product 2 M N K; of a whole step more than three times what the forward pass has."""
    a, b = torch.randn(3, 5), torch.randn(5, 7)
    assert benchmark.flops(lambda: a @ b) == 2 * 3 * 5 * 7
    config = Config(image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=2, num_heads=2,
                    batch_size=8, precision="fp32", sample_steps=4, guidance=1.0, optimizer="adamw")
    drawn, trained = (benchmark.measure(what, config, CPU, 0.01) for what in ("draw", "train"))
    forward = drawn["flops"] / drawn["images"] / 4  # per image and step; a batch of 8 is filled up to 16
    assert 2.7 < trained["flops"] / trained["images"] / (forward / 2) < 3.3


@pytest.mark.parametrize(("flags", "word"), [(["--rounds", 0], "--rounds"), (["--seconds", "nan"], "--seconds"),
                                             (["--against", "nothing"], "nothing"), (["--presets", "Z"], "Z"),
                                             (["--json", "/nowhere/b.json"], "/nowhere")])
def test_mistakes(call, flags, word):
    assert_refused(call(benchmark, *flags), word)
