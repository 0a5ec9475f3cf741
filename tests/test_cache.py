from support.commands import UserError
from support.folders import Folder

import dataclasses
import errno
import io
import json
import os
import shutil
import types
import zipfile

import numpy as np
import pytest
import torch
from conftest import SMALL_DATA, TINY, assert_refused, same, small_mnist, train_until
from PIL import Image
from test_parallel import assert_alike, together

from dataset import Dataset, load_dataset, to_float
from latent import cache, draw, train_dit
from latent.cache import Latents, open_data
from latent.config import IMAGES, LatentConfig
from latent.vae import VAE, load_vae, save_vae
from record.checkpoint import load_checkpoint

SMALL = dict(latent_channels=2, block_out_channels=(4, 8), norm_num_groups=2, mid_block_add_attention=False)


def make_vae(channels=3, seed=0, std=(0.5, 2.0)):
    """A random VAE of factor 2, whose posterior is wide enough to be seen."""
    torch.manual_seed(seed)
    vae = VAE(channels, channels, **SMALL).eval().requires_grad_(False)
    vae.normalize_by((0.1, -0.2), std)
    return vae


def random_data(count=20, channels=3, **options):
    images = torch.randint(0, 256, (count, channels, 8, 4), dtype=torch.uint8)
    return Dataset("random", images, torch.arange(count) % 3, [*"abc"], **options)


