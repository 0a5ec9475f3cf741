"""Whatever a command writes, it replaces no file that it reads, nor one that it has not written itself."""

from support.commands import UserError
from support.files import check_output
from support.pictures import check_picture, save_animation, save_picture

import shutil

import pytest
from conftest import REPOSITORY, TINY, assert_refused
from PIL import Image

import demo.export
import demo.share
import edit.draw
import few.distill
import fid_computer
import generator
import inference
import latent.import_dit
import latent.train_vae
import measure.classifier
import measure.results
import measure.scaling
import measure.score
import text.draw
import time_emb
import train
import video.draw
import video.score


@pytest.fixture
def here(tmp_path, monkeypatch, trained):
    """The current folder, which holds a trained run."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "run")
    return tmp_path


OUTPUTS = [  # the command, its flags, what it writes
    (inference, [], "samples.png"),
    (inference, ["--strip"], "strip.png"),
    (inference, ["--gif"], "samples.gif"),
    (inference, ["--out", "out.webp"], "out.webp"),
    (edit.draw, ["--morph", "3:8"], "strip.png"),
    (video.draw, ["--checkpoint", REPOSITORY / "weights" / "moving.pth"], "samples.gif"),
    (text.draw, ["purple hair"], "samples.gif"),
    (train, [*TINY, "--steps", 1, "--run-dir", "new"], "new/log.csv"),
    (train, [*TINY, "--steps", 1, "--run-dir", "new"], "new/loss.png"),
    (train, [*TINY, "--steps", 1, "--run-dir", "new"], "new/index.html"),
    (train, [*TINY, "--steps", 1, "--run-dir", "new"], "new/samples_000001.png"),
    (train, [*TINY, "--steps", 1, "--run-dir", "new"], "new/model.pth"),
    (few.distill, ["--run-dir", "new"], "new/log.csv"),
    (few.distill, ["--run-dir", "new"], "new/fake_000001.pth"),
    (few.distill, ["--run-dir", "new"], "new/fake_backup.pth"),
    (latent.train_vae, ["--out", "new"], "new/log.csv"),
    (latent.train_vae, ["--out", "new"], "new/samples_000001.png"),
    (demo.share, ["run", "out.pth"], "out.pth"),
    (latent.import_dit, ["official.pt", "out.pth"], "out.pth"),
    (demo.export, [], "dit.html"),
    (fid_computer, ["--real", "images", "--fake", "images", "--save-stats", "out.npz"], "out.npz"),
    (generator, ["--real", "new", "--fake", "new2"], "new/settings.json"),
    (measure.classifier, ["--out", "out.pth"], "out.pth"),
    (measure.results, ["samplers", "--out", "."], "samplers.png"),
    (measure.results, ["runs", "run", "--out", "."], "runs.png"),
    (measure.results, ["runs", "run", "--out", "."], "runs_digits.png"),
    (measure.scaling, ["--out", "new"], "new/scaling.md"),
    (measure.scaling, ["--out", "new"], "new/gflops.png"),
    (measure.scaling, ["--out", "new"], "new/training.png"),
    (measure.scaling, ["--out", "new"], "new/samples.png"),
    (measure.scaling, ["--out", "new", "--rates", "1e-3"], "new/rates.md"),
    (measure.score, ["--pictures", "new"], "new/nearest.png"),
    (measure.score, ["--pictures", "new"], "new/worst.png"),
    (video.score, ["--out", "out.gif"], "out.gif"),
    (time_emb, [], "time_emb.png"),
]


@pytest.mark.parametrize(("module", "flags", "path"), OUTPUTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_file_of_another_program_stays(module, flags, path, here, call):
    path = here / path
    path.parent.mkdir(exist_ok=True)
    if path.suffix in (".png", ".gif", ".webp"):
        Image.new("L", (5, 3), 77).save(path)
    else:
        path.write_bytes(b"something of the user's\n")
    before = path.read_bytes()
    assert_refused(call(module, *flags), path.name)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("module", "flags"), [
    (demo.share, [REPOSITORY / "weights" / "mnist.pth", "run/model.pth"]),
    (latent.import_dit, ["official.pt", "run/model.pth"]),
    (demo.export, ["--out", "run/model.pth"]),
    (measure.classifier, ["--out", "run/model.pth"]),
    (train, [*TINY, "--steps", 1]),
    (few.distill, ["--run-dir", "run"]),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_trained_model_stays(module, flags, here, call):
    before = (here / "run" / "model.pth").read_bytes()
    assert_refused(call(module, *flags), "run/model.pth")
    assert (here / "run" / "model.pth").read_bytes() == before


@pytest.mark.parametrize("flags", [
    ["--edit", "samples.png"], ["--inpaint", "samples.png", "--mask", "mask.png"],
    ["--inpaint", "other.png", "--mask", "samples.png"], ["--edit", "link.png"],
    ["--edit", "samples.png", "--out", "link.png"], ["--extend", "samples.gif"], ["--before", "samples.gif"],
    ["--loop", "samples.gif"], ["--between", "other.gif", "samples.gif"], ["--extend", "."]])
def test_a_picture_that_is_read_stays(flags, here, call):
    """The one that a command itself has drawn too."""
    changed = flags[0] in ("--edit", "--inpaint")
    weights = REPOSITORY / "weights"
    seven = ["--labels", 7, "--count", 1, "--checkpoint", weights / "mnist.pth", *([] if changed else ["--gif"])]
    assert call(inference, *seven)[0] == 0
    (here / "link.png").symlink_to("samples.png")
    path = here / ("samples.png" if changed else "samples.gif")
    before, moving = path.read_bytes(), ["--checkpoint", weights / "moving.pth"]
    if changed:  # other pictures that are read are sound
        for name in ("other.png", "mask.png"):
            Image.effect_noise((8, 8), 50).save(here / name)
    result = call(edit.draw, "--labels", 7, *flags) if changed else call(video.draw, *moving, *flags)
    assert_refused(result, "is read by this command")
    assert path.read_bytes() == before


def test_checkpoints_and_pages_that_are_read_stay(here, call):
    for module, flags in ((demo.share, ["run", "run/model.pth"]),
                          (demo.export, ["--out", "run/model.pth", "--checkpoint", "run"]),
                          (latent.import_dit, ["run/model.pth", "run/model.pth"])):
        assert_refused(call(module, *flags), "is read by this command")
    (here / "run" / "model.pth").rename(here / "a.png")  # whatever its name is
    before = (here / "a.png").read_bytes()
    assert_refused(call(inference, "--checkpoint", "a.png", "--out", "a.png"), "a.png is read by this command")
    assert (here / "a.png").read_bytes() == before


ONE = ["--count", 1, "--device", "cpu"]


@pytest.mark.parametrize(("module", "flags", "path"), [
    (inference, [*ONE], "samples.png"), (inference, [*ONE, "--gif"], "samples.gif"),
    (inference, [*ONE, "--out", "a.jpg"], "a.jpg"), (inference, [*ONE, "--out", "a.tiff"], "a.tiff"),
    (demo.share, ["run", "out.pth"], "out.pth"), (demo.share, ["run", "a.safetensors"], "a.safetensors"),
    (demo.export, [], "dit.html"), (time_emb, [], "time_emb.png")])
def test_its_own_file_is_replaced(module, flags, path, here, call):
    assert call(module, *flags)[0] == 0
    (here / path).rename(here / "first")
    (here / path).write_bytes(b"")  # of mktemp: nothing is lost
    assert call(module, *flags)[0] == 0 and (here / path).read_bytes() == (here / "first").read_bytes()
    number = (here / path).stat().st_ino
    assert call(module, *flags)[0] == 0 and (here / path).read_bytes() == (here / "first").read_bytes()
    assert (here / path).stat().st_ino != number


@pytest.mark.parametrize("ending", [".png", ".apng", ".gif", ".webp", ".jpg", ".tif", ".bmp"])
def test_which_pictures_say_whose_they_are(ending, tmp_path):
    """Where a format has no place for that, an existing picture stays, whoever has drawn it."""
    path, noise = tmp_path / f"a{ending}", Image.effect_noise((400, 300), 50)
    save_picture(path, noise)
    if ending == ".bmp":
        with pytest.raises(UserError, match="nothing in it says"):
            check_picture(path)
        return
    check_picture(path)
    if ending in (".png", ".gif", ".webp"):
        save_animation(path, [noise, noise.rotate(90), noise.rotate(180)], [50] * 3)
        check_picture(path, animated=True)


def test_whose_a_file_is(tmp_path):
    """The mark stands at its beginning or its end; without any, none is replaced."""
    path, mark = tmp_path / "file", b"of ours"
    for content, own in ((mark + bytes(9000), True), (bytes(9000) + mark, True), (b"", True), (mark, True),
                         (bytes(6000) + mark + bytes(6000), False), (b"other", False)):
        path.write_bytes(content)
        if own:
            check_output(path, mark)
        else:
            with pytest.raises(UserError, match="nothing in it says that this command wrote it: choose another name"):
                check_output(path, mark)
    with pytest.raises(UserError, match="file exists: choose another name, or remove it"):
        check_output(path, b"")
    check_output(tmp_path / "new", b"", [tmp_path / "new", None, tmp_path])


def test_a_new_run_clears_the_grids_of_the_one_before(call, tmp_path):
    """Whose model was moved away: the page would show them as its own. It says so; what the user put there stays."""
    flags = [*TINY, "--run-dir", tmp_path, "--sample-every"]
    assert call(train, *flags, 2, "--steps", 5)[0] == 0
    (tmp_path / "model.pth").rename(tmp_path / "kept.pth")
    (tmp_path / "samples_mine.png").write_bytes(b"mine")
    code, out, _ = call(train, *flags, 3, "--steps", 3)
    assert code == 0 and "3 sample grids of an earlier run" in out
    assert sorted(path.name for path in tmp_path.glob("samples_*")) == ["samples_000003.png", "samples_mine.png"]
    assert "samples_000005" not in (tmp_path / "index.html").read_text()


def test_a_student_removes_its_own_fakes_alone(call, here, tmp_path):
    flags = ["--checkpoint", "run", "--run-dir", "new", "--batch-size", 4, "--device", "cpu", "--checkpoint-every", 1]
    assert call(few.distill, *flags, "--steps", 1)[0] == 0
    new = here / "new"
    shutil.copy(new / "fake_000001.pth", new / "fake_backup.pth")
    (new / "fake_000000.pth").write_bytes(b"mine")
    assert call(few.distill, *flags, "--steps", 2, "--resume")[0] == 0
    assert sorted(path.name for path in new.glob("fake_*")) == ["fake_000000.pth", "fake_000002.pth", "fake_backup.pth"]


def test_a_classifier_and_a_round_trip_are_replaced(call, tmp_path, monkeypatch):
    """What comes after the check refuses them."""
    path = shutil.copy(REPOSITORY / "weights" / "digit_classifier.pth", tmp_path)
    assert_refused(call(measure.classifier, "--out", path, "--device", "no"), "--device no")
    flags = ["--vae", tmp_path, "--dataset", "mnist", "--device", "cpu"]
    for content, words in (('{"shape": 1, "vae_hash": "0"}', "holds no config.json"), ("{}", "round_trip.json exists")):
        (tmp_path / "round_trip.json").write_text(content)
        assert_refused(call(measure.score, *flags), words)
