"""Several processes, as torchrun starts them, do what one does."""

import os
import signal
import subprocess
import sys

import forks
import numpy as np
import pytest
import torch
from conftest import REPOSITORY, TINY
from forks import HANGS
from PIL import Image

from record.checkpoint import load_checkpoint
from video.config import ANY

FLAGS = [*TINY, "--batch-size", "9", "--lr-decay", "constant", "--precision", "fp32"]


def ranks(count, script, *args):
    """What `count` processes that work together, a script or a module each, have printed, and their exit codes."""
    script = [REPOSITORY / script] if str(script).endswith(".py") else ["-m", script]
    started = forks.start_ranks(count, [*script, *args], REPOSITORY, os.environ | {"PYTHONPATH": str(REPOSITORY)})
    out, err = map("".join, zip(*(rank.communicate() for rank in started), strict=True))
    return out, err, [rank.returncode for rank in started]


def together(count, script, *args):
    """The standard output of processes that end well; see `ranks`."""
    out, err, codes = ranks(count, script, *args)
    assert not any(codes), err
    return out


def assert_alike(run_a, run_b, tolerance=1e-4):
    """Weights, their average and the log are equal to rounding, and the optimizers' states have the same form."""
    a, b = (load_checkpoint(run / "model.pth", ANY) for run in (run_a, run_b))
    assert a["step"] == b["step"]
    for part in ("model", "ema"):  # Adam magnifies the rounding of a gradient that is zero
        torch.testing.assert_close(a[part], b[part], rtol=tolerance, atol=10 * tolerance)
    for x, y in zip(a["optimizers"], b["optimizers"], strict=True):
        assert {i: {name: value.shape for name, value in state.items()} for i, state in x.items()} == {
            i: {name: value.shape for name, value in state.items()} for i, state in y.items()}
    log_a, log_b = (np.genfromtxt(run / "log.csv", delimiter=",", skip_header=1) for run in (run_a, run_b))
    np.testing.assert_allclose(log_a, log_b, rtol=tolerance)


def test_a_run_does_not_depend_on_the_number_of_processes(command, tmp_path):
    """Nor does it when another number resumes it; the 9 images of a step cannot be shared equally."""
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert command("train.py", *FLAGS, "--steps", 8, "--run-dir", one).returncode == 0
    out = together(2, "train.py", *FLAGS, "--steps", 4, "--run-dir", two)
    assert out.count("2 processes") == 1 and out.count("trained in") == 1  # one of them speaks
    assert command("train.py", *FLAGS, "--steps", 8, "--run-dir", two, "--resume").returncode == 0
    together(3, "train.py", *FLAGS, "--steps", 8, "--run-dir", three)
    assert_alike(one, two)
    assert_alike(one, three)


AT_A_STEP = """
import os, signal, sys, train
from support.commands import run
original = train.take_step
def take_step(state, step, *args):
    if step == 25 and os.environ["RANK"] == "1":
        {what}
    return original(state, step, *args)
train.take_step = take_step
run(train.main)
"""


def write_script(folder, what):
    """A training the second process of which does `what` at step 25, and its flags."""
    (folder / "script.py").write_text(AT_A_STEP.format(what=what))
    return [folder / "script.py", *FLAGS, "--steps", 10_000_000, "--no-compile", "--checkpoint-every", 20, "--run-dir",
            folder / "run"]


def test_a_process_that_dies_ends_the_run(tmp_path):
    _, err, codes = ranks(2, *write_script(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)"))
    assert codes == [1, -signal.SIGKILL] and "another of the 2 processes is gone" in err and "Traceback" not in err
    assert load_checkpoint(tmp_path / "run" / "model.pth", ANY)["step"] == 20
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_sigterm_saves_once_for_all(tmp_path):
    """The real torchrun gets it, and hands it on to the processes. They end after the same step."""
    script = map(str, write_script(tmp_path, "os.kill(os.getppid(), signal.SIGTERM)"))
    process = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                              *script], text=True, capture_output=True, timeout=HANGS, cwd=REPOSITORY,
                             env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)})
    assert process.returncode and process.stdout.count("stopped after step") == 1 and "--resume" in process.stdout
    assert process.stdout.count("2 processes") == 1 and "is gone" not in process.stderr
    assert load_checkpoint(tmp_path / "run" / "model.pth", ANY)["step"] >= 26


def test_bad_input_is_one_line_of_each(tmp_path):
    _, err, codes = ranks(2, "train.py", *FLAGS, "--lr", "nan", "--run-dir", tmp_path / "run")
    assert codes == [1, 1] and err.count("\n") == err.count("error: lr is nan") == 2


def test_images_do_not_depend_on_the_number_of_processes(command, trained, tmp_path):
    def args(name):
        return ["--checkpoint", trained / "model.pth", "--count", 21, "--batch-size", 5, "--device", "cpu",
                "--real", tmp_path / name / "real", "--fake", tmp_path / name / "fake"]

    assert command("generator.py", *args("one")).returncode == 0
    shared = tmp_path / "two" / "fake"
    together(2, "generator.py", *args("two"))
    for missing in (shared / "000003_3.png", shared / "000019_9.png"):
        missing.unlink()
    together(3, "generator.py", *args("two"))  # goes on where two have ended
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*"))
    assert len(files) == 2 * 22 + 2
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*"))
    for file in files:
        if file.suffix == ".png":
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_fid_does_not_depend_on_the_number_of_processes(command, weights, tmp_path):
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.effect_noise((30, 30), 50).save(tmp_path / name / f"{i}.png")
    args = ["--real", tmp_path / "real", "--fake", tmp_path / "fake", "--dims", 64, "--device", "cpu",
            "--weights", weights]
    alone = command("fid_computer.py", *args)
    assert alone.returncode == 0, alone.stderr
    shared = together(2, "fid_computer.py", *args, "--save-stats", tmp_path / "stats.npz")
    assert shared.split()[0] == "FID" and shared.split()[2:] == alone.stdout.split()[2:]
    assert float(shared.split()[1]) == pytest.approx(float(alone.stdout.split()[1]), rel=1e-3)
    assert np.load(tmp_path / "stats.npz")["count"] == 5


TOGETHER = """
import numpy as np, torch
from support import parallel
@parallel.one_for_all()
def main():
    parallel.join("cpu")
    rank = parallel.RANK
    assert parallel.all_max(15 * (rank == 1)) == 15 and parallel.all_max(-rank) == 0
    numbers = torch.tensor([1.0, rank])
    parallel.all_sum(numbers)
    assert numbers.tolist() == [2, 1]
    assert parallel.gather(np.full((rank + 1, 2), rank)).tolist() == [[0, 0], [1, 1], [1, 1]]
    assert parallel.gather(np.arange(5)[parallel.share(5)]).tolist() == [0, 1, 2, 3, 4]
    assert parallel.gather(np.arange(1)[parallel.share(1)]).tolist() == [0]
    print("all is well")
main()
"""


def test_what_processes_do_together(tmp_path):
    """The largest number, sums, and arrays in the order of ranks, some of which are empty; one of them speaks."""
    (tmp_path / "script.py").write_text(TOGETHER)
    assert together(2, tmp_path / "script.py") == "all is well\n"