@pytest.fixture
def blocks(monkeypatch):
    """Blocks of 8 images, so that a few images have several; the list of those that are encoded."""
    monkeypatch.setattr(cache, "BLOCK", 8)
    encoded, original = [], Dataset.read

    def read(data, rows):
        if rows.stop - rows.start == 8:
            encoded.append(rows.start // 8)
        return original(data, rows)

    monkeypatch.setattr(Dataset, "read", read)
    return encoded


def only_folder(path):
    folder, = path.iterdir()
    return folder


def test_samples_are_of_the_posterior_of_their_images(tmp_path):
    """Their mean and standard deviation over many draws, against `VAE.encode`; and each draw by its formula."""
    vae, data = make_vae(), random_data(3)
    latents = Latents(data, "here", vae, False, tmp_path).load()
    assert "2 x 4 x 2 of here, 6 times fewer numbers" in latents.summary
    mean, std = vae.encode(to_float(data.images))
    index = torch.arange(3).repeat(4000)
    x = latents.x_0(index, slice(None), torch.Generator().manual_seed(1)).view(4000, *mean.shape)
    assert latents.shape == (2, 4, 2) and std.min() > 0.05
    torch.testing.assert_close(x.mean(dim=0), mean, atol=0.08 * std.max().item(), rtol=0)
    torch.testing.assert_close(x.std(dim=0), std, atol=0.002, rtol=0.05)
    noise = torch.randn(2, 2, 4, 2, generator=torch.Generator().manual_seed(7))
    x = latents.x_0(torch.tensor([2, 0]), slice(1, 2), torch.Generator().manual_seed(7))
    torch.testing.assert_close(x[0], mean[0] + std[0] * noise[1], atol=4e-3, rtol=1e-3)  # float16 at rest


def test_half_are_mirrored_where_it_is_asked_for(tmp_path):
    vae, data = make_vae(), random_data(2)
    both = torch.stack([vae.encode(to_float(images))[0] for images in (data.images, data.images.flip(-1))])
    for flips in (False, True):
        latents = Latents(data, "here", vae, flips, tmp_path).load()
        latents.rows = latents.rows.clone()
        latents.rows[:, :, 1] = 0  # the mean alone
        x = latents.x_0(torch.zeros(1000, dtype=int), slice(None), torch.Generator().manual_seed(0))
        as_they_are, mirrored = ((x - variant).abs().amax(dim=(1, 2, 3)) < 0.01 for variant in both[:, 0])
        assert (as_they_are | mirrored).all()
        assert mirrored.sum() == pytest.approx(500, abs=60) if flips else not mirrored.any()


def test_pixels_are_mirrored_as_latents_are():
    data = random_data(2, flips=True)
    x = data.x_0(torch.zeros(1000, dtype=int), slice(None), torch.Generator().manual_seed(0))
    mirrored = (x == to_float(data.images[0]).flip(-1)).all(dim=(1, 2, 3))
    assert ((x == to_float(data.images[0])).all(dim=(1, 2, 3)) ^ mirrored).all()
    assert mirrored.sum() == pytest.approx(500, abs=60)
    part = data.x_0(torch.zeros(1000, dtype=int), slice(300, 500), torch.Generator().manual_seed(0))
    assert torch.equal(part, x[300:500])


def test_they_are_encoded_once(tmp_path, blocks):
    vae, data = make_vae(), random_data()
    first = Latents(data, "here", vae, False, tmp_path).load()
    assert blocks == [0, 1, 2]
    again = Latents(data, "there", vae, False, tmp_path).load()
    assert blocks == [0, 1, 2] and torch.equal(first.rows, again.rows) and first.fingerprint == again.fingerprint
    assert sorted(path.name for path in only_folder(tmp_path).iterdir()) == ["latents.json", "latents.npy"]
    assert again.settings == data.settings | dict(
        vae="there", vae_hash=vae.fingerprint, latent_shape=(2, 4, 2), latent_mean=pytest.approx((0.1, -0.2)),
        latent_std=(0.5, 2.0), clamp=False)
    # They are kept as the VAE has them: other statistics need no other file.
    other = Latents(data, "here", make_vae(std=(1.0, 1.0)), False, tmp_path).load()
    assert blocks == [0, 1, 2] and torch.equal(first.rows, other.rows) and other.settings["latent_std"] == (1.0, 1.0)


def test_of_other_images_or_another_vae_they_are_encoded_anew(tmp_path, blocks, capsys):
    vae, data = make_vae(), random_data()
    changed = data.images.clone()
    changed[9, 0, 0, 0] ^= 1
    kinds = [(data, vae, False), (data, make_vae(seed=1), False), (data, vae, True),
             (Dataset("random", changed, data.labels, data.classes), vae, False)]
    found = [Latents(images, "here", network, flips, tmp_path).load() for images, network, flips in kinds]
    assert len(blocks) == 12 and len(list(tmp_path.iterdir())) == 4
    assert capsys.readouterr().out.count("are made once and kept in") == 4
    assert len({latents.fingerprint for latents in found}) == 4


@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_was_killed_goes_on(tmp_path, blocks, monkeypatch, at):
    """No hole, no double: within a block, whose part is written already."""
    vae, data = make_vae(), random_data()
    whole = Latents(data, "here", vae, False, tmp_path / "whole").load()
    original, count = os.fsync, []

    def killed(number):
        count.append(number)
        if len(count) == at + 2:  # the first is that of the notes
            raise KeyboardInterrupt
        return original(number)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", killed)
        Latents(data, "here", vae, False, tmp_path / "parts").load()
    blocks.clear()
    parts = Latents(data, "here", vae, False, tmp_path / "parts").load()
    assert blocks == [0, 1, 2][at:]
    assert torch.equal(whole.rows, parts.rows) and whole.fingerprint == parts.fingerprint


KILLED = """
import os, signal, sys
from pathlib import Path
from dataset import Dataset, load_dataset
from latent import cache, draw, train_dit
from latent.vae import load_vae
original = Dataset.read
def read(data, rows):
    if rows.start >= 512:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(data, rows)
Dataset.read = read
data = load_dataset("mnist", os.environ["SMALL_MNIST"], image_size=8)
cache.Latents(data, "here", load_vae(sys.argv[1]), False, Path(sys.argv[2])).load()
"""


def test_kill_9(command, tmp_path, capsys):
    save_vae(make_vae(1), tmp_path / "vae")
    process = command("-c", KILLED, tmp_path / "vae", tmp_path / "latents")
    assert process.returncode == -9, process.stderr
    vae, data = load_vae(tmp_path / "vae"), small_mnist()
    latents = Latents(data, "here", vae, False, tmp_path / "latents").load()
    assert "2 of 6 blocks are in" in capsys.readouterr().out
    assert torch.equal(latents.rows, Latents(data, "here", vae, False, tmp_path / "other").load().rows)


def test_a_folder_is_read_block_by_block(tmp_path, monkeypatch):
    """A data set of any size; each image is encoded as `load_dataset` reads it."""
    for i in range(22):  # of 11 of a class one is held out
        (tmp_path / "data" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        array = np.random.default_rng(i).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "data" / "ab"[i % 2] / f"{i}.png")
    save_vae(make_vae(), tmp_path / "vae")
    monkeypatch.setattr(cache, "BLOCK", 8)
    config = LatentConfig(dataset="folder", data_dir=str(tmp_path / "data"), vae=str(tmp_path / "vae"),
                          latents=str(tmp_path / "latents"))
    data = load_dataset("folder", tmp_path / "data")
    monkeypatch.setattr(Folder, "read_all", None)
    most, original = [], Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, rows: most.append(rows.stop - rows.start) or original(self, rows))
    latents = open_data(config, torch.device("cpu")).load()
    assert max(most) == 8 and len(latents.rows) == 20 and torch.equal(latents.labels, data.labels)
    vae = load_vae(tmp_path / "vae")
    assert torch.equal(latents.rows[:, 0], vae.moments(to_float(data.images)).half())
    # Another file of the same name, size and place is another image
    file = tmp_path / "data" / "a" / "0.png"
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 10**9))
    assert open_data(config, torch.device("cpu")).load().fingerprint == latents.fingerprint
    assert len(list((tmp_path / "latents").iterdir())) == 2  # looked at again, and found to be the same


