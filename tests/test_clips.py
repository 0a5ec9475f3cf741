from support import image_files, sizes
from support.commands import UserError
from support.image_files import read_clip

import os
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import TINY, assert_refused, same, train_until
from PIL import Image

import edit.draw
from dataset import Dataset, to_float
from latent.vae import VAE, save_vae
from record.checkpoint import load_checkpoint
from video import clips as clips_module
from video import draw, train_dit
from video.clips import CLIPS, Clips, read_clips
from video.config import ClipConfig


def frames_of(*greys, size=(8, 8), mode="L"):
    return [Image.new("L", size, grey).convert(mode) for grey in greys]


def save(path, frames, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)


def greys(path, mode="L"):
    return read_clip(path, mode=mode)[0].amax((1, 2, 3)).tolist()


@pytest.mark.parametrize(("name", "options"), [("a.gif", {}), ("a.webp", dict(lossless=True)), ("a.png", {}),
                                               ("a.apng", {})])
def test_frames_of_animations(tmp_path, name, options):
    """A frame that is shown for longer counts as several: encoders merge frames that are alike."""
    save(tmp_path / name, frames_of(0, 50, 50, 50, 100, 200), duration=40, **options)
    assert greys(tmp_path / name) == [0, 50, 50, 50, 100, 200]
    save(tmp_path / name, frames_of(0, 50, 100), duration=[80, 240, 120], **options)
    assert greys(tmp_path / name) == [0, *[50] * 3, *[100] * 2]
    save(tmp_path / name, frames_of(0, 50, 100), duration=500, **options)  # slow: ten frames a second
    assert greys(tmp_path / name) == [0] * 5 + [50] * 5 + [100] * 5


def test_clips_without_times(tmp_path):
    frames = frames_of(10, 20, 30)
    save(tmp_path / "a.gif", frames)
    assert greys(tmp_path / "a.gif") == [10, 20, 30]
    frames[0].save(tmp_path / "one.png")
    assert greys(tmp_path / "one.png") == [10]
    (tmp_path / "folder").mkdir()
    for i, frame in enumerate(frames):
        frame.save(tmp_path / "folder" / f"{i}.png")
    assert greys(tmp_path / "folder") == [10, 20, 30]
    save(tmp_path / "rgba.png", [frame.convert("RGBA") for frame in frames], duration=10)
    assert read_clip(tmp_path / "rgba.png")[0].shape == (3, 3, 8, 8)
    assert read_clip(tmp_path / "rgba.png", mode="L")[0].shape == (3, 1, 8, 8)


def test_broken_clips(tmp_path):
    save(tmp_path / "a.gif", [Image.effect_noise((32, 32), 90) for _ in range(4)], duration=50)
    whole = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "b.gif").write_bytes(whole[:30])
    (tmp_path / "c.gif").write_bytes(b"GIF89a no clip")
    save(tmp_path / "d.png", frames_of(*[0, 50, 100] * 4), duration=[20, 60_000, 20] * 4)  # steps of 20 ms
    for name in ("b.gif", "c.gif", "d.png"):
        with pytest.raises(UserError, match=name):
            read_clip(tmp_path / name)


@pytest.fixture
def folder(tmp_path):
    """Two classes of clips; frame i of clip k is of the grey 40 k + i."""
    for k, (path, count) in enumerate((("left/a.gif", 6), ("left/b.png", 4), ("right/c.webp", 5))):
        save(tmp_path / "data" / path, frames_of(*range(40 * k, 40 * k + count), size=(10, 8)), duration=50,
             **({"lossless": True} if "webp" in path else {}))
    (tmp_path / "data" / "right" / "d").mkdir()
    for i in range(7):
        Image.new("L", (8, 8), 120 + i).save(tmp_path / "data" / "right" / "d" / f"{i:02d}.png")
    (tmp_path / "data" / "right" / "notes.txt").write_text("")
    return tmp_path / "data"


def read(folder, **settings):
    frames, *rest = read_clips(ClipConfig(dataset="clips", data_dir=str(folder), **settings))
    return Clips("clips", frames, *rest)


