from support.labels import class_weights, labels_by

import dataclasses
import functools
import json
import os

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, SMALL, assert_refused, load, small_mnist
from PIL import Image

import few.distill
import fid_computer
import generator
import inference
import latent.generator
import measure.results
import measure.score
from config import Config
from dataset import load_dataset, to_float, to_uint8
from inference import generate
from latent.config import LatentConfig
from measure.classifier import load_classifier
from record.checkpoint import load_checkpoint, save_checkpoint
from record.folder import open_folder
from video.config import ANY


def folders(tmp_path):
    return ["--real", tmp_path / "real", "--fake", tmp_path / "fake"]


def read(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


def test_fills_both_folders(command, trained, tmp_path):
    process = command("generator.py", "--checkpoint", trained / "model.pth", "--count", 12, *folders(tmp_path),
                      "--device", "cpu")
    assert process.returncode == 0, process.stderr
    assert process.stdout == ("score them with: python fid_computer.py --real "
                              f"{tmp_path / 'real'} --fake {tmp_path / 'fake'}\n")
    assert sorted(read(tmp_path / "fake")) == [f"{i:06d}_{i % 10}.png" for i in range(12)]
    real = sorted(read(tmp_path / "real"))
    assert [name[:6] for name in real] == [f"{i:06d}" for i in range(12)]
    data = small_mnist()
    for name in real:
        image = torch.from_numpy(np.array(Image.open(tmp_path / "real" / name)))
        match = (data.images[:, 0] == image).all(dim=(1, 2)).nonzero()[:, 0]
        assert len(match) and data.labels[match[0]] == int(name[7])
    model, config = load(trained / "model.pth")
    drawn = to_uint8(generate(model, config, torch.arange(12) % 10))
    for i, image in enumerate(drawn):
        assert np.array_equal(Image.open(tmp_path / "fake" / f"{i:06d}_{i % 10}.png"), image[0])


def test_labels_have_the_shares_of_their_weights():
    """Rounded, however many they are: of fewer, they are the first of more."""
    equal, unequal = torch.ones(3, dtype=torch.int64), torch.tensor([180, 20, 0])
    assert labels_by(equal, 8).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    for count, expected in ((1, [1, 0]), (10, [9, 1]), (26, [23, 3]), (200, [180, 20]), (2000, [1800, 200])):
        labels = labels_by(unequal, count)
        assert labels.bincount(minlength=3).tolist() == [*expected, 0]
        assert torch.equal(labels, labels_by(unequal, 2000)[:count])
    assert labels_by(torch.tensor([10**6] + 100 * [1]), 1000).tolist() == 1000 * [0]


def test_classes_of_about_one_size_are_drawn_equally_often():
    """MNIST's, and whatever differs by a quarter at most: their published scores are of such fakes."""
    for sizes, expected in (([180, 20], [180, 20]), ([20, 25], [1, 1]), ([20, 26], [20, 26]), ([3, 0, 1], [3, 0, 1]),
                            ([5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949], 10 * [1])):
        labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        assert class_weights(labels, len(sizes)).tolist() == expected
        assert class_weights(labels, len(sizes), equal=True).tolist() == [1] * len(sizes)


@pytest.fixture
def unequal(tmp_path):
    """The checkpoint of a model of 18 images of noise, and 2 of another, darker kind; to train on, that is."""
    for name, count, top in (("noise", 18, 256), ("shade", 2, 100)):
        (tmp_path / "data" / "test" / name).mkdir(parents=True)
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for i in range(count):
            image = np.random.default_rng([top, i]).integers(0, top, (8, 8), dtype=np.uint8)
            Image.fromarray(image).save(tmp_path / "data" / "train" / name / f"{i}.png")
    config = Config(dataset="folder", data_dir=str(tmp_path / "data"), image_size=8, channels=1, num_classes=2,
                    classes=("noise", "shade"), patch_size=4, hidden_size=8, depth=1, num_heads=2, sample_steps=1)
    save_checkpoint(tmp_path / "model.pth", config, 0, 0.0, config.build_model().state_dict())
    return tmp_path / "model.pth"


def labels_in(folder):
    return [int(name[7]) for name in sorted(read(folder))]


def test_fakes_are_as_unequal_as_the_data(call, unequal, tmp_path, monkeypatch, weights):
    """And so perfect fakes, the real images once more, are at no distance."""
    data = load_dataset("folder", tmp_path / "data")

    def perfect(model, config, labels, indices, way):
        places = [labels_by(torch.tensor([18, 2]), 20)[:i].tolist().count(label) for i, label in zip(
            indices, labels.tolist(), strict=True)]  # how many of its class came before
        return torch.stack([to_float(data.images[data.labels == label][place])
                            for label, place in zip(labels.tolist(), places, strict=True)])

    monkeypatch.setattr(inference, "generate", perfect)
    flags = ["--checkpoint", unequal, *folders(tmp_path)]
    code, _, err = call(generator, *flags, "--count", 7)
    assert code == 0 and "a class has 2 to 18 images: the fakes are as unequal (--equal" in err
    first = read(tmp_path / "fake")
    assert call(generator, *flags, "--count", 20, "--batch-size", 3)[0] == 0
    assert first.items() <= read(tmp_path / "fake").items()
    assert labels_in(tmp_path / "fake").count(1) == labels_in(tmp_path / "real").count(1) == 2
    code, out, err = call(fid_computer, *folders(tmp_path), "--dims", 64, "--weights", weights, "--device", "cpu")
    assert code == 0 and float(out.split()[1]) < 1e-3, out + err
    assert_refused(call(generator, *flags, "--count", 20, "--equal"), "another classes", tmp_path / "fake")


def test_equally_many_of_each_where_asked_for(call, unequal, tmp_path):
    flags = ["--checkpoint", unequal, *folders(tmp_path), "--count", 9, "--equal"]
    code, _, err = call(generator, *flags)
    assert code == 0 and "unequal" not in err
    assert labels_in(tmp_path / "fake") == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert_refused(call(generator, *flags[:-1]), "another classes", tmp_path / "fake")


def test_data_of_other_classes(call, unequal, tmp_path):
    flags = ["--checkpoint", unequal, *folders(tmp_path), "--count", 9]
    (tmp_path / "data" / "train" / "noise").rename(tmp_path / "data" / "train" / "night")
    code, _, err = call(generator, *flags)
    assert code == 0 and "what the model calls 'noise' is 'night' in" in err
    (tmp_path / "data" / "train" / "third").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "data" / "train" / "third" / "a.png")
    assert_refused(call(generator, *flags), "the model knows 2 classes", "have 3")


