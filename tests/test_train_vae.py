"""The training of a VAE; on a small MNIST, 8 x 8."""

from support.commands import UserError
from support.pictures import psnr

import dataclasses
import math
import os
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import SMALL, assert_refused, flags_of, learn, small_mnist, train_until
from diffusers import AutoencoderKL
from PIL import Image

import train
from dataset import Dataset, load_dataset, to_float
from latent import train_vae as module
from latent.train_vae import HeldOut, VAEConfig, kl_divergence, reconstruction_loss
from latent.vae import CONFIG, WEIGHTS, load_vae, save_vae

SETTINGS = dict(dataset="mnist", data_dir=str(SMALL), image_size=(8, 8), channels=1, factor=4, widths=(16, 32),
                latent_channels=4, warmup=2, precision="fp32", lr=4e-3)
FLAGS = ["--dataset", "mnist", "--data-dir", SMALL, "--image-size", 8, "--widths", 16, 32, "--latent-channels", 4,
         "--warmup", 2, "--precision", "fp32", "--batch-size", 8, "--lr", 4e-3, "--steps", 6,
         "--log-every", 3, "--sample-every", 3, "--checkpoint-every", 3, "--device", "cpu"]
STATE, LOG, PICTURE = "model.pth", "log.csv", "samples_000006.png"
LEFT = sorted([CONFIG, WEIGHTS, LOG, "index.html", "loss.png"])  # and pictures


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Images that are tested on and measured, so that a test takes no longer than it must."""
    monkeypatch.setattr(module, "HELD_OUT", 16)
    monkeypatch.setattr(module, "MEASURED", 32)


def a_run(**settings):
    """A `Run` at its start, on the small MNIST."""
    data = small_mnist()
    run = train.start_run(VAEConfig(**SETTINGS | settings), torch.device("cpu"))
    run.data = HeldOut(data.name, data.images, data.labels, data.classes, tests=small_mnist(False).images)
    return run


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a VAE that has learned the digits for some seconds."""
    folder = tmp_path_factory.mktemp("vae") / "vae"
    settings = SETTINGS | dict(steps=90, batch_size=32, log_every=30, sample_every=45, kl=1e-3)
    assert module.train_vae(settings, folder, device="cpu") == (90, 0)
    return folder


def test_it_learns(learned):
    """Far better than the mean of all images, and better from row to row."""
    images, tests = (small_mnist(part).images for part in (True, False))
    mean = images.float().mean(0).round().byte().expand_as(tests)
    made = module.reconstructions(load_vae(learned), tests)
    assert psnr(made, tests) > psnr(mean, tests) + 2
    names, *rows = [row.split(",") for row in (learned / LOG).read_text().splitlines()]
    assert names == ["step", "loss", "lr"] and [row[0] for row in rows] == ["30", "60", "90"]
    assert float(rows[0][1]) > float(rows[1][1]) and float(rows[2][2]) == pytest.approx(4e-3 / 90, rel=1e-4)
    with Image.open(learned / "samples_000090.png") as picture:
        assert picture.mode == "L" and picture.width > picture.height
    pictures = ["samples_000045.png", "samples_000090.png"]
    assert sorted(path.name for path in learned.iterdir()) == sorted([*LEFT, *pictures])


def test_the_page_of_a_vae(learned):
    """It says what the pictures show, what the loss is, and what to do next."""
    page = (learned / "index.html").read_text()
    for words in ("A VAE learns mnist", "below each what its latents decode to", "samples_000090.png", "<dd>16x32</dd>",
                  f"python -m latent.train_vae --out {learned} --resume", 'src="loss.png"',
                  f"python -m latent.train_dit --vae {learned} --dataset mnist --data-dir {SMALL} --image-size 8"):
        assert words in page, words
    assert "noise at every step" not in page and "--run-dir" not in page


