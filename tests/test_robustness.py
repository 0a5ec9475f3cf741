"""Kills and damage at random. Each test is there twice: short in every run of the tests, and long on demand."""

from support.commands import UserError, run

import copy
import dataclasses
import io
import multiprocessing
import os
import random
import re
import signal
import sys
import zipfile

import pytest
import torch
from conftest import TINY, learn, same

import train
from config import Config
from dataset import Dataset
from record.checkpoint import FORMAT, load_checkpoint
from record.log import RunLog, noise_levels
from train import save, start_run
from video.config import ANY, ClipConfig


def short_and_long(name, short, long):
    return pytest.mark.parametrize(name, [short, pytest.param(long, marks=pytest.mark.long)])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def half_of(file, content):
    """Writes half of what `torch.save` would, and dies."""
    buffer = io.BytesIO()
    torch_save(content, buffer)
    file.write(buffer.getvalue()[:buffer.tell() // 2])
    file.flush()
    die()


def half_a_row(log, *_):
    with log.path.open("a", buffering=1) as file:
        file.write("1,2.")
        file.flush()
        die()


torch_save = torch.save
# Where a run is killed: a function, and what it does in its last call instead.
KILLS = {
    "within a step": (train, "descend", lambda *_: die()),
    "within a save": (torch, "save", lambda content, file: half_of(file, content)),
    "before the new checkpoint takes the old one's place": (os, "replace", lambda *_: die()),
    "before it is on the disk": (os, "fsync", lambda *_: die()),
    "within a row of the log": (RunLog, "write", half_a_row),
    "before the samples": (train, "sample", lambda *_: die()),
    "within the samples": (train, "save_picture", lambda *_: die()),
}


def run_train(flags, kill=None, calls=0):
    """train.py in a process that has its imports already, which is killed after so many calls."""
    sys.argv = ["train.py", *map(str, flags)]
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    torch.set_num_threads(1)
    if kill:
        module, name, last = KILLS[kill]
        function, left = getattr(module, name), iter(range(calls))
        setattr(module, name, lambda *args: last(*args) if next(left, None) is None else function(*args))
    run(train.main)


@short_and_long("kills", 7, 50)
def test_a_run_that_is_killed_again_and_again_is_the_same_run(kills, tmp_path):
    """SIGKILL wherever it could hurt, each kind in turn, after a random number of steps."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo", "matplotlib.figure"])  # once for all
    flags = [*TINY, "--steps", 8 * kills, "--checkpoint-every", 1, "--sample-every", 3]

    def start(folder, *kill):
        more = ["--resume"] if (folder / "model.pth").exists() else []
        process = context.Process(target=run_train, args=([*flags, "--run-dir", folder, *more], *kill))
        process.start()
        process.join()
        return process.exitcode

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole) == 0
    rng, steps = random.Random(0), []
    for i in range(kills):
        assert start(killed, list(KILLS)[i % len(KILLS)], rng.randint(1, 4)) == -signal.SIGKILL
        if (killed / "model.pth").exists():
            steps.append(load_checkpoint(killed / "model.pth", ANY)["step"])  # whole, wherever it was killed
    assert steps == sorted(steps) and 0 < steps[0] < steps[-1] < 8 * kills
    assert start(killed) == 0
    a, b = load_checkpoint(whole / "model.pth", ANY), load_checkpoint(killed / "model.pth", ANY)
    for part in ("model", "ema", "optimizers", "window", "step", "data"):
        assert same(a[part], b[part]), part
    assert (whole / "log.csv").read_text() == (killed / "log.csv").read_text()
    names = {path.name for path in killed.iterdir() if not path.name.startswith("log_damaged")}
    assert names == {path.name for path in whole.iterdir()}
    pages = [re.sub("after .* of training", "", (folder / "index.html").read_text()) for folder in (whole, killed)]
    assert pages[1] == pages[0].replace(whole.name, killed.name)  # it names its folder
    for path in whole.glob("*.png"):
        assert path.read_bytes() == (killed / path.name).read_bytes(), path.name


SMALL = Config(dataset="mnist", image_size=8, channels=1, num_classes=10, patch_size=4, hidden_size=8, depth=1,
               num_heads=2)
STRANGE = [None, True, -1, 0, 1, 2, 3, 7, 10**9, 2**63, 10**400, -0.5, 1e-300, 1e300, float("nan"), float("inf"), "",
           "x", "flow", "mnist", b"x", [], [1], {}, {"a": 1}, (1, 2), "a\nb", "../..", "\0"]


def strange_config(rng, small=SMALL):
    """The fields of `small`, some of them missing, strange, or strangers."""
    values = dataclasses.asdict(small)
    for _ in range(rng.randint(1, 3)):
        values[rng.choice([*values, "stranger"])] = rng.choice(STRANGE)
    if rng.random() < 0.1:
        del values[rng.choice(list(values))]
    return values


@short_and_long("count", 500, 10_000)
def test_configurations(count):
    """A configuration is either refused in one line or sound."""
    clips = ClipConfig(**vars(SMALL) | dict(dataset="moving", image_size=(4, 8, 8), patch_size=(2, 4, 4)))
    rng, accepted = random.Random(0), 0
    for i in range(count):
        small = clips if i % 2 else SMALL
        values = strange_config(rng, small)
        try:
            made = type(small)(**values)
        except UserError as error:
            assert "\n" not in str(error)
        except TypeError as error:
            assert "stranger" in str(error)
        else:
            accepted += 1
            assert type(small)(**dataclasses.asdict(made)) == made
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
    """A damaged checkpoint is refused in one line, or what can be read of it fits: it runs no code, takes no memory."""
    import resource

    path = tmp_path / "model.pth"
    state = start_run(SMALL, torch.device("cpu"))
    for step in range(2):
        zeros = torch.zeros(9, 1, 8, 8, dtype=torch.uint8)
        learn(state, Dataset("", zeros, torch.arange(9), []), step)
    save(state, path, 2, 1.0, "0" * 16, torch.ones(noise_levels(1000), 2))
    good, content = path.read_bytes(), torch.load(path, weights_only=True)
    monkeypatch.chdir(tmp_path)
    rng, refused = random.Random(1), 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
            loaded = load_checkpoint(path, ANY)
        except UserError as error:
            refused += 1
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert isinstance(loaded["config"], Config) and sum(w.double().sum() for w in loaded["ema"].values()) != 0
    assert count / 3 < refused < count
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < peak + 500_000  # kilobytes
    assert os.listdir(tmp_path) == ["model.pth"]