def test_clips_in_files(folder):
    clips = read(folder)
    assert clips.classes == ["left", "right"] and clips.labels.tolist() == [0, 0, 1, 1]
    assert clips.lengths.tolist() == [6, 4, 5, 7] and clips.T == 4 and clips.shape == (1, 4, 8, 8)
    assert clips.settings == dict(dataset="clips", image_size=(4, 8, 8), channels=1, num_classes=2,
                                  classes=("left", "right"))
    index = torch.arange(4).repeat(50)
    x = clips.x_0(index, slice(None), torch.Generator().manual_seed(0))
    assert x.shape == (200, 1, 4, 8, 8)
    shown = ((x + 1) * 127.5).round().int()[:, 0, :, 0, 0]
    assert (shown.diff(dim=1) == 1).all() and torch.equal(shown[:, 0] // 40, index)  # consecutive, of their clip
    starts = [set((shown[index == k, 0] - 40 * k).tolist()) for k in range(4)]
    assert starts == [{0, 1, 2}, {0}, {0, 1}, {0, 1, 2, 3}]  # wherever it may begin
    for part in (slice(0, 70), slice(70, 200)):
        assert torch.equal(clips.x_0(index, part, torch.Generator().manual_seed(0)), x[part])


def test_fewer_frames_of_clips(folder):
    """Of --sizes: so many consecutive ones, of each clip wherever they may begin."""
    clips = read(folder).at((2, 8, 8))
    assert clips.shape == (1, 2, 8, 8) and clips.labels.tolist() == [0, 0, 1, 1]
    index = torch.arange(4).repeat(60)
    x = clips.x_0(index, slice(None), torch.Generator().manual_seed(0))
    shown = ((x + 1) * 127.5).round().int()[:, 0, :, 0, 0]
    assert shown.shape == (240, 2) and (shown.diff(dim=1) == 1).all()
    assert [set((shown[index == k, 0] - 40 * k).tolist()) for k in range(4)] == [{*range(n - 1)} for n in (6, 4, 5, 7)]


def test_short_clips_are_left_out(folder, capsys):
    clips = read(folder, image_size="5x6x6")
    assert clips.lengths.tolist() == [6, 5, 7] and clips.shape == (1, 5, 6, 6)
    assert "1 of 4 clips have fewer than 5 frames and are left out" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"left has no clip of 7 frames: set --image-size to fewer, .* 3x8x8"):
        read(folder, image_size="7x8x8")


@pytest.mark.parametrize(("tint", "channels"), [(1, 1), (4, 3)])
def test_a_tint_that_rounding_makes_is_grey(tmp_path, tint, channels):
    """One level between the channels, and no more."""
    frames = [Image.new("RGB", (8, 8), (grey, grey + tint, grey)) for grey in (10, 90, 200)]
    save(tmp_path / "x" / "a.png", frames)
    assert CLIPS["clips"](ClipConfig(dataset="clips", data_dir=str(tmp_path)), torch.device("cpu")).shape[0] == channels


def test_other_clips_of_the_same_frames_have_another_fingerprint():
    frames = Dataset("", torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1), torch.zeros(8, dtype=torch.int64), ["a"])
    numbers = [torch.tensor(each) for each in ([0, 4], [4, 4], [0, 0])]  # starts, lengths, labels
    others = [[*numbers[:i], numbers[i] + torch.tensor([0, -1]), *numbers[i + 1:]] for i in range(3)]
    found = [Clips("", frames, *each, 2).fingerprint for each in (numbers, *others)] + [
        Clips("", frames, *numbers, 3).fingerprint]
    assert len({*found}) == 5


def test_colour_is_seen(folder):
    Image.new("RGB", (8, 8), (200, 0, 0)).save(folder / "right" / "d" / "03.png")
    clips = read(folder)
    assert clips.shape == (3, 4, 8, 8) and read(folder, channels=1).shape[0] == 1
    assert (clips.frames.images[:6] == clips.frames.images[:6, :1]).all()


def test_other_clips_have_another_fingerprint(folder):
    first = read(folder).fingerprint
    assert read(folder).fingerprint == first
    others = {read(folder, image_size="3x8x8").fingerprint}
    (folder / "left" / "a.gif").rename(folder / "right" / "z.gif")
    others.add(read(folder).fingerprint)
    (folder / "right" / "z.gif").unlink()
    assert len({first, *others, read(folder).fingerprint}) == 4


