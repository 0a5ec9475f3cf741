from support import sizes

import argparse

import numpy as np
import pytest
import torch
from conftest import (
    CLIPS,
    WIDE,
    A,
    B,
    assert_refused,
    greys_of,
    load,
    make_checkpoint,
    new,
    save_clip,
    save_frames,
    size,
)
from PIL import Image

import inference
import video.draw
from dataset import to_uint8
from diffusion import from_noise
from inference import generate
from video.draw import draw_longer
from video.given import complete


def test_clips_are_animated(call, tmp_path, monkeypatch):
    """As a GIF, of which the strip has the frames side by side, each to the last bit."""
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", make_checkpoint(tmp_path / "clips.pth", **CLIPS), "--labels", "31", "--device", "cpu"]
    code, out, _ = call(video.draw, *flags)
    assert code == 0 and out.startswith("samples.gif: 2 clips of 4 frames, dpm with 3 steps")
    assert size("samples.gif")[::2] == ((2 + 2 * 58, 2 + 58), 4)
    assert call(video.draw, *flags, "--count", 3)[0] == 0
    assert size("samples.gif")[::2] == ((2 + 2 * 58, 2 + 3 * 58), 4)
    with Image.open("samples.gif") as image:
        assert image.info["duration"] == 100 and image.info["loop"] == 0
    assert call(video.draw, *flags, "--strip")[0] == 0
    assert size("strip.png") == ((2 + 4 * 58, 2 + 2 * 58), "L", 1)
    assert call(video.draw, *flags, "--count", 1, "--out", "one.png")[0] == 0
    with Image.open("strip.png") as strip, Image.open("one.png") as clip:
        for i in range(4):
            clip.seek(i)
            for row in range(2):
                frame = clip.crop((58 * row, 0, 58 * row + 58, 58))
                assert strip.crop((58 * i, 58 * row, 58 * i + 58, 58 * row + 58)).tobytes() == frame.tobytes()
    code, _, err = call(video.draw, *flags, "--out", "a.jpg")
    assert_refused((code, "", err), "JPEG cannot be animated")
    with Image.open("strip.png") as strip:  # in a notebook
        assert video.draw.draw("31", checkpoint="clips.pth", device="cpu").tobytes() == strip.tobytes()


def test_a_clip_is_a_function_of_seed_and_index(tmp_path):
    model, config = load(make_checkpoint(tmp_path / "clips.pth", **CLIPS))
    labels = torch.arange(20) % 10
    clips = generate(model, config, labels)
    assert clips.shape == (20, 1, 4, 8, 8) and clips.std() > 0.1
    for index in ([0], [19], [3, 17], [*range(5, 20)]):
        assert torch.equal(generate(model, config, labels[index], index), clips[index])


def drawn_frames(path):
    """The grey of the first image's upper left corner in each frame of an animation."""
    with Image.open(path) as image:
        greys = []
        for i in range(getattr(image, "n_frames", 1)):
            image.seek(i)
            greys += [image.convert("L").getpixel((3, 3))] * round(image.info.get("duration", 100) / 100)
        return greys


def drawn(window, *frames):
    return [(window, i) for i in frames]


@pytest.mark.parametrize(("flags", "windows", "clip"), [
    ("--extend a.png --frames 20", [(A[-4:], 4, []), (drawn(1, 4, 5, 6, 7), 4, []), (drawn(2, 4, 5, 6, 7), 4, [])],
     [*A, *drawn(1, 4, 5, 6, 7), *drawn(2, 4, 5, 6, 7), *drawn(3, 4, 5)]),
    ("--extend a.png", [(A[-4:], 4, [])], [*A, *drawn(1, 4, 5, 6, 7)]),
    ("--extend one.png --frames 7", [([70], 7, [])], [70, *drawn(1, 1, 2, 3, 4, 5, 6)]),
    ("--before a.png --frames 20", [([], 4, A[:4]), ([], 4, drawn(1, 0, 1, 2, 3)), ([], 4, drawn(2, 0, 1, 2, 3))],
     [*drawn(3, 2, 3), *drawn(2, 0, 1, 2, 3), *drawn(1, 0, 1, 2, 3), *A]),
    ("--between a.png b.png", [(A[-2:], 4, B[:2])], [*A, *drawn(1, 2, 3, 4, 5), *B]),
    ("--between b.png one.png", [(B[-2:], 5, [70])], [*B, *drawn(1, 2, 3, 4, 5, 6), 70]),
    ("--loop a.png", [(A[-2:], 4, A[:2])], [*A, *drawn(1, 2, 3, 4, 5)]),
    ("--frames 14", [([], 8, []), (drawn(1, 4, 5, 6, 7), 4, []), (drawn(2, 4, 5, 6, 7), 4, [])],
     [*drawn(1, *range(8)), *drawn(2, 4, 5, 6, 7), *drawn(3, 4, 5)])])
