import pytest
import torch

from dataset import Dataset
from latent.sprites import CHARACTERS, split_characters
from latent.vae import VAE, save_vae
from record.checkpoint import save_checkpoint
from video import score, sprites
from video.config import ClipConfig
from video.sprites import FIGURES, PARTS, SIDE, SpriteJudge, parts_of

KINDS = ["walk front", "walk left", "cast front"]


def make_clips(numbers, size):
    """Clips uint8 (len(numbers), 3, 8, 3, *size), of each kind one: a quarter of a frame has the colour of each part,
    and a bar across them is of the kind, and moves."""
    H, W = size
    parts = parts_of(numbers)
    frames = torch.zeros(len(numbers), len(KINDS), 8, 3, H, W)
    for i in range(len(PARTS)):
        rows, columns = (slice(k * n // 2, (k + 1) * n // 2) for k, n in ((i // 2, H), (i % 2, W)))
        colours = torch.stack([40 * parts[:, i], 240 - 30 * parts[:, i], 50 * (parts[:, i] % 3)], dim=1).float()
        frames[..., rows, columns] = colours[:, None, None, :, None, None]
    for kind in range(len(KINDS)):
        for t in range(8):
            row = (t * (kind + 1) % 8) * H // 8
            frames[:, kind, t, kind, row:row + H // 8] = 255
    return frames.byte()


def load(name, data_dir, train, size, channels):
    """In the place of `load_images`: such sprites of the characters of one part."""
    frames = make_clips(torch.from_numpy(split_characters(train)), (32, 32))
    labels = torch.arange(len(KINDS)).repeat_interleave(8).repeat(len(frames))
    return Dataset("sprites", sprites.resize(frames.flatten(0, 2), size)[:, :channels], labels, KINDS)


@pytest.fixture(scope="module")
def judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sprites, "load_images", load)
        yield SpriteJudge()


@pytest.fixture(scope="module")
def real(judge):
    return judge.real_clips(60, (32, 32))


def test_parts_of_characters():
    numbers = torch.arange(CHARACTERS)
    parts = parts_of(numbers)
    assert parts.shape == (CHARACTERS, 4) and len({tuple(row) for row in parts.tolist()}) == CHARACTERS
    assert parts[-1].tolist() == [5] * 4 and parts[1].tolist() == [0, 0, 0, 1]  # the hair changes first


def test_real_clips(judge, real):
    clips, labels = real
    assert clips.shape == (60, 3, 8, 32, 32) and labels.unique().tolist() == [0, 1, 2]
    found = judge.score(clips, labels)
    assert found.keys() == FIGURES.keys()
    for name in ("action", "character", "order", *PARTS):
        assert found[name] == 1, name
    assert found["motion"] == pytest.approx(1, abs=0.02) and found["distance"] < 1 and found["copies"] == 0
    frames = sprites.resize(clips.transpose(1, 2).flatten(0, 1), (SIDE, SIDE)).view(60, 8, -1)
    numbers, kinds = judge.find(frames)
    assert torch.equal(kinds, labels) and torch.equal(judge.characters(frames, labels), numbers[:, None].expand(-1, 8))


# The controls


def test_another_action_is_caught(judge, real):
    assert judge.score(real[0], (real[1] + 1) % 3)["action"] == 0


def test_a_character_that_changes_is_caught(judge, real):
    """Midway another one goes on."""
    clips, labels = real
    order = labels.argsort(stable=True)
    clips, labels = clips[order], labels[order]
    found = judge.score(torch.cat([clips[:, :, :4], clips.roll(1, 0)[:, :, 4:]], dim=2), labels)
    assert found["character"] < 0.1 and 0.05 < found["hair"] < 0.4


def test_frozen_clips_are_caught(judge, real):
    found = judge.score(real[0][:, :, :1].expand_as(real[0]), real[1])
    assert found["motion"] == 0 and found["order"] < 0.5


def test_shuffled_clips_are_caught(judge, real):
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    assert judge.score(real[0][:, :, order], real[1])["order"] < 0.5


def test_noise_is_caught(judge, real):
    noise = 40 * torch.randn(real[0].shape, generator=torch.Generator().manual_seed(0))
    found = judge.score((real[0] + noise).clamp(0, 255).byte(), real[1])
    assert found["distance"] > 10


def test_parts_that_change_are_told_apart(judge):
    """Midway one part of ten of 20 characters changes, which is each time another share of the clips."""
    numbers = torch.from_numpy(split_characters(False))[:20]
    others = numbers.clone()
    for i, (part, step) in enumerate([("body", 216)] * 4 + [("trousers", 36)] * 3 + [("top", 6)] * 2 + [("hair", 1)]):
        k = PARTS.index(part)
        others[i] += step if parts_of(numbers[i])[k] < 5 else -step
        assert (parts_of(others[i]) != parts_of(numbers[i])).tolist() == [part == name for name in PARTS]
    before, after = (make_clips(some, (32, 32))[:, 1].movedim(1, 2) for some in (numbers, others))
    found = judge.score(torch.cat([before[:, :, :4], after[:, :, 4:]], dim=2), torch.ones(20, dtype=torch.int64))
    assert [found[name] for name in (*PARTS, "character", "action")] == pytest.approx([0.8, 0.85, 0.9, 0.95, 0.5, 1])


def test_distance_motion_and_order_are_measured(judge, real):
    """Known by hand: six grey levels everywhere; half of what moves; the first half of the way not gone; two frames of
    eight in each other's places."""
    clips, labels = real
    off = torch.where(clips < 128, clips + 6, clips - 6)
    assert judge.score(off, labels)["distance"] == pytest.approx(6, abs=0.3)  # where two greys meet, less
    mean = clips.float().mean(2, keepdim=True)
    found = judge.score((mean + (clips - mean) / 2).round().byte(), labels)
    assert found["motion"] == pytest.approx(0.5, abs=0.03) and found["order"] == 1
    late = clips[:, :, [4] * 4 + [4, 5, 6, 7]]
    assert judge.score(late, labels)["motion"] == pytest.approx(3 / 7, abs=0.07)
    swapped = clips[:, :, [0, 1, 2, 3, 4, 5, 7, 6]]
    assert judge.score(swapped, labels)["order"] == pytest.approx(6 / 8)


def test_training_characters_are_seen(judge):
    clips = make_clips(torch.from_numpy(split_characters(True))[:30], (32, 32))[:, 0].movedim(1, 2)
    assert judge.score(clips, torch.zeros(30, dtype=torch.int64))["copies"] == 1


def test_the_command(call, tmp_path, monkeypatch):
    """Of latents too, beside real clips that went through the VAE; with the data and the channels of the model."""
    asked = []
    monkeypatch.setattr(sprites, "load_images", lambda name, data_dir, train, size, channels: (
        asked.append((data_dir, channels)), load(name, data_dir, train, size, channels))[1])
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_vae(VAE(3, 3, 2, (8, 8), norm_num_groups=4), "vae")
    shared = dict(dataset="sprites", image_size=(8, 32, 32), num_classes=3, classes=tuple(KINDS), hidden_size=16,
                  depth=1, num_heads=2, sample_steps=2)
    latents = dict(vae="vae", latent_shape=(2, 8, 16, 16), latent_mean=(0.0,), latent_std=(1.0,), clamp=False)
    for settings in (dict(channels=1, patch_size=(2, 16, 16)), dict(channels=3, patch_size=(2, 8, 8), **latents)):
        config = ClipConfig(**shared, **settings)
        save_checkpoint("sprites.pth", config, 5, 1.0, config.build_model().state_dict())
        seen, original = [], score.draw
        monkeypatch.setattr(score, "draw", lambda *args, seen=seen, original=original: (
            seen.append(args[2].tolist()), original(*args))[1])
        code, out, err = call(score, "--checkpoint", "sprites.pth", "--count", 20, "--data-dir", tmp_path / "there")
        assert code == 0 and "20 clips of 8 x 32 x 32" in out, err
        assert {*asked} == {(str(tmp_path / "there"), config.channels)} and seen == [[k % 3 for k in range(20)]]
        rows = {line[:56].strip(): line[56:].split() for line in out.splitlines()}
        assert all(len(rows[title]) == 2 for title, _ in FIGURES.values()) and "frames given" not in out
        assert (float(rows[FIGURES["distance"][0]][1]) > 5) == bool(config.latent_shape)
        assert rows["nearest to a training character (by chance 77%)"][1] == "0.0%" or config.latent_shape
        asked.clear()
        monkeypatch.setattr(score, "draw", original)