def test_a_model_of_no_classes(call, tmp_path):
    config = Config(image_size=8, channels=1, patch_size=4, hidden_size=8, depth=1, num_heads=2)
    save_checkpoint(tmp_path / "model.pth", config, 0, 0.0, config.build_model().state_dict())
    flags = ["--checkpoint", tmp_path / "model.pth"]
    for command, *more in ((generator, *folders(tmp_path)), (measure.score,), (inference,),
                           (few.distill, "--run-dir", tmp_path),
                           (measure.results, "samplers", "--out", tmp_path)):
        assert_refused(call(command, *more, *flags), "model.pth", "it knows no class that could be asked for")


def test_goes_on_and_does_not_depend_on_the_batches(call, trained, tmp_path):
    flags = ["--checkpoint", trained / "model.pth", "--device", "cpu"]
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


def test_other_data_in_the_same_folder(call, trained, tmp_path, monkeypatch):
    """The same number of images of the same size, but not the same images: their score would mean nothing."""
    flags = ["--checkpoint", trained / "model.pth", "--count", 3, *folders(tmp_path)]
    assert call(generator, *flags)[0] == 0
    before, note = read(tmp_path / "real"), (tmp_path / "real" / "settings.json").read_text()
    data = small_mnist()
    other = dataclasses.replace(data, images=data.images.flip(0), labels=data.labels.flip(0))
    monkeypatch.setattr(generator, "main", functools.partial(generator.main, load=lambda *args, **options: other))
    assert_refused(call(generator, *flags), "another data", tmp_path / "real")
    assert read(tmp_path / "real") == before and (tmp_path / "real" / "settings.json").read_text() == note
    assert json.loads(note)["data"] == data.fingerprint and json.loads(note)["channels"] == 1


def test_real_images_are_a_random_subset(call, trained, tmp_path):
    """Without repetition, and whatever the seed that the fakes are drawn with."""
    flags = ["--checkpoint", trained / "model.pth", "--count", 100]
    for seed in (0, 1):
        assert call(generator, *flags, *folders(tmp_path / str(seed)), "--seed", seed)[0] == 0
    first, second = (read(tmp_path / str(seed) / "real") for seed in (0, 1))
    assert first == second and read(tmp_path / "0" / "fake") != read(tmp_path / "1" / "fake")
    data = small_mnist()
    places = []
    for name in sorted(first):
        image = torch.from_numpy(np.array(Image.open(tmp_path / "0" / "real" / name)))
        places += (data.images[:, 0] == image).all(dim=(1, 2)).nonzero()[:, 0].tolist()
    assert len(set(places)) == 100  # they hold no image twice
    assert places != sorted(places) and 600 < np.mean(places) < 900 and min(places) < 100 and max(places) > 1400


