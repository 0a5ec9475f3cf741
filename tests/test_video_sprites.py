import pytest
import torch

from checkpoint import build_model, save_checkpoint
from config import Config
from dataset import CHARACTERS, Dataset, split_characters
from latent.vae import VAE, save_vae
from video import score, sprites
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
    """In the place of `load_dataset`: such sprites of the characters of one part."""
    frames = make_clips(torch.from_numpy(split_characters(train)), (32, 32))
    labels = torch.arange(len(KINDS)).repeat_interleave(8).repeat(len(frames))
    return Dataset("sprites", sprites.resize(frames.flatten(0, 2), size), labels, KINDS)


@pytest.fixture(scope="module")
def judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sprites, "load_dataset", load)
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
    frames = sprites.resize(clips.transpose(1, 2).flatten(0, 1), (SIDE, SIDE)).view(60, 8, -1).float()
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


def test_training_characters_are_seen(judge):
    clips = make_clips(torch.from_numpy(split_characters(True))[:30], (32, 32))[:, 0].movedim(1, 2)
    assert judge.score(clips, torch.zeros(30, dtype=torch.int64))["copies"] == 1


def test_the_command(call, tmp_path, monkeypatch):
    """Of latents too, beside real clips that went through the VAE."""
    monkeypatch.setattr(sprites, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_vae(VAE(3, 3, 2, (8, 8), norm_num_groups=4), "vae")
    shared = dict(dataset="sprites", image_size=(8, 32, 32), channels=3, num_classes=3, classes=tuple(KINDS),
                  hidden_size=16, depth=1, num_heads=2, sample_steps=2)
    latents = dict(vae="vae", latent_shape=(2, 8, 16, 16), latent_mean=(0.0,), latent_std=(1.0,), clamp=False)
    for settings in (dict(patch_size=(2, 16, 16)), dict(patch_size=(2, 8, 8), **latents)):
        config = Config(**shared, **settings)
        save_checkpoint("sprites.pth", config, 5, 1.0, build_model(config).state_dict())
        code, out, err = call(score, "--checkpoint", "sprites.pth", "--count", 20)
        assert code == 0 and "20 clips of 8 x 32 x 32" in out, err
        rows = {line[:56].strip(): line[56:].split() for line in out.splitlines()}
        assert all(len(rows[title]) == 2 for title, _ in FIGURES.values()) and "frames given" not in out
        assert (float(rows[FIGURES["distance"][0]][1]) > 5) == bool(config.latent_shape)
