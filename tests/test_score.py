"""The ruler, tested: each way for fakes to be bad must move the figure that is there for it, and no other."""

from support.commands import UserError

import dataclasses
import json
import math
import pickle
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, SMALL, SMALL_DATA, assert_refused, small_mnist
from PIL import Image, ImageDraw

import inference
import measure.score
from config import Config
from dataset import Dataset, load_dataset, to_uint8
from inference import generate
from latent.config import LatentConfig
from latent.vae import VAE, load_vae, save_vae
from measure import classifier as classifier_script
from measure.classifier import WEIGHTS, DigitClassifier, augment, load_classifier, train_classifier
from measure.score import (
    METRICS,
    Judge,
    compare,
    embed,
    nearest,
    nearest_picture,
    pick_reference,
    report,
    worst_picture,
)
from record.checkpoint import load_checkpoint, load_model, save_checkpoint


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Matrices as small as these gain nothing from threads, and on a busy machine lose seconds to them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def classifier():
    return load_classifier()


@pytest.fixture(scope="module")
def judge(classifier, parts):
    return Judge(parts[0], parts[1], classifier).score


@pytest.fixture(scope="module")
def good(judge, parts):
    return judge(parts[2].images, parts[2].labels)


DATA = ["--dataset", "mnist", "--data-dir", SMALL, "--image-size", 8]
SHIPPED = REPOSITORY / "weights" / "mnist.pth"


def gaussian(n, dims, seed, scale=1.0):
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed)) * scale


def blur(images, sigma):
    kernel = torch.exp(-torch.arange(-3, 4) ** 2 / (2 * sigma**2))
    kernel = kernel[:, None] * kernel
    return F.conv2d(images.float(), (kernel / kernel.sum())[None, None], padding=3).round().byte()


# The formulas

def distance(a, b):
    return math.sqrt(sum((float(x) - float(y)) ** 2 for x, y in zip(a, b, strict=True)))


def kth_neighbour(points, i, k):
    """NN_k of 1904.06991 and NND_k of 2002.09797: how far the k-th nearest of the other points is."""
    return sorted(distance(points[i], points[j]) for j in range(len(points)) if j != i)[k - 1]


def by_the_papers(fake, real):
    """The four figures straight from their definitions, one pair of points at a time."""
    narrow = [kth_neighbour(real, i, 3) for i in range(len(real))]
    wide = [kth_neighbour(real, i, 5) for i in range(len(real))]
    around_fakes = [kth_neighbour(fake, j, 3) for j in range(len(fake))]
    d = [[distance(x, y) for y in fake] for x in real]
    N, M = len(real), len(fake)
    return {"precision": sum(any(d[i][j] <= narrow[i] for i in range(N)) for j in range(M)) / M,
            "recall": sum(any(d[i][j] <= around_fakes[j] for j in range(M)) for i in range(N)) / N,
            "density": sum(d[i][j] <= wide[i] for i in range(N) for j in range(M)) / (5 * M),
            "coverage": sum(any(d[i][j] <= wide[i] for j in range(M)) for i in range(N)) / N}


@pytest.mark.parametrize("count_fake, count_real, dims, scale", [(40, 40, 2, 1.0), (25, 60, 3, 0.5), (70, 30, 2, 3.0)])
def test_neighbour_figures_are_those_of_the_papers(count_fake, count_real, dims, scale, monkeypatch):
    fake, real = gaussian(count_fake, dims, 1, scale), gaussian(count_real, dims, 2)
    monkeypatch.setattr(measure.score, "BLOCK", 7)
    result, expected = compare(fake, real), by_the_papers(fake.numpy(), real.numpy())
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert 0 < expected["coverage"] < 1  # else the case would show little


def test_points_on_a_line_can_be_counted_by_hand():
    real = torch.arange(0.0, 100, 10)
    fake = torch.tensor([5.0, 5, 5, 5, 1000, 1000])
    result = compare(*(F.pad(points[:, None], (0, 1)) for points in (fake, real)))  # in the plane: (N, 2)
    assert result["precision"] == pytest.approx(4 / 6)  # 5 is in the ball of 0
    assert result["density"] == pytest.approx(4 * 4 / (5 * 6))  # ... and in four of k = 5: those of 0, 10, 20 and 30
    assert result["coverage"] == pytest.approx(4 / 10)
    assert result["recall"] == pytest.approx(9 / 10)  # the third neighbour of 1000 is 5, so its ball ends at 5


def test_which_figure_is_which():
    """Fakes that crowd in one of two places are all precise, and leave half of the real ones out."""
    real = torch.cat([gaussian(50, 4, 0), gaussian(50, 4, 1) + 100])
    result = compare(real[:50] + 1e-6, real)
    assert result["precision"] == 1 and result["recall"] == result["coverage"] == 0.5
    result = compare(real, real[:50] + 1e-6)  # and the other way round
    assert result["precision"] == 0.5 and result["recall"] == result["coverage"] == 1


def test_a_set_against_itself_is_perfect():
    points = gaussian(100, 4, 0)
    result = compare(points, points)
    assert result["precision"] == result["recall"] == result["coverage"] == 1
    assert result["frechet"] == pytest.approx(0, abs=1e-6)
    assert result["density"] == pytest.approx(6 / 5)  # the k = 5 neighbours of each ball and its own centre


def test_a_shift_moves_the_frechet_distance_by_its_square():
    points = gaussian(500, 4, 0)
    assert compare(points + torch.tensor([3.0, 0, 4, 0]), points)["frechet"] == pytest.approx(25, rel=1e-4)


def test_sets_far_apart_have_nothing_in_common():
    result = compare(gaussian(50, 4, 0) + 1000, gaussian(60, 4, 1))
    assert [result[name] for name in METRICS[1:]] == [0, 0, 0, 0]


def test_repeated_points_have_no_radius():
    real, fake = gaussian(50, 4, 0), gaussian(50, 4, 0)[:1].repeat(20, 1)
    assert compare(fake, real)["recall"] == pytest.approx(1 / 50)  # the one that it copies
    assert compare(fake, real)["precision"] == 1


def test_too_few_points_give_nan():
    assert all(math.isnan(compare(gaussian(5, 4, 0), gaussian(50, 4, 1))[name]) for name in METRICS)
    assert not any(math.isnan(compare(gaussian(6, 4, 0), gaussian(50, 4, 1))[name]) for name in METRICS)


