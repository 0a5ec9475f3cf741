"""What every command promises: one line for each mistake, no traceback, whatever it is started in."""

import support
from support import files, parallel
from support.commands import (
    Parser,
    UserError,
    catch_signals,
    dtype_of,
    end_stopped,
    pick_device,
    resolve_precision,
    run,
)
from support.files import lock_dir, make_dir

import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from conftest import ONE_GIGABYTE, REPOSITORY, TINY, assert_refused
from forks import HANGS

import diffusion
import edit.draw
import fid_computer
import generator
import inference
import latent.draw
import measure.classifier
import measure.results
import measure.score
import train
import video.draw
import video.score
import video.train_dit
from demo import export, share
from few import distill
from latent import import_dit, sprites, train_dit, train_vae
from record import checkpoint
from video.config import ANY

COMMANDS = ("train", "inference", "generator", "fid_computer", "latent.train_dit", "latent.draw", "video.train_dit",
            "video.draw", "edit.draw", "few.distill", "measure.score", "measure.results", "measure.classifier",
            "measure.benchmark", "demo.export", "demo.share")

# Stands in for torch, to see what is prepared when a command imports it.
STAND_IN = """
import json, os, sys
names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
print(json.dumps({name: os.environ[name] for name in names if name in os.environ}))
sys.stdout.flush()
raise KeyboardInterrupt
"""


def start(name, *args, **options):
    """Runs a command whose torch, or numpy, is the stand-in: it ends there, as if Ctrl-C were pressed."""
    return subprocess.run([sys.executable, "-m", name, *args], cwd=REPOSITORY, capture_output=True, text=True,
                          timeout=HANGS, **options)


