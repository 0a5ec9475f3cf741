from support.pictures import grid

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMALL, assert_refused
from PIL import Image

import inference
from config import Config
from dataset import to_float, to_uint8
from diffusion import from_noise
from measure.classifier import load_classifier
from record.checkpoint import load_model, save_checkpoint
from video import score
from video.config import ClipConfig
from video.given import complete
from video.moving import SPEEDS, bounce, load_moving
from video.score import FIGURES, Judge, crop, fit_bounces, fit_paths, follow, make_real, track, wasserstein


@pytest.fixture(scope="module")
def parts():
    return [load_moving(ClipConfig(data_dir=str(SMALL)), part) for part in (True, False)]


@pytest.fixture(scope="module")
def judge(parts):
    return Judge(*parts, load_classifier(), count=400)


@pytest.fixture(scope="module")
def real(parts):
    return make_real(parts[1], 150, 1)


@pytest.fixture(scope="module")
def figures(judge, real):
    return judge.score(*real)


def test_a_faint_background_moves_no_centre():
    clips = torch.full((1, 1, 2, 32, 32), 25, dtype=torch.uint8)
    clips[0, 0, 0, 5, 6], clips[0, 0, 1, 20, 30] = 200, 26
    assert track(clips).tolist() == [[[5, 6], [20, 30]]]


def test_what_is_cut_out_is_around_the_nearest_pixel():
    clips = torch.zeros(1, 1, 1, 32, 32, dtype=torch.uint8)
    clips[0, 0, 0, 11, 9] = 200
    for middle in ([10.6, 9.4], [11.4, 8.6]):
        assert crop(clips, torch.tensor([[middle]]))[0, 0].nonzero().tolist() == [[14, 14]]


def test_real_clips(figures):
    assert figures.keys() == FIGURES.keys()
    assert figures["frames"] > 0.9 and figures["clips"] > 0.85 and figures["constant"] > 0.9
    assert figures["jolt"] < 0.15 and figures["residual"] < 0.06 and figures["residual_90"] < 0.2
    assert figures["speed"] < 0.1 and figures["direction"] < 6
    assert figures["vanished"] == figures["appeared"] == 0 and figures["copies"] < 0.12


def test_paces(parts):
    """Of clips labelled slow and fast; asked for the other way round, none is."""
    data = load_moving(ClipConfig(data_dir=str(SMALL), speeds=True), False)
    judge = Judge(parts[0], data, load_classifier(), count=200)
    assert "pace" in judge.figures
    clips, labels = make_real(data, 60, 0)
    found = judge.score(clips, labels)
    assert found["pace"] > 0.9 and found["frames"] > 0.85
    assert judge.score(clips, labels ^ 1)["pace"] < 0.1


def test_the_weights_that_come_along(judge):
    """On a few clips, what README says of many."""
    model, config = load_model(REPOSITORY / "weights" / "moving.pth", kinds=(ClipConfig,))
    labels = torch.arange(16) % 10
    found = judge.score(score.draw(model, config, labels), labels)
    assert found["frames"] > 0.93 and found["constant"] > 0.6
    assert found["jolt"] < 0.8 and found["residual"] < 1.5


# The controls: what is wrong with each must be caught, and in a clip that runs backwards nothing is wrong.


def test_shuffled_frames_are_caught(judge, real, figures):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    found = judge.score(real[0][:, :, order], real[1])
    assert found["jolt"] > 20 * figures["jolt"] and found["residual"] > 20 * figures["residual"]
    assert found["constant"] == figures["constant"]


def test_frozen_clips_are_caught(judge, real, figures):
    found = judge.score(real[0][:, :, :1].expand_as(real[0]), real[1])
    assert found["speed"] > 1.2 and found["speed"] > 20 * figures["speed"]  # all of the mean speed
    assert found["jolt"] == 0 and found["residual"] < 0.01 and found["constant"] == 1  # which alone would praise it


def test_digits_swapped_midway_are_caught(judge, real, figures):
    clips, labels = real
    found = judge.score(torch.cat([clips[:, :, :8], clips.roll(1, 0)[:, :, 8:]], dim=2), labels)
    assert found["constant"] < 0.3 and found["clips"] < 0.3 and 0.4 < found["frames"] < 0.7


