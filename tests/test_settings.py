"""A test for each setting, named after it: a run that differs in it alone differs as its help says.

A run is what the command leaves: its checkpoint, its log, its pictures. What its first step should learn is computed
here by hand: an untrained network answers 0, and its last layer sees the normalized tokens as they are.
"""

from support.commands import UserError
from support.noise import noise_source

import csv
import dataclasses
import functools
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import SMALL, SMALL_DATA, TINY, assert_refused, same, small_mnist, train_until
from PIL import Image

import inference
import latent.draw
import latent.train_dit
import train
import video.train_dit
from config import PRESETS, Config
from dataset import Dataset
from dit import DiT, sincos_positions
from dit_block import DiTBlock
from latent.config import LatentConfig
from latent.vae import VAE, save_vae
from record.checkpoint import load_model, save_checkpoint
from video.config import ANY, ClipConfig

BASE = ["--precision", "fp32", "--warmup", "0", "--lr-decay", "constant", "--optimizer", "adamw", "--grad-clip", "0",
        "--patch-size", "2"]
BETA_1, BETA_2 = 0.9, 0.99  # AdamW's
EMBEDDING, LAST = "patch_embedding.linear.weight", "final_layer.linear.weight"
# Written out, so that a setting that wrongly became changeable is noticed
CHANGEABLE = dict(steps=4, data_dir=f"{SMALL}/MNIST/raw", log_every=1, sample_every=1, checkpoint_every=1,
                  sampler="ddim", sample_steps=2, guidance=0.0, eta=0.5, spacing="linspace", guided_channels=1,
                  guidance_high=0.6, clamp=False, compile=True, recompute=True, latents="elsewhere")
NOT_CHANGEABLE = dict(
    dataset="folder", ground="white", digits=2, speeds=True, sizes=((1, 16, 16),), given=0.5, motion=1.0,
    image_size=16, channels=3, flips=True, num_classes=11, classes=("cat",), patch_size=4, hidden_size=64, depth=2,
    num_heads=1, mlp_ratio=2.0, time_spacing="article", gelu="tanh", rope=True, qk_norm=True, T=500, process="ddpm",
    beta_start=1e-3, beta_end=0.01, shift=1.0, variance="learned", loss="l1", vae_hash="0", latent_shape=(4, 2, 2),
    latent_mean=(0.5,), latent_std=(2.0,), batch_size=9, optimizer="muon", lr=1e-3, lr_decay="linear", warmup=3,
    weight_decay=0.1, grad_clip=0.5, ema_decay=0.9, label_dropout=0.2, precision="bf16", seed=1, vae="somewhere")


def test_every_setting_has_a_test():
    names = [field.name for field in dataclasses.fields(ClipConfig)]
    assert [name for name in names if f"test_{name}" not in globals()] == []
    assert sorted(names) == sorted([*CHANGEABLE, *NOT_CHANGEABLE])
    assert {*ClipConfig().CHANGEABLE} == {*CHANGEABLE}
    assert {*ClipConfig(vae="x").CHANGEABLE} == {*CHANGEABLE, "vae"}  # it may have moved: test_cache.py moves one


class Left:
    """What a run has left in its folder, and what it printed."""

    def __init__(self, folder, out=""):
        self.folder, self.out = folder, out
        content = torch.load(folder / "model.pth", weights_only=True)
        self.content, self.config, self.model = content, content["config"], content["model"]
        with (folder / "log.csv").open() as file:
            self.rows = list(csv.DictReader(file))

    def moments(self, which="exp_avg"):
        """The state of AdamW by the name of its weight, when it has all of them."""
        return {name: state[which] for name, state in zip(self.model, self.content["optimizers"][0].values(),
                                                          strict=True)}

    def gradients(self, before=None):
        """The gradients of the last step (in double: the moments are sums), from those of AdamW's first moments."""
        last = before.moments() if before else dict.fromkeys(self.model, torch.zeros(()))
        return {name: (value.double() - BETA_1 * last[name]) / (1 - BETA_1) for name, value in self.moments().items()}


@pytest.fixture
def go(call, tmp_path):
    """Trains by a command, for one step unless told otherwise: go(lr=0.1) returns what the run has `Left`."""
    count = itertools.count()

    def go(command=train, **settings):
        run = tmp_path / f"run{next(count)}"
        preset = {name: settings.pop(name) for name in ("mlp_ratio", "time_spacing") if name in settings}
        flags = [word for name, value in ({"steps": 1} | settings).items() for word in to_flag(name, value)]
        data = TINY[:2] if "dataset" not in settings else []
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PRESETS, "default", preset)  # they have no flag
            code, out, err = call(command, *data, *TINY[2:], *BASE, *flags, "--run-dir", run)
        assert code == 0, err
        return Left(run, out)

    return go


def to_flag(name, value):
    name = name.replace("_", "-")
    return [f"--{'' if value else 'no-'}{name}"] if type(value) is bool else [f"--{name}", value]


@pytest.fixture
def own(tmp_path):
    """A folder of 3 classes with 4 small noisy images each."""
    for name in ("ant", "bee", "cow"):
        (tmp_path / "own" / name).mkdir(parents=True)
        for i in range(4):
            Image.effect_noise((8, 8), 60).save(tmp_path / "own" / name / f"{i}.png")
    return tmp_path / "own"


def digits():
    """The images uint8 (1500, 1, 8, 8) that there are to train on, and their labels."""
    data = small_mnist()
    return data.images, data.labels


def draws(config, step=0, data=None):
    """What step `step` draws: x_0, y, t, noise. The one place that asks train.py itself."""
    config = LatentConfig(**config)
    images, labels = data or digits()
    return train.make_batch(Dataset("", images, labels, []), config.build_process(), config, step)


def path(config, t):
    """Of the steps t (B,): the shares of image and noise in x_t, and what the error counts in the loss, each (B,)."""
    t = t.double()
    if config["process"] == "ddpm":
        betas = config["beta_start"] + (config["beta_end"] - config["beta_start"]) * torch.arange(
            config["T"], dtype=torch.float64) / (config["T"] - 1)
        kept = torch.tensor([math.prod((1 - betas[:int(i) + 1]).tolist()) for i in t])
        return kept.sqrt(), (1 - kept).sqrt(), torch.ones(len(t))
    odds = (t + 1) / (config["T"] - t) * config["shift"]
    tau = odds / (1 + odds)
    return 1 - tau, tau, 1 / tau.clamp(min=0.2)