def test_nearest_is_exact():
    generator = torch.Generator().manual_seed(0)
    train = torch.randint(0, 256, (300, 1, 28, 28), generator=generator, dtype=torch.uint8)
    images = torch.cat([train[[7, 250]], torch.randint(0, 256, (5, 1, 28, 28), generator=generator, dtype=torch.uint8)])
    distances, indices = nearest(images, train, size=3)
    pixels = [x.numpy().reshape(len(x), -1) / 255 for x in (images, train)]
    every = np.sqrt(((pixels[0][:, None] - pixels[1][None]) ** 2).sum(axis=2))
    assert indices.tolist() == every.argmin(axis=1).tolist()
    assert indices[:2].tolist() == [7, 250] and distances[:2].tolist() == [0, 0]
    np.testing.assert_allclose(distances, every.min(axis=1), rtol=1e-5)


@pytest.mark.parametrize("size", [1000, 100, 4, 1])
def test_nearest_is_exact_in_blocks_and_in_colour(size):
    generator = torch.Generator().manual_seed(0)
    train, images = (torch.randint(0, 256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8) for n in (301, 9))
    images[4] = train[199]
    distances, indices = nearest(images, train, size)
    every = torch.cdist(*(x.flatten(1).double() / 255 for x in (images, train)))
    assert indices.tolist() == every.argmin(dim=1).tolist() and indices[4] == 199 and distances[4] == 0
    torch.testing.assert_close(distances.double(), every.min(dim=1).values, rtol=1e-5, atol=0)


def test_large_images_are_averaged_first():
    small = torch.randint(0, 256, (5, 3, 32, 16), dtype=torch.uint8)
    large = small.repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert torch.equal(measure.score.shrink(large), small) and measure.score.shrink(small) is small
    assert measure.score.shrink(torch.zeros(2, 3, 500, 4, dtype=torch.uint8)).shape == (2, 3, 32, 1)
    checks = (torch.arange(64)[:, None] + torch.arange(64)) % 2 * 100
    assert measure.score.shrink(checks.byte().expand(1, 1, 64, 64)).unique().tolist() == [50]
    assert nearest(large, large.flip(0))[1].tolist() == [4, 3, 2, 1, 0]


def test_the_reference_is_drawn_as_the_fakes_were_asked_for():
    real_labels = torch.tensor([0] * 500 + [digit for digit in range(1, 10) for _ in range(100)])

    def drawn(labels, count, seed=0):
        index = pick_reference(labels, real_labels, count, seed=seed)
        assert len(set(index.tolist())) == count
        return index, real_labels[index].bincount(minlength=10)

    balanced = torch.arange(200) % 10
    assert drawn(balanced, 200)[1].tolist() == [20] * 10
    assert drawn(torch.arange(26) % 10, 26)[1].tolist() == [3] * 6 + [2] * 4
    assert drawn(None, 200)[1][0] > 40  # as in the real set
    assert drawn(balanced[balanced != 3], 180)[1][3] > 0  # a missing class is no excuse for itself
    assert torch.equal(drawn(balanced, 200)[0], drawn(balanced, 200)[0])
    assert not torch.equal(drawn(balanced, 200)[0], drawn(balanced, 200, seed=1)[0])
    few_classes = pick_reference(torch.arange(30) % 3, torch.arange(90) % 3, 30, num_classes=3)
    assert (few_classes % 3).bincount().tolist() == [10] * 3


def test_the_reference_is_as_unequal_as_the_fakes():
    real_labels = torch.tensor([0] * 180 + [1] * 20)

    def drawn(*counts):
        labels = torch.tensor([0] * counts[0] + [1] * counts[1])
        index = pick_reference(labels, real_labels, len(labels), 2)
        assert len(set(index.tolist())) == len(index)
        return real_labels[index].bincount(minlength=2).tolist()

    assert drawn(90, 10) == [90, 10] and drawn(180, 20) == [180, 20]
    assert drawn(15, 15) == [15, 15]                                   # asked for equally often
    assert drawn(100, 100) == [20, 20] and drawn(360, 40) == [180, 20]   # of the larger class no more than fit
    assert 80 < drawn(0, 100)[0] < 100                                   # a missing class is no excuse for itself


def test_perfect_fakes_of_unequal_classes_have_a_ratio_of_one(classifier, parts):
    """Drawn equally often, their distance would be that of other shares, and not of worse images."""
    def unequal(data):
        """All of five digits, and a dozen of each of the others."""
        kept = torch.cat([(data.labels == digit).nonzero()[:, 0][:None if digit < 5 else 12] for digit in range(10)])
        return dataclasses.replace(data, images=data.images[kept], labels=data.labels[kept])

    train, test, fakes = map(unequal, parts)
    judge = Judge(train, test, classifier)
    labels = judge.labels(300)
    assert (labels.bincount() - 300 * train.labels.bincount() / len(train.labels)).abs().max() < 1
    assert judge.labels(30, equal=True).tolist() == 3 * [*range(10)]
    images = [fakes.images[fakes.labels == label][labels[:k].tolist().count(label)]
              for k, label in enumerate(labels.tolist())]
    result = judge.score(torch.stack(images), labels)
    assert [part["reference"] for part in result["classes"]] == labels.bincount().tolist()
    assert 0.7 < result["ratio"] < 1.5
    assert judge.brief_real(labels)["frechet"] == pytest.approx(result["real"]["frechet"])


# The round trip of a VAE

class Rounding(torch.nn.Module):
    """A stand-in for a VAE: its latents are the images, a little off and uncertain."""

    def __init__(self, offset=0.0, std=0.0):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.offset, self.std = offset, std

    def encode(self, x):
        return x + self.offset, torch.full_like(x, self.std)

    def decode(self, z):
        return z


def test_latents_are_sampled_by_a_fixed_seed():
    images = torch.full((500, 1, 8, 8), 128, dtype=torch.uint8)
    same = measure.score.reconstruct(Rounding(), images)
    assert torch.equal(same, images) and same.device.type == "cpu"
    made = measure.score.reconstruct(Rounding(offset=0.1, std=0.2), images)
    values = made.float() / 127.5 - 1
    assert values.mean().item() == pytest.approx(0.1 + 1 / 255, abs=0.005)
    assert values.std().item() == pytest.approx(0.2, abs=0.005)
    assert len({image.numpy().tobytes() for image in made}) == 500  # each its own
    assert torch.equal(measure.score.reconstruct(Rounding(offset=0.1, std=0.2), images), made)
    assert not torch.equal(measure.score.reconstruct(Rounding(offset=0.1, std=0.2), images, seed=1), made)