def test_its_latents_are_normalized(learned):
    """Of each channel, over the images that were measured; as a diffusion model draws them from the posterior."""
    vae = load_vae(learned)  # whose training had no such limits
    mean, std = vae.encode(to_float(small_mnist().images))
    assert mean.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0] * 4, abs=1e-4)
    assert (mean**2 + std**2).mean(dim=(0, 2, 3)).tolist() == pytest.approx([1] * 4, abs=1e-3)
    plain, spread = vae.posterior(to_float(small_mnist().images[:9]))
    assert torch.allclose(spread, torch.tensor(0.1), atol=2e-4) and 0.1 < plain.std() < 10


def test_a_vae_of_patches_is_one_of_diffusers_behind_a_rearrangement(learned):
    """Whoever has diffusers alone sees an autoencoder of the patches' pixels."""
    vae = load_vae(learned)
    theirs = AutoencoderKL.from_pretrained(learned)
    assert vae.patch_size == 2 and vae.factor == 4 and vae.image_channels == 1
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    patches = torch.nn.functional.pixel_unshuffle(x, 2)
    with torch.no_grad():
        expected = theirs.encode(patches).latent_dist
        mean, std = vae.posterior(x)
        torch.testing.assert_close(mean, expected.mean)
        torch.testing.assert_close(std, expected.std)
        made = torch.nn.functional.pixel_shuffle(theirs.decode(mean).sample, 2)
        torch.testing.assert_close(vae.reconstruct(mean), made)


def test_without_patches_diffusers_reads_it(call, tmp_path):
    code, *_ = call(module, *FLAGS, "--widths", 8, 8, 16, "--out", tmp_path / "vae")
    assert code == 0
    vae, theirs = load_vae(tmp_path / "vae"), AutoencoderKL.from_pretrained(tmp_path / "vae")
    assert vae.factor == 4 and "patch_size" not in (tmp_path / "vae" / CONFIG).read_text()
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x).latent_dist.mean, vae.posterior(x)[0])
        z = torch.randn(1, 4, 2, 2)
        torch.testing.assert_close(theirs.decode(z).sample, vae.reconstruct(z))


# The loss


def test_the_reconstruction_loss():
    """By its formula, on averages that are written out."""
    made, x = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8)
    expected = torch.zeros(2)
    for n, weight in ((1, 1), (2, 0.5), (4, 0.5)):
        averages = (made - x).view(2, 3, 8 // n, n, 8 // n, n).mean(dim=(3, 5))
        expected += weight * averages.abs().flatten(1).mean(1)
    torch.testing.assert_close(reconstruction_loss(made, x), expected)
    assert reconstruction_loss(x[:, :, :2, :2], x[:, :, :2, :2]).tolist() == [0, 0]  # too small for an average of 4 x 4


def test_the_kl_divergence_is_that_of_torch():
    mean, std = torch.randn(2, 4, 2, 2), torch.rand(2, 4, 2, 2) + 0.1
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(0.0, 1.0)).flatten(1).mean(1)
    torch.testing.assert_close(kl_divergence(mean, std), expected)


class Toy(torch.nn.Module):
    """In place of a VAE: latents are the averages of 4 x 4 pixels, and decoded as one grey each; `seen` holds them."""

    factor = 4

    def __init__(self):
        super().__init__()
        self.quant_conv = torch.nn.Conv2d(1, 1, 1)
        self.gain, self.spread = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.tensor(0.1))
        self.seen = []

    def posterior(self, x):
        mean = torch.nn.functional.avg_pool2d(x, 4) * self.gain
        return mean, self.spread.expand_as(mean)

    def reconstruct(self, z):
        self.seen.append(z)
        return z.repeat_interleave(4, 2).repeat_interleave(4, 3)


def losses_of(worker, x, noise, config, alone=False):
    return module.losses(types.SimpleNamespace(worker=worker, config=config), x, noise, alone)


