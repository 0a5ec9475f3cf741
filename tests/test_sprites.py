"""The sprites, made of sheets that are made up here: of the real size, fewer, and full of noise."""

from support import sizes
from support.commands import UserError

import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from latent import sprites
from latent.sprites import load_images, read_sprites, split_characters

SHEETS = {"body": 2, "bottomwear": 1, "topwear": 3, "hair": 2, "shoes": 1}  # 12 characters
# The cells of each class, counted row by row, as the script that comes with the sheets takes them.
CELLS = {"walk front": [138, 131, 132, 133, 134, 135, 136, 137], "walk left": [125, 118, 119, 120, 121, 122, 123, 124],
         "walk right": [151, 144, 145, 146, 147, 148, 149, 150], "cast front": [26, 27, 28, 29, 30, 31, 30, 32],
         "cast left": [13, 14, 15, 16, 17, 18, 17, 19], "cast right": [39, 40, 41, 42, 43, 44, 43, 45],
         "slash front": [182, 183, 184, 185, 186, 187, 186, 182],
         "slash left": [169, 170, 171, 172, 173, 174, 173, 169],
         "slash right": [195, 196, 197, 198, 199, 200, 199, 195]}


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """A folder of sheets: every block of 8 x 8 pixels has a colour of its own, and is clear, half clear or opaque."""
    folder, rng = tmp_path_factory.mktemp("sheets") / "Sprites", np.random.default_rng(0)
    for layer, count in SHEETS.items():
        (folder / layer).mkdir(parents=True)
        for k in range(count):
            blocks = rng.integers(0, 256, (168, 104, 4), dtype=np.uint8)
            blocks[..., 3] = rng.choice([0, 0, 0, 130, 255], (168, 104))
            Image.fromarray(blocks).resize((832, 1344), Image.Resampling.NEAREST).save(folder / layer / f"{k}.png")
    return folder


@pytest.fixture
def sheets(made_up, monkeypatch):
    """The same, in the place of the real ones."""
    monkeypatch.setattr(sprites, "SHEETS", {layer: range(count) for layer, count in SHEETS.items()})
    monkeypatch.setattr(sprites, "CHARACTERS", 12)
    monkeypatch.setattr(sprites, "TRAINING_CHARACTERS", 8)
    return made_up


@pytest.mark.parametrize("train", [True, False])
def test_frames(sheets, train):
    """Each is the right choice of sheets, on top of each other in the right order, and the right cell: as the script
    that comes with the sheets makes it, of whole sheets, cut afterwards."""
    choices, numbers = list(itertools.product(*map(range, SHEETS.values()))), split_characters(train)
    frames = read_sprites(sheets.parent, train)
    assert frames.shape == (len(numbers), 9, 8, 3, 64, 64)
    for i in (0, 3):
        image = Image.new("RGBA", (832, 1344), "black")
        for layer, k in zip(SHEETS, choices[numbers[i]], strict=True):
            image = Image.alpha_composite(image, Image.open(sheets / layer / f"{k}.png"))
        for kind, frame in itertools.product(range(9), range(8)):
            top, left = (64 * place for place in divmod(list(CELLS.values())[kind][frame], 13))
            expected = np.asarray(image)[top:top + 64, left:left + 64, :3]
            assert np.array_equal(frames[i, kind, frame].permute(1, 2, 0), expected)


def test_images_are_the_frames(sheets):
    data, frames = load_images("sprites", sheets.parent), read_sprites(sheets.parent, True)
    assert data.name == "sprites" and data.classes == list(CELLS)
    assert data.images.shape == (576, 3, 64, 64) and data.images.dtype == torch.uint8 and data.images.is_contiguous()
    assert torch.equal(data.images.view(frames.shape), frames)
    labels = data.labels.view(8, 9, 8)
    assert labels.dtype == torch.int64 and all((labels[:, kind] == kind).all() for kind in range(9))
    assert load_images("sprites", sheets.parent, train=False).images.shape == (288, 3, 64, 64)


def test_characters_to_test_are_new_choices_of_known_parts():
    train, test = split_characters(True), split_characters(False)
    assert len(train) == 1000 and sorted([*train, *test]) == list(range(6**4))
    assert train[:4].tolist() == [1116, 1135, 17, 469] and test[-1] == 1262  # as numpy's seed 423 has always had it
    for part in range(4):
        assert {number // 6**part % 6 for number in train} == set(range(6))


def test_other_sizes_and_greys(sheets):
    data = load_images("sprites", sheets.parent, train=False)
    small = load_images("sprites", sheets.parent, train=False, image_size=(32, 64))
    means = data.images.float().view(-1, 3, 32, 2, 64).mean(3)  # of what each pixel covers
    assert small.images.shape == (288, 3, 32, 64) and torch.equal(small.labels, data.labels)
    assert (small.images - means).abs().median() <= 0.5 < 50 < means.std()
    grey = load_images("sprites", sheets.parent, train=False, channels=1)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert grey.images.shape == (288, 1, 64, 64)
    assert ((data.images * weights).sum(1, keepdim=True) - grey.images).abs().max() < 1.01


def test_memory_is_asked_for_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "available_memory", lambda: 1.7e9)
    with pytest.raises(UserError, match=r"72,000 images of 64 x 64 pixels would take 0\.885 GB"):
        load_images("sprites", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_clone_of_the_repository(sheets, tmp_path):
    assert torch.equal(read_sprites(sheets, False), read_sprites(sheets.parent, False))


def test_the_real_ones_come_with_the_code(tmp_path, monkeypatch):
    """Wherever one is, the very images that all our figures are of."""
    monkeypatch.chdir(tmp_path)
    assert load_images("sprites", train=False).fingerprint == "62e6a141ffc58ed5"


def test_sheets_that_are_missing_or_damaged(sheets, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} does not hold the sprites: leave --data-dir out"):
        read_sprites(tmp_path, False)
    shutil.copytree(sheets, tmp_path / "Sprites")
    hair = tmp_path / "Sprites" / "hair" / "1.png"
    for content, what in ((hair.read_bytes()[:-99], "cannot be read"), (None, r"cannot be read .*No such file")):
        hair.unlink() if content is None else hair.write_bytes(content)
        with pytest.raises(UserError, match=f"hair/1.png {what}"):
            read_sprites(tmp_path, False)
    Image.new("RGBA", (1344, 832)).save(hair)
    with pytest.raises(UserError, match=r"hair/1\.png is of 1344 x 832 pixels, but a sheet of sprites has 832 x 1344"):
        read_sprites(tmp_path, False)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file does not hold the sprites"):
        load_images("sprites", tmp_path / "file")