def test_a_perfect_vae_has_the_figures_of_real_images(classifier, parts):
    whole = Judge(parts[0], parts[1], classifier)
    result = whole.score(parts[2].images, parts[2].labels, vae=Rounding())
    assert {name: result["vae"][name] for name in METRICS} == {name: result["real"][name] for name in METRICS}
    picked = whole.pick(parts[2].labels, 599)
    reads = embed(classifier, parts[0].images[picked])[1].argmax(dim=1)
    assert result["vae"]["accuracy"] == pytest.approx((reads == parts[0].labels[picked]).float().mean().item())
    assert result["vae"]["psnr"] == pytest.approx(10 * math.log10(255**2 * 12))
    blurred = whole.score(parts[2].images, parts[2].labels, vae=Rounding(std=0.4))
    assert blurred["vae"]["frechet"] > 2 * blurred["real"]["frechet"] and blurred["vae"]["psnr"] < 20
    assert blurred["fake"] == result["fake"] and blurred["real"] == result["real"]
    lines = report(blurred).splitlines()
    assert lines[0].split() == ["599", "images", "fake", "real", "vae"]
    assert lines[1].split()[2:] == [*(f"{blurred[part]['frechet']:.3f}" for part in ("fake", "real", "vae")), "ratio",
                                    f"{blurred['ratio']:.2f}"]
    rows = {line[:30].strip(): line[30:].split() for line in lines}
    assert rows["PSNR, dB"] == ["-", "-", f"{blurred['vae']['psnr']:.3f}"]
    assert rows["distance to a training image"][2] == "-"
    alone = whole.score_vae(Rounding(std=0.4), 590)
    assert alone["ratio"] == pytest.approx(alone["vae"]["frechet"] / alone["real"]["frechet"])
    fewest = parts[0].labels.bincount().min().item()  # of a class: 59 would be asked for
    assert report(alone).splitlines()[0].split() == [str(10 * min(fewest, 59)), "images", "real", "vae"]
    with pytest.raises(UserError, match="5 images are too few"):
        whole.score_vae(Rounding(), 5)


@pytest.fixture(scope="module")
def small_classifier():
    return train_classifier(small_mnist(), epochs=12)


@pytest.fixture
def vae(tmp_path, small_classifier, monkeypatch):
    """The folder of a VAE of small digits, which halves them; and a classifier of these at hand."""
    monkeypatch.setattr(measure.score, "find_classifier", lambda *args: small_classifier)
    save_vae(VAE(1, 1, block_out_channels=(4, 8), norm_num_groups=4), tmp_path / "vae")
    return tmp_path / "vae"


def test_a_model_of_latents_stands_beside_its_vae(call, vae, tmp_path):
    config = LatentConfig(**SMALL_DATA, channels=1, num_classes=10, latent_shape=(4, 4, 4), vae=str(vae),
                          latent_mean=(0.0,), latent_std=(1.0,), clamp=False, patch_size=2, hidden_size=32, depth=1,
                          num_heads=2, sample_steps=2)
    save_checkpoint(tmp_path / "model.pth", config, 0, 0.0, config.build_model().state_dict())
    code, out, err = call(measure.score, "--checkpoint", tmp_path / "model.pth", "--vae", vae, "--count", 50)
    assert code == 0, err
    rows = {line[:30].strip(): line[30:].split() for line in out.splitlines()}
    assert rows["50 images"] == ["fake", "real", "vae"] and rows["PSNR, dB"][:2] == ["-", "-"]
    assert 0 < float(rows["PSNR, dB"][2]) < 20 and float(rows["Fréchet distance"][2]) > 1
    assert not (vae / "round_trip.json").exists()  # that is of the VAE alone


def test_a_vae_alone(call, vae):
    flags = ["--vae", vae, *DATA, "--count", 200, "--device", "cpu"]
    code, out, err = call(measure.score, *flags)
    assert code == 0, err
    kept = json.loads((vae / "round_trip.json").read_text())
    data = small_mnist()
    assert kept.keys() == {"real", "vae", "ratio", "count", "reference", "test", "vae_hash"} and kept["count"] == 200
    loaded = load_vae(vae)
    assert kept["vae_hash"] == loaded.hash_of("encoder", "quant_conv", "decoder", "post_quant_conv")
    rows = {line[:30].strip(): line[30:].split() for line in out.splitlines()}
    assert rows["200 images"] == ["real", "vae"] and rows["PSNR, dB"] == ["-", f"{kept['vae']['psnr']:.3f}"]
    assert rows["Fréchet distance"][:2] == [f"{kept[part]['frechet']:.3f}" for part in ("real", "vae")]
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))  # 20 of each digit
    picked = torch.cat([order[data.labels[order] == digit][:20] for digit in range(10)])
    images = data.images[picked]
    made = measure.score.reconstruct(loaded, images)
    errors = (made.double() - images.double()).square().mean(dim=(1, 2, 3))
    assert kept["vae"]["psnr"] == pytest.approx((10 * torch.log10(255**2 / errors)).mean().item(), rel=1e-5)
    assert call(measure.score, *flags)[1] == out


def test_vaes_that_do_not_fit(call, vae, tmp_path):
    flags = ["--vae", vae, *DATA]
    assert_refused(call(measure.score, "--vae", vae), "scores the VAE alone", "--dataset", "--checkpoint")
    assert_refused(call(measure.score, *flags, "--image-size", 7), "2 x 2 pixels", "7 x 7", "--image-size 8x8")
    assert_refused(call(measure.score, *flags, "--channels", 3), "images of 1 channels, but these have 3")
    assert_refused(call(measure.score, *flags, "--guidance", 2), "draws nothing")
    assert_refused(call(measure.score, *flags, "--pictures", tmp_path / "a"), "draws nothing")
    assert_refused(call(measure.score, "--checkpoint", SHIPPED, "--image-size", 8), "for --vae alone")
    assert not (vae / "round_trip.json").exists()
    (vae / "config.json").unlink()
    assert_refused(call(measure.score, *flags), "holds no config.json")


