from support import commands
from support.noise import noise_source

import gzip
import math
import os
import shutil
import signal
import struct
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import forks
import numpy as np
import pytest
import torch
from PIL import Image

import inference
import train
import video.draw
from config import Config
from dataset import Dataset, load_dataset, to_float
from diffusion import from_noise
from record.checkpoint import load_model, save_checkpoint
from video.config import ANY, ClipConfig

REPOSITORY = Path(__file__).parent.parent
SHIPPED = REPOSITORY / "weights" / "mnist.pth"


def write_small_mnist():
    """A folder with the first 150 images of each digit of MNIST to train on, and the first 297 of all to test on, as
    torchvision has them."""
    folder = Path(tempfile.mkdtemp(prefix="small-mnist-"))
    (folder / "MNIST" / "raw").mkdir(parents=True)
    for part, count in (("train", 2000), ("t10k", 297)):
        parts = []
        for name, shape in (("labels-idx1", ()), ("images-idx3", (28, 28))):
            with gzip.open(REPOSITORY / "MNIST" / "raw" / f"{part}-{name}-ubyte.gz") as file:
                file.read(8 + 4 * len(shape))
                parts.append(np.frombuffer(file.read(count * math.prod(shape)), np.uint8).reshape(count, *shape))
        chosen = np.sort(np.concatenate([np.flatnonzero(parts[0] == digit)[:150] for digit in range(10)]))
        for name, array in zip(("labels-idx1", "images-idx3"), parts, strict=True):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, len(chosen), *array.shape[1:])
            (folder / "MNIST" / "raw" / f"{part}-{name}-ubyte").write_bytes(header + array[chosen].tobytes())
    return folder


MADE_HERE = "SMALL_MNIST" not in os.environ  # and not by the process that started this one
SMALL = write_small_mnist() if MADE_HERE else Path(os.environ["SMALL_MNIST"])
os.environ["SMALL_MNIST"] = str(SMALL)


def learn(run, data, step, command=train):
    """One step of a run of `command`, as the training loop takes it. Returns the losses (B,) and their times (B,)."""
    losses, batch, t = command.prepare(run, data, step)
    return train.take_step(run, step, losses, *batch), t


def pytest_unconfigure():
    forks.stop()
    if MADE_HERE:
        shutil.rmtree(SMALL)


# What trains in no time on it, at 8 x 8 pixels: the settings, and the flags that say the same and more.
SMALL_DATA = dict(dataset="mnist", data_dir=str(SMALL), image_size=8)
TINY = ["--dataset", "mnist", "--data-dir", str(SMALL), "--image-size", "8", "--hidden-size", "32", "--depth", "1",
        "--num-heads", "2", "--sample-steps", "3", "--batch-size", "8", "--warmup", "2", "--log-every", "2",
        "--device", "cpu"]

if "PYTEST_XDIST_WORKER" in os.environ:  # processes of as many threads as there are cores would wait for each other
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore


def small_mnist(train=True, **options):
    """What `TINY` trains on: a part of it, a `Dataset`."""
    return load_dataset("mnist", SMALL, train, **{"image_size": 8} | options)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def in_a_process(script, *args, **options):
    """Runs a script or a module of the repository, or "-c" and Python code, in a process of its own, as a user does;
    returns the finished process. See `forks.Fork`."""
    where = [REPOSITORY / script] if script.endswith(".py") else [script] if script == "-c" else ["-m", script]
    return forks.run([*where, *args], **dict(cwd=REPOSITORY, env=dict(os.environ)) | options)


# What a process runs first that may take one more gigabyte of addresses than it has
ONE_GIGABYTE = """
import resource
with open("/proc/self/statm") as file:
    has = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (has + 2**30,) * 2)
"""


@pytest.fixture
def command():
    return in_a_process


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs the `main` of a script in this process, which spares it the imports: `call(train, "--steps", 2)` returns
    its exit code, standard output and standard error."""

    def call(module, *args):
        monkeypatch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        code = 0
        try:
            commands.run(module.main)
        except SystemExit as end:
            code = end.code
            if isinstance(code, str):
                print(code, file=sys.stderr)
                code = 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, *capsys.readouterr()

    return call


def assert_refused(result, *words):
    """One line that names the trouble, exit code 1, no traceback. `result` comes from `call` or `command`."""
    code, _, err = result if isinstance(result, tuple) else (result.returncode, result.stdout, result.stderr)
    assert code == 1, err
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [err.splitlines()[-1]], err
    for word in words:
        assert str(word) in err.splitlines()[-1], err


def flags_of(module):
    """The names of all flags and arguments of a command, as its parser has them: a set, but for help."""
    class Seen(Exception):
        pass

    def parse(parser, *_):
        raise Seen({action.dest for action in parser._actions} - {"help"})

    with mock.patch.object(commands.Parser, "parse_args", parse), pytest.raises(Seen) as seen:
        module.main()
    return seen.value.args[0]


def same(a, b):
    """Equal to the last bit, through dicts and lists of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def train_until(call, flags, step, command=train):
    """Trains by this command with Ctrl-C pressed during step `step`; returns what it printed."""
    original = train.take_step

    def pressed(*args):
        if args[1] == step - 1:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "take_step", pressed)
        code, out, _ = call(command, *flags)
    assert code == 130
    return out


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The run folder of a model that the command trained for a few steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    process = in_a_process("train.py", *TINY, "--steps", 6, "--run-dir", folder)
    assert process.returncode == 0, process.stderr
    return folder