def test_there_and_back_is_measured(tmp_path, monkeypatch):
    """Of a VAE that returns what it got, or always grey."""
    data = random_data()
    mean_square = ((data.images.float() - 128).square().flatten(1).mean(1))
    for decode, expected in ((lambda z: z.repeat(1, 1, 2, 2), None), (
            lambda z: torch.zeros(len(z), 3, 8, 4), (10 * torch.log10(255**2 / mean_square)).mean().item())):
        vae = make_vae()
        monkeypatch.setattr(vae, "reconstruct", decode)
        if expected:
            latents = Latents(data, "here", vae, False, tmp_path).load()
            assert f"round trip {expected:.1f} dB" in latents.summary


# What cannot be


def test_a_damaged_cache(tmp_path):
    vae, data = make_vae(), random_data()
    Latents(data, "here", vae, False, tmp_path).load()
    folder = only_folder(tmp_path)
    note, file = folder / "latents.json", folder / "latents.npy"
    text, content = note.read_text(), file.read_bytes()

    def refused(words):
        with pytest.raises(UserError, match=words) as error:
            Latents(data, "here", vae, False, tmp_path).load()
        assert str(folder) in str(error.value) and "remove" in str(error.value)

    for damage in (content[:-1], content[:100], b"", content[:20] + b"x" * 60 + content[80:]):
        file.write_bytes(damage)
        refused("damaged or cut short")
    np.save(file, np.zeros((20, 1, 2, 2, 4, 2), np.float32))
    refused("float32")
    np.save(file, np.asfortranarray(np.load(io.BytesIO(content))))
    refused("damaged or cut short")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("latents.npy", content)
    refused("damaged or cut short")
    for garbage in (bytes(len(content)), os.urandom(len(content)), b"PK\x03\x04" + bytes(len(content) - 4),
                    content[:10] + b"(" * 118 + content[128:]):
        file.write_bytes(garbage)
        refused("damaged or cut short")
    file.unlink()
    os.mkfifo(file)
    refused("it is no file")
    file.unlink()
    # Whole, but of other numbers than were written: a round trip that was measured is not theirs
    first = len(content) - 20 * 32 * 2
    for numbers in (np.zeros(640, np.float16), np.full(640, np.nan, np.float16)):
        file.write_bytes(content[:first] + numbers.tobytes())
        refused("has changed since it was written")
    file.write_bytes(content[:-2] + b"\0\x3c")
    refused("has changed since it was written")
    file.write_bytes(content)
    note.unlink()
    os.mkfifo(note)
    refused("damaged")
    note.unlink()
    for damage in ("", "[]", "{}", text[:-5], text.replace('"psnr": ', '"psnr": []+'), "[" * 100_000):
        note.write_text(damage)
        refused("damaged")
    note.write_text(json.dumps(json.loads(text) | {"vae": "0123456789abcdef"}))
    refused("another VAE")
    note.write_text(text)
    Latents(data, "here", vae, False, tmp_path).load()


def test_an_unfinished_encoding_that_is_damaged(tmp_path, blocks, monkeypatch):
    """Before it goes on, the file is looked at; what was encoded is not written over."""
    vae, data = make_vae(), random_data()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "round_trip", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        Latents(data, "here", vae, False, tmp_path).load()
    file = only_folder(tmp_path) / "latents.npy"
    content = file.read_bytes()
    marks = bytearray((only_folder(tmp_path) / "encoded").read_bytes())
    marks[-cache.HASH:] = bytes(cache.HASH)  # the last block is not done
    (only_folder(tmp_path) / "encoded").write_bytes(marks)
    for damage in (bytes(len(content)), os.urandom(len(content)), bytes(128) + content[128:]):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=r"latents.npy is damaged.*remove .* to have it encoded anew"):
            Latents(data, "here", vae, False, tmp_path).load()
        assert file.read_bytes() == damage
    file.write_bytes(content)
    assert len(Latents(data, "here", vae, False, tmp_path).load().rows) == 20