# The ruler

def test_what_is_nearest(judge, parts):
    """Copies have a training image as their nearest, test images themselves, and new ones either, by chance."""
    shares = [judge(part.images, part.labels)["fake"]["unseen"] for part in parts]
    assert shares[:2] == [0, 1] and shares[2] == pytest.approx(0.5, abs=0.08)
    assert judge(parts[2].images, None)["real"]["unseen"] == pytest.approx(599 / 1198, abs=0.001)


def test_good_fakes_are_as_good_as_real(good):
    fake, real = good["fake"], good["real"]
    assert good["count"] == 599
    assert 0.5 < good["ratio"] < 1.5
    for name in ("precision", "recall", "density", "coverage", "accuracy"):
        assert fake[name] == pytest.approx(real[name], abs=0.06), name
    assert fake["nearest"] == pytest.approx(real["nearest"], rel=0.05)
    assert fake["copies"] < 0.05 and real["copies"] < 0.03
    for part in good["classes"]:
        assert part["fake"]["accuracy"] > 0.8 and part["fake"]["coverage"] > 0.85


def test_shuffled_labels_show_in_the_accuracy_alone(good, judge, parts):
    images, labels = parts[2].images, parts[2].labels.clone()
    labels[::2] = (labels[::2] + 1 + torch.arange(len(labels[::2])) % 9) % 10  # half of them, each to another digit
    result = judge(images, labels)
    assert result["fake"]["accuracy"] == pytest.approx(0.48, abs=0.05)
    for name in (*METRICS[1:], "nearest", "copies"):
        assert result["fake"][name] == good["fake"][name]
    assert result["fake"]["frechet"] == pytest.approx(good["fake"]["frechet"])


def test_blur_shows_in_precision_recall_and_frechet(good, judge, parts):
    slight, strong = (judge(blur(parts[2].images, sigma), parts[2].labels) for sigma in (0.6, 1.0))
    assert slight["ratio"] > 5 and slight["fake"]["recall"] < good["fake"]["recall"] - 0.1
    assert strong["ratio"] > 25
    assert strong["fake"]["precision"] < 0.75 and strong["fake"]["recall"] < 0.3 and strong["fake"]["coverage"] < 0.6
    assert strong["fake"]["copies"] < 0.1 and slight["fake"]["copies"] < 0.1


def test_a_missing_class_shows_in_coverage_and_recall(good, judge, parts):
    kept = parts[2].labels != 8
    result = judge(parts[2].images[kept], parts[2].labels[kept])
    assert result["classes"][8]["count"] == 0
    assert result["ratio"] > 4
    assert result["fake"]["coverage"] < good["fake"]["coverage"] - 0.05
    assert result["fake"]["recall"] < good["fake"]["recall"] - 0.05
    assert result["fake"]["precision"] == pytest.approx(good["fake"]["precision"], abs=0.03)
    assert result["fake"]["accuracy"] > 0.98 and result["fake"]["copies"] < 0.035
    assert "    8       0              -" in report(result)


def test_one_bad_class_shows_in_its_row_alone(good, judge, parts):
    images, labels = parts[2].images, parts[2].labels
    result = judge(torch.where((labels == 8)[:, None, None, None], blur(images, 1.0), images), labels)
    for digit, (part, before) in enumerate(zip(result["classes"], good["classes"], strict=True)):
        if digit == 8:
            assert part["ratio"] > 2 * before["ratio"]
            assert part["fake"]["recall"] < before["fake"]["recall"] - 0.3
        else:
            assert part == before
    for name in ("accuracy", "precision", "coverage"):  # in the totals it hardly shows, which is why there are rows
        assert result["fake"][name] == pytest.approx(good["fake"][name], abs=0.05)


def test_one_image_again_and_again_shows_in_recall_and_coverage(judge, parts):
    result = judge(parts[2].images[:1].repeat(1000, 1, 1, 1), parts[2].labels[:1].repeat(1000))
    assert result["fake"]["precision"] == 1 and result["fake"]["accuracy"] == 1  # what these cannot see
    assert result["fake"]["recall"] < 0.02 and result["fake"]["coverage"] < 0.05
    assert result["ratio"] > 50
    assert result["fake"]["copies"] == 0


def test_training_images_passed_off_as_fakes_show_as_copies_alone(judge, parts):
    result = judge(parts[0].images, parts[0].labels)
    assert result["fake"]["copies"] == 1 and result["fake"]["nearest"] == 0
    assert result["ratio"] == pytest.approx(1)
    noise = torch.randint(0, 10, parts[0].images.shape, generator=torch.Generator().manual_seed(0))
    mixed = (parts[0].images + noise).clamp(0, 255).byte()  # a little noise does not hide them
    mixed[::2] = parts[2].images[::2]
    assert judge(mixed, None)["fake"]["copies"] == pytest.approx(0.5, abs=0.05)


def test_copies_are_told_by_the_limit_of_their_digit(judge, classifier, parts):
    """By hand: nearer to a training image than 99 % of the test images that are read alike."""
    noise = torch.randn(parts[0].images.shape, generator=torch.Generator().manual_seed(0))
    fakes = (parts[0].images + 40 * torch.rand(599, 1, 1, 1) * noise).clamp(0, 255).byte()
    reads, test_reads = (embed(classifier, images)[1].argmax(dim=1) for images in (fakes, parts[1].images))
    distances, test_distances = (nearest(images, parts[0].images)[0] for images in (fakes, parts[1].images))
    copies = [distances[i] < test_distances[test_reads == reads[i]].quantile(0.01) for i in range(599)]
    share = sum(copies).item() / 599
    assert judge(fakes, None)["fake"]["copies"] == pytest.approx(share, abs=1e-6)
    assert 0.1 < share < 0.98


def test_without_labels_all_but_the_accuracy_is_known(good, judge, parts):
    result = judge(parts[2].images, None)
    assert math.isnan(result["fake"]["accuracy"]) and not math.isnan(result["real"]["accuracy"])
    for name in (*METRICS[1:], "nearest", "copies"):
        assert result["fake"][name] == good["fake"][name]
    assert sum(part["count"] for part in result["classes"]) == 599
    assert re.search(r"read as asked for +- +0\.", report(result))


def test_the_score_is_deterministic(good, judge, parts):
    assert judge(parts[2].images, parts[2].labels) == good