@pytest.mark.parametrize("content", ["[1, 2]", '"text"', "{broken", "", "null", "[" * 100_000, "folder", "link"])
def test_settings_that_say_nothing(call, trained, tmp_path, content):
    flags = ["--checkpoint", trained / "model.pth", "--count", 2, *folders(tmp_path)]
    note = tmp_path / "fake" / "settings.json"
    note.parent.mkdir()
    if content == "folder":
        note.mkdir()
    elif content == "link":
        note.symlink_to("nowhere")
    else:
        note.write_text(content)
    Image.new("L", (8, 8)).save(note.with_name("000000_0.png"))
    assert_refused(call(generator, *flags), note, "does not say")
    assert sorted(os.listdir(note.parent)) == ["000000_0.png", "settings.json"]
    assert content in ("folder", "link") or note.read_text() == content
    assert read(tmp_path / "real") == {}  # both folders are looked at before either is filled


def test_images_of_unknown_origin(call, trained, tmp_path):
    """fid_computer.py would score them with the rest."""
    flags = ["--checkpoint", trained / "model.pth", "--count", 2, *folders(tmp_path)]
    assert call(generator, *flags)[0] == 0
    Image.new("L", (8, 8)).save(tmp_path / "fake" / "mine.jpg")
    assert_refused(call(generator, *flags), "unknown origin", "mine.jpg")
    (tmp_path / "fake" / "mine.jpg").rename(tmp_path / "mine.jpg")
    assert call(generator, *flags)[0] == 0
    (tmp_path / "fake" / "settings.json").unlink()
    assert_refused(call(generator, *flags), "unknown origin", "000000_0.png")


def test_fewer_images_than_there_are(call, trained, tmp_path):
    flags = ["--checkpoint", trained / "model.pth", *folders(tmp_path)]
    for _ in range(2):  # as many as are asked for are nothing to warn of
        assert "already" not in call(generator, *flags, "--count", 5)[2]
    code, out, err = call(generator, *flags, "--count", 3)
    assert code == 0 and out.startswith("score them with")
    assert f"{tmp_path / 'fake'} holds 5 images already, and all of them will be scored" in err
    assert f"{tmp_path / 'real'} holds 5 images already" in err
    assert len(read(tmp_path / "fake")) == 5


