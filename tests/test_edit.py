from support import image_files, sizes
from support.commands import UserError
from support.labels import parse_morph
from support.noise import noise_source
from support.pictures import grid

import argparse
import dataclasses
import functools
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CLIPS,
    SHIPPED,
    SLOPE,
    WIDE,
    A,
    assert_refused,
    greys_of,
    load,
    make_checkpoint,
    save_frames,
    size,
    tile,
)
from PIL import Image

import edit.draw
import edit.ways
import inference
from dataset import to_float, to_uint8
from diffusion import from_noise
from edit.draw import draw
from inference import generate, sample
from latent.config import LatentConfig


@pytest.fixture
def small(tmp_path):
    """A checkpoint, and a picture and a mask for it, black where the picture is known."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(tmp_path / "picture.png")
    Image.fromarray(rng.choice(np.array([0, 255], np.uint8), (8, 8))).save(tmp_path / "mask.png")
    return make_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm"])
def test_what_is_known_is_kept_to_the_last_bit(call, small, tmp_path, sampler):
    flags = ["--checkpoint", small, "--inpaint", tmp_path / "picture.png", "--mask", tmp_path / "mask.png",
             "--sampler", sampler, "--out", tmp_path / "a.png"]
    code, _, err = call(edit.draw, *flags, "--labels", 3, 5, "--count", 2)
    assert code == 0, err
    drawn = [tile(Image.open(tmp_path / "a.png"), *place) for place in ((0, 0), (0, 1), (1, 0), (1, 1))]
    picture, mask = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("picture", "mask"))
    for image in drawn:
        assert np.array_equal(image[mask == 0], picture[mask == 0])
        assert not np.array_equal(image[mask == 255], picture[mask == 255])
    assert len({image.tobytes() for image in drawn}) == 4
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(every)), every)


def test_a_model_of_images_reads_one_frame_of_a_clip(call, small, tmp_path, monkeypatch):
    frames = [Image.new("L", (8, 8), 9 * i) for i in range(20)]
    frames[0].save(tmp_path / "long.gif", save_all=True, append_images=frames[1:], duration=100)
    original, read = image_files.convert, []
    monkeypatch.setattr(image_files, "convert", lambda *of: read.append(of) or original(*of))
    monkeypatch.setattr(sizes, "available_memory", lambda: 2 * 64)  # what one takes
    code, _, err = call(edit.draw, "--checkpoint", small, "--edit", tmp_path / "long.gif", "--labels", 3, "--out",
                        tmp_path / "a.png")
    assert code == 0 and len(read) == 1, err


def test_a_pipe_is_not_opened(call, small, tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "empty").mkdir()
    for name, words in (("pipe.png", "it is no file"), ("empty", "holds no images")):
        assert_refused(call(edit.draw, "--checkpoint", small, "--edit", tmp_path / name), name, words)


def test_transparency_is_laid_on_the_model_s_ground(tmp_path):
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.save(tmp_path / "x.png")
    for ground, value in (("black", -1), ("white", 1)):
        _, config = load(make_checkpoint(tmp_path / "model.pth", ground=ground))
        picture, _ = edit.draw.read_picture(tmp_path / "x.png", config)
        assert picture.unique().tolist() == [value]


def test_masks_of_another_size_and_pictures_of_any(call, small, tmp_path):
    """The picture is cropped at its centre; the mask, stretched over it, as well."""
    Image.new("RGBA", (40, 16), (200, 200, 200, 255)).save(tmp_path / "wide.webp", lossless=True)
    Image.new("L", (5, 1)).save(tmp_path / "mask.png")
    mask = Image.open(tmp_path / "mask.png")
    mask.putpixel((2, 0), 255)  # the middle fifth: half of the square in the middle
    mask.save(tmp_path / "mask.png")
    assert call(edit.draw, "--checkpoint", small, "--inpaint", tmp_path / "wide.webp", "--mask", tmp_path / "mask.png",
                "--labels", 3, "--count", 1, "--out", tmp_path / "a.png")[0] == 0
    image = tile(Image.open(tmp_path / "a.png"), 0, 0)
    assert (image[:, [0, 1, 6, 7]] == 200).all() and not (image[:, 2:6] == 200).all(axis=0).any()


@pytest.mark.parametrize("kind", ["edit", "inpaint", "morph"])
@pytest.mark.parametrize("settings", [dict(channels=3, image_size=(8, 12), patch_size=(4, 6), num_classes=2,
                                           classes=("cat: big", "dog")), {}, dict(process="ddpm", T=10)])
def test_every_model_edits_completes_and_morphs(call, tmp_path, kind, settings):
    """Colour, not square, with names, or small; from a photo, as grid, strip and animation."""
    path = make_checkpoint(tmp_path / "model.pth", **settings)
    Image.effect_noise((50, 30), 90).convert("CMYK").save(tmp_path / "photo.jpg")
    Image.linear_gradient("L").save(tmp_path / "mask.gif")
    names = load(path)[1].class_names
    flags = {"edit": ["--edit", tmp_path / "photo.jpg", "--labels", *names[:2]],
             "inpaint": ["--inpaint", tmp_path / "photo.jpg", "--mask", tmp_path / "mask.gif", "--count", 1],
             "morph": ["--morph", ":".join(names[:2]), "--to-seed", 9]}
    for more, name in (([], "a.png"), (["--strip"], "b.png"), (["--gif", "--sample-steps", 9], "c.gif")):
        code, _, err = call(edit.draw, "--checkpoint", path, *flags[kind], *more, "--out", tmp_path / name)
        assert code == 0, err
    assert size(tmp_path / "a.png")[1] == ("RGB" if settings.get("channels") else "L")
    steps = 7 if kind == "edit" and "T" in settings else 9  # of 10 there are no more within the default strength
    assert size(tmp_path / "c.gif")[2] == (58 if kind == "morph" else steps + 1)


def test_an_edited_or_completed_image_is_a_function_of_seed_and_index():
    model, config = load(SHIPPED)
    picture, known = torch.rand(1, 1, 28, 28) * 2 - 1, torch.arange(28).view(1, 1, 1, 28) < 14
    labels = torch.arange(20) % 10
    for sampler, way in (("ddpm", functools.partial(edit.ways.edit, picture=picture, strength=0.5)),
                         ("dpm", functools.partial(edit.ways.inpaint, picture=picture, known=known))):
        config = dataclasses.replace(config, sampler=sampler, sample_steps=3)
        *_, together = sample(model, config, labels, way=way)
        for indices in ([5], [17, 2, 9]):
            *_, drawn = sample(model, config, labels[indices], indices, way=way)
            assert torch.equal(drawn, together[indices]), indices


def test_the_more_strength_the_more_changes(call, tmp_path):
    digit = tile(inference.draw(3, checkpoint=SHIPPED), 0, 0, scale=2)
    Image.fromarray(digit).save(tmp_path / "three.png")
    changes = []
    for strength in (0.001, 0.4, 0.7, 1):
        assert call(edit.draw, "--checkpoint", SHIPPED, "--edit", tmp_path / "three.png", "--labels", 7, "--count", 8,
                    "--strength", strength, "--out", tmp_path / "a.png")[0] == 0
        drawn = [tile(Image.open(tmp_path / "a.png"), row, 0, scale=2) for row in range(8)]
        changes.append(np.abs(np.subtract(drawn, digit, dtype=float)).mean())
    assert changes == sorted(changes) and changes[0] < 2 and changes[1] < 20 < changes[3]


@pytest.mark.parametrize("sampler", ["dpm", "ddpm"])
def test_a_morph_leads_from_one_draw_to_another(call, tmp_path, sampler):
    """Its ends are what is drawn without it; rows do not depend on how many there are."""
    flags = ["--checkpoint", SHIPPED, "--sampler", sampler, "--sample-steps", 4, "--out", tmp_path / "a.png",
             "--device", "cpu"]

    def drawn(*more, of=edit.draw):
        code, _, err = call(of, *flags, *more)
        assert code == 0, err
        return np.asarray(Image.open(tmp_path / "a.png"))

    def row(picture, number, columns):
        return [tile(picture, number, column, scale=2) for column in columns]

    first, last, other = (drawn("--labels", *more, "--count", 2, of=inference)
                          for more in ((3,), (8,), (8, "--seed", 7)))
    labels, both, one = drawn("--morph", "3:8", "--count", 2), drawn("--morph", "3:8", "--to-seed", 7, "--count", 2), (
        drawn("--morph", "3:8", "--count", 1))
    for k in range(2):
        for morph, end in ((labels, last), (both, other)):
            ends = [*row(first, k, [0]), *row(end, k, [0])]
            assert np.abs(np.subtract(row(morph, k, [0, 10]), ends, dtype=float)).mean() < 1
        steps = np.abs(np.diff(np.array(row(both, k, range(11)), dtype=float), axis=0)).mean(axis=(1, 2))
        assert steps.min() > 0 and steps.max() < np.abs(np.subtract(*row(both, k, (0, 10)), dtype=float)).mean()
    assert np.array_equal(row(one, 0, range(11)), row(labels, 0, range(11)))


def test_a_morph_is_animated_there_and_back(call, small, tmp_path):
    assert call(edit.draw, "--checkpoint", small, "--morph", "3:3", "--to-seed", 1, "--gif", "--count", 12,
                "--out", tmp_path / "a.gif")[0] == 0
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.size == (2 + 10 * 58, 2 + 2 * 58)
        frames, times = [], []
        for number in range(animation.n_frames):
            animation.seek(number)
            frames.append(np.asarray(animation.convert("L")))
            times.append(animation.info["duration"])
    assert times == [1000, *[60] * 28] * 2  # milliseconds
    model, config = load(small)
    first = np.asarray(grid(to_uint8(generate(model, config, torch.full((12,), 3))), 10), dtype=float)
    assert np.abs(first - frames[0]).mean() < 3
    assert len(frames) == 58 and all(np.array_equal(frames[i], frames[-i]) for i in range(1, 29))
    assert not np.array_equal(frames[0], frames[len(frames) // 2])


@pytest.mark.parametrize(("flags", "words"), [
    (["--edit", "picture.png", "--morph", "3:8"], ["--edit and --morph"]),
    (["--edit", "picture.png", "--inpaint", "picture.png", "--mask", "mask.png"], ["--edit and --inpaint"]),
    (["--mask", "mask.png"], ["--mask is for --inpaint"]), (["--inpaint", "picture.png"], ["--inpaint needs --mask"]),
    (["--strength", 0.5], ["--strength is for --edit"]), (["--to-seed", 5], ["--to-seed is for --morph"]),
    (["--edit", "picture.png", "--mask", "mask.png"], ["--mask is for --inpaint"]),
    *[(["--edit", "picture.png", "--strength", strength], [f"--strength {strength}", "0", "1"])
      for strength in (0, 1.01, "nan")],
    (["--edit", "none.png"], ["none.png cannot be read", "No such file"]), (["--edit", ""], ["--edit", "is empty"]),
    ([], ["say what to do: --edit PICTURE"]), (["--edit", "damaged.png"], ["damaged.png cannot be read"]),
    (["--inpaint", "picture.png", "--mask", "damaged.png"], ["damaged.png cannot be read"]),
    (["--inpaint", "picture.png", "--mask", "black.png"], ["black.png is black all over"]),
    (["--inpaint", "picture.png", "--mask", "white.png"], ["white.png is white all over"]),
    (["--edit", "picture.png", "--labels", "cat"], ["'cat' is no label"]),
    (["--morph", "3:8", "--labels", 3], ["leave --labels out"]), (["--morph", "3"], ["'3'", "3:8"]),
    *[(["--morph", words], ["two labels", "0 to 9"]) for words in ("", ":", "3:", "3:cat", "31:8", "3:8:1", "3:10")],
    (["--morph", "3:3"], ["leads nowhere", "--to-seed"]), (["--morph", "3:8", "--to-seed", -1], ["--to-seed -1"]),
    *[(["--morph", "3:8", "--to-seed", seed, *more], ["another seed"]) for seed, *more in ((4, "--seed", 4), (0,))],
    (["--morph", "3:8", "--count", 1000], ["--count 1000"]),
])
def test_bad_changes(call, small, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.png").write_bytes((tmp_path / "picture.png").read_bytes()[:60])
    for colour in ("black", "white"):
        Image.new("L", (9, 9), colour).save(f"{colour}.png")
    assert_refused(call(edit.draw, "--checkpoint", small, *flags), *words)
    assert not list(tmp_path.glob("s*.png"))


def test_latents_are_no_picture(call, small, tmp_path):
    flags = ["--checkpoint", make_checkpoint(tmp_path / "latent.pth", channels=4)]
    assert_refused(call(edit.draw, *flags, "--edit", tmp_path / "picture.png"), "4 channels", "no picture")
    assert call(edit.draw, *flags, "--morph", "3:8", "--out", tmp_path / "a.png")[0] == 0


def test_a_morph_of_names_with_colons():
    names = ("a", "b", "a:b", "c:")
    assert parse_morph("a:b", names) == [0, 1]
    assert parse_morph("a:b:b", names) == [2, 1] and parse_morph("b:a:b", names) == [1, 2]
    assert parse_morph("c::a", names) == [3, 0] and parse_morph("0:3", names) == [0, 3]


def test_draw_changes_pictures_too(small, tmp_path):
    flags = dict(checkpoint=small, device="cpu")
    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    assert draw("37", edit=picture, strength=0.5, **flags).size == (2 + 2 * 58, 2 + 58)
    assert draw([3], edit=picture, **flags).tobytes() != inference.draw([3], **flags).tobytes()
    completed, known = tile(draw(3, inpaint=picture, mask=mask, **flags), 0, 0), np.asarray(Image.open(mask)) == 0
    assert np.array_equal(completed[known], np.asarray(Image.open(picture))[known])
    assert draw(morph="3:8", count=2, to_seed=9, **flags).size == (2 + 11 * 58, 2 + 2 * 58)
    # From Python, what lies in a file may come as it is.
    pictures = [Image.open(path).copy() for path in (picture, mask)]
    for one, other in (pictures, [np.asarray(image.convert("RGB")) for image in pictures]):
        kept = one.copy()
        assert draw([3], edit=one, **flags).tobytes() == draw([3], edit=str(picture), **flags).tobytes()
        assert draw(3, inpaint=one, mask=other, **flags).tobytes() == draw(3, inpaint=picture, mask=mask,
                                                                           **flags).tobytes()
        assert np.array_equal(one, kept)  # it is the caller's
    exif = Image.Exif()
    exif[0x112] = 6  # to be shown turned
    pictures[0].crop((0, 0, 8, 4)).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as turned:
        assert draw([3], edit=turned, **flags).tobytes() == draw([3], edit=tmp_path / "turned.png", **flags).tobytes()
        assert turned.size == (8, 4)
    for wrong in ([1, 2], np.zeros((2, 3, 4, 5), np.uint8), np.zeros((4, 4), np.complex64)):
        with pytest.raises(UserError, match="the picture cannot be read as an image"):
            draw([3], edit=wrong, **flags)
    with pytest.raises(UserError, match="the picture is white all over"):
        draw([3], inpaint=picture, mask=np.full((9, 9), 255, np.uint8), **flags)
    for wrong in (dict(mask=mask), dict(edit=picture, morph="3:8"), dict(morph="3:8", labels="3")):
        with pytest.raises(UserError):
            draw(**wrong, **flags)


def test_a_clip_is_edited(call, tmp_path, monkeypatch):
    """From its first frames; what its mask keeps stays in every frame."""
    monkeypatch.chdir(tmp_path)
    checkpoint = make_checkpoint(tmp_path / "clips.pth", **CLIPS)
    frames = [Image.fromarray(np.full((8, 8), 50 * i, np.uint8)) for i in range(5)]
    frames[0].save("five.gif", save_all=True, append_images=frames[1:], duration=40)
    frames[0].save("three.gif", save_all=True, append_images=frames[1:3], duration=40)
    _, config = load(checkpoint)
    picture, _ = edit.draw.read_picture("five.gif", config)
    assert torch.equal(to_uint8(picture)[0, 0, :, 0, 0], torch.tensor([0, 50, 100, 150], dtype=torch.uint8))
    flags = ["--checkpoint", checkpoint, "--labels", 7, "--count", 1, "--out", "new.png"]
    assert call(edit.draw, *flags, "--edit", "five.gif", "--strength", 0.1)[0] == 0
    assert size("new.png")[2] == 4
    assert_refused(call(edit.draw, *flags, "--edit", "three.gif"), "three.gif has 3 frames", "clips of 4")
    mask = Image.new("L", (8, 8))
    mask.paste(255, (0, 4, 8, 8))
    mask.save("mask.png")
    assert call(edit.draw, *flags, "--inpaint", "five.gif", "--mask", "mask.png")[0] == 0
    with Image.open("new.png") as clip:
        for i in range(4):
            clip.seek(i)
            assert set(clip.convert("L").crop((2, 2, 58, 30)).tobytes()) == {50 * i}


@pytest.mark.parametrize("flags", [["--edit", "one.png"], ["--edit", "one.png", "--strip"],
                                   ["--morph", "3:5", "--gif"]])
def test_a_clip_may_have_one_frame(call, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    make_checkpoint("still.pth", **CLIPS | dict(image_size=(1, 8, 8), patch_size=(1, 4, 4)))
    Image.new("L", (8, 8), 90).save("one.png")
    code, out, err = call(edit.draw, "--checkpoint", "still.pth", *flags, "--count", 2, "--out", "a.png")
    columns, rows = (1, 20) if "--strip" in flags else (30, 2) if "--gif" in flags else (10, 2)
    assert code == 0 and f"{columns * rows} images" in out, err
    assert size("a.png") == ((2 + 58 * columns, 2 + 58 * rows), "L", 1)


def save_wide(path, pixels):
    """A picture of 24 x 8 pixels whose middle half, which is what a model of 12 x 8 sees, is `pixels`."""
    frame = np.random.default_rng(0).integers(0, 256, (8, 24)).astype(np.uint8)
    frame[:, 6:18] = pixels
    Image.fromarray(frame).save(path)


@pytest.mark.parametrize(("settings", "flags", "strength", "steps"), [
    ({}, [], 0.7, 3), ({}, ["--strength", 0.5], 0.5, 3), (dict(T=10, sample_steps=8), ["--strength", 0.3], 0.3, 3)])
def test_what_is_edited(call, tmp_path, shown, settings, flags, strength, steps):
    save_wide(tmp_path / "wide.png", SLOPE)
    checkpoint = make_checkpoint(tmp_path / "m.pth", image_size=(8, 12), **settings)
    code, out, err = call(edit.draw, "--checkpoint", checkpoint, "--edit", tmp_path / "wide.png", *flags, "--labels", 7,
                          3, "--count", 2, "--out", tmp_path / "a.png")
    assert code == 0 and f"with {steps} steps" in out, err
    seen, = shown
    assert (seen.way, seen.strength, seen.config.sample_steps) == (edit.ways.edit, strength, steps)
    assert seen.labels == [7, 3, 7, 3]
    assert np.array_equal(to_uint8(seen.picture)[0, 0], SLOPE) and len(seen.picture) == 1


@pytest.mark.parametrize("clip", [False, True])
def test_what_is_completed(call, tmp_path, shown, clip):
    """Known is what is black, in every frame; the mask, not half as large as the picture, is stretched over it."""
    settings = WIDE if clip else dict(image_size=(8, 12))
    save_wide(tmp_path / "wide.png", SLOPE)
    save_frames(tmp_path / "ten.png", *A)
    mask = np.random.default_rng(1).integers(0, 256, (8, 12)).astype(np.uint8)
    save_wide(tmp_path / "mask.png", mask)
    with Image.open(tmp_path / "mask.png") as image:
        image.resize((48, 16), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    if clip:
        Image.fromarray(mask).save(tmp_path / "mask.png")
    code, _, err = call(edit.draw, "--checkpoint", make_checkpoint(tmp_path / "m.pth", **settings), "--inpaint",
                        tmp_path / ("ten.png" if clip else "wide.png"), "--mask", tmp_path / "mask.png", "--labels", 7,
                        3, "--count", 1, "--out", tmp_path / "a.png")
    assert code == 0, err
    seen, = shown
    assert (seen.way, seen.labels, hasattr(seen, "rounds")) == (edit.ways.inpaint, [7, 3], False)
    known = seen.known.expand(seen.picture.shape)[0, 0]
    assert torch.equal(known, torch.from_numpy(mask < 128).expand_as(known)) and seen.known.dtype == torch.bool
    frames = to_uint8(seen.picture)[0, 0].numpy().astype(int)
    assert greys_of(frames) == A[:8] if clip else np.array_equal(frames, SLOPE)


def test_what_is_known_of_latents():
    """Those of which all pixels are."""
    class Mean:
        def encode(self, x):
            return F.avg_pool2d(x, 4).repeat(1, 2, 1, 1), None

    config = LatentConfig(image_size=(8, 12), channels=1, num_classes=2, vae="x", latent_shape=(2, 2, 3), clamp=False,
                          latent_mean=(0.0,), latent_std=(1.0,), patch_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentConfig, "find_vae", lambda *_: Mean())
        patch.setattr(edit.draw, "read_picture", lambda *_: (torch.rand(1, 1, 8, 12), known))
        known = torch.ones(1, 1, 8, 12, dtype=torch.bool)
        known[0, 0, 3, 4] = known[0, 0, 4:, 8:] = False
        args = argparse.Namespace(morph=None, edit=None, inpaint="", mask="", labels="1")
        *_, options = edit.draw.prepare(config.build_model(), config, args, 11)
    latents, of = options["way"].keywords["picture"], options["way"].keywords["known"]
    assert latents.shape == (1, 2, 2, 3) and of.dtype == torch.bool
    assert of[0, 0].tolist() == [[True, False, True], [True, True, False]]


def test_what_a_morph_is_made_of(call, tmp_path, shown):
    """The embeddings lie evenly between those of the two labels, from the first to the second; each row has the noise
    of an image of --seed, and goes from there to that of --to-seed on a quarter of a circle."""
    checkpoint = make_checkpoint(tmp_path / "m.pth", image_size=(8, 12))
    table = load(checkpoint, precision="fp32")[0].label_embedding.weight
    flags = ["--checkpoint", checkpoint, "--morph", "3:8", "--count", 2, "--seed", 5, "--precision", "fp32", "--out",
             tmp_path / "a.png"]
    for more in ([], ["--to-seed", 9]):
        assert call(edit.draw, *flags, *more)[0] == 0
    share = torch.arange(11)[:, None] / 10
    for seen, to_seed in zip(shown, (5, 9), strict=True):
        assert seen.labels == [*range(11)] * 2 and seen.way is from_noise and seen.model.null_label == 11
        rows = seen.model.label_embedding.weight
        torch.testing.assert_close(rows[:11], (1 - share) * table[3] + share * table[8])
        assert torch.equal(rows[[0, 10, 11]], table[[3, 8, 10]])
        here, there = (noise_source(seed, [0, 1], (1, 8, 12), "cpu")() for seed in (5, to_seed))
        found = seen.source(seen.config.seed, list(range(22)), (1, 8, 12), "cpu")().unflatten(0, (2, 11))
        angles = (torch.arange(11) / 10 * np.pi / 2).view(11, 1, 1, 1)
        for k in range(2):
            way = here[k] if to_seed == 5 else angles.cos() * here[k] + angles.sin() * there[k]
            torch.testing.assert_close(found[k], way.expand(11, -1, -1, -1))


def test_a_clip_morphs(call, tmp_path):
    """As an animation, or with --strip its frames side by side; without the names of its classes above."""
    checkpoint = make_checkpoint(tmp_path / "clips.pth", **CLIPS | dict(num_classes=2, classes=("cat", "dog")))
    flags = ["--checkpoint", checkpoint, "--morph", "cat:dog", "--count", 1, "--device", "cpu", "--out"]
    code, out, _ = call(edit.draw, *flags, tmp_path / "m.png")
    assert code == 0 and "11 clips of 4 frames" in out
    assert size(tmp_path / "m.png") == ((2 + 11 * 58, 2 + 58), "L", 4)
    assert call(edit.draw, *flags, tmp_path / "s.png", "--strip")[0] == 0
    assert size(tmp_path / "s.png") == ((2 + 4 * 58, 2 + 11 * 58), "L", 1)
    with Image.open(tmp_path / "m.png") as clips, Image.open(tmp_path / "s.png") as strip:
        for frame in range(4):
            clips.seek(frame)
            for row in (0, 10):
                assert np.array_equal(tile(clips, 0, row), tile(strip, row, frame))
    assert draw(morph="cat:dog", checkpoint=checkpoint).size == (2 + 4 * 58, 2 + 11 * 58)


@pytest.mark.parametrize(("flags", "words"), [
    (["--count", 300], "WEBP, 640 x 17,402 pixels"),
    (["--count", 3000, "--gif"], "WEBP, 582 x 17,402 pixels")])
def test_a_morph_too_large_for_its_format_is_refused_before_the_work(call, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(inference, "sample", None)
    monkeypatch.setattr(inference, "check_count", lambda *_: None)
    assert_refused(call(edit.draw, "--checkpoint", SHIPPED, "--morph", "3:8", *flags, "--out", "a.webp"), words)
    assert not any(tmp_path.iterdir())