def test_too_few_images_or_impossible_labels_are_refused(judge, parts):
    with pytest.raises(UserError, match="5 images are too few"):
        judge(parts[2].images[:5], parts[2].labels[:5])
    for labels in (parts[2].labels[:7], parts[2].labels[:8] - 10, parts[2].labels[:8] + 10):
        with pytest.raises(UserError, match="as many labels"):
            judge(parts[2].images[:8], labels)


def test_test_images_that_are_too_few(classifier, parts):
    """Of as many images as there are features, or fewer, the covariance says nothing."""
    with pytest.raises(UserError, match="5 test images are too few"):
        Judge(parts[0], few(parts[1], 5), classifier)
    text = report(Judge(parts[0], few(parts[1], 8), classifier).score(parts[2].images, parts[2].labels))
    assert "warning: 8 test images are too few for 64 features: the Fréchet distances mean nothing" in text
    assert len(measure.score.few(2000, 64)) == 1 and measure.score.few(2000, 65) == []
    assert "64 images are too few for 64" in measure.score.few(64, 500)[1] and len(measure.score.few(65, 500)) == 1


def test_the_report_counts_and_warns(good):
    text = report(good)
    assert text.startswith("599 images") and "warning: 599 images are few" in text
    assert len(text.splitlines()) < 30 and all(len(line) <= 120 for line in text.splitlines())
    assert "warning" not in report(good | {"count": 2000})


def test_a_class_that_no_test_image_is_of(classifier, parts):
    without = (parts[1].labels != 8) & (embed(classifier, parts[1].images)[1].argmax(dim=1) != 8)
    test = dataclasses.replace(parts[1], images=parts[1].images[without], labels=parts[1].labels[without])
    result = Judge(parts[0], test, classifier).score(parts[2].images, parts[2].labels)
    assert math.isnan(result["classes"][8]["real"]["accuracy"]) and result["classes"][7]["real"]["accuracy"] > 0.8
    assert re.search(r"\n {4}8 .* - \( +-\)", report(result))


def figures_of(name, accuracy, ratio=1.0):
    of = dict.fromkeys((*METRICS, "nearest", "copies"), 0.5)
    return {"name": name, "count": 9, "ratio": ratio, "fake": of | {"accuracy": accuracy}, "real": of}


def test_names_of_classes_in_the_report():
    """Of any length, aligned; what is in a name is no missing number."""
    classes = [figures_of(name, math.nan) for name in ("banana", "a " * 40, "x")]
    lines = measure.score.class_table(classes)
    assert len({len(line) for line in lines}) == 1
    assert [line[:30].strip() for line in lines] == ["class", "banana", "a " * 14 + "a…", "x"]
    assert lines[1][30:].split()[:2] == ["9", "-"]


def test_of_many_classes_the_worst_are_shown():
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).tolist()
    lines = measure.score.class_table([figures_of(f"n{i}", i / 1000) for i in order])
    assert [line.split()[0] for line in lines[1:21]] == [f"n{i}" for i in range(20)]
    assert len(lines) == 22 and lines[-1] == "the 20 of 1,000 classes that are least read as asked for"
    lines = measure.score.class_table([figures_of(f"n{i}", math.nan, i) for i in order])  # no labels
    assert [line.split()[0] for line in lines[1:21]] == [f"n{999 - i}" for i in range(20)]
    assert len(measure.score.class_table([figures_of(str(i), 0.5) for i in range(20)])) == 21


def test_each_figure_of_the_report_is_in_its_own_column():
    numbers = (i / 1000 for i in range(1, 1000))

    def figures(count):
        names = (*METRICS, "accuracy", "nearest", "copies")
        return {"count": count, "reference": count, "ratio": 1000 * next(numbers),
                "fake": {name: next(numbers) for name in names}, "real": {name: next(numbers) for name in names}}

    result = figures(3000) | {"reference": 2999, "test": 500, "classes": [
        {"name": str(digit)} | figures(300 + digit) for digit in range(10)]}
    lines = report(result).splitlines()
    fake, real = result["fake"], result["real"]
    assert lines[1].split()[2:] == [f"{fake['frechet']:.3f}", f"{real['frechet']:.3f}", "ratio", "1.00"]
    for line, name in zip(lines[2:9], ("precision", "recall", "density", "coverage", "accuracy", "nearest", "copies"),
                          strict=True):
        assert line.split()[-2:] == [f"{fake[name]:.3f}", f"{real[name]:.3f}"], name
    for digit, line in enumerate(lines[11:21]):
        part = result["classes"][digit]
        pairs = [f"{part['fake'][name]:.3f} ({part['real'][name]:.3f})" for name in ("frechet", "recall", "coverage")]
        assert line.split() == f"{digit} {300 + digit} {part['fake']['accuracy']:.3f} {' '.join(pairs)}".split()
    assert "real: 2,999 training images" in lines[22]


def test_pictures(classifier, parts):
    images = torch.cat([parts[2].images[:50], parts[0].images[3:4]])
    picture = nearest_picture(images, parts[0], each=3)
    assert picture.mode == "L" and max(picture.size) < 1200
    first = np.asarray(picture)[2:58, 2:114]  # the copy, a 0, comes first, beside what it is a copy of
    assert np.array_equal(first[:, :56], first[:, 56:])
    assert np.array_equal(first[::2, :56:2], images[50, 0])

    labels = torch.cat([parts[2].labels[:50], parts[0].labels[3:4]])
    labels[17] = (labels[17] + 1) % 10
    probs = embed(classifier, images)[1]
    picture = worst_picture(images, labels, probs, "0123456789", count=12)
    assert picture.mode == "L" and max(picture.size) < 1200
    order = sorted(range(51), key=lambda k: probs[k, labels[k]].item())
    assert 17 in order[:2]  # the one that is none of what it should be
    for place, k in enumerate(order[:12]):  # the worst first, row by row
        top, left = 2 + place // 10 * (98 + 2), 2 + place % 10 * (84 + 2)
        assert np.array_equal(np.asarray(picture)[top:top + 84:3, left:left + 84:3], images[k, 0]), place
        caption = Image.new("L", (80, 13))  # 80 of 84 pixels: text begins at the fifth
        ImageDraw.Draw(caption).text((0, 0), f"{labels[k]} read {probs[k].argmax()}", fill=255)
        assert np.array_equal(np.asarray(picture)[top + 85:top + 98, left + 4:left + 84], np.asarray(caption)), place