def test_noise_and_kl_in_the_loss():
    x, noise = torch.rand(4, 1, 8, 8), torch.randn(4, 1, 2, 2)
    toy = Toy()
    plain = losses_of(toy, x, noise, VAEConfig(kl=0))
    torch.testing.assert_close(toy.seen[0], torch.nn.functional.avg_pool2d(x, 4) + 0.1 * noise)
    mean, std = toy.posterior(x)
    expected = plain + 0.3 * kl_divergence(mean, std)
    torch.testing.assert_close(losses_of(toy, x, noise, VAEConfig(kl=0.3)), expected)
    # The posterior's width learns only where it is not given, and nothing of the encoder while the decoder is alone.
    fixed, learnt = VAEConfig(noise=0.1), VAEConfig(noise=0)
    for config, alone, learns in ((fixed, False, (True, False)), (learnt, False, (True, True)),
                                  (learnt, True, (False, False))):
        toy = Toy()
        losses_of(toy, x.requires_grad_(alone), noise, config, alone).mean().requires_grad_().backward()
        assert tuple(weight.grad is not None and weight.grad.item() != 0 for weight in (toy.gain, toy.spread)) == learns


def test_the_posterior_keeps_its_width():
    """Which the format has no word for: the part of quant_conv that makes it is constant, and stays."""
    images = small_mnist().images
    run, learnt = (a_run(noise=noise, steps=4, batch_size=4) for noise in (0.3, 0.0))
    before = run.model.encoder.conv_in.weight.clone()
    for step in range(4):
        for each in (run, learnt):
            learn(each, each.data, step, module)
    for vae in (run.model, run.ema):
        assert torch.allclose(vae.posterior(to_float(images[:3]))[1], torch.tensor(0.3))
    assert not torch.equal(run.model.encoder.conv_in.weight, before)
    assert learnt.model.posterior(to_float(images[:3]))[1].std() > 0


def test_the_last_part_leaves_the_latents(monkeypatch):
    """From its first step on the encoder is the average that is kept."""
    monkeypatch.setattr(module, "DECODER_ALONE", 0.5)
    run = a_run(steps=8, batch_size=4)
    fingerprints, decoders = [], []
    for step in range(8):
        learn(run, run.data, step, module)
        fingerprints.append(run.ema.fingerprint)
        decoders.append(run.ema.hash_of("decoder"))
    assert len(set(fingerprints[:4])) == 4 and len(set(fingerprints[3:])) == 1 and len(set(decoders)) == 8
    assert run.model.fingerprint == run.ema.fingerprint


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_in_either_precision(precision):
    """bfloat16 computes gradients for float32 weights."""
    losses = []
    for kind in ("fp32", precision):
        run = a_run(precision=kind, steps=5, batch_size=16)
        each, t = learn(run, run.data, 0, module)
        losses.append(each.mean().item())
        assert each.shape == t.shape == (16,) and not t.any()
        assert {weight.dtype for weight in run.model.state_dict().values()} == {torch.float32}
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_kernels_of_the_blocks_are_muons():
    """All others are AdamW's, and none is left out."""
    run = a_run()
    adamw, muon = ({id(weight) for group in optimizer.param_groups for weight in group["params"]}
                   for optimizer in run.optimizers)
    for name, weight in run.model.named_parameters():
        assert (id(weight) in muon) == ("_block" in name and weight.ndim == 4) == (id(weight) not in adamw), name


def test_psnr():
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    others = images.clone()
    others[0], others[1] = 255, 51
    assert psnr(images, others) == pytest.approx((0 + 20 * math.log10(5)) / 2)
    assert psnr(images, images) == pytest.approx(58.92, abs=0.01)
    many = torch.arange(250).byte().view(250, 1, 1, 1)
    assert psnr(many, 255 - many) == pytest.approx(np.mean([20 * np.log10(255 / abs(255 - 2 * n)) for n in range(250)]))