@pytest.fixture
def stand_in(tmp_path):
    """An environment in which torch and numpy are the stand-in, without the user's own settings."""
    for name in ("torch", "numpy"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text(STAND_IN)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    return kept | {"PYTHONPATH": str(tmp_path / "site")}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_settled_before_torch_is_imported(name, stand_in):
    """How long threads spin; and Ctrl-C while modules are still being imported is one word."""
    process = start(name, env=stand_in)
    assert json.loads(process.stdout) == {"GOMP_SPINCOUNT": "3000"}
    assert process.returncode == 130 and process.stderr == "stopped\n"


@pytest.mark.parametrize("given", [{"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "active"}])
def test_how_threads_wait_is_up_to_the_user(given, stand_in):
    assert json.loads(start("train", env=stand_in | given).stdout) == given


@pytest.mark.parametrize(("before", "frozen"), [("", True), ("sys.modules['torch'] = gc; ", False)])
def test_garbage_is_not_searched_for_in_torch(before, frozen):
    """But in what comes later; and nothing is settled for a program that has imported torch by itself."""
    body = f"import gc, sys; {before}import support; print(gc.isenabled(), gc.get_freeze_count())"
    enabled, count = subprocess.check_output([sys.executable, "-c", body], cwd=REPOSITORY, timeout=HANGS).split()
    assert enabled == b"True" and (int(count) > 50_000) == frozen  # Python 3.12 begins with some hundred


@pytest.mark.parametrize(("body", "code"), [("pass", 0), ("sys.exit(3)", 3), ("raise UserError", 1), ("1 / 0", 1)])
def test_a_command_ends_after_what_others_have_registered(body, code):
    """And with its own exit code; only one that succeeds ends at once then, and only where it is the program."""
    script = ("import atexit, sys\nfrom support.commands import UserError, run\nimport support\ndef main():\n    "
              f"{body}\natexit.register(lambda: print('last', support.DONE))\nrun(main)\nprint('next')")
    process = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, text=True, capture_output=True,
                             timeout=HANGS, env={**os.environ, "PYTHONUNBUFFERED": ""})
    assert process.returncode == code
    assert process.stdout == ("next\nlast ['main']\n" if code == 0 else "last []\n")
    run(lambda: None)
    assert not support.DONE


@pytest.mark.parametrize("name", ["train", "measure.score"])
def test_a_library_that_is_not_installed(name, stand_in, tmp_path):
    for module in ("torch", "numpy"):
        (tmp_path / "site" / module / "__init__.py").write_text("import a_library_that_nobody_has")
    assert_refused(start(name, env=stand_in), "a_library_that_nobody_has", "pip install -r requirements.txt")


def closed_pipe():
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("script", ["train.py", "inference.py"])
def test_output_that_nobody_reads(script, command, trained, tmp_path):
    """As in `| head -1`."""
    flags = [*TINY, "--steps", 2, "--run-dir", tmp_path / "run"] if script == "train.py" else [
        "--checkpoint", trained / "model.pth", "--out", tmp_path / "a.png"]
    with open(closed_pipe(), "w") as nobody:
        process = command(script, *flags, stdout=nobody)
    assert process.returncode == 141 and "Traceback" not in process.stderr and "Exception" not in process.stderr


STREAMS = """
import os, support, sys
print("lost")
print("lost", file=sys.stderr)
file = open(sys.argv[1], "w")
assert file.fileno() > 2 and sys.stdin.read() == "", file.fileno()
file.write(" ".join(str(stream.fileno()) for stream in (sys.stdin, sys.stdout, sys.stderr)))
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_closed_streams(closed, tmp_path):
    """Each is replaced, and what is opened next does not take its place; what a process does with them is below."""
    process = subprocess.Popen([sys.executable, "-c", STREAMS, tmp_path / "out"], cwd=REPOSITORY,
                               stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               preexec_fn=lambda: [os.close(number) for number in closed])
    assert process.wait(HANGS) == 0 and (tmp_path / "out").read_text() == "0 1 2"


def test_a_run_with_closed_streams(tmp_path):
    words = [sys.executable, str(REPOSITORY / "train.py"), *TINY, "--steps", "2", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(words, preexec_fn=lambda: [os.close(number) for number in (0, 1, 2)])
    assert process.wait(HANGS) == 0
    assert checkpoint.load_checkpoint(tmp_path / "run" / "model.pth", ANY)["step"] == 2


FULL = "/dev/full"  # what is written there finds no space left


@pytest.mark.parametrize("err", ["full", "unread"])
def test_a_run_outlives_its_bar(err, command, tmp_path):
    """Standard error on a full disk, or a pipe that nobody reads: the run goes on, and ends well."""
    with open(FULL if err == "full" else closed_pipe(), "w") as stream:
        process = command("train.py", *TINY, "--steps", 2, "--run-dir", tmp_path / "run", stderr=stream)
    assert process.returncode == 0 and "trained in" in process.stdout
    assert checkpoint.load_checkpoint(tmp_path / "run" / "model.pth", ANY)["step"] == 2


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported at some other API call"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")])
def test_out_of_memory_names_what_to_lower(error):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        run(fail, memory="--this or --that")
    assert str(end.value).startswith("error: out of memory: lower --this or --that") and "\n" not in str(end.value)


def test_memory_that_really_runs_out(command, tmp_path):
    """The tokens of a batch, float32 (100,000, 16, 256), do not fit into a gigabyte."""
    process = command("train.py", *TINY, "--batch-size", 100_000, "--hidden-size", 256, "--run-dir", tmp_path / "run",
                      "--precision", "fp32", prepare=ONE_GIGABYTE)
    assert_refused(process, "out of memory", "--batch-size")


@pytest.mark.parametrize("error", [ValueError("a mistake of ours"),
                                   torch.AcceleratorError("CUDA error: an illegal memory access was encountered")])
def test_other_errors_are_not_hidden(error):
    def fail():
        raise error

    with pytest.raises(type(error), match=str(error)):
        run(fail)


def test_files_that_the_system_refuses_are_one_line(call, tmp_path):
    assert_refused(call(train, *TINY, "--run-dir", tmp_path / ("x" * 300)), "File name too long")
    assert_refused(call(train, *TINY, "--resume", "--run-dir", tmp_path / ("x" * 300)), "x" * 300)


@pytest.mark.parametrize("name", ["meta", "cuda:99", "nonsense", "", "cpu:x"])
def test_devices_that_cannot_be_used(name):
    with pytest.raises(UserError, match="--device") as caught:
        pick_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("module", "flags"), [
    (train, ["--run-dir", ""]), (train, [*TINY, "--data-dir", ""]), (generator, ["--real", ""]),
    (generator, ["--fake", ""]), (generator, ["--data-dir", ""]), (fid_computer, ["--real", ""]),
    (fid_computer, ["--fake", ""]), (fid_computer, ["--weights", ""]), (fid_computer, ["--save-stats", ""]),
    (share, ["", "x.pth"]), (share, ["model.pth", ""]), (measure.score, ["--images", ""]),
    (measure.score, ["--pictures", ""]), (measure.score, ["--data-dir", ""]), (measure.classifier, ["--data-dir", ""]),
    (measure.classifier, ["--out", ""]), (measure.results, ["samplers", "--data-dir", ""]),
    (measure.results, ["samplers", "--out", ""]), (measure.results, ["samplers", "--checkpoint", ""]),
    (distill, ["--run-dir", ""]), (distill, ["--checkpoint", ""]),
    (edit.draw, ["--edit", ""]), (video.draw, ["--extend", ""]), (video.draw, ["--before", ""]),
    (video.draw, ["--between", "", ""]), (video.draw, ["--loop", ""]), (inference, ["--out", ""]),
    (edit.draw, ["--inpaint", "", "--mask", "a.png"]), (edit.draw, ["--inpaint", "a.png", "--mask", ""]),
    (video.score, ["--out", ""]), (video.score, ["--beside", ""]), (export, ["--out", ""]),
    (import_dit, ["", "a.pth"]), (import_dit, ["a.pt", ""])])
def test_an_empty_name_is_not_the_current_folder(module, flags, call, tmp_path, monkeypatch):
    """As an unset variable of a shell leaves it."""
    monkeypatch.chdir(tmp_path)
    assert_refused(call(module, *flags), "is empty")
    assert not any(tmp_path.iterdir())


HELPED = """
import runpy, sys
name = sys.argv[1]
for flag in ("--help", "--no-such-flag"):
    sys.argv[1:] = [flag]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if flag == "--no-such-flag" or end.code:
            raise
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_and_a_mistake_that_names_it(name, command):
    """On a terminal that knows ASCII alone."""
    process = command("-c", HELPED, name, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    named = f"python -m {name}" if "." in name else f"{name}.py"
    assert_refused(process, f"({named} --help lists the flags)")
    assert process.stdout.startswith(f"usage: {named} ")


def test_the_fastest_device_is_picked_by_itself(monkeypatch):
    """Here there is none but the CPU, so an attempt to use another one says which."""
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert pick_device() == torch.device("cpu")
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        with pytest.raises(UserError, match="--device mps cannot"):
            pick_device()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(UserError, match="--device cuda cannot"):
            pick_device()
    assert pick_device("cpu") == torch.device("cpu")


def test_the_precision_follows_from_the_hardware(monkeypatch):
    """bf16 only where it is quicker; and what is asked for is what one gets."""
    intel, amd = {"avx512_bf16": True, "cpu_name": "Intel Xeon"}, {"avx512_bf16": True, "cpu_name": "AMD EPYC"}
    for capabilities, wanted in (({}, "fp32"), ({"avx512_f": True}, "fp32"), (amd, "bf16"), (intel, "fp32"),
                                 (intel | {"amx_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capabilities=capabilities: capabilities)
        assert resolve_precision("auto", torch.device("cpu")) == wanted
    for supported, wanted in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, supported=supported: supported or including_emulation)
        assert resolve_precision("auto", torch.device("cuda")) == wanted
    assert resolve_precision("auto", torch.device("mps")) == "fp32"
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert dtype_of(name, torch.device("cpu")) == dtype


def test_ctrl_c_is_one_word(capsys):
    def pressed():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        run(pressed)
    assert end.value.code == 130 and capsys.readouterr().err == "stopped\n"


def test_a_mistaken_flag_is_one_line(capsys):
    with pytest.raises(UserError, match=r"--x.*--help"):
        Parser(prog="name.py").parse_args(["--x"])


# Signals


def test_the_first_signal_is_noted_and_the_second_is_the_systems():
    before = signal.getsignal(signal.SIGTERM)
    with catch_signals() as received:
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        signal.raise_signal(signal.SIGINT)
        assert received == [signal.SIGTERM, signal.SIGINT]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_hangup_that_the_user_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with catch_signals() as received:
            signal.raise_signal(signal.SIGHUP)
        assert received == []
    finally:
        signal.signal(signal.SIGHUP, before)


SIGNALLED = """
import os, signal, sys, train
from support.commands import run
number, sys.argv = int(sys.argv[1]), ["train.py", *sys.argv[2:]]
signal.signal(number, signal.SIG_DFL)  # whoever runs the tests may ignore it, as nohup does
original = train.take_step
def take_step(state, step, *args):
    if step == 3:
        os.kill(os.getpid(), number)
    return original(state, step, *args)
train.take_step = take_step
run(train.main)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_the_step_and_saves(number, command, tmp_path):
    process = command("-c", SIGNALLED, int(number), *TINY, "--steps", 10**6, "--no-compile", "--run-dir",
                           tmp_path / "run")
    assert process.returncode == 128 + number and "Traceback" not in process.stderr
    assert checkpoint.load_checkpoint(tmp_path / "run" / "model.pth", ANY)["step"] == 4
    assert not list((tmp_path / "run").glob("samples*")) and (tmp_path / "run" / "loss.png").exists()
    if number != signal.SIGHUP:  # then nobody is there to read
        assert "stopping" in process.stderr and "stopped after step 4" in process.stdout
        assert "--resume" in process.stdout


# One training a folder


HOLD = """
import sys
from support.files import lock_dir
with lock_dir(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_two_trainings_do_not_share_a_folder(call, tmp_path):
    """The second is refused. After a kill -9 of the first, nobody is."""
    folder = tmp_path / "run"
    folder.mkdir()
    first = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=REPOSITORY, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "locked\n"
    assert_refused(call(train, *TINY, "--steps", 2, "--run-dir", folder), folder, "in use by another")
    assert not (folder / "model.pth").exists()
    first.kill()
    first.wait()
    assert call(train, *TINY, "--steps", 2, "--run-dir", folder)[0] == 0
    assert not (folder / ".lock").exists()


def test_a_lock_ends_with_its_block(tmp_path):
    with pytest.raises(ZeroDivisionError), lock_dir(tmp_path):
        with pytest.raises(UserError, match="in use"), lock_dir(tmp_path):
            pass
        raise ZeroDivisionError
    with lock_dir(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch, capsys):
    """Some network file systems: there the block runs unlocked, as on Windows. Any other error is still one."""
    def flock(file, kind):
        raise OSError(errors[-1], os.strerror(errors[-1]))

    errors = [number]
    monkeypatch.setattr(files.fcntl, "flock", flock)
    with lock_dir(tmp_path):
        (tmp_path / "model.pth").touch()
    assert os.listdir(tmp_path) == ["model.pth"] and capsys.readouterr().err == ""
    errors.append(errno.EIO)
    with pytest.raises(UserError, match="cannot be written"), lock_dir(tmp_path):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "under", "/proc/nowhere", "/proc"):
        with pytest.raises(UserError, match="cannot be written"):
            make_dir(path)


# What torchrun leaves, and what it does not


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500",
            "TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize(("name", "processes", "gpus", "wanted"), [
    (None, 2, 1, "2 processes need a GPU each, and here is 1"), ("cuda", 4, 3, "here are 3: .* --nproc-per-node 3"),
    ("cuda:1", 2, 8, "here is 1: "), (None, 2, 2, "cuda:1"), ("cuda", 2, 8, "cuda:1"), ("cuda:3", 1, 8, "cuda:3"),
    ("cpu", 2, 1, "cpu")])
def test_each_process_has_a_gpu_of_its_own(name, processes, gpus, wanted, monkeypatch):
    """Of several on this machine; on another there may be as many more."""
    picked = []
    monkeypatch.setattr(parallel, "WORLD", 8)
    for variable, value in (("LOCAL_RANK", 1), ("LOCAL_WORLD_SIZE", processes)):
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: picked.append(backend))
    monkeypatch.setattr(parallel, "pick_device", torch.device)
    if " " in wanted:
        with pytest.raises(UserError, match=wanted):
            parallel.join(name)
        assert not picked
    else:
        assert parallel.join(name) == torch.device(wanted)
        assert picked == ["gloo" if name == "cpu" else "cpu:gloo,cuda:nccl"]


def test_a_rank_left_in_the_environment_is_not_torchruns(command, tmp_path):
    process = command("train.py", *TINY, "--steps", 2, "--run-dir", tmp_path / "run", env=os.environ | {
        name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"})
    assert process.returncode == 0 and "trained in" in process.stdout, process.stderr
    assert (tmp_path / "run" / "model.pth").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_work_for_one_process_is_done_once(rank, command, trained, tmp_path):
    """Two that write one file at the same time would get into each other's way."""
    environment = os.environ | TORCHRUN | {"RANK": str(rank)}
    for name, *flags in (["demo.share", str(trained), str(tmp_path / "a.pth")],
                         ["inference", "--checkpoint", str(trained), "--out", str(tmp_path / "a.png")]):
        process = command(name, *flags, env=environment)
        assert process.returncode == 0 and process.stdout.count("\n") == (not rank), process.stderr
    assert len(os.listdir(tmp_path)) == (0 if rank else 2)


def test_work_for_one_process_waits_for_no_others(monkeypatch):
    """The others have left: neither it nor what it starts may take torchrun's word that they are there."""
    for name, value in {**TORCHRUN, "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(parallel, "WORLD", 2)
    seen = []
    run(lambda: seen.append((parallel.RANK, parallel.WORLD, "TORCHELASTIC_RUN_ID" in os.environ)), alone=True)
    assert seen == [(0, 1, False)]


def test_shares_cover_everything_once(monkeypatch):
    for world in (1, 2, 3, 7):
        for n in (0, 1, 9, 64):
            parts = []
            for rank in range(world):
                monkeypatch.setattr(parallel, "RANK", rank)
                monkeypatch.setattr(parallel, "WORLD", world)
                parts.append(range(n)[parallel.share(n)])
            assert [i for part in parts for i in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(("rank", "order"), [(0, ["block", "wait"]), (1, ["wait", "block"])])
def test_the_first_process_is_first(rank, order, monkeypatch):
    done = []
    monkeypatch.setattr(parallel, "RANK", rank)
    monkeypatch.setattr(parallel, "wait", lambda: done.append("wait"))
    with parallel.rank_0_first():
        done.append("block")
    assert done == order


@pytest.mark.parametrize(("error", "words"), [
    (RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1"), "another of the 2 processes is gone"),
    (torch.distributed.DistNetworkError("The client socket has timed out"), "another of the 2 processes is gone"),
    (torch.distributed.DistBackendError("NCCL error: unhandled cuda error"), "cannot work together: NCCL error")])
def test_errors_of_processes_that_work_together(error, words, monkeypatch):
    monkeypatch.setattr(parallel, "WORLD", 2)
    with pytest.raises(UserError, match=words), parallel.one_for_all():
        raise error
    with pytest.raises(RuntimeError, match="ours"), parallel.one_for_all():
        raise RuntimeError("a mistake of ours")


@pytest.mark.parametrize("script, command", [((), "python '../my repo/train.py'"), (("-m", "a.b"), "python -m a.b")])
def test_a_stopped_command_says_how_to_go_on_as_it_was_called(script, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["../my repo/train.py", "--resume", "--steps", "3"])
    with pytest.raises(SystemExit) as end:
        end_stopped(1200, signal.SIGTERM, *script)
    assert end.value.code == 143
    assert capsys.readouterr().out == f"stopped after step 1,200; go on with: {command} --steps 3 --resume\n"


@pytest.mark.parametrize(("script", "flags"), [("inference.py", ["--count", 1]), ("train.py", ["--help"]),
                                               ("generator.py", ["--help"]), ("train.py", [*TINY, "--steps", 2])])
def test_a_command_imports_only_what_it_needs(script, flags, tmp_path):
    """Each of these takes a second or so, and a hundred megabytes, and a picture needs none; nor does a training but
    matplotlib, at its end."""
    words = [sys.executable, REPOSITORY / script, *map(str, flags)]
    process = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, timeout=HANGS, env=os.environ | {
        "PYTHONPROFILEIMPORTTIME": "1"})
    assert process.returncode == 0, process.stderr[-500:]
    imported = {line.split("|")[-1].strip() for line in process.stderr.splitlines() if line.startswith("import time:")}
    assert "torch" in imported and not imported & {
        "sympy", "torch._dynamo", "torch.distributed.fsdp", "torch._inductor", "matplotlib", "sklearn", "torchvision",
        "scipy", "diffusers", "PIL.PdfImagePlugin"} - ({"matplotlib"} if "--steps" in flags else set())


def test_nothing_asks_for_a_network(call, tmp_path, monkeypatch):
    """What the README runs with what comes with the repository, in a folder elsewhere."""
    asked = []

    def refuse(*args, **options):
        asked.append(args)
        raise OSError("no network")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(sprites, "SHEETS", {layer: [*numbers][:2] for layer, numbers in sprites.SHEETS.items()})
    monkeypatch.setattr(sprites, "CHARACTERS", 16)  # of the real parts
    monkeypatch.setattr(sprites, "TRAINING_CHARACTERS", 12)
    monkeypatch.chdir(tmp_path)
    tiny = ["--hidden-size", 32, "--depth", 1, "--num-heads", 2, "--sample-steps", 2, "--steps", 1, "--device", "cpu"]
    steps = ["--steps", 1, "--device", "cpu"]
    for command in ([inference, "--device", "cpu"], [train, *tiny], [inference, "--device", "cpu"],
                    [generator, "--count", 10, "--device", "cpu"], [export], [diffusion],
                    [video.train_dit, *tiny, "--image-size", "4x24x24", "--run-dir", "moving"],
                    [train_vae, "--dataset", "sprites", "--image-size", 16, "--out", "vae", *steps],
                    [train_dit, *tiny, "--image-size", 16, "--vae", "vae", "--run-dir", "sprites"],
                    [latent.draw, "--checkpoint", "sprites", "--device", "cpu"],
                    [latent.draw, "--checkpoint", REPOSITORY / "weights" / "sprites.pth", "--count", 1]):
        code, _, err = call(*command)
        assert code == 0, (command, err)
    assert not asked
    assert not {"MNIST", "Sprites"} & {*os.listdir()}


@pytest.mark.parametrize("name", ["mnist", "moving", "sprites"])
def test_the_weights_that_come_along_name_no_folder(name):
    """So that they find the images that come along too, wherever one is."""
    assert checkpoint.load_checkpoint(REPOSITORY / "weights" / f"{name}.pth", ANY)["config"].data_dir == ""