def test_folders_that_are_none(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    for path, words in ((tmp_path / "no", "is not a folder"), (tmp_path / "empty", "no clips in"),
                        (tmp_path, f"lies in {folder}, .*, point --data-dir at {folder}"),
                        (folder / "right" / "d", "have one frame each")):
        with pytest.raises(UserError, match=words):
            read(path)
    assert read(folder / "left").classes == ["all"]
    (folder / "left" / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"a\.gif cannot be read"):
        read(folder)


def test_classes_are_in_order_and_those_of_train_where_there_is_one(folder):
    for path in ("9/a.gif", "10/b.gif"):
        save(folder / path, frames_of(1, 2, 3, 4), duration=50)
    assert read(folder).classes == ["9", "10", "left", "right"]
    save(folder / "split" / "train" / "up" / "c.gif", frames_of(1, 2, 3, 4), duration=50)
    save(folder / "split" / "test" / "down" / "c.gif", frames_of(1, 2, 3, 4), duration=50)
    assert read(folder / "split").classes == ["up"]


def test_frames_are_in_natural_order(tmp_path):
    folder = tmp_path / "data" / "a" / "clip"
    folder.mkdir(parents=True)
    for i in range(1, 13):
        Image.new("L", (8, 8), 20 * i).save(folder / f"{i}.png")
    in_order = [20 * i for i in range(1, 13)]
    assert greys(folder) == in_order
    assert read(tmp_path / "data").frames.images.amax((1, 2, 3)).tolist() == in_order


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_ten_milliseconds_or_less_are_a_tenth_of_a_second(tmp_path, name):
    """As browsers have it: else one such frame would make the others ten times as long."""
    save(tmp_path / name, frames_of(0, 50, 100, 150), duration=[100, 10, 100, 200], **(
        dict(lossless=True) if "webp" in name else {}))
    assert greys(tmp_path / name) == [0, 50, 100, 150, 150]


def write_video(path, frames, rate, codec="libx264", first=0):
    """frames: uint8 arrays (H, W, 3). first: the number of the first one, which says when it is shown."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = *frames[0].shape[:2], "yuv420p"
        for number, pixels in enumerate(frames, first):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = number, 1 / Fraction(rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def plain(*greys, size=(32, 48)):
    return [np.full((*size, 3), grey, np.uint8) for grey in greys]


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.mov", "libx264"), ("a.webm", "libvpx")])
def test_ten_frames_a_second_are_taken_of_a_video(tmp_path, name, codec):
    for rate, taken in ((30, range(0, 24, 3)), (25, (0, 2, 5, 7, 10, 12, 15, 17, 20, 22)),
                        (5, [i // 2 for i in range(48)])):
        clip, size = read_clip(write_video(tmp_path / name, plain(*range(0, 240, 10)), rate, codec), (16, 24))
        assert clip.shape == (len(taken), 3, 16, 24) and size == (48, 32)
        assert (clip.float().mean((1, 2, 3)) - 10 * torch.tensor(list(taken))).abs().max() < 4, rate
    assert read_clip(tmp_path / name, still=True)[0].shape == (1, 3, 32, 32)


def test_a_video_may_begin_late(tmp_path):
    """As one that was cut out of another: time counts from the first frame on."""
    path = write_video(tmp_path / "a.webm", plain(*range(0, 240, 10)), 10, "libvpx", first=7)
    clip = read_clip(path, (16, 24))[0]
    assert len(clip) == 24 and (clip.float().mean((1, 2, 3)) - 10 * torch.arange(24)).abs().max() < 4


def test_a_telephone_s_video_is_turned_upright(tmp_path):
    frame = np.zeros((32, 48, 3), np.uint8)
    frame[:16, :24] = 255  # its upper left quarter
    data = write_video(tmp_path / "a.mp4", [frame] * 3, 10).read_bytes()
    start, one = data.index(b"tkhd") + 44, 2**16
    assert data[start:start + 36] == struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 2**30)
    (tmp_path / "a.mp4").write_bytes(data[:start] + struct.pack(">9i", 0, one, 0, -one, 0, 0, 32 * one, 0, 2**30)
                                     + data[start + 36:])  # a quarter to the right
    clip, size = read_clip(tmp_path / "a.mp4", (48, 32), mode="L")
    assert size == (32, 48) and clip[0, 0, :20, 20:].min() > 200 and clip[0, 0, 28:].max() < 50
    assert clip[0, 0, :, :12].max() < 50


def test_videos_are_clips(tmp_path, capsys):
    write_video(tmp_path / "own" / "a" / "long.mp4", plain(*range(0, 240, 10)), 10)
    write_video(tmp_path / "own" / "b" / "deeper" / "short.webm", plain(*range(0, 120, 10)), 10, "libvpx")
    clips = read(tmp_path / "own")
    assert clips.classes == ["a", "b"] and clips.lengths.tolist() == [24, 12] and clips.shape == (1, 12, 32, 32)
    assert "10 frames a second are taken of the 2 videos" in capsys.readouterr().err


def test_broken_videos(tmp_path):
    whole = write_video(tmp_path / "a.mp4", plain(0, 50, 100), 10).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "none.mp4").write_bytes(b"no video")
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path / 'a.mp4'}\n#EXT-X-ENDLIST\n")
    for name in ("cut.mp4", "none.mp4", "list.mp4"):  # the last one would have another file opened
        with pytest.raises(UserError, match=f"{name} cannot be read as a video"):
            read_clip(tmp_path / name)
    write_video(tmp_path / "long.mp4", plain(*[9] * 4, size=(16, 16)), Fraction(1, 1000))  # an hour
    with pytest.raises(UserError, match=r"long\.mp4 cannot be read .*longer than 10,000 frames"):
        read_clip(tmp_path / "long.mp4")


def test_clips_that_do_not_fit(tmp_path, monkeypatch):
    """They are refused as the header says, or the next frame would be one too many."""
    for path, count in (("a/one.gif", 5), ("b/two.png", 7)):
        save(tmp_path / "own" / path, frames_of(*range(count), size=(20, 10), mode="RGB"), duration=100)
    write_video(tmp_path / "own" / "b" / "video.mp4", plain(*range(8)), 10)
    needed = 3 * 4 * 6  # bytes of a frame in colour
    for path, count in (("a/one.gif", 5), ("b/two.png", 7), ("b/video.mp4", 8)):
        monkeypatch.setattr(sizes, "available_memory", lambda count=count: 2 * needed * count)
        assert len(read_clip(tmp_path / "own" / path, (4, 6))[0]) == count
        monkeypatch.setattr(sizes, "available_memory", lambda count=count: 2 * needed * count - 1)
        read_clip(tmp_path / "own" / path, (4, 6), still=True)
        with monkeypatch.context() as patch, pytest.raises(UserError, match=f"^{count} images of 4 x 6 pixels"):
            patch.setattr(image_files, "to_tensor", None)
            read_clip(tmp_path / "own" / path, (4, 6))
    everything = 2 * 4 * 6 * (5 + 7) + 2 * needed * 8  # those that are read are grey, and the last one not yet
    monkeypatch.setattr(sizes, "available_memory", lambda: everything)
    assert len(read(tmp_path / "own", image_size="2x4x6").frames.labels) == 20
    monkeypatch.setattr(sizes, "available_memory", lambda: everything - 1)
    with pytest.raises(UserError, match=r"^12 images of 4 x 6 pixels"):
        read(tmp_path / "own", image_size="2x4x6")
    save(tmp_path / "long.gif", frames_of(0, 50, 100), duration=[20, 2000, 20])
    monkeypatch.setattr(sizes, "available_memory", lambda: 2 * 64 * 102 - 1)
    with pytest.raises(UserError, match=r"^102 images of 8 x 8 pixels"):
        read_clip(tmp_path / "long.gif", mode="L")


def test_a_clip_above_the_largest_size_is_refused_at_its_first_frame(tmp_path, monkeypatch):
    folder = tmp_path / "own" / "a" / "clip"
    folder.mkdir(parents=True)
    for i in range(3):
        Image.new("L", (1100, 1030)).save(folder / f"{i}.png")
    original, seen = image_files.read_image, []
    monkeypatch.setattr(image_files, "read_image", lambda path, *of: seen.append(path) or original(path, *of))
    with pytest.raises(UserError, match=r"3 images of 1030 x 1030 .* 1024 x 1024 is the largest"):
        read(tmp_path / "own")
    assert len(seen) == 1


def test_a_folder_one_level_too_high_is_noticed(tmp_path, capsys):
    """The folders of classes are no clips, whose frames would be the first ones of different animations."""
    for name in ("left/a.gif", "left/b.gif", "right/c.gif"):
        save(tmp_path / "zip" / "own" / name, frames_of(*range(0, 200, 50)))
    with pytest.raises(UserError, match=f"point --data-dir at {tmp_path}/zip/own"):
        read(tmp_path / "zip")
    save(tmp_path / "zip" / "more" / "d.gif", frames_of(*range(0, 200, 50)))
    capsys.readouterr()
    assert read(tmp_path / "zip").labels.tolist() == [0, 1, 1, 1]
    assert f"{tmp_path}/zip/own: what lies in its 2 folders" in capsys.readouterr().err
    frames_of(5)[0].save(tmp_path / "zip" / "own" / "left" / "0.png")
    with pytest.raises(UserError, match=r"left/a\.gif has 4 frames, and is no frame of a clip"):
        read(tmp_path / "zip")


def test_what_clips_leave_out_is_said_once(folder, capsys):
    (folder / "right" / "d" / "notes.txt").touch()
    (folder / "right" / "d" / "inner").mkdir()
    (folder / "left" / "sound.mp3").touch()
    os.mkfifo(folder / "left" / "pipe.gif")
    (folder / "up").mkdir()
    read(folder)
    said = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert said == [f"{folder}: left out 5 files: 2 .txt, 1 .mp3, 1 folder beside frames, 1 special file; and 1 folder,"
                    " in which it found nothing to read: up"]


def test_clips_are_grey_by_content_and_on_a_ground(tmp_path):
    frame = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    frame.putpixel((2, 1), (0, 0, 0, 255))
    save(tmp_path / "own" / "a" / "x.webp", [frame, frame.rotate(90)], duration=100, lossless=True)
    save(tmp_path / "own" / "a" / "y.webp", frames_of(0, 130, size=(8, 8), mode="RGB"), duration=100)
    assert read(tmp_path / "own").shape == (1, 2, 8, 8)
    black, white = (read(tmp_path / "own", ground=ground).frames.images[0, 0] for ground in ("black", "white"))
    assert not black.any() and white[1, 2] == 0 and white.float().mean() > 250


FLAGS = [*TINY[2:], "--dataset", "clips", "--image-size", "4x8x8", "--patch-size", "2x4x4", "--steps", 6]


def test_training_on_clips_and_drawing_them(call, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--data-dir", folder, "--sizes", "1x8x8"]
    code, out, _ = call(train_dit, *flags, "--run-dir", "whole")
    assert code == 0 and "4 clips of 4 to 7 frames, 4 at a time" in out
    train_until(call, [*flags, "--run-dir", "parts"], 3, train_dit)
    assert call(train_dit, *flags, "--run-dir", "parts", "--resume")[0] == 0
    whole, parts = (load_checkpoint(f"{name}/model.pth", (ClipConfig,)) for name in ("whole", "parts"))
    assert all(same(whole[name], parts[name]) for name in ("data", "ema", "model", "optimizers", "window"))
    code, out, _ = call(draw, "--checkpoint", "whole", "--labels", "right", "--count", 1)
    assert code == 0 and out.startswith("samples.gif: 1 clips of 4 frames")
    code, out, _ = call(draw, "--checkpoint", "whole", "--labels", "right", "--count", 2, "--size", "1x8x8")
    assert code == 0 and out.startswith("samples.png: 2 images")  # a still is a clip of one frame
    for size in ("5x8x8", "4x8x16", "8x8", "x", "abc", "0x8x8"):
        assert_refused(call(draw, "--checkpoint", "whole", "--size", size), "--size", "at most 4x8x8")
    assert_refused(call(draw, "--checkpoint", "whole", "--size", "2x8x8", "--extend", "samples.gif"), "--extend")
    (folder / "left" / "a.gif").unlink()
    assert_refused(call(train_dit, *flags, "--run-dir", "parts", "--resume", "--steps", 8), "other data")
    assert_refused(call(train_dit, *flags, "--run-dir", "new", "--sizes", "6x8x8"), "sizes hold 6x8x8", "has 4")


def test_clips_of_latents(call, folder, tmp_path, monkeypatch):
    """Each frame through the VAE, to learn and to show."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_vae(VAE(1, 1, 2, (8, 8), norm_num_groups=4), "vae")
    flags = [*FLAGS, "--data-dir", folder, "--vae", "vae", "--patch-size", "2x2x2"]
    code, out, err = call(train_dit, *flags, "--run-dir", "run")
    assert code == 0 and "latents   2 x 4 x 4 of vae" in out, err
    config = load_checkpoint("run/model.pth", (ClipConfig,))["config"]
    assert (config.image_size, config.latent_shape) == ((4, 8, 8), (2, 4, 4, 4))
    code, out, _ = call(draw, "--checkpoint", "run", "--labels", "right", "--count", 1, "--strip")
    assert code == 0 and out.startswith("strip.png: 1 clips of 4 frames")
    code, out, err = call(edit.draw, "--checkpoint", "run", "--edit", folder / "left" / "a.gif", "--strength", 0.5,
                          "--count", 1)
    assert code == 0, err
    assert_refused(call(train_dit, *flags, "--run-dir", "new", "--sizes", "2x8x8"), "only clips of pixels")


def test_latents_of_clips_are_those_of_their_frames():
    """What is random in a frame does not depend on how the batch is shared."""
    class Noisy(Dataset):
        def x_0(self, index, part, generator):
            return super().x_0(index, part, generator) + torch.rand(len(index), 1, 1, 1, generator=generator)[part]

    images = torch.randint(256, (12, 1, 2, 2), dtype=torch.uint8)
    frames = Noisy("x", images, torch.zeros(12, dtype=torch.int64), ["a"])
    clips = Clips("x", frames, torch.tensor([0, 5]), torch.tensor([3, 3]), torch.tensor([0, 0]), 3)
    index = torch.tensor([1, 0, 1])
    x = clips.x_0(index, slice(None), torch.Generator().manual_seed(0))
    assert torch.equal(clips.x_0(index, slice(1, 3), torch.Generator().manual_seed(0)), x[1:])
    between = x - to_float(images)[torch.tensor([[5, 6, 7], [0, 1, 2], [5, 6, 7]])].movedim(1, 2)
    assert between.min() >= 0 and between.flatten(3)[..., 0].unique().numel() == 9


def test_sprites_in_motion(call, tmp_path, monkeypatch):
    """Each action of each character is a clip of 8 frames, or of fewer of them anywhere in it."""
    labels = torch.arange(3).repeat_interleave(8).repeat(4)
    images = torch.arange(96).byte().view(96, 1, 1, 1).expand(96, 3, 8, 8).contiguous()
    sprites = Dataset("sprites", images, labels, ["walk front", "walk left", "walk right"])
    asked = []
    monkeypatch.setattr(clips_module, "load_images", lambda name, *args, **of: (asked.append((args, of)), sprites)[1])
    data = CLIPS["sprites"](ClipConfig(dataset="sprites", image_size="8x8x8"), torch.device("cpu")).load()
    assert data.settings == dict(dataset="sprites", image_size=(8, 8, 8), channels=3, num_classes=3,
                                 classes=("walk front", "walk left", "walk right"))
    assert data.labels.tolist() == [0, 1, 2] * 4
    x = data.x_0(torch.tensor([5, 0]), slice(None), torch.Generator().manual_seed(0))
    assert ((x[:, 0, :, 0, 0] + 1) * 127.5).round().tolist() == [[*range(40, 48)], [*range(8)]]
    few = CLIPS["sprites"](ClipConfig(dataset="sprites", image_size="3x8x8", data_dir="there", channels=1),
                           torch.device("cpu"))
    assert asked[-1] == (("there",), dict(image_size=[8, 8], channels=1)) and few.shape[1] == 3
    x = few.x_0(torch.tensor([5]).repeat(90), slice(None), torch.Generator().manual_seed(0))
    shown = ((x[:, 0, :, 0, 0] + 1) * 127.5).round()
    assert (shown.diff(dim=1) == 1).all() and set(shown[:, 0].tolist()) == {*range(40, 46)}
    with pytest.raises(UserError, match="move in 8 frames"):
        CLIPS["sprites"](ClipConfig(dataset="sprites", image_size="9x8x8"), torch.device("cpu"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_vae(VAE(3, 3, 2, (8, 8), norm_num_groups=4), "vae")
    code, out, err = call(train_dit, *TINY[2:], "--dataset", "sprites", "--image-size", "8x8x8", "--vae", "vae",
                          "--steps", 2)
    assert code == 0 and "12 clips of 8 frames" in out, err
    config = load_checkpoint("run/model.pth", (ClipConfig,))["config"]
    assert (config.latent_shape, config.patch_size, config.image_size) == ((2, 8, 4, 4), (2, 1, 1), (8, 8, 8))