@pytest.mark.parametrize("length", [0, 7, 16, 64])
def test_hashes_that_are_cut_short_are_of_no_block(tmp_path, blocks, monkeypatch, length):
    """Nobody knows then which of the three blocks are on disk: all are encoded anew."""
    vae, data = make_vae(), random_data()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache, "encode_blocks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        Latents(data, "here", vae, False, tmp_path / "a").load()
    (only_folder(tmp_path / "a") / "encoded").write_bytes(bytes([1] * length))
    rows, whole = (Latents(data, "here", vae, False, tmp_path / name).load().rows for name in "ab")
    assert torch.equal(rows, whole) and blocks.count(1) == 2


def test_a_large_cache_is_looked_at_in_part(tmp_path, monkeypatch):
    """Its first and its last image are among the images that are."""
    monkeypatch.setattr(cache, "CHECKED", 5 * 64)
    rows = torch.randn(20, 1, 2, 2, 4, 2).half()
    seen = []
    for i in range(20):
        changed = rows.clone()
        changed[i] = 0
        if cache.check_of(changed) != cache.check_of(rows):
            seen.append(i)
    assert len(seen) == 5 and seen[0] == 0 and seen[-1] == 19


def test_other_labels_go_on_with_no_run(call, flags, tmp_path, monkeypatch):
    """The latents would be the same, and the run another one."""
    data, run = small_mnist(), tmp_path / "run"
    fingerprints = []
    for labels in (data.labels, data.labels.roll(1)):
        changed = dataclasses.replace(data, labels=labels)
        monkeypatch.setattr(cache, "load_images", lambda *_, changed=changed, **__: changed)
        latents = LatentConfig(**SMALL_DATA, vae=str(flags[-3]), latents=str(flags[-1])).open_data("cpu").load()
        fingerprints.append(latents.fingerprint)
        result = call(train_dit, *flags, "--steps", 2 * len(fingerprints), "--run-dir", run,
                      *(["--resume"] if len(fingerprints) == 2 else []))
        assert len(fingerprints) == 2 or result[0] == 0
    assert fingerprints[0] != fingerprints[1]
    assert_refused(result, "other data")