def test_pictures_of_named_classes():
    """In colour; the names of the classes below, in nearest.png of the training image."""
    names = [f"class {i}" for i in range(30)]
    images = torch.randint(0, 256, (60, 3, 64, 64), dtype=torch.uint8)
    train = Dataset("folder", images, torch.arange(60) % 30, names)
    picture = np.asarray(nearest_picture(images, train, each=2))
    assert picture.shape == (2 + 20 * (64 + 14 + 2), 2 + 2 * (128 + 2), 3)  # 20 of the 30 classes
    pair = picture[2:66, 2:130]
    assert np.array_equal(pair[:, :64], pair[:, 64:])
    label = next(i % 30 for i in range(60) if np.array_equal(pair[:, :64], images[i].permute(1, 2, 0)))
    caption = Image.new("RGB", (120, 13))
    ImageDraw.Draw(caption).text((0, 0), names[label], fill="white")
    assert np.array_equal(picture[67:80, 6:126], np.asarray(caption))
    picture = np.asarray(worst_picture(images, torch.arange(60) % 30, torch.eye(30)[torch.arange(1, 61) % 30], names))
    assert np.array_equal(picture[2:66, 2:66], images[0].permute(1, 2, 0))
    for row, text in enumerate(("class 0", "read class 1")):
        caption = Image.new("RGB", (60, 12))
        ImageDraw.Draw(caption).text((0, 0), text, fill="white")
        assert np.array_equal(picture[67 + 14 * row:79 + 14 * row, 6:66], np.asarray(caption))


def test_the_nearest_come_first(parts):
    """In each digit's row, from left to right: each fake left of the training image that it is like."""
    train = parts[0]
    zeros = (train.labels == 0).nonzero()[:4, 0]
    fakes = train.images[zeros].clone()
    for i, amount in enumerate((30, 0, 20, 10)):
        fakes[i, 0, 0, :5] = amount  # so far from its training image
    picture = np.asarray(nearest_picture(fakes, train, each=4))
    for place, i in enumerate((1, 3, 2, 0)):
        left = 2 + place * (112 + 2)
        assert np.array_equal(picture[2:58:2, left:left + 56:2], fakes[i, 0])
        assert np.array_equal(picture[2:58:2, left + 56:left + 112:2], train.images[zeros[i], 0])


# The classifier

def test_the_classifier_that_is_shipped_reads_digits(classifier, parts):
    assert WEIGHTS.stat().st_size < 1_000_000
    assert torch.load(WEIGHTS, weights_only=True)["test_accuracy"] > 0.993
    images = torch.cat([part.images for part in parts])
    features, probs = embed(classifier, images)
    assert features.shape == (1797, 64) and features.dtype == torch.float32
    assert (probs.argmax(dim=1) == torch.cat([part.labels for part in parts])).float().mean() > 0.94
    torch.testing.assert_close(probs.sum(dim=1), torch.ones(1797))
    logits = classifier(images[:9].float() / 127.5 - 1)
    torch.testing.assert_close(logits.softmax(dim=1), probs[:9], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(embed(classifier, images[:60], batch_size=7)[0], features[:60], rtol=1e-3, atol=1e-4)


def test_other_images_are_refused(classifier):
    for shape in ((3, 1, 8, 8), (3, 3, 28, 28), (3, 28, 28)):
        with pytest.raises(UserError, match="28 x 28"):
            embed(classifier, torch.zeros(shape, dtype=torch.uint8))
    with pytest.raises(UserError, match="uint8"):
        embed(classifier, torch.zeros(3, 1, 28, 28))


def test_another_data_set_is_refused():
    with pytest.raises(UserError, match="reads 'mnist', not 'KMNIST'"):
        load_classifier(name="KMNIST")


class Malicious:
    def __reduce__(self):
        return print, ("this must never run",)


def test_a_file_that_is_no_classifier_is_one_clear_error(tmp_path, capsys):
    path = tmp_path / "classifier.pth"
    with pytest.raises(UserError, match="there is no classifier"):
        load_classifier(path=path)
    whole = WEIGHTS.read_bytes()
    damaged = [b"", whole[:1000], whole[:-1000], np.random.default_rng(0).bytes(10_000), pickle.dumps(Malicious(), 2)]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"classifier\.pth"):
            load_classifier(path=path)
    content = torch.load(WEIGHTS, weights_only=True)
    state = content["state_dict"]
    name = next(iter(state))
    for other in ([1, 2], {"format": "other"}, {**content, "dataset": ["x"]}, {**content, "state_dict": None},
                  {**content, "state_dict": {key: state[key] for key in list(state)[1:]}},
                  {**content, "state_dict": {**state, name: state[name][:3]}}, Malicious()):
        torch.save(other, path)
        with pytest.raises(UserError, match=r"classifier\.pth"):
            load_classifier(path=path)
    assert "never run" not in capsys.readouterr().out


def few(data, count):
    return dataclasses.replace(data, images=data.images[:count], labels=data.labels[:count])


def test_training_learns_and_is_repeatable(parts):
    trained = train_classifier(parts[0], epochs=6, batch_size=64)
    assert (embed(trained, parts[1].images)[1].argmax(dim=1) == parts[1].labels).float().mean() > 0.8
    first, second = (train_classifier(few(parts[0], 128), epochs=1, batch_size=64) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(weight, weight.half().float()) for weight in trained.parameters())
    assert isinstance(trained, DigitClassifier) and not trained.training


@pytest.fixture
def mnist(parts, monkeypatch):
    """The stand-in digits in place of MNIST."""
    monkeypatch.setattr(classifier_script, "load_images", lambda name, data_dir, train, **options: (
        parts[0 if train else 1] if name == "mnist" else load_dataset(name, data_dir, train, **options)))


