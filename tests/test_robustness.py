"""Kills and damage at random. Each test is there twice: short in every run of the tests, and long on demand."""

from support.commands import UserError, run

import copy
import dataclasses
import io
import multiprocessing
import os
import random
import sys
import time
import zipfile

import pytest
import torch
from conftest import TINY
from test_train import same

import train
from checkpoint import FORMAT, build_model, load_checkpoint, save_checkpoint
from config import Config


def short_and_long(name, short, long):
    return pytest.mark.parametrize(name, [short, pytest.param(long, marks=pytest.mark.long)])


def run_train(flags):
    """train.py in a process that has its imports already."""
    sys.argv = ["train.py", *map(str, flags)]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    run(train.main)


@short_and_long("kills", 3, 30)
def test_a_run_that_is_killed_again_and_again_is_the_same_run(kills, tmp_path):
    """SIGKILL at random moments, many of them within a save, since every step is saved."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])
    flags = [*TINY, "--steps", 40 * kills, "--checkpoint-every", 1, "--sample-every", 10**6]

    def start(*more):
        process = context.Process(target=run_train, args=([*flags, *more],))
        process.start()
        return process

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start("--run-dir", whole)
    process.join(100)
    assert process.exitcode == 0
    rng, done, steps = random.Random(0), 0, []
    while True:
        more = ["--resume"] if (killed / "model.pth").exists() else []
        process = start("--run-dir", killed, *more)
        before = steps[-1] if steps else 0
        while done < kills and process.is_alive():
            time.sleep(rng.uniform(0, 0.1))
            reached = load_checkpoint(killed / "model.pth")["step"] if (killed / "model.pth").exists() else 0
            if reached > before:
                process.kill()
                done += 1
        process.join(100)
        if process.exitcode != -9:
            break
        steps.append(load_checkpoint(killed / "model.pth")["step"])  # whole, whenever it was killed
    assert process.exitcode == 0 and done == kills and steps == sorted(set(steps))
    a, b = load_checkpoint(whole / "model.pth"), load_checkpoint(killed / "model.pth")
    for part in ("model", "ema", "optimizers", "window", "step"):
        assert same(a[part], b[part]), part
    assert (whole / "log.csv").read_text() == (killed / "log.csv").read_text()
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())


SMALL = Config(dataset="digits", image_size=8, channels=1, num_classes=10, patch_size=4, hidden_size=8, depth=1,
               num_heads=2)
STRANGE = [None, True, -1, 0, 1, 2, 3, 7, 10**9, 2**63, 10**400, -0.5, 1e-300, 1e300, float("nan"), float("inf"), "",
           "x", "flow", "mnist", b"x", [], [1], {}, {"a": 1}, (1, 2), "a\nb", "../..", "\0"]


def strange_config(rng):
    """The fields of `SMALL`, some of them missing, strange, or strangers."""
    values = dataclasses.asdict(SMALL)
    for _ in range(rng.randint(1, 3)):
        values[rng.choice([*values, "stranger"])] = rng.choice(STRANGE)
    if rng.random() < 0.1:
        del values[rng.choice(list(values))]
    return values


@short_and_long("count", 500, 10_000)
def test_configurations(count):
    """A configuration is either refused in one line or sound."""
    rng, accepted = random.Random(0), 0
    for _ in range(count):
        values = strange_config(rng)
        try:
            made = Config(**values)
        except UserError as error:
            assert "\n" not in str(error)
        except TypeError as error:
            assert "stranger" in str(error)
        else:
            accepted += 1
            assert Config(**dataclasses.asdict(made)) == made
    assert count / 100 < accepted < count


def mutate(data, rng):
    """`data` with a few bytes changed, a part cut out or doubled, or its end missing."""
    data = bytearray(data)
    kind = rng.random()
    start, length = rng.randrange(len(data)), rng.randrange(1, 200)
    if kind < 0.6:
        for _ in range(rng.choice([1, 1, 2, 5, 50])):
            data[rng.randrange(len(data))] = rng.randrange(256)
    elif kind < 0.75:
        del data[start:start + length]
    elif kind < 0.9:
        data[start:start] = data[start:start + length]
    else:
        del data[start:]
    return bytes(data)


def mutate_within(data, rng):
    """A checkpoint whose archive is sound, but one of the files in it is not: no checksum warns of that."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        names = old.namelist()
        victim = next(name for name in names if name.endswith("data.pkl")) if rng.random() < 0.8 else rng.choice(names)
        for name in names:
            new.writestr(name, mutate(old.read(name), rng) if name == victim else old.read(name))
    return result.getvalue()


@short_and_long("count", 300, 10_000)
def test_damaged_checkpoints(count, tmp_path, monkeypatch):
    """A damaged checkpoint is refused in one line, or what can be read of it fits: it runs no code, takes no memory and
    no time."""
    import resource

    path = tmp_path / "model.pth"
    model = build_model(SMALL)
    save_checkpoint(path, SMALL, 5, 1.0, model.state_dict(), model=model.state_dict())
    good, content = path.read_bytes(), torch.load(path, weights_only=True)
    monkeypatch.chdir(tmp_path)
    rng, refused = random.Random(1), 0
    start, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        kind = rng.random()
        if kind < 0.3:
            path.write_bytes(mutate(good, rng))
        elif kind < 0.7:
            path.write_bytes(mutate_within(good, rng))
        else:
            changed = copy.copy(content)
            changed[rng.choice(list(changed))] = rng.choice(STRANGE)
            if rng.random() < 0.7:
                changed["config"] = strange_config(rng)
            torch.save(changed | {"format": FORMAT}, path)
        try:
            loaded = load_checkpoint(path)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert isinstance(loaded["config"], Config) and sum(w.double().sum() for w in loaded["ema"].values()) != 0
    assert count / 3 < refused < count
    assert time.monotonic() - start < 10 + count / 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 500_000  # kilobytes
    assert os.listdir(tmp_path) == ["model.pth"]