def test_jitter_is_caught(judge, real, figures):
    """Each frame shifted by a pixel, at random."""
    shifts = torch.randint(-1, 2, (*real[0].shape[:3:2], 2), generator=torch.Generator().manual_seed(0))
    clips = torch.stack([torch.stack([frame.roll(shift, (0, 1)) for frame, shift in zip(
        clip[0], rows.tolist(), strict=True)])[None] for clip, rows in zip(real[0], shifts, strict=True)])
    found = judge.score(clips, real[1])
    assert found["jolt"] > 10 * figures["jolt"] and found["residual"] > 10 * figures["residual"]
    assert found["constant"] == pytest.approx(figures["constant"], abs=0.03)


def test_time_reversed_is_not_caught(judge, real, figures):
    found = judge.score(real[0].flip(2), real[1])
    for name in FIGURES:
        assert found[name] == pytest.approx(figures[name], rel=0.02, abs=0.002), name


def test_training_digits_are_caught(judge, parts, figures):
    found = judge.score(*make_real(parts[0], 150, 1))
    assert found["copies"] > 2.5 * figures["copies"]


def test_vanishing_and_appearing_are_caught(judge, real):
    clips, labels = real
    gone, more = clips.clone(), clips.clone()
    gone[:, :, 10:12] = 0
    more[:, :, 3:5] = torch.maximum(clips, clips.flip(3))[:, :, 3:5]
    assert judge.score(gone, labels)["vanished"] == pytest.approx(2 / 16)
    assert judge.score(more, labels)["appeared"] > 0.05


def test_elastic_paths_are_found():
    """Speeds and places of exact paths, and the size of what disturbs one."""
    generator = torch.Generator().manual_seed(0)
    way, speed = torch.rand(200, generator=generator) * 22, torch.rand(200, generator=generator) * 2.5
    x = bounce(way[:, None] + speed[:, None] * torch.arange(16), 11)
    found, errors = fit_bounces(x, 11, 4.0)
    assert errors.mean(1).sqrt().max() < 0.05
    assert (found - speed).abs().quantile(0.95) < 0.02
    noise = torch.randn(200, 16, generator=generator)
    _, errors = fit_bounces(x + 0.5 * noise, 11, 4.0)
    assert errors.mean().sqrt().item() == pytest.approx(0.5, abs=0.06)
    places = torch.stack([10 + x, 10 + x.roll(1, 0)], dim=2)
    speeds, _, residual = fit_paths(places, (32, 32))
    torch.testing.assert_close(speeds, torch.hypot(speed, speed.roll(1, 0)), atol=0.1, rtol=0)
    assert residual.max() < 0.1


def test_the_digit_is_followed(parts):
    data, generator = parts[1], torch.Generator().manual_seed(3)
    index = torch.randint(len(data.labels), (50,), generator=generator)
    clips, labels = make_real(data, 50, 3)
    assert torch.equal(data.labels[index], labels)
    paths = data.paths(index, slice(None), generator)[:, 0]
    places = track(clips)
    assert (places - paths).norm(dim=2).median() < 0.1
    crops = crop(clips, places)
    assert crops.shape == (50, 16, 28, 28)
    assert (track(crops[:, None]) - 14).abs().max() < 1.1
    assert torch.equal(crop(clips, torch.full((50, 16, 2), 14.0)), clips[:, 0, :, :28, :28])
    track(torch.zeros_like(clips))  # black frames have a middle


def test_wasserstein():
    a = torch.rand(500)
    assert wasserstein(a, a.flip(0)) == 0 and wasserstein(a, a + 2) == pytest.approx(2, abs=1e-5)
    assert wasserstein(torch.zeros(9), torch.tensor([0.0, 1.0])) == pytest.approx(0.5, abs=1e-3)