def test_folder_of_fakes(call, mnist, parts, tmp_path):
    for i, (image, label) in enumerate(zip(parts[2].images[::6], parts[2].labels[::6], strict=True)):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:06d}_{label}.png")
    code, out, err = call(measure.score, "--images", tmp_path)
    assert code == 0, err
    assert out.startswith("100 images") and "read as asked" in out and "warning: 100 images are few" in out
    assert accuracy(out) == pytest.approx(0.96, abs=0.04)
    images, labels = measure.score.read_fakes(tmp_path)
    assert torch.equal(images, parts[2].images[::6].expand(-1, 3, -1, -1)) and torch.equal(labels, parts[2].labels[::6])
    (tmp_path / "000000_0.png").rename(tmp_path / "mine.png")
    assert_refused(call(measure.score, "--images", tmp_path), "1 images whose names end in no label", "mine.png")
    for i, path in enumerate(sorted(tmp_path.glob("0*.png"))):
        path.rename(tmp_path / f"mine_too{i}.png")
    assert measure.score.read_fakes(tmp_path)[1] is None
    Image.new("L", (8, 8)).save(tmp_path / "small.png")
    assert_refused(call(measure.score, "--images", tmp_path), "several sizes")
    assert_refused(call(measure.score, "--images", tmp_path / "none"), "missing")
    for flags in (["--checkpoint", "x"], ["--count", 100], ["--guidance", 2], ["--seed", 0]):
        assert_refused(call(measure.score, "--images", tmp_path, *flags), "--images", f"leave out {flags[0]}")
    for path in tmp_path.iterdir():
        path.unlink()
    assert_refused(call(measure.score, "--images", tmp_path), "no images")
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    assert_refused(call(measure.score, "--images", tmp_path), "20 x 20", "--dataset", "28 x 28")


def accuracy(out):
    return float(re.search(r"read as asked for +([0-9.]+)", out)[1])


def test_what_is_drawn_is_read_as_what_was_asked_for(call, mnist):
    """The score's own path, on the weights that come with the repository; digits shifted by one would be at 0."""
    code, out, err = call(measure.score, "--checkpoint", SHIPPED, "--count", 200)
    assert code == 0, err
    assert out.startswith(f"{SHIPPED}: dpm, 8 steps, guidance 1.1, seed 0") and accuracy(out) > 0.96
    model, config = load_model(SHIPPED, kinds=(Config,))
    labels = torch.arange(25) % 10
    fakes = measure.score.draw_fakes(model, config, labels)
    assert torch.equal(fakes, to_uint8(generate(model, config, labels)))


def test_each_flag_reaches_the_drawing(call, mnist, monkeypatch, parts, tmp_path):
    seen, content = [], load_checkpoint(SHIPPED, (Config,))
    config, path = LatentConfig(**dataclasses.asdict(content["config"])), tmp_path / "pixels.pth"
    save_checkpoint(path, config, 5, 1.0, content["ema"])

    def watched(model, config, labels):
        seen.append((config, next(model.parameters()).dtype, labels))
        return parts[2].images[:len(labels)]

    monkeypatch.setattr(measure.score, "draw_fakes", watched)
    flags = ["--count", 33, "--sampler", "ddim", "--sample-steps", 4, "--guidance", 3, "--eta", 0.5, "--spacing",
             "linspace", "--guided-channels", 1, "--guidance-high", 0.6, "--no-clamp",
             "--seed", 7, "--precision", "bf16", "--device", "cpu"]
    code, out, err = call(measure.score, "--checkpoint", path, *flags)
    assert code == 0, err
    drawn, dtype, labels = seen[0]
    assert drawn == dataclasses.replace(
        config, sampler="ddim", sample_steps=4, guidance=3.0, eta=0.5, spacing="linspace", guided_channels=1,
        guidance_high=0.6, clamp=False, seed=7, precision="bf16") and dtype == torch.bfloat16
    assert labels.tolist() == [*range(10), *range(10), *range(10), 0, 1, 2]
    assert f"{path}: ddim, 4 steps, guidance 3, seed 7" in out and "33 images" in out
    assert_refused(call(measure.score, "--checkpoint", SHIPPED, *flags), "--spacing")  # which its kind does not have
    for flags in (["--images", "x", "--equal"], ["--vae", "x", "--dataset", "mnist", "--equal"]):
        assert_refused(call(measure.score, *flags), "leave out --equal")


def test_equally_many_where_asked_for(call, mnist, monkeypatch, parts):
    one = parts[0].labels > 0
    one[(parts[0].labels == 0).nonzero()[:20]] = True  # a third of the zeros
    monkeypatch.setitem(parts_of := {}, 0, dataclasses.replace(parts[0], images=parts[0].images[one],
                                                               labels=parts[0].labels[one]))
    monkeypatch.setattr(classifier_script, "load_images", lambda name, data_dir, train, **options: (
        parts_of[0] if train else parts[1]))
    counts = []
    monkeypatch.setattr(measure.score, "draw_fakes", lambda model, config, labels: (
        counts.append(labels.bincount().tolist()), parts[2].images[:len(labels)])[1])
    for flags in ([], ["--equal"]):
        assert call(measure.score, "--checkpoint", SHIPPED, "--count", 100, *flags)[0] == 0
    assert counts[0][0] == 4 and min(counts[0][1:]) >= 10 and counts[1] == 10 * [10]


def test_distances_of_the_report_by_hand(classifier, parts):
    """The middle one of the fakes' distances, and not their mean: four copies, and five a known way off."""
    train, fakes = parts[0], parts[0].images[:9].clone()
    for i, amount in zip(range(4, 9), (51, 102, 153, 204, 255), strict=True):
        fakes[i, 0, 0, 0] = amount  # a corner that is black in all
    result = Judge(train, parts[1], classifier).score(fakes, None)
    assert train.images[:, 0, 0, 0].max() == 0
    assert result["fake"]["nearest"] == pytest.approx(0.2)


def test_fakes_do_not_depend_on_the_batch(monkeypatch):
    model, config = load_model(SHIPPED, kinds=(Config,))
    labels = torch.arange(20) % 7
    whole = measure.score.draw_fakes(model, config, labels)
    monkeypatch.setattr(inference, "batch_that_fits", lambda config, device: 7)
    assert torch.equal(measure.score.draw_fakes(model, config, labels), whole)


