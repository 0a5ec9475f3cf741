import numpy as np
import torch
from conftest import assert_refused
from PIL import Image

import generator
from dataset import load_dataset


def folders(tmp_path):
    return ["--real", tmp_path / "real", "--fake", tmp_path / "fake"]


def read(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_fills_both_folders(command, trained, tmp_path):
    process = command("generator.py", "--checkpoint", trained / "model.pth", "--count", 12, *folders(tmp_path))
    assert process.returncode == 0, process.stderr
    assert sorted(read(tmp_path / "fake")) == [f"{i:06d}_{i % 10}.png" for i in range(12)]
    real = sorted(read(tmp_path / "real"))
    assert [name[:6] for name in real] == [f"{i:06d}" for i in range(12)]
    data = load_dataset("digits", "")
    for name in real:
        image = torch.from_numpy(np.array(Image.open(tmp_path / "real" / name)))
        match = (data.images[:, 0] == image).all(dim=(1, 2)).nonzero()[:, 0]
        assert len(match) and data.labels[match[0]] == int(name[7])


def test_goes_on_and_does_not_depend_on_the_batches(call, trained, tmp_path):
    flags = ["--checkpoint", trained / "model.pth"]
    once, parts = tmp_path / "once", tmp_path / "parts"
    assert call(generator, *flags, *folders(once), "--count", 11)[0] == 0
    assert call(generator, *flags, *folders(parts), "--count", 4)[0] == 0
    kept = parts / "fake" / "000001_1.png"
    old = kept.stat().st_mtime_ns
    (parts / "fake" / "000002_2.png").unlink()  # what is missing comes back
    assert call(generator, *flags, *folders(parts), "--count", 11, "--batch-size", 3)[0] == 0
    assert kept.stat().st_mtime_ns == old
    assert read(once / "real") == read(parts / "real")
    assert read(once / "fake") == read(parts / "fake")
    assert not list(parts.glob("*/*.tmp"))


def test_images_of_two_kinds_are_not_mixed(call, trained, tmp_path):
    flags = ["--checkpoint", trained / "model.pth", "--count", 3, *folders(tmp_path)]
    assert call(generator, *flags)[0] == 0
    before = read(tmp_path / "fake")
    assert_refused(call(generator, *flags, "--guidance", 4), "another guidance", tmp_path / "fake")
    assert read(tmp_path / "fake") == before
    (tmp_path / "other").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "other" / "mine.png")
    assert_refused(call(generator, *flags, "--fake", tmp_path / "other"), "unknown origin")
    assert sorted(path.name for path in (tmp_path / "other").iterdir()) == ["mine.png"]


def test_bad_flags(call, trained, tmp_path):
    flags = ["--checkpoint", trained / "model.pth", *folders(tmp_path)]
    assert_refused(call(generator, *flags, "--count", 0), "--count 0")
    assert_refused(call(generator, *flags, "--count", 3, "--batch-size", 0), "batch_size is 0")
    assert_refused(call(generator, *flags[2:], "--checkpoint", "none.pth"), "none.pth")
    (tmp_path / "file").touch()
    assert_refused(call(generator, *flags, "--count", 3, "--fake", tmp_path / "file"), tmp_path / "file")


def test_more_images_than_the_data_set_has(call, trained, tmp_path, monkeypatch):
    data = load_dataset("digits", "")
    few = data._replace(images=data.images[:5], labels=data.labels[:5])
    monkeypatch.setattr(generator, "load_dataset", lambda *args, **options: few)
    code, _, err = call(generator, "--checkpoint", trained / "model.pth", "--count", 7, *folders(tmp_path))
    assert code == 0 and "only 5 training images" in err
    assert len(read(tmp_path / "real")) == 5 and len(read(tmp_path / "fake")) == 7