def by_hand(run, data=None):
    """Of the first step of a run: the losses (B,), t (B,), and the gradients of the last layer's weight and bias."""
    config = run.config
    x_0, _, t, noise = draws(config, data=data)
    signal, share, scale = (part.float().view(-1, 1, 1, 1) for part in path(config, t))
    target = noise if config["process"] == "ddpm" else x_0
    error = -scale * target
    losses = (error.abs() if config["loss"] == "l1" else error.square()).flatten(1).mean(1)
    slope = scale * (error.sign() if config["loss"] == "l1" else 2 * error) / error.numel()

    patch, size = config["patch_size"], config["image_size"]
    cells, slopes = (F.unfold(part, patch, stride=patch).mT for part in (signal * x_0 + share * noise, slope))
    places = sincos_positions([s // p for s, p in zip(size, patch, strict=True)], config["hidden_size"])
    tokens = F.linear(cells, run.model[EMBEDDING]) + places  # its gradient was 0: it is as it was
    tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
    return losses, t, torch.einsum("bnp,bnd->pd", slopes, tokens), slopes.sum((0, 1))


def assert_first_step(run, data=None):
    """The logged losses, in all and by noise level, and the gradients of a run of one step are those by hand."""
    losses, t, weight, bias = by_hand(run, data)
    T = run.config["T"]
    levels = [losses[(t >= T * i / 4) & (t < T * (i + 1) / 4)].mean() for i in range(4)]
    row = [float(value) for name, value in run.rows[0].items() if name.startswith("loss")]
    torch.testing.assert_close(row, [float(value) for value in (losses.mean(), *levels)], rtol=1e-4, atol=0,
                               equal_nan=True)
    gradients = run.gradients()
    for name, expected in ((LAST, weight), ("final_layer.linear.bias", bias)):
        torch.testing.assert_close(gradients.pop(name).float(), expected, rtol=1e-3, atol=1e-5 * expected.abs().max())
    assert not any(value.any() for value in gradients.values())


def shapes(run):
    return {name: tuple(value.shape) for name, value in run.model.items()}


def picture(path):
    return np.array(Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A run that knows a little: its network looks at the time, the label and all of the image."""
    run = tmp_path_factory.mktemp("taught") / "run"
    settings = Config(**SMALL_DATA, hidden_size=32, depth=1, num_heads=2, sample_steps=3, batch_size=32, warmup=0,
                      precision="fp32", steps=300, lr=0.01, ema_decay=0.9)
    train.train(settings, run, device="cpu")
    return run


def as_latents(run):
    """The run as one of `latent.train_dit`, which trains on pixels too."""
    folder = run.with_name("latents")
    if not folder.exists():
        shutil.copytree(run, folder)
        content = torch.load(run / "model.pth", weights_only=True)
        config = dataclasses.asdict(LatentConfig(**content["config"]))
        torch.save(content | {"kind": "latents", "config": config}, folder / "model.pth")
    return folder


@pytest.fixture
def draw(call, taught, tmp_path):
    """The picture that inference.py draws with the model `taught`, with these flags."""

    def draw(*words, command=inference, **settings):
        flags = [word for name, value in settings.items() for word in to_flag(name, value)]
        run = taught if command == inference else as_latents(taught)
        code, _, err = call(command, "--checkpoint", run, "--device", "cpu", "--precision", "fp32", *words, *flags,
                            "--out", tmp_path / "drawn.png")
        assert code == 0, err
        return picture(tmp_path / "drawn.png")

    return draw


def further(call, taught, folder, command=train, **settings):
    """The sample grid of `taught`, drawn anew by a resumed run that changes these settings."""
    shutil.copytree(taught if command == train else as_latents(taught), folder)
    (folder / "samples_000300.png").unlink()
    flags = [word for name, value in settings.items() for word in to_flag(name, value)]
    code, _, err = call(command, "--resume", "--run-dir", folder, "--device", "cpu", *flags)
    assert code == 0, err
    return picture(folder / "samples_000300.png")


# Data


def test_dataset(go, own):
    run = go(batch_size=16)
    assert run.config["dataset"] == "mnist" and "mnist: 1,500 images" in run.out
    assert_first_step(run)
    run = go(dataset="folder", data_dir=own)
    assert run.config["dataset"] == "folder" and "12 images" in run.out
    with Image.open(own / "bee" / "0.png") as image:
        assert image.size == (8, 8)
    images = torch.stack([torch.from_numpy(np.array(Image.open(file)))[None] for file in sorted(own.glob("*/*.png"))])
    assert_first_step(run, (images, torch.arange(12) // 4))


def write_mnist(folder):
    """MNIST's training part, of noise."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    numbers = np.random.default_rng(0)
    for name, shape in (("images-idx3", (60000, 28, 28)), ("labels-idx1", (60000,))):
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        content = numbers.integers(0, 10, shape, dtype=np.uint8)
        (raw / f"train-{name}-ubyte").write_bytes(header + content.tobytes())


def test_data_dir(go, own, tmp_path):
    write_mnist(tmp_path / "there")
    assert go(data_dir=tmp_path / "there", image_size=0, patch_size=14).config["image_size"] == (28, 28)
    shutil.copytree(own / "ant", tmp_path / "other" / "dog")
    run = go(dataset="folder", data_dir=tmp_path / "other")
    assert run.config["classes"] == ("dog",) and run.config["data_dir"] == str(tmp_path / "other")
    assert run.content["data"] != go(dataset="folder", data_dir=own).content["data"]


def test_num_classes(go, own):
    """One label more than there are classes: the null label."""
    assert shapes(go())["label_embedding.weight"] == (11, 32)
    run = go(dataset="folder", data_dir=own)
    assert run.config["num_classes"] == 3 and shapes(run)["label_embedding.weight"] == (4, 32)


def test_classes(go, own, call, tmp_path):
    assert go().config["classes"] == tuple("0123456789")
    run = go(dataset="folder", data_dir=own)
    assert run.config["classes"] == ("ant", "bee", "cow")
    for label in ("bee", "1"):
        out = tmp_path / f"{label}.png"
        assert call(inference, "--checkpoint", run.folder, "--labels", label, "--out", out, "--device", "cpu")[0] == 0
    assert (tmp_path / "bee.png").read_bytes() == (tmp_path / "1.png").read_bytes()


def test_image_size(go, own):
    for value, size, cells in ((0, (8, 8), 4), (12, (12, 12), 9), ("8x12", (8, 12), 6)):
        run = go(image_size=value, dataset="folder", data_dir=own, patch_size=4)
        assert run.config["image_size"] == size and f"images of {size[0]} x {size[1]}" in run.out
        height, width = (side * round(56 / size[0]) + 2 for side in size)
        assert picture(run.folder / "samples_000001.png").shape == (6 * height + 2, 10 * width + 2)
        assert size[0] * size[1] == cells * 16 and shapes(run)[EMBEDDING] == (32, 16)


def test_channels(go, own):
    for value, channels, mode in ((0, 1, "L"), (1, 1, "L"), (3, 3, "RGB")):
        run = go(channels=value, dataset="folder", data_dir=own)
        assert run.config["channels"] == channels and shapes(run)[LAST] == (2 * 2 * channels, 32)
        with Image.open(run.folder / "samples_000001.png") as image:
            assert image.mode == mode


def test_ground(go, tmp_path):
    """Half of each image is transparent, and as black or white as the ground."""
    (tmp_path / "clear" / "x").mkdir(parents=True)
    for i in range(3):
        image = Image.new("RGBA", (8, 8), (90, 90, 90, 255))
        image.paste((200, 200, 200, 0), (0, 0, 8, 4))
        image.save(tmp_path / "clear" / "x" / f"{i}.png")
    runs = []
    for ground, grey in (("black", 0), ("white", 255)):
        runs.append(go(dataset="folder", data_dir=tmp_path / "clear", ground=ground))
        images = torch.full((3, 1, 8, 8), 90, dtype=torch.uint8)
        images[:, :, :4] = grey
        assert_first_step(runs[-1], (images, torch.zeros(3, dtype=torch.int64)))
    assert runs[0].config["ground"] == "black" and runs[1].config["ground"] == "white"


def test_flips(go, own, call, tmp_path):
    """A network that answers 0 is as wrong about an image as about its mirror image, but has other things to learn."""
    run, plain = (go(latent.train_dit, flips=flips, dataset="folder", data_dir=own, batch_size=12)
                  for flips in (True, False))
    assert run.config["flips"] and not plain.config["flips"] and run.content["data"] == plain.content["data"]
    assert float(run.rows[0]["loss"]) == pytest.approx(float(plain.rows[0]["loss"]), rel=1e-4)
    gradients, others = run.gradients()[LAST], plain.gradients()[LAST]
    assert (gradients - others).abs().max() > 0.01 * others.abs().max()
    assert_refused(call(latent.train_dit, *TINY, "--flips", "--run-dir", tmp_path / "no"), "--flips", "photographs")


@pytest.fixture
def go_moving(go, tmp_path):
    """As `go`, on clips of moving digits: of MNIST's shape, noise."""
    write_mnist(tmp_path / "there")
    return lambda **settings: go(video.train_dit, **dict(dataset="moving", data_dir=tmp_path / "there",
                                                         image_size="2x24x24", patch_size="2x12x12") | settings)


def test_digits(go_moving):
    for digits, classes in ((1, 10), (2, 65)):
        run = go_moving(digits=digits)
        assert run.config["digits"] == digits and shapes(run)["label_embedding.weight"] == (classes + 1, 32)


def test_speeds(go_moving):
    for speeds, names in ((False, ("0", "1", "2")), (True, ("0 slow", "0 fast", "1 slow"))):
        assert go_moving(speeds=speeds).config["classes"][:3] == names


def test_sizes(go_moving):
    """There are places for the largest along each axis, and other clips are learned from."""
    run = go_moving(sizes="1x24x24,2x24x36", steps=4)
    assert run.config["sizes"] == ((1, 24, 24), (2, 24, 36)) and run.config["image_size"] == (2, 24, 24)
    alone = go_moving(steps=4)
    assert [row["loss"] for row in run.rows] != [row["loss"] for row in alone.rows]
    assert "6 tokens" in run.out and "4 tokens" in alone.out


def test_given(go_moving):
    """The loss is of the other frames: as large of each, and its gradient another."""
    runs = [go_moving(given=share, batch_size=64, image_size="4x24x24") for share in (0.0, 1.0)]
    losses = [float(run.rows[0]["loss"]) for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    gradients = [run.gradients()[LAST] for run in runs]
    assert (gradients[0] - gradients[1]).abs().max() > 0.1 * gradients[0].abs().max()


def test_motion(go_moving):
    """A term of the loss, of whatever clips: with frames given or without."""
    for given in (0.0, 1.0):
        losses = [float(go_moving(motion=motion, given=given, image_size="4x24x24").rows[0]["loss"])
                  for motion in (0.0, 500.0, 1000.0)]
        assert losses[1] > 1.05 * losses[0]
        assert losses[2] - losses[1] == pytest.approx(losses[1] - losses[0], rel=1e-3)


# Model


def test_patch_size(go):
    for value, patch in ((0, (2, 2)), (2, (2, 2)), (4, (4, 4)), ("4x2", (4, 2)), ("2x8", (2, 8))):
        run = go(patch_size=value)
        cells = patch[0] * patch[1]
        assert run.config["patch_size"] == patch
        assert shapes(run)[EMBEDDING] == (32, cells) and shapes(run)[LAST] == (cells, 32)
        assert f"{64 // cells} tokens" in run.out
        assert_first_step(run)


def test_hidden_size(go):
    for D in (16, 48):
        run = go(hidden_size=D)
        assert shapes(run)[EMBEDDING] == (D, 4) and shapes(run)["blocks.0.attention.qkv.weight"] == (3 * D, D)
        assert_first_step(run)


def test_depth(go, call):
    """However many blocks and whatever the optimizer, the checkpoint can be read again."""
    for depth, optimizer in itertools.product((1, 2, 3), ("adamw", "muon")):
        run = go(depth=depth, optimizer=optimizer)
        assert {int(name.split(".")[1]) for name in run.model if name.startswith("blocks.")} == {*range(depth)}
        assert load_model(run.folder / "model.pth", kinds=ANY)[1].depth == depth
        code, _, err = call(train, "--resume", "--steps", 2, "--run-dir", run.folder, "--device", "cpu")
        assert code == 0, err


def test_num_heads(go, monkeypatch):
    """No weight has another shape; the heads share out the width, and see with it something else."""
    seen, original, runs = [], F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, *rest: (seen.append(q.shape[1:]),
                                                                              original(q, *rest))[1])
    for heads in (1, 4):
        runs.append(go(num_heads=heads, steps=4))
        assert {*seen} == {(heads, 16, 32 // heads)}
        seen.clear()
    assert shapes(runs[0]) == shapes(runs[1]) and not same(runs[0].model, runs[1].model)


def test_mlp_ratio(go):
    for ratio, width in ((4.0, 128), (2.5, 80)):
        named = shapes(go(mlp_ratio=ratio))
        assert named["blocks.0.mlp.0.weight"] == (width, 32) and named["blocks.0.mlp.2.weight"] == (32, width)


def test_time_spacing(go):
    for spacing, gaps in (("dit", 128), ("article", 127)):
        seen = []

        def see(module, inputs, seen=seen):
            if getattr(module, "in_features", 0) == 256:  # of the time alone
                seen.append(inputs[0])

        with torch.nn.modules.module.register_module_forward_pre_hook(see):
            run = go(time_spacing=spacing)
        t = draws(run.config)[2].double()
        angles = t[:, None] * 10000 ** -(torch.arange(128, dtype=torch.float64) / gaps)
        torch.testing.assert_close(seen[0].double(), torch.cat([angles.sin(), angles.cos()], 1), atol=2e-4, rtol=0)


def test_gelu():
    """The tanh formula instead of the exact one, which are 4.7e-4 apart at the most."""
    config = LatentConfig(image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=16, num_heads=2, depth=1)
    x = torch.linspace(-5, 5, 1001)
    for gelu, expected in (("none", x * torch.special.ndtr(x)), ("tanh", x / 2 * (1 + torch.tanh(
            math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))):
        layer = dataclasses.replace(config, gelu=gelu).build_model().blocks[0].mlp[1]
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_rope(go_moving):
    """Attention's queries and keys are then turned, which shows once its gates have opened; and where samples are drawn
    from the checkpoint."""
    runs = [go_moving(rope=rope, steps=4, log_every=1) for rope in (False, True)]
    losses = [[float(row["loss"]) for row in run.rows] for run in runs]
    assert losses[0][0] == losses[1][0] and not same(runs[0].model, runs[1].model)
    assert shapes(runs[0]) == shapes(runs[1])
    model, config = load_model(runs[1].folder / "model.pth", precision="fp32", kinds=ANY)
    x, y = torch.randn(2, *config.input_shape), torch.tensor([0, 1])
    whole = config.build_model()
    whole.load_state_dict(model.state_dict())
    assert torch.equal(model(x, 5, y), whole(x, 5, y))


def test_qk_norm(go_moving):
    """A scale for the queries of each block, which is learned."""
    plain, normed = (go_moving(qk_norm=qk_norm, steps=4, image_size="4x24x24") for qk_norm in (False, True))
    scale = normed.model["blocks.0.attention.scale"]
    assert normed.model.keys() - plain.model.keys() == {"blocks.0.attention.scale"}
    assert scale.shape == (16,) and not torch.equal(scale, torch.ones(16))


# Diffusion


@pytest.mark.parametrize("process", ["flow", "ddpm"])
def test_T(go, process):
    for T, names in ((1000, ["0-249", "250-499", "500-749", "750-999"]), (10, ["0-2", "3-4", "5-7", "8-9"])):
        run = go(T=T, process=process, beta_end=0.01, batch_size=64)
        assert [name for name in run.rows[0] if "_t" in name] == [f"loss_t{name}" for name in names]
        assert_first_step(run)


def test_process(go):
    for process in ("ddpm", "flow"):
        assert_first_step(go(process=process, batch_size=64))


def test_beta_start(go):
    runs = [go(process="ddpm", beta_start=value, batch_size=64) for value in (1e-4, 5e-3)]
    for run in runs:
        assert_first_step(run)
    assert not torch.allclose(runs[0].gradients()[LAST], runs[1].gradients()[LAST], rtol=0.01)


def test_beta_end(go):
    runs = [go(process="ddpm", beta_end=value, batch_size=64) for value in (0.02, 0.01)]
    for run in runs:
        assert_first_step(run)
    assert not torch.allclose(runs[0].gradients()[LAST], runs[1].gradients()[LAST], rtol=0.01)


def test_shift(go):
    for shift in (2.2, 1, 0.5):
        assert_first_step(go(shift=shift, batch_size=64))


def test_variance(go, call):
    """The network answers twice as much: 0, which is midway between the two bounds of the variance."""
    assert shapes(go(latent.train_dit, process="ddpm", variance="fixed"))[LAST] == (4, 32)
    learned = go(latent.train_dit, process="ddpm", variance="learned", batch_size=64, beta_start=1e-3)
    assert shapes(learned)[LAST] == (8, 32)
    _, _, t, noise = draws(learned.config)
    kept, _, _ = path(learned.config, torch.arange(1000))
    kept = kept.square()
    low, gap = torch.zeros(2, 1000, dtype=torch.float64)
    betas = 1 - kept / torch.cat([torch.ones(1), kept[:-1]])
    low[1:] = (betas[1:] * (1 - kept[:-1]) / (1 - kept[1:])).log()
    gap = betas / (1 - kept).sqrt() / (1 - betas).sqrt()
    spread = (betas.log() - low) / 2
    at = [part[t].view(-1, 1, 1, 1) for part in (low, gap, spread)]
    bits = (at[2] - 1 + (-at[2]).exp() + (at[1] * noise).square() / (at[0] + at[2]).exp()) / 2 / math.log(2)
    assert t.min() > 0  # where the bound is another one
    expected = noise.square().mean() + bits.mean()
    assert float(learned.rows[0]["loss"]) == pytest.approx(expected.item(), rel=1e-4)
    assert bits.mean() > 0.01
    gradient = learned.gradients()[LAST].float().view(4, 2, 32)  # values of a patch, then noise and variance
    torch.testing.assert_close(gradient[:, 0], by_hand(learned)[2], rtol=1e-3, atol=1e-6)
    assert gradient[:, 1].any()
    assert call(latent.train_dit, "--resume", "--steps", 2, "--run-dir", learned.folder, "--device", "cpu")[0] == 0
    assert_refused(call(latent.train_dit, *TINY, "--process", "flow", "--variance", "learned", "--run-dir",
                        learned.folder / "x"), "process ddpm alone")


@pytest.mark.parametrize("process", ["flow", "ddpm"])
def test_loss(go, process):
    for loss in ("l2", "l1"):
        assert_first_step(go(loss=loss, process=process, batch_size=64))


# Training


def test_steps(go):
    for steps in (1, 3):
        run = go(steps=steps, log_every=50)
        assert run.content["step"] == steps and [row["step"] for row in run.rows] == [str(steps)]
        assert {state["step"].item() for state in run.content["optimizers"][0].values()} == {steps}


def test_batch_size(go, call, tmp_path):
    for size in (5, 40):
        assert_first_step(go(batch_size=size))
        train_until(call, [*TINY, "--batch-size", size, "--log-every", 9, "--run-dir", tmp_path / f"{size}"], 3)
        assert Left(tmp_path / f"{size}").content["window"][:, 1].sum() == 3 * size  # losses not yet logged


def test_optimizer(go):
    run, before = go(steps=4, depth=2), go(steps=3, depth=2)
    assert [len(states) for states in run.content["optimizers"]] == [len(run.model)]
    squares, last = run.moments("exp_avg_sq"), before.moments("exp_avg_sq")
    for name, gradient in run.gradients(before).items():
        expected = BETA_2 * last[name] + (1 - BETA_2) * gradient.square()
        torch.testing.assert_close(squares[name], expected.float(), rtol=1e-3, atol=1e-12)

    run, before = (go(steps=steps, depth=2, optimizer="muon") for steps in (3, 2))
    names = [f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("attention.qkv", "attention.out", "mlp.0",
                                                                          "mlp.2")]
    adamw, muon = run.content["optimizers"]
    assert len(adamw) == len(run.model) - len(names)
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in adamw.values())
    assert sorted(muon) == [*range(len(names))]
    for i, name in enumerate(names):  # the first gradient that they get is the third
        assert muon[i].keys() == {"momentum"} and muon[i]["momentum"].shape == run.model[name].shape
        update = run.model[name] - before.model[name]
        size = 0.2 * max(update.shape) ** 0.5 * 0.004
        assert 0.65 < torch.linalg.matrix_norm(update, 2) / size < 1.25
        assert (update * muon[i]["momentum"]).sum() < 0  # downhill


def test_lr(go):
    """AdamW's first step is as long as lr, in each weight."""
    for lr in (0.004, 0.02):
        run = go(lr=lr, batch_size=64)
        assert float(run.rows[0]["lr"]) == lr
        gradient = run.gradients()[LAST]
        assert gradient.abs().min() > 1e-5
        torch.testing.assert_close(run.model[LAST], -lr * gradient.sign().float(), rtol=2e-3, atol=0)
    run = go(lr=0)
    assert not run.model[LAST].any()


def rates(run):
    return [float(row["lr"]) for row in run.rows]


def test_lr_decay(go):
    left = np.array([1, 0.8, 0.6, 0.4, 0.2])
    for decay, expected in (("constant", left**0), ("linear", left), ("sqrt", left**0.5)):
        run = go(lr_decay=decay, steps=5, log_every=1, lr=0.1)
        assert rates(run) == pytest.approx(0.1 * expected, rel=1e-5)


def test_warmup(go):
    run = go(warmup=3, steps=6, log_every=1, lr=0.1)
    assert rates(run) == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    run = go(warmup=3, steps=4, log_every=1, lr=0.1, lr_decay="linear")
    assert rates(run) == pytest.approx([0.025, 0.05 * 0.75, 0.075 * 0.5, 0.1 * 0.25])
    run = go(warmup=3, lr=0.1)
    assert run.model[LAST].abs().max().item() == pytest.approx(0.025, rel=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weight_decay(go, optimizer):
    """At the first step most weights have no gradient, and shrink as decay alone has them do."""
    plain, decayed = (go(weight_decay=value, optimizer=optimizer, lr=0.1) for value in (0, 0.5))
    for name, value in plain.model.items():
        if not name.startswith("final_layer.linear"):
            torch.testing.assert_close(decayed.model[name], value * (1 - 0.1 * 0.5), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(decayed.model[LAST], plain.model[LAST])  # it was 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_grad_clip(go, optimizer):
    """The norm is that of all gradients together, whoever optimizes them; a smaller one stays as it is."""
    def third(clip):
        run, before = (go(grad_clip=clip, optimizer=optimizer, steps=steps) for steps in (3, 2))
        states = zip(run.content["optimizers"], before.content["optimizers"], strict=True)
        parts = [(state[i][name].double() - beta * last[i][name]) / (1 - beta) for (state, last), name, beta in
                 zip(states, ("exp_avg", "momentum"), (BETA_1, 0.95), strict=False) for i in range(len(state))]
        return torch.cat([part.flatten() for part in parts]).norm().item()

    assert third(0) > 0.05
    assert third(0.01) == pytest.approx(0.01, rel=2e-3)
    free, wide, clipped = (go(grad_clip=clip, optimizer=optimizer).content["optimizers"] for clip in (0, 1e6, 0.01))
    assert same(free, wide)
    norm = torch.cat([state["exp_avg"].flatten() for state in free[0].values()]).norm() / (1 - BETA_1)
    for i, state in free[0].items():
        torch.testing.assert_close(clipped[0][i]["exp_avg"], state["exp_avg"] * 0.01 / norm, rtol=1e-3, atol=1e-9)


def test_ema_decay(go, call):
    run = go(ema_decay=0)
    assert same(run.content["ema"], run.model)
    run = go()  # the first weights are soon forgotten, whatever the decay
    torch.testing.assert_close(run.content["ema"][LAST], 0.9 * run.model[LAST])
    run = go(ema_decay=0.05)
    torch.testing.assert_close(run.content["ema"][LAST], 0.95 * run.model[LAST])  # it was 0
    for decay in (0.5, 0.75):
        before = go(ema_decay=decay, steps=40)
        assert call(train, "--resume", "--steps", 41, "--run-dir", before.folder, "--device", "cpu")[0] == 0
        after = Left(before.folder)
        for name, value in after.model.items():
            torch.testing.assert_close(after.content["ema"][name],
                                       decay * before.content["ema"][name] + (1 - decay) * value)


def test_label_dropout(go):
    """The labels that a step has seen, the third, are those whose embeddings have a gradient."""
    for share, expected in ((1, {10}), (0, {*range(10)}), (0.5, {*range(11)})):
        moments = go(label_dropout=share, steps=3, batch_size=100).moments()["label_embedding.weight"]
        assert {*moments.any(1).nonzero().flatten().tolist()} == expected
    dropped = draws(dict(label_dropout=0.3, batch_size=20_000, num_classes=10))[1] == 10
    assert dropped.double().mean().item() == pytest.approx(0.3, abs=0.01)


def test_precision(go):
    """bf16: the weights are float32, their gradients are not."""
    runs = {name: go(precision=name, steps=1) for name in ("fp32", "bf16", "auto")}
    for name in ("fp32", "bf16"):
        gradient = runs[name].gradients()[LAST].float()
        off = (gradient.bfloat16().float() / gradient - 1).abs().max()
        assert (off < 1e-6) == (name == "bf16") and runs[name].config["precision"] == name
        assert {value.dtype for value in runs[name].model.values()} == {torch.float32}
    torch.testing.assert_close(runs["bf16"].gradients()[LAST], runs["fp32"].gradients()[LAST], rtol=0.05, atol=0.01)
    auto = runs["auto"].config["precision"]
    assert same(runs["auto"].model, runs[auto].model)


@pytest.mark.long
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="nothing can be compiled here")
def test_compile(go, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    plain, compiled = go(steps=3), go(compile=True, steps=3)
    assert "compiled" in compiled.out and "compiled" not in plain.out
    assert compiled.config["compile"] and not plain.config["compile"]
    assert any((tmp_path / "cache").rglob("*.cpp"))
    for name, value in plain.gradients().items():
        torch.testing.assert_close(compiled.gradients()[name], value, rtol=0.01, atol=1e-3 * value.abs().max().item())


def test_recompute(go, monkeypatch):
    calls, original = [], DiTBlock.forward
    monkeypatch.setattr(DiTBlock, "forward", lambda *args: (calls.append(torch.is_grad_enabled()), original(*args))[1])
    plain = go(depth=2, steps=4)
    once = sum(calls)
    again = go(depth=2, steps=4, recompute=True)
    assert once == 2 * 4 and sum(calls) - once == 2 * once
    torch.testing.assert_close(again.model, plain.model, rtol=1e-5, atol=1e-6)


def test_seed(go):
    first, again, other, large = (go(seed=seed, batch_size=64) for seed in (5, 5, 6, 5 + 2**32))
    assert same(first.model, again.model) and first.rows == again.rows
    for run in (first, other, large):
        assert_first_step(run)
    for a, b in itertools.combinations((first, other, large), 2):
        assert not same(a.model, b.model) and a.rows != b.rows
        assert (a.folder / "samples_000001.png").read_bytes() != (b.folder / "samples_000001.png").read_bytes()
    assert not torch.equal(first.model[EMBEDDING], other.model[EMBEDDING])


def test_log_every(go):
    one_by_one = [float(row["loss"]) for row in go(log_every=1, steps=5).rows]
    assert len(one_by_one) == 5
    for every, steps in ((2, [2, 4, 5]), (9, [5])):
        run = go(log_every=every, steps=5)
        assert [int(row["step"]) for row in run.rows] == steps
        means = [np.mean(one_by_one[low:high]) for low, high in itertools.pairwise([0, *steps])]
        assert [float(row["loss"]) for row in run.rows] == pytest.approx(means, rel=1e-4)


def test_sample_every(go):
    for every, steps in ((2, [2, 4, 5]), (9, [5])):
        found = sorted(go(sample_every=every, steps=5).folder.glob("samples_*"))
        assert [file.name for file in found] == [f"samples_{step:06d}.png" for step in steps]


def test_checkpoint_every(go, monkeypatch):
    saved, original = [], torch.save
    monkeypatch.setattr(torch, "save", lambda content, file: (saved.append(content["step"]), original(content, file)))
    for every, steps in ((2, [2, 4, 5]), (9, [5])):
        saved.clear()
        go(checkpoint_every=every, steps=5)
        assert saved == steps


# Sampling


def test_sampler(call, taught, draw, tmp_path):
    """Those that are relatives draw the same where the theory says so, and each its own elsewhere."""
    drawn = [draw(sampler=name, sample_steps=10, guidance=3) for name in ("ddpm", "ddim", "dpm", "heun")]
    for a, b in itertools.combinations(drawn, 2):
        assert np.abs(a - b).max() > 8
    # Of two steps the second ends at the clean image, and the first has nothing before it to be of second order
    ddpm, ddim, dpm = (draw(sampler=name, sample_steps=2) for name in ("ddpm", "ddim", "dpm"))
    assert np.abs(ddim - dpm).max() <= 1 < 8 < np.abs(ddpm - ddim).max()
    # The grid that training draws
    grid = further(call, taught, tmp_path / "run", sampler="ddpm")
    assert np.abs(grid - draw("--count", 6, sampler="ddpm")).max() <= 1
    assert np.abs(grid - picture(taught / "samples_000300.png")).max() > 8


def test_sample_steps(call, taught, draw, tmp_path, monkeypatch):
    calls, forward = [], DiT.forward
    monkeypatch.setattr("dit.DiT.forward", lambda *args: (calls.append(args[2].unique().tolist()), forward(*args))[1])
    for steps, times in ((1, [999]), (4, [999, 749, 499, 249])):
        calls.clear()
        draw(sample_steps=steps)
        assert calls == [[t] for t in times]
    grid = further(call, taught, tmp_path / "run", sample_steps=4)
    assert np.abs(grid - draw("--count", 6, sample_steps=4)).max() <= 1
    assert np.abs(grid - draw("--count", 6, sample_steps=1)).max() > 8


def test_guidance(call, taught, draw, tmp_path):
    """In one step the image is what the network answers for the label and without one: u + guidance (c - u)."""
    model, config = load_model(taught / "model.pth", precision="fp32", kinds=ANY)
    noise = noise_source(0, range(10), (1, 8, 8), "cpu")()
    with torch.no_grad():
        c, u = (model(noise, config.T - 1, y) for y in (torch.arange(10), 10))
    for scale in (0, 1, 1.4, 5, -2):
        expected = ((u + scale * (c - u)).clamp(-1, 1) + 1) * 127.5
        shown = draw("--count", 1, sample_steps=1, guidance=scale)[2:-2:7].reshape(8, -1)[:, 2:]
        shown = np.stack([shown[:, 58 * i:58 * i + 56:7] for i in range(10)])
        assert np.abs(shown - expected[:, 0].numpy()).max() < 0.6
    assert (c - u).abs().max() > 0.05
    grid = further(call, taught, tmp_path / "run", guidance=5)
    assert np.abs(grid - draw("--count", 6, guidance=5)).max() <= 1
    assert np.abs(grid - draw("--count", 6, guidance=1)).max() > 8


def test_eta(call, taught, draw, tmp_path):
    """As much noise as ddpm is ddpm."""
    none, some, full = (draw(sampler="ddim", eta=eta, sample_steps=5) for eta in (0, 0.5, 1))
    assert np.abs(full - draw(sampler="ddpm", sample_steps=5)).max() <= 1
    assert np.abs(none - draw(sampler="ddim", sample_steps=5)).max() == 0
    for a, b in itertools.combinations((none, some, full), 2):
        assert np.abs(a - b).max() > 1
    grid = further(call, taught, tmp_path / "run", sampler="ddim", eta=0.5)
    assert np.abs(grid - draw("--count", 6, sampler="ddim", eta=0.5)).max() <= 1


def test_spacing(call, taught, draw, tmp_path, monkeypatch):
    calls, forward = [], DiT.forward
    monkeypatch.setattr("dit.DiT.forward", lambda *args: (calls.append(args[2].unique().tolist()), forward(*args))[1])
    for spacing, times in (("trailing", [999, 749, 499, 249]), ("linspace", [999, 666, 333, 0])):
        calls.clear()
        drawn = draw("--count", 6, command=latent.draw, sample_steps=4, spacing=spacing)
        assert calls == [[t] for t in times]
    grid = further(call, taught, tmp_path / "run", latent.train_dit, sample_steps=4, spacing="linspace")
    assert np.abs(grid - drawn).max() <= 1 < 8 < np.abs(grid - draw("--count", 6, sample_steps=4)).max()


def test_guided_channels(call, go, own, tmp_path):
    """Drawn in one step: the first channels are u + 5 (c - u), the others c."""
    run = go(latent.train_dit, dataset="folder", data_dir=own, channels=3, steps=200, lr=0.01, batch_size=16)
    model, _ = load_model(run.folder / "model.pth", precision="fp32", kinds=ANY)
    noise = noise_source(0, range(3), (3, 8, 8), "cpu")()
    with torch.no_grad():
        c, u = (model(noise, 999, y) for y in (torch.arange(3), 3))
    assert ((c - u).abs() * 4 * 127.5).mean((0, 2, 3)).min() > 2
    for n in (0, 1, 2, 3):
        expected = c.clone()
        expected[:, :n or 3] = (u + 5 * (c - u))[:, :n or 3]
        assert call(latent.draw, "--checkpoint", run.folder, "--guidance", 5, "--sample-steps", 1, "--guided-channels",
                    n, "--count", 1, "--precision", "fp32", "--out", tmp_path / "a.png", "--device", "cpu")[0] == 0
        drawn = picture(tmp_path / "a.png")[-58:-2:7, :, :]
        for i in range(3):
            pixels = torch.from_numpy(drawn[:, 2 + 58 * i:58 + 58 * i:7]).permute(2, 0, 1)
            assert ((expected[i].clamp(-1, 1) + 1) * 127.5 - pixels).abs().max() < 0.6, n


def test_guidance_high(call, taught, draw, tmp_path):
    """Of four steps two are guided, for which the network sees twice as many images."""
    as_latents(taught)
    draw = functools.partial(draw, command=latent.draw, guidance=5, sample_steps=4)
    some, images, forward = draw(), [], DiT.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dit.DiT.forward", lambda *args: (images.append(len(args[1])), forward(*args))[1])
        drawn = draw("--count", 6, guidance_high=0.6)
    assert images == [64, 64, 128, 128]
    assert np.abs(drawn - draw("--count", 6)).max() > 8 and np.abs(some - draw(guidance_high=1.0)).max() == 0
    grid = further(call, taught, tmp_path / "run", latent.train_dit, guidance=5, sample_steps=4, guidance_high=0.6)
    assert np.abs(grid - drawn).max() <= 1


def test_clamp(call, taught, draw, tmp_path):
    """The image is what the last step sees, cut off or not; what is cut off at an early step leads elsewhere."""
    model, config = load_model(as_latents(taught) / "model.pth", precision="fp32", kinds=ANY)
    draw = functools.partial(draw, command=latent.draw)
    for clamp in (True, False):
        settings = dataclasses.replace(config, guidance=5.0, clamp=clamp)
        assert (inference.generate(model, settings, torch.arange(10)).abs().max() > 1.1) == (not clamp)
    assert np.abs(draw(guidance=5, clamp=False) - draw(guidance=5)).max() > 8
    assert np.abs(draw(guidance=5, clamp=False, sample_steps=1) - draw(guidance=5, sample_steps=1)).max() == 0
    grid = further(call, taught, tmp_path / "run", latent.train_dit, guidance=5, clamp=False)
    assert np.abs(grid - draw("--count", 6, guidance=5, clamp=False)).max() <= 1


# Latents: tests/test_cache.py trains on them


@pytest.fixture
def untaught(tmp_path, call):
    """Draws two images in one step with a network that has never learned, and answers 0: untaught(**fields) returns the
    picture's tiles, uint8 (2, 8, 8), and their VAE."""
    torch.manual_seed(1)
    vae = VAE(in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(8, 16), norm_num_groups=4).eval()
    save_vae(vae, tmp_path / "vae")

    def untaught(**fields):
        config = LatentConfig(**dict(
            dataset="mnist", image_size=8, channels=1, num_classes=2, patch_size=2, hidden_size=16, depth=1,
            num_heads=2, sample_steps=1, clamp=False, latent_shape=(2, 4, 4), latent_mean=(0.0,), latent_std=(1.0,),
            vae=str(tmp_path / "vae"), vae_hash=vae.fingerprint) | fields)
        save_checkpoint(tmp_path / "model.pth", config, 1, 1.0, config.build_model().state_dict())
        result = call(latent.draw, "--checkpoint", tmp_path / "model.pth", "--count", 1, "--out", tmp_path / "a.png",
                      "--device", "cpu")
        if result[0]:
            return result, vae
        drawn = picture(tmp_path / "a.png")[2:-2:7]
        return torch.from_numpy(np.stack([drawn[:, 2:58:7], drawn[:, 60:116:7]])), vae

    return untaught


def assert_decoded(untaught, vae, z, **fields):
    """An untrained network sees the clean latent 0, which stands for z (C,)."""
    with torch.no_grad():
        expected = (vae.reconstruct(torch.tensor(z).view(1, -1, 1, 1).expand(1, 2, 4, 4))[0, 0] + 1) * 127.5
    for tile in untaught(**fields)[0]:
        assert (tile - expected.clamp(0, 255)).abs().max() < 0.6


def test_latent_shape(untaught):
    drawn, vae = untaught()
    assert drawn.shape == (2, 8, 8)
    assert_decoded(untaught, vae, [0.0, 0.0])
    for shape in ((2, 2, 2), (2, 4, 2), (3, 4, 4)):
        assert_refused(untaught(latent_shape=shape)[0], str(shape), "(1, 8, 8)")
    for shape in ((2,), (2, 0, 4), (2, 4, 4.0), ("2", 4, 4), (2, 4, 10**6)):
        with pytest.raises(UserError, match="latent_shape"):
            LatentConfig(latent_shape=shape, latent_mean=(0.0,), latent_std=(1.0,), clamp=False)
    with pytest.raises(UserError, match="--no-clamp"):
        LatentConfig(latent_shape=(2, 4, 4), latent_mean=(0.0,), latent_std=(1.0,))
    with pytest.raises(UserError, match=r"patch_size 2 does not divide latent_shape 5x4: choose one of \[1, 5\]"):
        LatentConfig(image_size=8, patch_size=2, latent_shape=(2, 5, 4), latent_mean=(0.0,), latent_std=(1.0,),
                     clamp=False)


def test_latent_mean(untaught):
    _, vae = untaught()
    assert_decoded(untaught, vae, [3.0, 3.0], latent_mean=(3.0,))
    assert_decoded(untaught, vae, [3.0, -1.0], latent_mean=(3.0, -1.0))
    for wrong in ((), (1.0, 2.0, 3.0), (math.nan,), ("a",), (1,)):
        with pytest.raises(UserError, match="latent_mean"):
            untaught(latent_mean=wrong)


def test_latent_std(untaught, tmp_path):
    """The network's 0 stays 0, whatever it is; a state before the end does not."""
    drawn, vae = untaught(latent_std=(2.0, 9.0))
    assert torch.equal(drawn, untaught()[0])
    z = torch.randn(3, 2, 4, 4)
    config = LatentConfig(image_size=8, channels=1, latent_shape=(2, 4, 4), latent_mean=(0.5,), latent_std=(2.0, 9.0),
                          clamp=False, vae=str(tmp_path / "vae"))
    with torch.no_grad():
        expected = (vae.reconstruct(z * torch.tensor([2.0, 9.0]).view(2, 1, 1) + 0.5) + 1) * 127.5
    assert (config.to_images(z) - expected.clamp(0, 255)).abs().max() < 0.6
    for wrong in ((), (1.0, 2.0, 3.0), (0.0,), (-1.0, 1.0), (math.inf,)):
        with pytest.raises(UserError, match="latent_std"):
            untaught(latent_std=wrong)


def test_vae(untaught, tmp_path):
    drawn, _ = untaught()
    shutil.move(tmp_path / "vae", tmp_path / "other")
    assert torch.equal(untaught(vae=str(tmp_path / "other"))[0], drawn)
    assert torch.equal(untaught(vae="other")[0], drawn)  # beside the checkpoint
    assert_refused(untaught()[0], f"there is no folder {str(tmp_path / 'vae')!r}")
    assert_refused(untaught(vae="")[0], "--vae FOLDER")
    for fields in (dict(vae_hash="x"), dict(latent_std=(1.0,))):
        with pytest.raises(UserError, match="latent_shape"):
            LatentConfig(**fields)


def test_which_vae_is_ready(tmp_path, monkeypatch):
    """The one that is named, else one of that name beside the checkpoint; it is looked at before the work."""
    opened, latents = [], dict(latent_shape=(2, 4, 4), latent_mean=(0.0,), latent_std=(1.0,), clamp=False)
    monkeypatch.setattr(LatentConfig, "find_vae", lambda config, device: opened.append(config.vae))
    monkeypatch.chdir(tmp_path)
    config, beside = LatentConfig(vae="vae", **latents), str(Path("run") / "vae")
    assert config.ready("run/model.pth", "cpu") is config  # there is none yet
    (tmp_path / "run" / "vae").mkdir(parents=True)
    assert config.ready("run/model.pth", "cpu").vae == beside
    (tmp_path / "vae").mkdir()
    assert config.ready("run/model.pth", "cpu").vae == "vae"
    assert opened == ["vae", beside, "vae"] and LatentConfig().ready("run/model.pth", "cpu") == LatentConfig()
    with pytest.raises(UserError, match=r"run/model\.pth draws images without a VAE: leave --vae out"):
        LatentConfig(vae="vae").ready("run/model.pth", "cpu")


def test_what_decides_how_latents_look(monkeypatch):
    """The settings to draw with, and of the VAE what decodes: fakes go on with the same ones alone."""
    vae = VAE(1, 1, 2, (8, 16), norm_num_groups=4)
    monkeypatch.setattr(LatentConfig, "find_vae", lambda *_: vae)
    config = LatentConfig(vae="vae", latent_shape=(2, 4, 4), latent_mean=(0.0,), latent_std=(1.0,), clamp=False)
    before = config.drawn_how("cpu")
    assert set(before) == set(LatentConfig.SAMPLING) and before["spacing"] == "trailing" and before["vae"] != "vae"
    assert LatentConfig().drawn_how("cpu")["vae"] == ""
    for name, kept in (("encoder", True), ("quant_conv", True), ("decoder", False), ("post_quant_conv", False)):
        torch.nn.init.normal_(next(vae.get_submodule(name).parameters()))
        after = config.drawn_how("cpu")
        assert (after == before) == kept, name
        before = after


def test_latents(call, untaught, tmp_path):
    """The folder that gets them, beside what else is there."""
    untaught()  # makes the VAE
    for name in ("a", "b"):
        code, _, err = call(latent.train_dit, *TINY, "--vae", tmp_path / "vae", "--latents", tmp_path / name, "--steps",
                            1, "--run-dir", tmp_path / f"run_{name}")
        assert code == 0, err
    kept = [[*(tmp_path / name).rglob("latents.npy")] for name in ("a", "b")]
    assert [len(files) for files in kept] == [1, 1] and kept[0][0].read_bytes() == kept[1][0].read_bytes()


def test_vae_hash(untaught):
    drawn, vae = untaught()
    assert torch.equal(untaught(vae_hash="")[0], drawn)
    assert_refused(untaught(vae_hash="0123456789abcdef")[0], "is another VAE", vae.fingerprint, "0123456789abcdef")


# What a resumed run may change


COMMANDS = {Config: train, LatentConfig: latent.train_dit, ClipConfig: video.train_dit}


def command_of(name):
    """The first class that has the setting, and the command that trains with it."""
    return next((of, command) for of, command in COMMANDS.items() if name in of.__dataclass_fields__)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """whole(of): a run folder whose settings are of that class."""
    settings = dict(dataset="mnist", data_dir=str(SMALL), image_size=8, patch_size=2, hidden_size=32, depth=1,
                    num_heads=2, sample_steps=3, batch_size=8, steps=3, optimizer="adamw", precision="fp32", channels=1)
    clips = dict(dataset="moving", image_size="2x24x24", patch_size="2x12x12")

    @functools.cache
    def whole(of):
        run = tmp_path_factory.mktemp("whole") / "run"
        COMMANDS[of].train(settings | (clips if of == ClipConfig else {}), run, device="cpu")
        return run

    return whole


@pytest.mark.parametrize("name", NOT_CHANGEABLE)
def test_a_resumed_run_refuses(name, call, whole):
    (of, command), value = command_of(name), NOT_CHANGEABLE[name]
    run = whole(of)
    before = (run / "model.pth").read_bytes()
    if "help" not in of.__dataclass_fields__[name].metadata:  # it has no flag
        with pytest.raises(UserError, match=f"cannot be resumed with other settings: {name} "):
            command.train({name: value}, run, resume=True, device="cpu")
    else:
        assert_refused(call(command, *to_flag(name, value), "--resume", "--run-dir", run, "--device", "cpu"),
                       f"cannot be resumed with other settings: {name} ")
    assert (run / "model.pth").read_bytes() == before


@pytest.mark.parametrize("name", CHANGEABLE)
def test_a_resumed_run_accepts(name, call, whole, tmp_path, monkeypatch):
    (of, command), value = command_of(name), CHANGEABLE[name]
    run = shutil.copytree(whole(of), tmp_path / "run")
    monkeypatch.setattr(train, "can_compile", lambda device: False)  # minutes, and test_compile has it
    more = ["--sampler", "ddim"] if name == "eta" else []  # the one that has a use for it
    code, _, err = call(command, "--steps", 4, *to_flag(name, value), *more, "--resume", "--run-dir", run, "--device",
                        "cpu")
    assert code == 0, err
    left = Left(run)
    assert left.content["step"] == 4 and left.config[name] == (value if name != "compile" else False)


# Seeds


def test_no_two_pairs_of_seed_and_step_share_what_they_draw():
    """Neither neighbours nor those that some way to mix the two numbers would take for one another."""
    images = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    data, words = (images, torch.zeros(256, dtype=torch.int64)), 2**32

    def drawn(seed, step):
        x_0, y, t, noise = draws(dict(seed=seed, batch_size=256, num_classes=10, label_dropout=0.5), step, data)
        return [part.flatten().double() for part in (x_0[:, 0, 0, 0], y, t, noise)]

    seeds = [0, 1, 6, 7, words, words + 1, words + 7, 2 * words, 2 * words + 7, 3 * words, 2**63 - 1]
    pairs = [(seed, step) for seed in seeds for step in range(4)]
    assert {(6, 2), (7, 1), (words + 7, 1), (2 * words + 7, 0), (7, 2)} <= {*pairs}
    parts = [torch.stack(part) for part in zip(*(drawn(*pair) for pair in pairs), strict=True)]
    for part in parts:  # 6 standard deviations: one of a thousand million such numbers is above
        assert torch.corrcoef(part).fill_diagonal_(0).abs().max() < 6 / part.shape[1] ** 0.5
    neighbours = parts[3].view(-1, 2)  # nor is one stream a later piece of another
    assert len(neighbours.unique(dim=0)) == len(neighbours)