def test_scores_a_checkpoint(call, mnist, tmp_path):
    config = Config(dataset="mnist", image_size=28, channels=1, num_classes=10, patch_size=14, hidden_size=32, depth=1,
                    num_heads=2, sample_steps=2)
    save_checkpoint(tmp_path / "model.pth", config, 0, 0.0, config.build_model().state_dict())
    flags = ["--checkpoint", tmp_path / "model.pth", "--count", 100]
    code, out, err = call(measure.score, *flags, "--pictures", tmp_path / "pictures")
    assert code == 0, err
    assert out.startswith(f"{tmp_path / 'model.pth'}: dpm, 2 steps, guidance") and "100 images" in out
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["nearest.png", "worst.png"]
    assert_refused(call(measure.score, *flags, "--count", 5), "--count 5")
    assert_refused(call(measure.score, *flags, "--pictures", tmp_path / "model.pth"), "cannot be written")


@pytest.mark.parametrize(("settings", "words"), [
    (dict(image_size=32), ["--dataset mnist --data-dir here --image-size 32 --channels 1"]),
    (dict(channels=3), ["--image-size 28 --channels 3"]), (dict(num_classes=7), ["7 classes", "have 10"]),
    (dict(dataset="KMNIST"), ["python -m measure.classifier --dataset KMNIST --data-dir here --image-size 28"]),
    (dict(channels=2), ["channels is 2"]), (dict(dataset="folder", data_dir="none"), ["none is not a folder"])])
def test_what_cannot_be_scored_is_refused_before_the_work(call, tmp_path, monkeypatch, settings, words):
    """And where a classifier is missing, the line says which command trains it."""
    settings = dict(dataset="mnist", data_dir="here", image_size=28, channels=1, num_classes=10, patch_size=4,
                    hidden_size=32, depth=1, num_heads=2) | settings
    config = Config(**settings)
    save_checkpoint(tmp_path / "model.pth", config, 0, 0.0, config.build_model().state_dict())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(classifier_script, "load_images", lambda name, data_dir, **options: dataclasses.replace(
        load_dataset(*(["folder", data_dir] if name == "folder" else ["mnist", SMALL]), **options), name=name))
    monkeypatch.setattr(measure.score, "draw_fakes", None)
    assert_refused(call(measure.score, "--checkpoint", tmp_path / "model.pth"), *words)


def test_no_mnist_is_found_before_the_work(call, tmp_path, monkeypatch):
    def missing(*args, **options):
        raise UserError("MNIST is not there")

    monkeypatch.setattr(classifier_script, "load_images", missing)
    monkeypatch.setattr(measure.score, "draw_fakes", None)
    assert_refused(call(measure.score, "--checkpoint", SHIPPED), "MNIST is not there")
    (tmp_path / "worst.png").mkdir()
    assert_refused(call(measure.score, "--checkpoint", SHIPPED, "--pictures", tmp_path), "worst.png", "folder")


def test_models_of_small_digits_can_be_scored(call, trained, tmp_path, small_classifier, monkeypatch):
    """A classifier of their own reads real ones nearly always right."""
    monkeypatch.setattr(measure.score, "find_classifier", lambda *args: small_classifier)
    code, out, err = call(measure.score, "--checkpoint", trained, "--count", 60, "--pictures", tmp_path / "pictures")
    assert code == 0, err
    assert "60 images" in out and 0 <= accuracy(out) < 0.5  # it is hardly trained
    assert "real: 60 training images" in out
    data = small_mnist(False)
    for i, (image, label) in enumerate(zip(data.images[:200], data.labels, strict=False)):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:06d}_{label}.png")
    code, out, err = call(measure.score, "--images", tmp_path, *DATA[:-2])
    assert code == 0, err
    assert accuracy(out) > 0.92 and "200 images" in out
    precision = re.search(r"precision +([0-9.]+)", out)
    assert float(precision[1]) > 0.97


def test_where_the_classifier_is_written_is_known_before_it_is_trained(call, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_script, "load_images", None)
    for out in (tmp_path / "none" / "x.pth", tmp_path):
        assert_refused(call(classifier_script, "--out", out), out, "cannot be written")
    for seed in (-1, 2**63, 10**30):
        assert_refused(call(classifier_script, "--out", tmp_path / "x.pth", "--seed", seed), f"seed is {seed}")


def test_a_classifier_is_written(call, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_script, "load_images", lambda name, data_dir, train, **options: parts[
        0 if train else 1])
    code, out, err = call(classifier_script, "--out", tmp_path / "x.pth", "--device", "cpu")
    assert code == 0, err
    share = torch.load(tmp_path / "x.pth", weights_only=True)["test_accuracy"]
    reads = embed(load_classifier(path=tmp_path / "x.pth"), parts[1].images)[1].argmax(dim=1)
    assert share == pytest.approx((reads == parts[1].labels).float().mean().item(), abs=0.01)
    assert f"reads {share:.2%} of 599 test images" in out


def test_images_are_turned_scaled_and_shifted():
    """By up to 2 of 28 pixels: the centre of mass of a dot moves by up to that, each image in its own way."""
    dot = torch.full((200, 1, 28, 28), -1.0)
    dot[:, :, 12:16, 12:16] = 1
    moved = augment(dot, torch.Generator().manual_seed(0)) + 1
    place = torch.arange(28.0) - 13.5
    for axis in (2, 3):
        sums = moved.sum(dim=5 - axis)[:, 0]
        offset = (sums * place).sum(dim=1) / sums.sum(dim=1)
        assert offset.abs().max() < 2.4 and offset.abs().max() > 1.6 and 0.9 < offset.std() < 1.4
    line = torch.full((200, 1, 28, 28), -1.0)
    line[:, :, 4:24, 13:15] = 1
    turned = augment(line, torch.Generator().manual_seed(1)) + 1
    heights = turned.sum(dim=(1, 3)).gt(1).sum(dim=1).float()
    assert heights.min() < 19 and heights.max() > 20
    columns = turned[:, 0] * place
    slant = columns[:, 6:10].sum(dim=(1, 2)) / turned[:, 0, 6:10].sum(dim=(1, 2)) - columns[:, 18:22].sum(
        dim=(1, 2)) / turned[:, 0, 18:22].sum(dim=(1, 2))
    assert 1.2 < slant.abs().max() < 2.8  # 12 rows at up to 10 degrees


def test_training_sees_augmented_images(parts, monkeypatch):
    seen = []
    monkeypatch.setattr(classifier_script, "augment", lambda x, generator: seen.append(x) or x * 0 - 1)
    train_classifier(few(parts[0], 128), epochs=2, batch_size=64)
    assert len(seen) == 4 and all(x.shape == (64, 1, 28, 28) and x.min() == -1 and x.max() == 1 for x in seen)