def make_checkpoint(path, of=ClipConfig, **settings):
    config = of(**dict(dataset="moving", image_size=(6, 32, 32), channels=1, num_classes=10, patch_size=(2, 16, 16),
                           hidden_size=16, depth=1, num_heads=2, sample_steps=2) | settings)
    torch.manual_seed(config.seed)
    model = config.build_model()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    save_checkpoint(path, config, 5, 1.0, model.state_dict())
    return path


# The command, on clips made by hand: each figure that it prints is known.

T, H, W = 8, 32, 48
LABELS = [f"{digit} {pace}" for digit in range(10) for pace in SPEEDS]


def clip(digits, column=0, row=0, start=12, zigzag=0, level=15, halves=4):
    """A clip uint8 (1, T, H, W) of a square that goes `column` and `row` pixels a frame. zigzag: pixels that its row
    lies beside a straight path. Of each frame, a list, or of all: digits, read from its grey; level, of 255, by which
    its middle is darker than the training digit's; halves, half of its side."""
    frames = torch.zeros(1, T, H, W, dtype=torch.uint8)
    of = [x if isinstance(x, list) else [x] * T for x in (digits, level, halves)]
    for t, (digit, level, half, side) in enumerate(zip(*of, [1, -1, -1, 1, 1, -1, -1, 1], strict=True)):
        y, x = (11 if row else 15) + row * t + zigzag * side, start + column * t
        frames[0, t, y - half:y + half + 1, x - half:x + half + 1] = 100 + 15 * digit
        frames[0, t, y, x] -= level
    return frames


def read_grey(x):
    """In the place of the classifier, of x (N, 1, 28, 28)."""
    digit = (to_uint8(x).amax((1, 2, 3)).float() - 100) / 15
    return -(digit[:, None] - torch.arange(10)).abs()


