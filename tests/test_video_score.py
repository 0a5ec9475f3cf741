import pytest
import torch
from conftest import REPOSITORY, assert_refused
from PIL import Image

import dataset
from checkpoint import build_model, load_model, save_checkpoint
from config import Config
from dataset import CannotDownload, to_float
from measure.classifier import load_classifier
from video import score
from video.moving import bounce, load_moving
from video.score import FIGURES, Judge, crop, fit_bounces, fit_paths, follow, make_real, track, wasserstein


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory):
    """Scikit-learn's digits, wherever the tests are run."""
    def fail(data_dir):
        raise CannotDownload("no network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "download_mnist", fail)
        patch.chdir(tmp_path_factory.mktemp("offline"))
        yield


@pytest.fixture(scope="module")
def parts(offline):
    return [load_moving(Config(dataset="moving"), part) for part in (True, False)]


@pytest.fixture(scope="module")
def judge(parts):
    return Judge(*parts, load_classifier(), count=400)


@pytest.fixture(scope="module")
def real(parts):
    return make_real(parts[1], 150, 1)


@pytest.fixture(scope="module")
def figures(judge, real):
    return judge.score(*real)


def test_real_clips(figures):
    """Scikit-learn's digits are not what the classifier has learned; all the rest is as it should be."""
    assert figures.keys() == FIGURES.keys()
    assert figures["frames"] > 0.9 and figures["clips"] > 0.85 and figures["constant"] > 0.9
    assert figures["jolt"] < 0.15 and figures["residual"] < 0.06 and figures["residual_90"] < 0.2
    assert figures["speed"] < 0.1 and figures["direction"] < 6
    assert figures["vanished"] == figures["appeared"] == 0 and figures["copies"] < 0.12


def test_paces(parts):
    """Of clips labelled slow and fast; asked for the other way round, none is."""
    data = load_moving(Config(dataset="moving", speeds=True), False)
    judge = Judge(parts[0], data, load_classifier(), count=200)
    assert "pace" in judge.figures
    clips, labels = make_real(data, 60, 0)
    found = judge.score(clips, labels)
    assert found["pace"] > 0.9 and found["frames"] > 0.85
    assert judge.score(clips, labels ^ 1)["pace"] < 0.1


def test_the_weights_that_come_along(judge):
    """On a few clips, what README says of many."""
    model, config = load_model(REPOSITORY / "weights" / "moving.pth")
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
    _, found, errors = fit_bounces(x, 11, 4.0)
    assert errors.mean(1).sqrt().max() < 0.05
    assert (found - speed).abs().quantile(0.95) < 0.02
    noise = torch.randn(200, 16, generator=generator)
    *_, errors = fit_bounces(x + 0.5 * noise, 11, 4.0)
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


def make_checkpoint(path, **settings):
    config = Config(**dict(dataset="moving", image_size=(6, 32, 32), channels=1, num_classes=10, patch_size=(2, 16, 16),
                           hidden_size=16, depth=1, num_heads=2, sample_steps=2) | settings)
    torch.manual_seed(config.seed)
    model = build_model(config)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    save_checkpoint(path, config, 5, 1.0, model.state_dict())
    return path


def test_continuations(tmp_path, parts, monkeypatch):
    """Of a model that knows everything, exact; of one that knows nothing, about as far off as can be."""
    data = load_moving(Config(dataset="moving", image_size=(6, 32, 32)), False)
    clips, labels = make_real(data, 20, 0)
    monkeypatch.setattr(score, "draw", lambda *_: clips)
    drawn, stays = follow(None, None, clips, labels, 2)
    assert drawn.max() == 0 and stays[:2].tolist()[1] == 0
    expected = (track(clips)[:, 5] - track(clips)[:, 1]).norm(dim=1).median()
    assert stays[5] == expected > 2


def test_the_command(call, tmp_path):
    path = make_checkpoint(tmp_path / "clips.pth")
    code, out, err = call(score, "--checkpoint", path, "--count", 20)
    assert code == 0, err
    assert "clips: 20 clips of 6 x 32 x 32, dpm, 2 steps, guidance 1.4, seed 0" in out
    rows = {line[:56].strip(): line[56:].split() for line in out.splitlines()}
    assert [name for name, (title, _) in FIGURES.items() if len(rows.get(title, "")) != 2] == ["pace"]
    assert float(rows["digit as asked, of all frames"][1][:-1]) > 80 and "4 frames given" in out


def test_models_side_by_side(call, tmp_path):
    """A column for each; two of the same weights draw the same, and one of others does not."""
    paths = [make_checkpoint(tmp_path / f"{name}.pth", seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    code, out, err = call(score, "--checkpoint", paths[0], "--beside", *paths[1:], "--count", 20, "--out",
                          tmp_path / "side.gif")
    assert code == 0, err
    assert [line.split() for line in out.splitlines() if line.split() == ["a", "b", "c", "real"]]
    rows = [line[56:].split() for line in out.splitlines() if line.startswith(("distance", "second"))]
    assert len(rows) == 2 and all(len(row) == 4 and row[0] == row[1] != row[2] for row in rows)
    names, *errors = (line.split() for line in out.splitlines()[-6:-1])
    assert names[0] == "frame" and errors[0][1:] == errors[1][1:] != errors[2][1:]
    with Image.open(tmp_path / "side.gif") as picture:
        assert picture.n_frames == 6
        picture.seek(3)
        a, b, c = (picture.convert("L").crop((2 + 66 * i, 16, 66 + 66 * i, picture.height)).tobytes() for i in range(3))
    assert a == b != c


@pytest.mark.parametrize(("settings", "flags", "words"), [
    (dict(dataset="folder"), [], ["only clips of one moving digit"]), (dict(digits=2), [], ["--digits 1"]),
    (dict(dataset="sprites"), [], ["8x64x64"]),
    ({}, ["--count", 5], ["--count 5"]), ({}, ["--shown", 6], ["--shown 6", "6 frames"]),
    ({}, ["--shown", 0], ["--shown 0"]), ({}, ["--beside", "c.pth"], ["two models are called c"]),
    ({}, ["--out", "a.jpg"], ["a.jpg"]), ({}, ["--labels", 3], ["--labels"])])
def test_bad_flags(call, tmp_path, monkeypatch, settings, flags, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(score, "--checkpoint", make_checkpoint(tmp_path / "c.pth", **settings), *flags), *words)


def test_what_is_given_is_kept(tmp_path):
    """Of the known frames every pixel, in whatever batch."""
    model, config = load_model(make_checkpoint(tmp_path / "c.pth"))
    clips, labels = make_real(load_moving(config, False), 20, 0)
    known = (torch.arange(6) < 4)[:, None, None]
    drawn = score.draw(model, config, labels, to_float(clips), known)
    assert torch.equal(drawn[:, :, :4], clips[:, :, :4]) and not torch.equal(drawn[:, :, 4:], clips[:, :, 4:])