def test_what_the_network_is_shown(call, tmp_path, monkeypatch, shown, flags, windows, clip):
    """The frames next to those that it draws, in their places, of each clip its own; the window slides along."""
    monkeypatch.chdir(tmp_path)
    checkpoint = make_checkpoint("clips.pth", **WIDE, given=0.5)
    for name, greys in (("a", A), ("b", B), ("one", [70])):
        save_frames(f"{name}.png", *greys)
    code, out, err = call(video.draw, "--checkpoint", checkpoint, *flags.split(), "--labels", 7, 3, "--count", 1,
                          "--out", "out.png")
    assert code == 0 and f"2 clips of {len(clip)} frames" in out, err

    def expected(frames, k):
        return [new(frame[0], k, frame[1]) if isinstance(frame, tuple) else frame for frame in frames]

    first = flags.startswith(("--extend", "--before", "--frames"))  # those joined have window 0
    for number, (seen, (before, missing, after)) in enumerate(zip(shown, windows, strict=True), 1):
        assert seen.labels == [7, 3] and seen.config.sample_steps == 3
        if not (before or after):  # the clip that --frames alone begins with
            assert seen.way is from_noise and seen.indices is None
            continue
        window = number - (1 if flags.startswith("--frames") else 0) if first else 0
        assert seen.way is complete and seen.indices == [window * 2**32, window * 2**32 + 1]
        known = seen.known.expand(8, 1, 1).flatten().tolist()
        assert known == [True] * len(before) + [False] * missing + [True] * len(after)
        assert seen.picture.shape == (2, 1, 8, 8, 12)
        for k in range(2):
            frames = to_uint8(seen.picture[k, 0]).numpy().astype(int)
            assert greys_of(frames[known]) == expected([*before, *after], k)
    with Image.open("out.png") as picture:
        for k in range(2):
            frames = []
            for number in range(picture.n_frames):
                picture.seek(number)
                frames.append(np.asarray(picture, dtype=int)[2:58:7, 2 + 86 * k:86 + 86 * k:7])
            assert greys_of(np.stack(frames)) == expected(clip, k)


def test_size_and_count_reach_the_sampler(call, tmp_path, shown):
    checkpoint = make_checkpoint(tmp_path / "m.pth", **WIDE, sizes=((2, 8, 4), (4, 16, 8)))
    for asked, shape in ((None, (1, 8, 8, 12)), ("2x8x4", (1, 2, 8, 4)), ("4x16x8", (1, 4, 16, 8))):
        code, out, _ = call(video.draw, "--checkpoint", checkpoint, "--labels", 7, 3, "--count", 3,
                            *(["--size", asked] if asked else []), "--out", tmp_path / "a.png")
        assert code == 0 and f"6 clips of {shape[1]} frames" in out
        assert shown[-1].shape == shape and shown[-1].labels == [7, 3] * 3
        assert size(tmp_path / "a.png")[0] == tuple(2 + n * (m * round(56 / shape[2]) + 2)
                                                   for n, m in ((2, shape[3]), (3, shape[2])))


def test_longer_clips(call, tmp_path, monkeypatch):
    """What is given stays as it is, in its place."""
    monkeypatch.chdir(tmp_path)
    checkpoint = make_checkpoint(tmp_path / "clips.pth", **CLIPS, given=0.5)
    a, b = save_clip("a.png", 10, 20, 30, 40, 50, 60), save_clip("b.png", 200, 210, 220)
    flags = ["--checkpoint", checkpoint, "--labels", 7, "--count", 1, "--out", "new.png"]

    def draw(*more):
        code, out, err = call(video.draw, *flags, *more)
        assert code == 0, err
        frames = drawn_frames("new.png")
        assert f"1 clips of {len(frames)} frames" in out
        return frames

    greys, others = [10, 20, 30, 40, 50, 60], [200, 210, 220]
    assert draw("--extend", a)[:6] == greys and len(draw("--extend", a)) == 8
    assert len(draw("--extend", a, "--frames", 13)) == 13 and draw("--extend", a, "--frames", 13)[:6] == greys
    assert draw("--extend", a, "--frames", 13)[:8] == draw("--extend", a)  # the window slides on
    assert draw("--before", a)[-6:] == greys and draw("--before", a, "--frames", 11)[-6:] == greys
    assert draw("--before", a) != draw("--extend", a)
    found = draw("--between", a, b)
    assert found[:6] == greys and found[-3:] == others and len(found) == 6 + 2 + 3
    found = draw("--loop", a)
    assert found[:6] == greys and len(found) == 8
    assert len(draw("--frames", 9)) == 9 and draw("--frames", 9)[:4] == draw()
    save_clip("one.png", 90)
    assert draw("--extend", "one.png")[0] == 90 and len(draw("--extend", "one.png", "--frames", 6)) == 6