DRAWN = {k: dict(digits=k // 2, column=1 + k % 2) for k in range(20)}  # of each label one
for k, other in {10: dict(digits=[5] * 3 + [6] + [5] * 4), 12: dict(digits=7), 14: dict(digits=[7] * 4 + [8] * 4),
                 18: dict(column=2), 1: dict(halves=[4, 4, 2, 2, 2, 4, 4, 4]), 5: dict(halves=[4] * 4 + [6] * 4),
                 0: dict(level=3), **{k: dict(level=1) for k in (6, 8, 11)}}.items():
    DRAWN[k] |= other
for k in (9, 15):
    DRAWN[k] |= dict(level=3)
DRAWN[13] |= dict(level=[0] * 4 + [8] * 4)  # on average no copy
DRAWN[3] |= dict(halves=[4, 3] + [4] * 6)  # 0.60 times the ink
DRAWN[7] |= dict(halves=[5] + [4] * 7)     # 1.49 times
for k, zigzag in {**dict.fromkeys(range(2, 10), 1), **dict.fromkeys((16, 17, 19), 3)}.items():
    DRAWN[k] |= dict(zigzag=zigzag)
# Of the real ones: those that the judge holds clips against, and those of the column
HELD = [dict(digits=k // 20, level=(1 + k % 20) * (2 if k < 20 else 1), **({"column": 1} if k % 4 else {"row": 1}))
        for k in range(200)]
ASKED = [*range(0, 16, 2), *range(1, 20, 2), 1, 3]
REAL = [dict(digits=label // 2, start=10 + i % 7, **{"row" if i < 2 else "column": 1 + label % 2})
        for i, label in enumerate(ASKED)]
REAL[5] |= dict(level=1)
REAL[19] |= dict(digits=9)

TABLE = {  # two models, and real clips
    "digit as asked, of all frames": ["91.9%", "100.0%", "95.0%"],                         # 147 of 160
    "digit as asked in every frame, of all clips": ["85.0%", "100.0%", "95.0%"],
    "the same digit in every frame, of all clips": ["90.0%", "100.0%", "100.0%"],
    "second difference of its place, median, pixels": [2, 0, 0],
    "distance from an elastic path, median, pixels": [1, 0, 0],
    "the same, 90th percentile": [3, 0, 0],
    "speeds: Wasserstein-1 to real ones, pixels a frame": [0.55, 0.5, 0.6],                # from 1 pixel
    "directions: Wasserstein-1 to real ones, degrees": [22.5, 22.5, 13.5],                 # from 90 of one in four
    "slow or fast as asked, of all clips": ["95.0%", "100.0%", "100.0%"],
    "frames with less than half of the clip's ink": ["1.9%", "0.0%", "0.0%"],
    "frames with more than 1.5 times the clip's ink": ["2.5%", "0.0%", "0.0%"],
    "nearer to a training digit than 95 % of real ones": ["20.0%", "0.0%", "5.0%"]}


def test_every_figure_of_the_command(call, tmp_path, monkeypatch):
    """140 clips, seven of each label, in batches of 40. One of the models was trained with frames given."""
    held, real, *drawn = (torch.stack([clip(**of) for of in some]) for some in (
        HELD, REAL, DRAWN.values(), [dict(digits=k // 2, column=1 + k % 2) for k in range(20)]))
    training = torch.stack([clip(digit, level=0)[0, 0, 1:29, :28].roll(2, 1) for digit in range(10)])
    sets = [SimpleNamespace(images=torch.cat([images, 0 * images[:1]]), classes=LABELS)
            for images in (training, 0 * training)]
    continued, times = [], iter([0, 7, 100, 102])

    def make_real(data, count, seed):
        assert data is sets[1]
        index = torch.arange(count) % len(held if seed == 0 else real)
        return (held, torch.zeros(count)) if seed == 0 else (real[index], torch.tensor(ASKED)[index])

    def sample(model, config, labels, indices, way):
        which, B = int(config.given == 0), len(labels)
        if way is from_noise:
            assert labels.tolist() == [i % 20 for i in indices]
            yield to_float(drawn[which][labels])
            return
        asked = torch.arange(140)[indices] % 20
        assert labels.tolist() == torch.tensor(ASKED)[asked].tolist()
        assert way.func is complete and which == 0 and len(way.keywords["picture"]) == B
        picture, known = way.keywords["picture"], way.keywords["known"]
        assert torch.equal(to_uint8(picture), real[asked]) and known.flatten().tolist() == [True] * 4 + [False] * 4
        continued.extend(indices)
        yield torch.where(known, picture, picture.roll(1, -1))  # a pixel from where it is

    for name, value in dict(make_real=make_real, load_classifier=lambda: read_grey,
                            load_moving=lambda config, train: sets[not train],
                            time=SimpleNamespace(monotonic=lambda: next(times))).items():
        monkeypatch.setattr(score, name, value)
    monkeypatch.setattr(inference, "sample", sample)
    monkeypatch.setattr(inference, "batch_that_fits", lambda *_: 40)
    settings = dict(image_size=(T, H, W), num_classes=20, classes=tuple(LABELS), speeds=True)
    paths = [make_checkpoint(tmp_path / f"{name}.pth", given=of, **settings) for name, of in (("a", 0.5), ("b", 0))]
    code, out, err = call(score, "--checkpoint", paths[0], "--beside", paths[1], "--count", 140,
                          "--device", "cpu", "--out", tmp_path / "side.png")
    assert code == 0, err
    lines = out.splitlines()
    for name, rate in (("a", "20.0"), ("b", "70.0")):
        assert f"{name}: 140 clips of 8 x 32 x 48, dpm, 2 steps, guidance 1.4, seed 0; {rate} clips/s" in lines
    assert lines[2].startswith("b continues no clips: it was trained without frames given")
    assert lines[3].split() == ["a", "b", "real"]
    rows = {line[:56].strip(): line[56:].split() for line in lines[4:4 + len(TABLE)]}
    assert list(rows) == list(TABLE)
    for title, expected in TABLE.items():
        if isinstance(expected[0], str):
            assert rows[title] == expected, title
        else:
            near = 0.15 if "degrees" in title else 0.02
            assert list(map(float, rows[title])) == pytest.approx(expected, abs=near), title
    title, *rows = lines[5 + len(TABLE):-1]
    assert title == "4 frames given, the others drawn: pixels from the real place, median of 128 clips"
    assert {row[:18].strip(): row[18:].split() for row in rows} == {
        "frame": ["5", "6", "7", "8"], "a": ["1.00"] * 4,
        "as the last given": ["2.00", "4.00", "6.00", "8.00"]}
    assert continued == [*range(128)]
    with Image.open(tmp_path / "side.png") as picture:
        assert picture.n_frames == T
        for t in range(T):
            picture.seek(t)
            both = torch.stack([some[k, :, t] for k in range(5) for some in drawn])
            assert np.array_equal(np.asarray(picture), np.asarray(grid(both, 2, captions=["a", "b"]))), t


def test_elastic_paths_of_known_direction():
    steps = torch.tensor([[[0, 1]], [[1, 0]], [[1, 1.0]]])
    places = torch.tensor([12.0, 11.0]) + torch.arange(8)[None, :, None] * steps
    speed, direction, residual = fit_paths(places, (32, 48))
    torch.testing.assert_close(speed, torch.tensor([1, 1, 2**0.5]), atol=0.01, rtol=0)
    torch.testing.assert_close(direction, torch.tensor([0.0, 90, 45]), atol=0.5, rtol=0)  # of its steepness
    assert residual.max() < 0.02


def test_continuations(tmp_path, parts, monkeypatch):
    """Of a model that knows everything, exact; of one that knows nothing, about as far off as can be."""
    data = load_moving(ClipConfig(dataset="moving", image_size=(6, 32, 32)), False)
    clips, labels = make_real(data, 20, 0)
    monkeypatch.setattr(score, "draw", lambda *_: clips)
    drawn, stays = follow(None, None, clips, labels, 2)
    assert drawn.max() == 0 and stays[:2].tolist()[1] == 0
    expected = (track(clips)[:, 5] - track(clips)[:, 1]).norm(dim=1).median()
    assert stays[5] == expected > 2


def test_models_side_by_side(call, tmp_path):
    """Two of the same weights draw the same, and one of others does not."""
    paths = [make_checkpoint(tmp_path / f"{name}.pth", seed=seed, given=0.5)
             for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    code, out, err = call(score, "--checkpoint", paths[0], "--beside", *paths[1:], "--count", 20, "--device", "cpu")
    assert code == 0, err
    rows = [line[56:].split() for line in out.splitlines() if line.startswith(("distance", "second"))]
    assert len(rows) == 2 and all(len(row) == 4 and row[0] == row[1] != row[2] for row in rows)
    names, *errors = (line.split() for line in out.splitlines()[-5:])
    assert names[0] == "frame" and errors[0][1:] == errors[1][1:] != errors[2][1:]


@pytest.mark.parametrize(("settings", "flags", "words"), [
    (dict(dataset="clips"), [], ["only clips of one moving digit"]), (dict(digits=2), [], ["--digits 1"]),
    (dict(dataset="sprites"), [], ["8x64x64"]), (dict(image_size=(2, 32, 32)), [], ["moving of 2x32x32"]),
    (dict(of=Config, dataset="folder", image_size=(32, 48), patch_size=(16, 16)), [],
     ["is a model of images", "python inference.py"]),
    ({}, ["--count", 5], ["--count 5"]), ({}, ["--beside", "c.pth"], ["two models are called c"]),
    ({}, ["--out", "a.jpg"], ["a.jpg"]), ({}, ["--labels", 3], ["--labels"])])
def test_bad_flags(call, tmp_path, monkeypatch, settings, flags, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(score, "--checkpoint", make_checkpoint(tmp_path / "c.pth", **settings), *flags), *words)


def test_what_is_given_is_kept(tmp_path):
    """Of the known frames every pixel, in whatever batch."""
    model, config = load_model(make_checkpoint(tmp_path / "c.pth"), kinds=(ClipConfig,))
    clips, labels = make_real(load_moving(config, False), 20, 0)
    known = (torch.arange(6) < 4)[:, None, None]
    drawn = score.draw(model, config, labels, to_float(clips), known)
    assert torch.equal(drawn[:, :, :4], clips[:, :, :4]) and not torch.equal(drawn[:, :, 4:], clips[:, :, 4:])
