from support import sizes
from support.commands import UserError

import dataclasses
import math

import pytest
import torch
from conftest import SMALL, TINY, assert_refused, learn, same, train_until
from PIL import Image

import train
from config import Config
from dataset import load_dataset
from record.checkpoint import load_checkpoint
from video import train_dit
from video.config import ClipConfig
from video.given import given_frames
from video.moving import MARGIN, SPEEDS, bounce, centres, load_moving, place

MOVING = [*TINY[2:], "--dataset", "moving", "--image-size", "4x24x24", "--patch-size", "2x12x12"]


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def moving(**settings):
    return load_moving(ClipConfig(data_dir=str(SMALL), **settings))


def draw(data, count, seed=0, part=slice(None), what="x_0"):
    """Some clips, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(len(data.labels), (count,), generator=generator)
    return getattr(data, what)(index, part, generator), data.labels[index]


def test_a_digit_is_where_its_centre_of_mass_should_be():
    image = torch.zeros(1, 28, 28)
    image[0, 9:19, 10:17] = torch.rand(10, 7)
    at = torch.tensor([[[13.25, 15.5], [12.0, 19.75], [16.9, 13.1]]])
    frames = place(image, at, (32, 36))
    assert frames.shape == (1, 3, 32, 36)
    torch.testing.assert_close(centres(frames[0]), at[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(frames.sum((2, 3)), image.sum().expand(1, 3))  # no ink is lost
    corner = torch.tensor([[[3.0, 5.0]]])  # whole pixels: the image itself
    torch.testing.assert_close(place(image, centres(image)[:, None] + corner, (32, 36))[0, 0, 3:31, 5:33], image[0],
                               atol=1e-5, rtol=0)
    cut = place(image, torch.tensor([[[-1.0, 40.0]]]), (32, 36))
    assert cut.sum() < image.sum() / 2


def test_bounces():
    assert bounce(torch.tensor([0.0, 3, 5, 7, 10, 12, 19]), 5).tolist() == [0, 3, 5, 3, 0, 2, 1]


@pytest.mark.parametrize("pace", SPEEDS)
def test_paths_are_straight_and_bounce(pace):
    data = moving(speeds=True, image_size=(16, 32, 40))
    assert data.classes == [f"{digit} {name}" for digit in range(10) for name in SPEEDS]
    paths, labels = draw(data, 500, what="paths")
    paths = paths[:, 0][labels % len(SPEEDS) == [*SPEEDS].index(pace)]                # (n, T, 2)
    low, high = (share * 32 for share in SPEEDS[pace])
    assert paths.shape[1:] == (16, 2)
    for axis, side in enumerate((32, 40)):
        assert paths[..., axis].min() >= MARGIN and paths[..., axis].max() <= side - 1 - MARGIN
        assert paths[..., axis].min() < MARGIN + 0.5 and paths[..., axis].max() > side - 1.5 - MARGIN
    steps = paths.diff(dim=1).abs()
    speed = steps.amax(1).norm(dim=1)  # of the steps in which it meets no wall
    assert low - 1e-3 < speed.min() and speed.max() < high + 1e-3 and speed.max() - speed.min() > (high - low) * 0.8
    free = (steps.amax(1, keepdim=True) - steps < 1e-3).float().mean()
    assert 0.75 < free < 1  # in the others a wall turns the velocity, and no more


def test_clips_are_a_function_of_the_generator():
    data = moving()
    clips, _ = draw(data, 12)
    assert clips.shape == (12, 1, 16, 32, 32) and clips.min() == -1 and 0.5 < clips.max() <= 1
    assert torch.equal(draw(data, 12)[0], clips) and not torch.equal(draw(data, 12, seed=1)[0], clips)
    for part in (slice(0, 5), slice(5, 12)):  # as processes share a batch
        torch.testing.assert_close(draw(data, 12, part=part)[0], clips[part], atol=1e-6, rtol=0)
    paths, _ = draw(data, 12, what="paths")
    frames, numbers = clips[:, 0] + 1, torch.arange(32.0)
    ink = frames.sum((2, 3))
    seen = torch.stack([frames.sum(3) @ numbers, frames.sum(2) @ numbers], dim=2) / ink[..., None]
    whole = ink > 0.999 * ink.amax(1, keepdim=True)  # no wall cuts off any of it
    assert whole.float().mean() > 0.5
    torch.testing.assert_close(seen[whole], paths[:, 0][whole], atol=0.05, rtol=0)
    assert torch.equal(data.labels, load_dataset("mnist", SMALL).labels) and data.classes == [*"0123456789"]


def test_every_axis_and_sign_of_direction():
    paths, _ = draw(moving(), 400, what="paths")
    first = paths[:, 0].diff(dim=1)[:, 0]
    quarters = (first[:, 0] > 0).long() * 2 + (first[:, 1] > 0)
    assert quarters.bincount(minlength=4).min() > 60


def test_two_digits():
    data = moving(digits=2)
    assert len(data.classes) == 65 and data.classes[10:13] == ["0+0", "0+1", "0+2"] and data.classes[-1] == "9+9"
    digits = torch.cat([load_dataset("mnist", SMALL).labels, torch.tensor([10])])  # 10: none
    for shown, label in zip(digits[data.shown].tolist(), data.labels.tolist(), strict=True):
        assert data.classes[label] == "+".join(str(digit) for digit in sorted(shown) if digit < 10)
    assert (data.shown[:, 1] == len(data.images) - 1).float().mean() == 0.5
    (clips, labels), (paths, _) = draw(data, 20), draw(data, 20, what="paths")
    assert paths.shape == (20, 2, 16, 2)
    ink = (clips + 1).sum((1, 3, 4)).mean(1)
    assert ink[labels >= 10].mean() > 1.3 * ink[labels < 10].mean()
    apart = [dataclasses.replace(data, shown=data.shown.clone()) for _ in range(2)]
    for k, one in enumerate(apart):  # with one of the two only
        one.shown[:, 1 - k] = len(data.images) - 1
    alone = [draw(one, 20)[0] for one in apart]
    torch.testing.assert_close(clips, torch.maximum(*alone))  # where they meet, the brighter one is seen
    assert (alone[0] + alone[1] + 2).max() > 3  # and they do meet


def test_two_digits_with_speeds():
    """A label names the digits and the pace of the clips that have it; without speeds they move at any."""
    data, plain = moving(digits=2, speeds=True), moving(digits=2)
    assert len(data.classes) == 130 and data.classes[20:23] == ["0+0 slow", "0+0 fast", "0+1 slow"]
    digits = torch.cat([load_dataset("mnist", SMALL).labels, torch.tensor([10])])  # 10: none
    for shown, (low, high), label in zip(digits[data.shown].tolist(), data.paces.tolist(), data.labels.tolist(),
                                         strict=True):
        names, pace = data.classes[label].split()
        assert names == "+".join(str(digit) for digit in sorted(shown) if digit < 10)
        assert (low, high) == pytest.approx(SPEEDS[pace])
    assert len(data.labels) == 2 * len(plain.labels) and data.labels.bincount(minlength=130)[::2].sum() == len(
        plain.labels)
    assert (plain.paces == torch.tensor([SPEEDS["slow"][0], SPEEDS["fast"][1]])).all()


def test_the_parts_have_other_digits():
    train_part, test = (load_moving(ClipConfig(data_dir=str(SMALL)), part) for part in (True, False))
    assert len(train_part.labels) == 1500 and len(test.labels) == 297
    seen = {image.numpy().tobytes() for image in train_part.images[:-1]}
    assert not any(image.numpy().tobytes() in seen for image in test.images[:-1])


def test_other_clips_have_another_fingerprint():
    data = moving()
    assert data.fingerprint == moving().fingerprint
    others = [moving(digits=2), moving(speeds=True), moving(image_size=(8, 32, 32)),
              load_moving(ClipConfig(data_dir=str(SMALL)), False)]
    others += [dataclasses.replace(data, **{name: value}) for name, value in (
        ("paces", data.paces * 2), ("labels", data.labels.flip(0)), ("shown", data.shown.flip(0)),
        ("images", data.images.flip(1)), ("classes", data.classes[::-1]))]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 10


@pytest.mark.parametrize("size", [(16, 20, 32), (16, 32, 16)])
def test_sizes_without_room(size):
    with pytest.raises(UserError, match="no side may be below 22 pixels"):
        moving(image_size=size)


def test_several_sizes_are_not_compiled(monkeypatch):
    seen = []
    monkeypatch.setattr(train_dit.root, "train", lambda config, *_, **__: seen.append(config.get("compile")))
    for settings in ({"steps": 10_000}, {"steps": 10_000, "sizes": "1x32x32"}, {"sizes": "1x32x32", "compile": True}):
        train_dit.train(settings)
    assert seen == [None, False, True]


@pytest.mark.parametrize("settings", [dict(image_size=(8, 24, 32)), dict(image_size=(4, 24, 24),
                                                                         sizes=((8, 24, 32),))])
def test_clips_that_do_not_fit(monkeypatch, settings):
    """A batch of floats takes 4 bytes a pixel, and half of the memory is for the rest."""
    needed = 64 * 4 * 8 * 24 * 32
    monkeypatch.setattr(sizes, "available_memory", lambda: 2 * needed)
    moving(batch_size=64, **settings)
    monkeypatch.setattr(sizes, "available_memory", lambda: 2 * needed - 1)
    with pytest.raises(UserError, match=r"512 images of 24 x 32 pixels .* lower --image-size, --sizes or --batch-size"):
        moving(batch_size=64, **settings)


def test_images_have_no_frames():
    with pytest.raises(UserError, match=r"image_size is .*but must be height and width"):
        Config(image_size="2x8x8")
    with pytest.raises(UserError, match="dataset is 'moving'"):
        Config(dataset="moving")
    with pytest.raises(UserError, match=r"image_size is .*but must be frames, height and width"):
        ClipConfig(image_size=8)


def learned(monkeypatch, steps, shards=(slice(None),), **settings):
    """The batches of these steps of a run on clips that learns nothing, and their losses, by each of its shards."""
    config = ClipConfig(data_dir=str(SMALL), batch_size=6, num_classes=10, channels=1, hidden_size=8, depth=1,
                        num_heads=1, precision="fp32", **settings)
    data, run = load_moving(config), train.start_run(config, torch.device("cpu"))
    seen, losses, make_batch = [], [], train.make_batch
    torch.nn.init.normal_(run.model.final_layer.linear.weight)
    monkeypatch.setattr(train, "make_batch", lambda *args: (seen.append(make_batch(*args)), seen[-1])[1])
    monkeypatch.setattr(train, "descend", lambda run, losses, *batch: losses(run, *batch).detach())
    for step in steps:
        for part in shards:
            monkeypatch.setattr(train_dit.parallel, "share", lambda count, part=part: part)
            losses.append(learn(run, data, step, train_dit)[0])
    monkeypatch.undo()
    return seen, losses


def test_each_batch_has_one_of_the_sizes(monkeypatch):
    seen, _ = learned(monkeypatch, range(30), sizes="1x32x32,4x32x64", image_size=(4, 32, 32), patch_size=(1, 16, 16))
    sizes = [x_0.shape for x_0, *_ in seen]
    assert all(noise.shape == x_0.shape for x_0, _, _, noise in seen)
    assert {*sizes} == {(6, 1, 4, 32, 32), (6, 1, 1, 32, 32), (6, 1, 4, 32, 64)}
    assert min(map(sizes.count, sizes)) > 3


def test_a_resumed_run_is_the_same_run(call, tmp_path):
    """To the last bit, on clips of several sizes; the grid of samples moves."""
    flags = [*MOVING, "--sizes", "1x24x24,4x24x36", "--steps", 8]
    code, out, _ = call(train_dit, *flags, "--run-dir", tmp_path / "whole")
    assert code == 0 and "moving: 4 frames of 24 x 24, of 1,500 digits" in out
    train_until(call, [*flags, "--run-dir", tmp_path / "parts"], 5, train_dit)
    code, _, err = call(train_dit, *flags, "--run-dir", tmp_path / "parts", "--resume")
    assert code == 0, err
    whole, parts = (load_checkpoint(tmp_path / name / "model.pth", (ClipConfig,)) for name in ("whole", "parts"))
    config = whole["config"]
    assert (config.image_size, config.sizes, config.largest) == ((4, 24, 24), ((1, 24, 24), (4, 24, 36)), (4, 24, 36))
    for name in ("step", "data", "ema", "model", "optimizers", "window"):
        assert same(whole[name], parts[name]), name
    with Image.open(tmp_path / "whole" / "samples_000008.png") as image:
        assert image.n_frames > 1 and image.info["duration"] == 100  # milliseconds of a frame
    assert_refused(call(train_dit, *flags, "--digits", 2, "--run-dir", tmp_path / "parts", "--resume"), "digits 1 -> 2")


@pytest.mark.parametrize(("flags", "words"), [
    (["--image-size", 32, "--patch-size", 0], ["image_size is (32, 32)", "frames, height and width"]),
    (["--flips"], ["--flips"]),
    (["--vae", "x"], ["leave out --vae"]), (["--channels", 3], ["--channels"]), (["--digits", 3], ["digits is 3"]),
    (["--patch-size", "3x8x8"], ["patch_size 3x8x8 does not divide", "[1, 2, 4] x"]),
    (["--sizes", "4x24"], ["sizes is (4, 24)"]), (["--sizes", "4x20x24"], ["clips of 4x20x24", "22 pixels"]),
    (["--sizes", "4x24x30"], ["patch_size 2x12x12 does not divide 4x24x30"]),
    (["--preset", "moving", "--patch-size", 0, "--sizes", "1x32x32", "--image-size", "6x32x32"], ["cannot be cut"])])
def test_bad_flags(call, tmp_path, flags, words):
    assert_refused(call(train_dit, *MOVING, "--steps", 1, "--run-dir", tmp_path / "run", *flags), *words)
    assert not (tmp_path / "run" / "model.pth").exists()


def test_direction_is_uniform():
    paths, _ = draw(moving(image_size=(2, 64, 64)), 2000, what="paths")
    step = paths[:, 0, 1] - paths[:, 0, 0]
    angle = torch.atan2(step[:, 0].abs(), step[:, 1].abs()) * 2 / math.pi
    assert torch.histc(angle, 5, 0, 1).min() > 300


def test_which_frames_are_given():
    """Of each kind as many: the first, the last, both ends, any; never all of them."""
    known = given_frames(8000, 8, 0.5, torch.Generator().manual_seed(0))
    assert known.shape == (8000, 1, 8, 1, 1)
    known = known.view(8000, 8)
    count = known.sum(1)
    assert 0.47 < (count > 0).float().mean() < 0.53 and count.max() == 7
    known, count = known[count > 0], count[count > 0]
    assert count.bincount(minlength=8)[1:].min() > len(known) / 7 * 0.85
    runs = known.int().diff(dim=1).abs().sum(1)
    first, last = (runs == 1) & known[:, 0], (runs == 1) & known[:, -1]
    both = (runs == 2) & known[:, 0] & known[:, -1]
    for share in (first, last, both):  # with those of the other kinds that look like it
        assert 0.22 < share.float().mean() < 0.4
    assert (runs > 2).float().mean() > 0.1
    assert not given_frames(100, 1, 1.0, torch.Generator().manual_seed(0)).any()  # of a still, none
    assert not given_frames(100, 8, 0.0, torch.Generator().manual_seed(0)).any()


def test_given_frames_are_trained_on(call, tmp_path):
    flags = [*MOVING, "--given", 0.5, "--sizes", "1x24x24", "--steps", 6]
    assert call(train_dit, *flags, "--run-dir", tmp_path / "whole")[0] == 0
    train_until(call, [*flags, "--run-dir", tmp_path / "parts"], 2, train_dit)
    assert call(train_dit, *flags, "--run-dir", tmp_path / "parts", "--resume")[0] == 0
    whole, parts = (load_checkpoint(tmp_path / name / "model.pth", (ClipConfig,)) for name in ("whole", "parts"))
    assert whole["config"].given == 0.5
    assert all(same(whole[name], parts[name]) for name in ("ema", "model", "optimizers", "window"))


def test_processes_share_given_frames_and_sizes(monkeypatch):
    """What each learns from is its part of the batch, which is another one without frames given."""
    settings = dict(image_size=(4, 24, 24), patch_size=(1, 12, 12), sizes="2x24x24")
    seen, losses = learned(monkeypatch, range(4), (slice(None), slice(0, 2), slice(2, 6)), given=0.5, **settings)
    _, plain = learned(monkeypatch, range(4), **settings)
    for k, other in zip(range(0, 12, 3), plain, strict=True):
        for whole, *halves in (*zip(*seen[k:k + 3], strict=True), losses[k:k + 3]):
            torch.testing.assert_close(torch.cat(halves), whole, atol=1e-5, rtol=0)
        assert 0 < (losses[k] != other).sum() < 6  # where some are given
    assert {x_0.shape[2] for x_0, *_ in seen} == {2, 4}