def test_longer_clips_are_a_function_of_seed_and_index(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, config = load(make_checkpoint(tmp_path / "clips.pth", **CLIPS, given=0.5))
    args = argparse.Namespace(extend=save_clip("a.png", 10, 20, 30), before=None, between=None, loop=None, frames=11)
    clips = draw_longer(model, config, [3, 7], 10, args)
    assert clips.shape == (20, 1, 11, 8, 8)
    assert torch.equal(draw_longer(model, config, [3, 7], 1, args), clips[:2])
    assert (clips[0] != clips[2]).any()
    assert len({clips[0, :, i:i + 2].numpy().tobytes() for i in (3, 5, 7, 9)}) == 4  # each window has noise of its own


@pytest.mark.parametrize(("flags", "words"), [
    (["--extend", "a.png", "--loop", "a.png"], ["--extend and --loop"]), (["--extend", "no.gif"], ["no.gif"]),
    (["--before", "a.png", "--between", "a.png", "a.png"], ["--before and --between"]), (["--frames", 0], ["--frames"]),
    (["--loop", "a.png", "--frames", 9], ["--frames"]), (["--between", "a.png"], ["--between"]),
    (["--frames", 99999], ["10,000 frames"]), (["--extend", "a.png", "--size", "2x8x8"], ["--size"]),
    (["--extend", "a.png", "--frames", 9, "--guidance-high", 0.5], ["--guidance-high", "--extend all steps"])])
def test_bad_flags_of_longer_clips(call, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    save_clip("a.png", 10, 20, 30)
    make_checkpoint(tmp_path / "clips.pth", **CLIPS, given=0.5)
    assert_refused(call(video.draw, "--checkpoint", "clips.pth", *flags), *words)


def test_models_that_cannot_make_clips_longer(call, tmp_path, monkeypatch):
    """One that has not learned from given frames, or draws images, is refused before anything is read or drawn."""
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "clips.pth", **CLIPS)
    for flags in (["--extend", "no.gif"], ["--before", "no.gif"], ["--between", "no.gif", "no.gif"],
                  ["--loop", "no.gif"], ["--frames", 9]):
        assert_refused(call(video.draw, "--checkpoint", "clips.pth", *flags), f"{flags[0]} needs a model that was "
                       "trained with frames given: python -m video.train_dit --given 0.3")
    make_checkpoint(tmp_path / "images.pth")
    assert_refused(call(video.draw, "--checkpoint", "images.pth", "--frames", 9), "images.pth", "a model of images",
                   "python inference.py")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clips.pth", "images.pth"]


def test_what_is_given_is_measured(call, tmp_path, monkeypatch):
    make_checkpoint(tmp_path / "clips.pth", **CLIPS, given=0.5)
    flags = ["--checkpoint", tmp_path / "clips.pth", "--labels", 3, 7, "--count", 5, "--out", tmp_path / "a.gif"]
    for more, count in ((["--frames", 12], 2 * 5 * 12), (["--extend", save_clip(tmp_path / "a.png", *range(9))], 130)):
        monkeypatch.setattr(sizes, "available_memory", lambda count=count: 2 * count * 4 * 64 - 1)
        assert_refused(call(video.draw, *flags, *more), f"{count} images of 8 x 8", "lower --count or --frames")
        monkeypatch.setattr(sizes, "available_memory", lambda: 2 * 130 * 4 * 64)
        code, _, err = call(video.draw, *flags, *more)
        assert code == 0, err


def test_a_picture_too_large_for_its_format_is_refused_before_the_work(call, tmp_path, monkeypatch):
    """As large as the clips that are asked for: those of 16 rows are shown taller than those of 8."""
    monkeypatch.chdir(tmp_path)
    make_checkpoint("clips.pth", **CLIPS, sizes=((4, 16, 8),))
    for module in (inference, video.draw):
        monkeypatch.setattr(module, "sample", None)
    flags = ["--checkpoint", "clips.pth", "--labels", 7, "--count", 260, "--out", "a.webp"]
    assert_refused(call(video.draw, *flags, "--size", "4x16x8"), "WEBP, 36 x 17,162 pixels")
    assert_refused(call(video.draw, *flags, "--size", "4x16x8", "--strip", "--count", 400), "WEBP, 138 x 26,402 pixels")
    with pytest.raises(TypeError):  # it is drawn
        call(video.draw, *flags)