def test_the_picture_and_the_figure_are_of_the_same_images(tmp_path, monkeypatch, capsys):
    """Each original stands above its own reconstruction; the PSNR in the log and at the end is that of all pairs."""
    tests = torch.randint(0, 256, (45, 1, 56, 40), dtype=torch.uint8)
    made = (tests.float() * torch.linspace(0.5, 0.95, 45).view(-1, 1, 1, 1)).byte()
    monkeypatch.setattr(module, "reconstructions", lambda vae, images: made if len(images) == 45 else images)
    run = a_run()
    run.data = dataclasses.replace(run.data, tests=tests)
    module.show(run, tmp_path / "a.png", lambda: False)
    error = (made.double() - tests.double()).square().flatten(1).mean(1)
    said = f"PSNR {(10 * torch.log10(255**2 / error)).mean().item():.2f} dB on 45 held-out images"
    assert f"a.png: {said}" in capsys.readouterr().out
    with Image.open(tmp_path / "a.png") as picture:
        shown = torch.from_numpy(np.array(picture))
    picked = module.some(torch.arange(45), 30).tolist()
    for i, number in enumerate(picked):
        top, left = 2 + 2 * (i // 10) * 58, 2 + i % 10 * 42
        assert torch.equal(shown[top:top + 56, left:left + 40], tests[number, 0])
        assert torch.equal(shown[top + 58:top + 114, left:left + 40], made[number, 0])
    module.finish(tmp_path / "vae", run)
    assert f"vae: {said}; its latents" in capsys.readouterr().out


def test_the_seed_decides_all_and_the_channels_are_those_asked_for(call, tmp_path):
    parts = []
    for seed in (3, 3, 4):
        run = a_run(seed=seed, batch_size=4)
        parts.append((run.model.state_dict()["encoder.conv_in.weight"], *module.make_batch(run.data, run.config, 5)))
    for a, b, c in zip(*parts, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    assert not torch.equal(parts[2][1], module.make_batch(run.data, run.config, 6)[0])
    code, _, err = call(module, *FLAGS, "--steps", 1, "--channels", 3, "--seed", 7, "--latent-channels", 5,
                        "--layers-per-block", 2, "--factor", 8, "--out", tmp_path / "vae")
    assert code == 0, err
    vae = load_vae(tmp_path / "vae")
    assert (vae.image_channels, vae.settings["latent_channels"], vae.factor) == (3, 5, 8)
    assert vae.settings["layers_per_block"] == 2 and vae.settings["block_out_channels"] == (16, 32)


def test_each_flag_reaches_the_training(call, tmp_path, monkeypatch):
    """The settings of the run, the images that it sees, and how often it logs, shows and saves."""
    (tmp_path / "mine" / "x").mkdir(parents=True)
    for i in range(24):
        picture = Image.new("RGBA", (20, 20), (9 * i, 200, 90, 255))
        picture.paste((0, 0, 0, 0), (0, 0, 20, 10))  # transparent
        picture.save(tmp_path / "mine" / "x" / f"{i}.png")
    asked = dict(dataset="folder", data_dir=str(tmp_path / "mine"), image_size=(16, 8), channels=3, ground="white",
                 factor=4, latent_channels=3, widths=(16, 32), layers_per_block=2, noise=0.2, kl=0.5,
                 steps=4, batch_size=5, lr=1e-3, warmup=3, precision="bf16", seed=7, log_every=2, sample_every=3,
                 checkpoint_every=1)
    assert flags_of(module) == {*asked, "out", "resume", "device"}
    started, saves, begin, save = [], [], train.start_run, train.save_checkpoint
    monkeypatch.setattr(train, "start_run", lambda *args: started.append(begin(*args)) or started[-1])
    monkeypatch.setattr(train, "save_checkpoint", lambda *args, **rest: saves.append(args[2]) or save(*args, **rest))
    show = {"image_size": ["16x8"], "widths": [16, 32]}
    words = [word for name, value in asked.items() for word in (
        f"--{name.replace('_', '-')}", *show.get(name, [value]))]
    code, out, err = call(module, *words, "--out", tmp_path / "vae", "--device", "cpu")
    assert code == 0, err
    run, = started
    assert {name: getattr(run.config, name) for name in asked} == asked
    assert run.data.images.shape == (22, 3, 16, 8)  # two of 24 are held out
    assert (run.data.images[:, :, :7] > 250).all() and (run.data.images[:, 1, 9:] == 200).all()
    assert run.config.latent_shape == (3, 4, 2) and saves == [1, 2, 3, 4]
    vae = load_vae(tmp_path / "vae")
    assert vae.settings["layers_per_block"] == 2 and vae.settings["block_out_channels"] == (16, 32)
    rows = (tmp_path / "vae" / LOG).read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["2", "4"]
    assert float(rows[0].split(",")[-1]) == pytest.approx(1e-3 * 2 / 4 * 3 / 4)  # it warms up, and decays
    pictures = sorted(path.name for path in (tmp_path / "vae").glob("samples*"))
    assert pictures == ["samples_000003.png", "samples_000004.png"] and "bf16, seed 7" in out


# Stopping and going on


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_resumed_run_is_the_same_run(call, tmp_path, monkeypatch, stop):
    """Stopped by Ctrl-C in its first part, at a save, and while the decoder learns alone: every byte of the folder."""
    monkeypatch.setattr(module, "DECODER_ALONE", 0.4)
    assert call(module, *FLAGS, "--out", tmp_path / "whole")[0] == 0
    out = train_until(call, [*FLAGS, "--out", tmp_path / "parts"], stop, module)
    assert f"stopped after step {stop}" in out and out.rstrip().endswith("--resume")
    there = [STATE, LOG, "index.html", *["loss.png"] * (stop >= 3), *["samples_000003.png"] * (stop > 3)]
    assert sorted(path.name for path in (tmp_path / "parts").iterdir()) == sorted(there)
    code, out, err = call(module, "--out", tmp_path / "parts", "--resume", "--device", "cpu")
    assert code == 0, err
    for name in (CONFIG, WEIGHTS, LOG, PICTURE):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "parts" / STATE).exists()


def test_a_run_can_be_finished_early(call, tmp_path, monkeypatch):
    train_until(call, [*FLAGS, "--out", tmp_path / "vae"], 2, module)
    code, out, _ = call(module, *FLAGS, "--out", tmp_path / "vae", "--resume", "--steps", 2)
    assert code == 0 and "PSNR" in out and load_vae(tmp_path / "vae").factor == 4


def test_killed_while_it_is_finished(call, tmp_path, monkeypatch):
    """What it had learned is not lost: --resume ends it."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "save_vae", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert call(module, *FLAGS, "--out", tmp_path / "vae")[0] == 130
    assert (tmp_path / "vae" / STATE).is_file() and not (tmp_path / "vae" / CONFIG).exists()
    assert call(module, "--out", tmp_path / "vae", "--resume")[0] == 0
    assert load_vae(tmp_path / "vae").factor == 4


def test_what_it_says(call, tmp_path):
    """The command that comes next can be typed as it is."""
    code, out, _ = call(module, *FLAGS, "--out", tmp_path / "my vae")
    assert code == 0
    assert "64 numbers of an image become 4 x 2 x 2 = 16" in out
    assert "pixel_unshuffle goes before its encoder, and pixel_shuffle behind its decoder, each by 2;" in out
    assert "samples_000003.png: PSNR" in out and "dB on 16 held-out images" in out
    vae = f"'{tmp_path / 'my vae'}'"
    assert out.splitlines()[-1].endswith(
        f"python -m latent.train_dit --vae {vae} --dataset mnist --data-dir {SMALL} --image-size 8")


@pytest.fixture
def pictures(tmp_path):
    """A folder of 45 colour images of 16 x 16, without a test part."""
    generator = np.random.default_rng(0)
    for label in "ab":
        (tmp_path / "pictures" / label).mkdir(parents=True)
    for i in range(45):
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(
            tmp_path / "pictures" / "ab"[i % 2] / f"{i}.png")
    return tmp_path / "pictures"


def test_a_folder_without_a_test_part(call, tmp_path, pictures, monkeypatch):
    """What is held out of training is tested on; of few images every 20th; one with a test part is tested on that."""
    flags = [*FLAGS, "--dataset", "folder", "--data-dir", pictures, "--image-size", 16]
    code, out, err = call(module, *flags, "--out", tmp_path / "vae")
    assert code == 0, err
    assert "41 images of 16 x 16 to train, 4 to test, colour" in out
    assert out.splitlines()[-1].endswith(f"--dataset folder --data-dir {pictures} --image-size 16")
    assert load_vae(tmp_path / "vae").image_channels == 3
    whole, config = load_dataset("folder", pictures), VAEConfig(dataset="folder", data_dir=str(pictures))
    data = config.open_data("cpu")
    assert torch.equal(data.tests, load_dataset("folder", pictures, train=False).images)
    assert torch.equal(data.images, whole.images) and not (data.images == data.tests[0]).flatten(1).all(1).any()
    few = Dataset("folder", whole.images[:9], torch.arange(9), [*"abcdefghi"])
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_images", lambda *_: few)
        data = config.open_data("cpu")
    assert torch.equal(data.tests, few.images[:1]) and torch.equal(data.images, few.images[1:])
    assert data.labels.tolist() == [*range(1, 9)]
    for part in ("train", "test"):
        (pictures / part).mkdir()
        (pictures / "a").rename(pictures / part / "a") if part == "train" else None
    (pictures / "test" / "a").mkdir()
    for path in sorted((pictures / "b").iterdir())[:4]:
        path.rename(pictures / "test" / "a" / path.name)
    shutil.rmtree(pictures / "b")  # a class beside train/ would make that one too
    code, out, err = call(module, *flags, "--out", tmp_path / "vae 2")
    assert code == 0, err
    assert "23 images of 16 x 16 to train, 4 to test" in out


def test_held_out_images_are_no_more_than_needed():
    images = torch.arange(5000).view(-1, 1, 1, 1)
    assert module.some(images, 1000).flatten()[[0, -1]].tolist() == [0, 4999] and len(module.some(images, 1000)) == 1000
    assert torch.equal(module.some(images[:7], 1000), images[:7])


# Failures


@pytest.mark.parametrize(("flags", "words"), [
    (["--factor", 3], ["--factor to one of [2, 4, 8]"]), (["--factor", 16], ["images of 8"]),
    (["--widths", 8, 8, 8, 8, 8], ["with 5 widths"]), (["--widths", 0], ["widths are (0,)"]),
    (["--image-size", 10], ["--factor to one of [2, 10]", "--image-size to 8"]),
    (["--noise", "nan"], ["noise is nan"]),
    (["--steps", 0], ["steps is 0"]),
    (["--resume"], ["there is no checkpoint", "latent.train_vae makes one"]), (["--batch-size", "x"], ["--batch-size"]),
    (["--lr", 1e4], ["lr is 10000"]), (["--device", "nowhere"], ["--device nowhere"])])
def test_flags_that_cannot_be(call, tmp_path, flags, words):
    assert_refused(call(module, *FLAGS, "--out", tmp_path / "vae", *flags), *words)
    assert not (tmp_path / "vae").exists() or not any((tmp_path / "vae").iterdir())


def test_the_command_refuses_in_one_line(command, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / CONFIG).write_text("mine")
    assert_refused(command("latent.train_vae", *FLAGS, "--out", tmp_path / "vae"), "holds a config.json already")
    assert [path.name for path in (tmp_path / "vae").iterdir()] == [CONFIG]


def test_a_finished_vae_stays(call, tmp_path, learned):
    before = {path.name: path.read_bytes() for path in learned.iterdir()}
    assert_refused(call(module, *FLAGS, "--out", learned), "holds a config.json already")
    assert_refused(call(module, *FLAGS, "--out", learned, "--resume"), f"the VAE in {learned} is finished")
    assert {path.name: path.read_bytes() for path in learned.iterdir()} == before


DAMAGES = {
    "cut": lambda path: os.truncate(path, 9000),
    "empty": lambda path: path.write_bytes(b""),
    "other": lambda path: torch.save({"format": "dit-checkpoint-2"}, path),
    "step": lambda path: change(path, step=-1),
    "settings": lambda path: change(path, config={"widths": (3,)}),
    "unknown": lambda path: change(path, config={"colour": 1}),
    "weights": lambda path: change(path, ema={}),
    "nan": lambda path: change(path, window=torch.tensor([[math.nan, 1]])),
    "levels": lambda path: change(path, window=torch.zeros(4, 2)),
    "optimizers": lambda path: change(path, optimizers=[{0: {"step": torch.tensor(1.0)}}, {}]),
    "momentum": lambda path: change(path, optimizers=[{}, {0: {"momentum": torch.zeros(3, 3)}}]),
    "no optimizers": lambda path: change(path, optimizers=None),
}


def change(path, **changes):
    torch.save(torch.load(path) | changes, path)


@pytest.fixture
def stopped(call, tmp_path, monkeypatch):
    """The folder of a run that was stopped after two steps."""
    train_until(call, [*FLAGS, "--out", tmp_path / "vae"], 2, module)
    return tmp_path / "vae"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_state_that_is_damaged(call, stopped, damage):
    DAMAGES[damage](stopped / STATE)
    before = (stopped / STATE).read_bytes()
    assert_refused(call(module, "--out", stopped, "--resume"), STATE)
    assert (stopped / STATE).read_bytes() == before


@pytest.mark.parametrize(("flags", "words"), [
    (["--resume", "--lr", 1], ["lr 0.004 -> 1.0"]), (["--resume", "--channels", 3], ["channels 1 -> 3"]),
    (["--resume", "--widths", 16], ["widths (16, 32) -> [16]"]), (["--resume", "--steps", 1], ["2 steps already"]),
    ([], ["model.pth exists", "--resume"])])
def test_a_run_that_cannot_go_on_so(call, stopped, flags, words):
    before = (stopped / STATE).read_bytes()
    assert_refused(call(module, "--out", stopped, *flags), *words)
    assert (stopped / STATE).read_bytes() == before


def test_other_data_than_it_was_trained_on(call, tmp_path, pictures, monkeypatch):
    flags = [*FLAGS, "--dataset", "folder", "--data-dir", pictures, "--image-size", 0, "--out", tmp_path / "vae"]
    train_until(call, [*flags], 2, module)
    Image.new("RGB", (16, 16)).save(pictures / "a" / "0.png")
    assert_refused(call(module, "--out", tmp_path / "vae", "--resume"), "was trained on other data")


def test_a_loss_that_is_not_finite(call, tmp_path, monkeypatch):
    """The last good state stays, and can be gone on with."""
    original = module.losses
    calls = []

    def broken(*args):
        calls.append(None)
        return original(*args) * (math.nan if len(calls) == 5 else 1)

    with monkeypatch.context() as patch:
        patch.setattr(module, "losses", broken)
        assert_refused(call(module, *FLAGS, "--out", tmp_path / "vae"), "not finite at step 6", "step 3")
    assert torch.load(tmp_path / "vae" / STATE)["step"] == 3
    assert call(module, "--out", tmp_path / "vae", "--resume")[0] == 0


def test_a_disk_that_is_full(call, tmp_path, monkeypatch):
    """When the VAE cannot be written, its training is not lost."""
    def full(*_):
        raise UserError("config.json cannot be written: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "save_vae", full)
        assert_refused(call(module, *FLAGS, "--out", tmp_path / "vae"), "No space left")
    assert torch.load(tmp_path / "vae" / STATE)["step"] == 6
    assert call(module, "--out", tmp_path / "vae", "--resume")[0] == 0


def test_a_folder_of_patches_that_do_not_fit(learned, tmp_path):
    vae = VAEConfig(**SETTINGS).build_model()
    vae.settings["patch_size"] = 3
    save_vae(vae, tmp_path / "vae")
    with pytest.raises(UserError, match="are not those of patches of 3 x 3 pixels"):
        load_vae(tmp_path / "vae")


def test_images_without_a_difference(call, tmp_path, monkeypatch):
    """Latents that are all the same cannot be normalized."""
    vae = VAEConfig(**SETTINGS).build_model()
    monkeypatch.setattr(vae, "encode", lambda x: (torch.ones(len(x), 4, 2, 2), torch.zeros(len(x), 4, 2, 2)))
    with pytest.raises(UserError, match="all the same"):
        module.measure_latents(vae, torch.zeros(4, 1, 8, 8, dtype=torch.uint8))


def test_two_at_once(call, stopped):
    from support.files import lock_dir

    with lock_dir(stopped):
        assert_refused(call(module, "--out", stopped, "--resume"), "in use by another process")