def test_a_disk_that_is_full(tmp_path, monkeypatch):
    """It is known before the work, or the system says so, or it happens in the midst: what was there stays."""
    vae, data = make_vae(), random_data(300)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=1000))
        with pytest.raises(UserError, match=r"cannot hold 0.02 MB of latents.*--latents"):
            Latents(data, "here", vae, False, tmp_path).load()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if hasattr(os, "posix_fallocate"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(UserError, match="No space left on device; choose another"):
                Latents(data, "here", vae, False, tmp_path).load()
        assert [path.name for path in only_folder(tmp_path).iterdir()] == []
    with monkeypatch.context() as patch:
        original, calls = os.fsync, []
        patch.setattr(os, "fsync", lambda number: full() if len(calls) == 2 else calls.append(1) or original(number))
        with pytest.raises(UserError, match="No space left on device; what is encoded is kept"):
            Latents(data, "here", vae, False, tmp_path).load()
    assert len(Latents(data, "here", vae, False, tmp_path).load().rows) == 300


def test_latents_that_are_not_finite(tmp_path):
    for broken in (float("nan"), 1e9):
        vae = make_vae()
        vae.quant_conv.bias[:] = broken
        with pytest.raises(UserError, match="not finite"):
            Latents(random_data(), "here", vae, False, tmp_path).load()


def test_images_that_do_not_fit(call, tmp_path):
    save_vae(make_vae(3), tmp_path / "vae")
    flags = [*TINY, "--vae", tmp_path / "vae", "--run-dir", tmp_path / "run", "--latents", tmp_path / "latents"]
    assert_refused(call(train_dit, *flags, "--channels", 1), "reads images of 3 channels", "--channels 3")
    assert_refused(call(train_dit, *flags, "--image-size", "7x9"), "2 x 2 pixels", "7 x 9", "--image-size 8x8")
    assert_refused(call(train_dit, *flags, "--image-size", 12), "latent_shape 6", "--patch-size", "--image-size to 16")
    assert_refused(call(train_dit, *flags, "--image-size", "2x4"), "latent_shape 1x2", "--image-size to 8")
    (tmp_path / "empty").mkdir()
    assert_refused(call(train_dit, *flags, "--vae", tmp_path / "empty"), "holds no config.json")
    assert_refused(call(train_dit, *flags, "--flips"), "--flips", "mirror")
    assert not (tmp_path / "latents").exists()  # it is known before the work


# Training on them


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    save_vae(make_vae(1), folder / "vae")
    return [*TINY, "--vae", folder / "vae", "--latents", folder / "latents"]


def test_a_resumed_run_is_the_same_run(call, flags, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    code, out, _ = call(train_dit, *flags, "--steps", 7, "--run-dir", whole)
    assert code == 0 and "2 x 4 x 4 of" in out and "round trip" in out and "16 tokens" in out
    train_until(call, [*flags, "--steps", 7, "--run-dir", parts], 3, train_dit)
    # The VAE has moved, and its statistics have been measured anew
    vae = load_vae(flags[-3])
    vae.normalize_by((3.0,), (4.0,))
    save_vae(vae, tmp_path / "moved")
    resumed = [*flags, "--vae", tmp_path / "moved", "--steps", 7, "--run-dir", parts, "--resume"]
    assert call(train_dit, *resumed)[0] == 0
    a, b = load_checkpoint(whole / "model.pth", IMAGES), load_checkpoint(parts / "model.pth", IMAGES)
    for part in ("model", "ema", "optimizers", "window", "step", "data"):
        assert same(a[part], b[part]), part
    assert a["config"].vae == str(flags[-3]) and b["config"].vae == str(tmp_path / "moved")
    assert a["config"].latent_std == b["config"].latent_std == (0.5, 2.0)
    assert (whole / "samples_000007.png").read_bytes() == (parts / "samples_000007.png").read_bytes()


def test_a_run_goes_on_that_is_told_all_of_its_settings(flags, tmp_path):
    """As measure.scaling tells them: also those that the data have decided since."""
    config = LatentConfig(**SMALL_DATA, hidden_size=16, depth=1, num_heads=2, batch_size=8, sample_steps=2, steps=2,
                          vae=str(flags[-3]), latents=str(flags[-1]))
    assert train_dit.train(config, tmp_path, device="cpu", until=1) == (1, 0) and config.clamp
    assert train_dit.train(config, tmp_path, True, "cpu") == (2, 0)
    assert not load_checkpoint(tmp_path / "model.pth", IMAGES)["config"].clamp


def test_draws_without_a_flag(call, flags, tmp_path):
    run = tmp_path / "run"
    assert call(train_dit, *flags, "--steps", 2, "--run-dir", run)[0] == 0
    out = tmp_path / "out.png"
    code, _, err = call(draw, "--checkpoint", run, "--out", out, "--count", 1)
    assert code == 0, err
    with Image.open(out) as image:
        assert image.width > 10 * 8


def test_another_vae_goes_on_with_no_run(call, flags, tmp_path):
    run, pixels = tmp_path / "run", tmp_path / "pixels"
    assert call(train_dit, *flags, "--steps", 2, "--run-dir", run)[0] == 0
    save_vae(make_vae(1, seed=5), tmp_path / "other")
    again = [*flags, "--vae", tmp_path / "other", "--steps", 4, "--resume", "--run-dir"]
    assert_refused(call(train_dit, *again, run), "another VAE")
    assert call(train_dit, *TINY, "--steps", 2, "--run-dir", pixels)[0] == 0
    assert_refused(call(train_dit, *again, pixels), "cannot be resumed with other settings: vae")
    with pytest.raises(UserError, match="a VAE is a folder"):  # and so does none
        train_dit.train(dict(vae=""), run, resume=True)


def test_processes_share_the_encoding_and_the_steps(command, flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    steady = [*flags, "--batch-size", 9, "--lr-decay", "constant", "--precision", "fp32", "--steps", 4]
    process = command("latent.train_dit", *steady, "--run-dir", one, "--latents", tmp_path / "a")
    assert process.returncode == 0, process.stderr
    together(2, "latent.train_dit", *steady, "--run-dir", two, "--latents", tmp_path / "b")
    assert_alike(one, two)
    files = [only_folder(tmp_path / name) / "latents.npy" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_ground_of_the_images_is_that_of_the_settings(monkeypatch):
    asked = []
    monkeypatch.setattr(cache, "load_images", lambda *args, **options: asked.append(options) or random_data())
    open_data(LatentConfig(dataset="folder", data_dir="x", image_size=8, channels=3, ground="white"), "cpu")
    assert asked == [dict(image_size=(8, 8), channels=3, ground="white")]