def test_says_how_to_score_them(call, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--checkpoint", trained / "model.pth", "--count", 2]
    assert call(generator, *flags)[1] == "score them with: python fid_computer.py\n"
    assert call(generator, *flags, "--fake", "my fakes")[1].endswith("fid_computer.py --fake 'my fakes'\n")
    assert_refused(call(generator, *flags, "--real", "a", "--fake", "./a"), "both a")


def test_what_the_shipped_weights_draw_is_what_the_names_say(call, tmp_path, monkeypatch):
    """Through the files, read back as the score reads them, by the classifier that comes with the repository."""
    content = load_checkpoint(REPOSITORY / "weights" / "mnist.pth", ANY)
    config = dataclasses.replace(content["config"], data_dir=str(SMALL))
    save_checkpoint(tmp_path / "model.pth", config, 1, 1.0, content["ema"])
    assert call(generator, "--checkpoint", tmp_path / "model.pth", "--count", 100, *folders(tmp_path))[0] == 0
    images, labels = measure.score.read_fakes(tmp_path / "fake")
    assert labels.bincount().tolist() == [10] * 10
    assert (load_classifier()(images[:, :1].float() / 127.5 - 1).argmax(dim=1) == labels).float().mean() > 0.95


def test_the_batch_is_as_large_as_memory_allows(call, trained, tmp_path, monkeypatch):
    sizes = []

    def watched(model, config, labels, indices, way):
        sizes.append(len(labels))
        return generate(model, config, labels, indices)

    monkeypatch.setattr(inference, "generate", watched)
    monkeypatch.setattr(inference, "batch_that_fits", lambda config, device: 4)
    flags = ["--checkpoint", trained / "model.pth", "--count", 10]
    assert call(generator, *flags, *folders(tmp_path / "a"))[0] == 0
    assert call(generator, *flags, *folders(tmp_path / "b"), "--batch-size", 7)[0] == 0
    assert sizes == [4, 4, 2, 7, 3]


@pytest.mark.parametrize("of", [Config, LatentConfig])
def test_each_flag_reaches_the_drawing(call, unequal, tmp_path, monkeypatch, of):
    """Of `generator.py`, and of `latent.generator`, which has more."""
    seen = []
    content = load_checkpoint(unequal, ANY)
    save_checkpoint(unequal, of(**vars(content["config"])), 0, 0.0, content["ema"])
    more = [] if of is Config else ["--spacing", "linspace", "--guided-channels", 1, "--guidance-high", 0.6,
                                       "--no-clamp"]
    changed = {} if of is Config else dict(spacing="linspace", guided_channels=1, guidance_high=0.6, clamp=False)

    def watched(model, config, labels, indices, way):
        seen.append((config, next(model.parameters()).dtype))
        return torch.zeros(len(labels), *config.input_shape)

    monkeypatch.setattr(inference, "generate", watched)
    (tmp_path / "data").rename(tmp_path / "moved")
    code, _, err = call(generator if of is Config else latent.generator, "--checkpoint", unequal, *folders(tmp_path),
                        "--count", 3, "--data-dir", tmp_path / "moved", "--sampler", "ddim", "--sample-steps", 4,
                        "--guidance", 3, "--eta", 0.5, *more, "--seed", 7, "--precision", "bf16", "--device", "cpu")
    assert code == 0, err
    config, dtype = seen[0]
    assert config == dataclasses.replace(
        load_checkpoint(unequal, ANY)["config"], data_dir=str(tmp_path / "moved"), sampler="ddim", sample_steps=4,
        eta=0.5, guidance=3.0, seed=7, precision="bf16", **changed)
    assert dtype == torch.bfloat16
    assert len(read(tmp_path / "real")) == 3


def test_bad_flags(call, trained, tmp_path):
    flags = ["--checkpoint", trained / "model.pth", *folders(tmp_path)]
    assert_refused(call(generator, *flags, "--count", 0), "--count 0")
    assert_refused(call(generator, *flags, "--count", 3, "--batch-size", 0), "batch_size is 0")
    assert_refused(call(generator, *flags[2:], "--checkpoint", "none.pth"), "none.pth")
    (tmp_path / "file").touch()
    assert_refused(call(generator, *flags, "--count", 3, "--fake", tmp_path / "file"), tmp_path / "file")


def test_more_images_than_the_data_set_has(call, trained, tmp_path, monkeypatch):
    data = small_mnist()
    few = dataclasses.replace(data, images=data.images[:5], labels=data.labels[:5])
    monkeypatch.setattr(generator, "main", functools.partial(generator.main, load=lambda *args, **options: few))
    code, _, err = call(generator, "--checkpoint", trained / "model.pth", "--count", 7, *folders(tmp_path))
    assert code == 0 and "only 5 training images" in err
    assert len(read(tmp_path / "real")) == 5 and len(read(tmp_path / "fake")) == 7


def test_each_process_has_its_share(tmp_path, monkeypatch):
    monkeypatch.setattr(generator.parallel, "wait", lambda: None)
    monkeypatch.setattr(generator.parallel, "WORLD", 3)
    (tmp_path / "000001_1.png").touch()
    (tmp_path / "settings.json").write_text("{}")
    shares = []
    for rank in range(3):
        monkeypatch.setattr(generator.parallel, "RANK", rank)
        shares.append(open_folder(tmp_path, 8, {}, Config))
    assert shares == [[0, 2], [3, 4], [5, 6, 7]]


def test_another_model_under_the_same_name(call, trained, tmp_path):
    model = tmp_path / "model.pth"
    flags = ["--checkpoint", model, "--count", 3, *folders(tmp_path)]
    content = torch.load(trained / "model.pth", weights_only=True)
    torch.save(content, model)
    assert call(generator, *flags)[0] == 0
    torch.save(content | {"ema": {name: 2 * value for name, value in content["ema"].items()}}, model)
    assert_refused(call(generator, *flags), "another checkpoint", tmp_path / "fake")


def test_no_image_is_half_written(call, trained, tmp_path, monkeypatch):
    """The disk is full within the third one: those before it are whole, and what is left of it is no image."""
    flags = ["--checkpoint", trained / "model.pth", "--count", 5, *folders(tmp_path)]
    original, calls = Image.Image.save, []

    def full(image, path, *args):
        calls.append(path)
        if len(calls) == 3:
            path.write_bytes(b"half")
            raise OSError(28, os.strerror(28))
        original(image, path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        assert_refused(call(generator, *flags), "No space left", "the images before it are kept")
    assert len(read(tmp_path / "real")) == 2 and not read(tmp_path / "fake")
    assert call(generator, *flags)[0] == 0
    assert len(read(tmp_path / "real")) == len(read(tmp_path / "fake")) == 5
    for path in tmp_path.glob("*/*.png"):
        with Image.open(path) as image:
            image.load()