@pytest.fixture(scope="session")
def state():
    """Random weights of FID's Inception, in half precision to be small."""
    from pytorch_fid import inception
    from torchvision.models import Inception3

    torch.manual_seed(0)
    with mock.patch.object(inception, "load_state_dict_from_url"), mock.patch.object(Inception3, "load_state_dict"):
        state = inception.fid_inception_v3().half().state_dict()
    for name, value in state.items():
        if name.endswith("bn.weight"):
            value.fill_(6 ** 0.5)  # keeps the signal's variance: PyTorch's initial weights and a ReLU divide it by 6
    return state


@pytest.fixture(scope="session")
def weights(state, tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(state, file)
    return file


@pytest.fixture(scope="session")
def parts():
    """1,797 of MNIST's test images in three parts of 599: to train, to test, to be good fakes."""
    data = load_dataset("mnist", train=False)
    order = torch.cat([(data.labels == digit).nonzero()[:180, 0] for digit in range(10)])[:1797]
    return [Dataset("mnist", data.images[order[part::3]], data.labels[order[part::3]], data.classes)
            for part in range(3)]


# Pictures and models to draw with


def make_checkpoint(path, seed=0, of=Config, **settings):
    """A checkpoint of an untrained model whose output is not zero."""
    settings = dict(image_size=8, channels=1, num_classes=10, patch_size=4, hidden_size=16, depth=1, num_heads=2,
                    sample_steps=3) | settings
    config = of(dataset="clips" if of is ClipConfig else "folder", **settings)
    torch.manual_seed(seed)
    model = config.build_model()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    save_checkpoint(path, config, 5, 1.0, model.state_dict())
    return path


def load(path, **options):
    """`load_model` of a checkpoint of any kind."""
    return load_model(path, kinds=ANY, **options)


def size(path):
    """The size, the mode and the number of frames of a picture."""
    with Image.open(path) as image:
        return image.size, image.mode, getattr(image, "n_frames", 1)


def tile(picture, row, column, scale=7, side=56):
    """An image of a grid of 8 x 8 ones, each of its pixels once."""
    top, left = 2 + (side + 2) * row, 2 + (side + 2) * column
    return np.asarray(picture)[top:top + side:scale, left:left + side:scale]


def save_clip(path, *greys):
    frames = [Image.fromarray(np.full((8, 8), grey, np.uint8)) for grey in greys]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


SLOPE = np.indices((8, 12))[0] + 2 * np.indices((8, 12))[1]  # so that no picture is a mirror image of itself


def save_frames(path, *greys):
    """Frames of 12 x 8 pixels that all differ."""
    frames = [Image.fromarray((grey + SLOPE).astype(np.uint8)) for grey in greys]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    return path


def greys_of(frames):
    """Frames uint8 (T, 8, 12) as numbers: of those of `save_frames` and of those newly drawn their grey."""
    for frame in frames:
        assert (frame == frame[0, 0]).all() or (frame - frame[0, 0] == SLOPE).all()
    return frames[:, 0, 0].tolist()


def new(window, k, i):
    """The grey of frame i of clip k, of 2, in the window that the stand-in for `sample` draws as its first, 1, ..."""
    return 130 + 16 * (window - 1) + 8 * k + i


@pytest.fixture
def shown(monkeypatch):
    """Stands in for `sample`: returns the list of what it was asked for, and draws frames of one grey each, `new`."""
    calls = []

    def sample(model, config, labels, indices=None, way=from_noise, source=None):
        B, bound = len(labels), getattr(way, "keywords", {})
        x = 0 * (source or noise_source)(config.seed, range(B), config.input_shape, "cpu")()
        shape = x.shape[1:]
        calls.append(SimpleNamespace(model=model, config=config, labels=labels.tolist(), indices=indices, source=source,
                                     way=getattr(way, "func", way), shape=shape, **bound))
        if len(shape) == 4:
            drawn = torch.tensor([[new(len(calls), k, i) for i in range(shape[1])] for k in range(B)])
            x = x + to_float(drawn)[:, None, :, None, None]
        x = torch.where(bound["known"], bound["picture"][:B], x) if "known" in bound else x
        yield from [x] * (config.sample_steps + 1)

    for module in (inference, video.draw):
        monkeypatch.setattr(module, "sample", sample)
    monkeypatch.setattr(inference, "pick_device", lambda name: torch.device("cpu"))  # where it draws
    return calls


WIDE = dict(of=ClipConfig, image_size=(8, 8, 12), patch_size=(2, 4, 4))
A, B = [30, 40, 50, 60, 70, 80, 90, 100, 110, 120], [200, 205, 210, 215, 220]  # of more frames than the model, of fewer


CLIPS = dict(of=ClipConfig, image_size=(4, 8, 8), patch_size=(2, 4, 4))
