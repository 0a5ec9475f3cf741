"""The score against closed forms, SciPy's matrix root and pytorch-fid's own network; the command on small folders."""

from support import image_files
from support.commands import UserError, run
from support.stats import read_stats, save_stats

import os
import pickle
import socket
import sys
import tracemalloc
import warnings
from concurrent.futures import Future
from pathlib import Path
from unittest import mock

import forks
import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import REPOSITORY, small_mnist
from PIL import Image
from pytorch_fid import inception
from torchvision.transforms.functional import to_tensor

import fid_computer

SCRIPT = Path(fid_computer.__file__)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On a busy machine, threads that wait for each other make such small work ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def extract(weights):
    return fid_computer.inception_extractor(64, weights, CPU)


def save_digits(folder, part, invert=False):
    folder.mkdir()
    for i, grey in enumerate(small_mnist().images[part, 0].numpy()):
        Image.fromarray(255 - grey if invert else grey).save(folder / f"{i:05d}.png")
    return folder


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("images") / "real", slice(0, 7))


@pytest.fixture
def fake(tmp_path):
    return save_digits(tmp_path / "fake", slice(100, 105), invert=True)


@pytest.fixture
def stats(tmp_path):
    """A file of --save-stats, of 64 features of 1,000 images."""
    file = tmp_path / "stats.npz"
    save_stats(file, *gaussian(np.random.default_rng(0), 64, 100), 1000)
    return file


@pytest.fixture
def call(monkeypatch, capsys):
    """Calls the command within this process, and returns what it wrote to standard output and standard error."""
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["fid_computer.py", *map(str, args)])
        fid_computer.main()
        return capsys.readouterr()
    return call


@pytest.fixture
def fails(call, tmp_path):
    """Calls the command, which must raise a `UserError` of one line, and change no file; returns that line."""
    def fails(*args):
        before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        with pytest.raises(UserError) as error:
            call(*args)
        assert before == {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
        assert len(str(error.value).splitlines()) == 1
        return str(error.value)
    return fails


OFFLINE = {"https_proxy": "http://127.0.0.1:9"}  # a dead proxy: nothing is downloaded, where there is a network too


def command(*args, **env):
    return forks.run([SCRIPT, *args], REPOSITORY, os.environ | OFFLINE | env)


def assert_failed(result, *words):
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 1 and result.stdout == "" and len(errors) == 1, result.stderr
    assert result.stderr.splitlines()[-1] == errors[0] and "Traceback" not in result.stderr
    assert all(word in errors[0] for word in words), errors[0]


def gaussian(random, dims, rank):
    """A random mean (D,) and a covariance (D, D) of at most `rank`."""
    factor = random.normal(size=(dims, rank))
    return random.normal(size=dims), factor @ factor.T / rank


def textbook(mean_1, cov_1, mean_2, cov_2):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that a singular matrix may have no root
        root = scipy.linalg.sqrtm(cov_1 @ cov_2)
    return ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1 + cov_2 - 2 * np.real(root))


# The distance


@pytest.mark.parametrize("rank", [1, 10, 32, 100])
def test_distance_to_itself_is_zero(rank):
    mean, cov = gaussian(np.random.default_rng(rank), 32, rank)
    assert 0 <= fid_computer.frechet_distance(mean, cov, mean, cov) < 1e-12


def test_distance_of_diagonal_gaussians():
    random = np.random.default_rng(0)
    mean_1, mean_2, std_1, std_2 = random.normal(size=(4, 20))
    expected = ((mean_1 - mean_2) ** 2).sum() + ((abs(std_1) - abs(std_2)) ** 2).sum()
    actual = fid_computer.frechet_distance(mean_1, np.diag(std_1 ** 2), mean_2, np.diag(std_2 ** 2))
    assert actual == pytest.approx(expected, rel=1e-12)


def test_distance_of_rotated_gaussians_that_commute():
    random = np.random.default_rng(1)
    rotation = np.linalg.qr(random.normal(size=(20, 20))).Q
    mean_1, mean_2, std_1, std_2 = abs(random.normal(size=(4, 20)))
    expected = ((mean_1 - mean_2) ** 2).sum() + ((std_1 - std_2) ** 2).sum()
    covs = [rotation * std ** 2 @ rotation.T for std in (std_1, std_2)]
    assert fid_computer.frechet_distance(mean_1, covs[0], mean_2, covs[1]) == pytest.approx(expected, rel=1e-12)


def test_distance_of_two_by_two_gaussians():
    # tr (M^1/2) = sqrt(tr M + 2 sqrt(det M)) for a 2x2 matrix M
    cov_1, cov_2, mean = np.array([[2.0, 1], [1, 3]]), np.array([[1.0, -0.5], [-0.5, 4]]), np.zeros(2)
    product = cov_1 @ cov_2
    expected = 10 - 2 * np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    assert fid_computer.frechet_distance(mean, cov_1, mean, cov_2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("rank_1", "rank_2"), [(100, 100), (20, 100), (100, 20), (20, 30), (1, 2)])
def test_distance_is_that_of_the_textbook_and_symmetric(rank_1, rank_2):
    random = np.random.default_rng(rank_1 + rank_2)
    first, second = gaussian(random, 64, rank_1), gaussian(random, 64, rank_2)
    actual = fid_computer.frechet_distance(*first, *second)
    assert actual == pytest.approx(textbook(*first, *second), rel=1e-6)
    assert actual == pytest.approx(fid_computer.frechet_distance(*second, *first), rel=1e-12)


def test_distance_of_singular_covariances_is_exact():
    # With C = A A^T the trace of the root is the sum of the singular values of A1^T A2.
    random, mean = np.random.default_rng(0), np.zeros(256)
    factor_1, factor_2 = random.normal(size=(256, 20)), random.normal(size=(256, 1000))
    root_trace = np.linalg.svd(factor_1.T @ factor_2, compute_uv=False).sum()
    expected = (factor_1 ** 2).sum() + (factor_2 ** 2).sum() - 2 * root_trace
    actual = fid_computer.frechet_distance(mean, factor_1 @ factor_1.T, mean, factor_2 @ factor_2.T)
    assert actual == pytest.approx(expected, rel=1e-12)


def test_distance_to_a_set_of_equal_images():
    mean, cov = gaussian(np.random.default_rng(0), 8, 20)
    point = np.zeros((8, 8))
    assert fid_computer.frechet_distance(mean, cov, mean, point) == pytest.approx(np.trace(cov), rel=1e-12)
    assert fid_computer.frechet_distance(mean, point, mean, point) == 0


def test_statistics_are_of_float64():
    features = (1000 + np.random.default_rng(0).normal(size=(500, 3))).astype(np.float32)
    mean, cov = fid_computer.statistics(features)
    exact = features.astype(np.float64)
    centered = exact - exact.mean(axis=0)
    assert mean.dtype == cov.dtype == np.float64
    np.testing.assert_allclose(mean, exact.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(cov, centered.T @ centered / 499, rtol=1e-10)
    with pytest.raises(UserError, match="not finite"):
        fid_computer.statistics(np.array([[0, np.nan], [1, 2]]))


# The features


@pytest.mark.parametrize(("dims", "sizes"), [(64, (8, 400)), (2048, (28,))])
def test_features_are_those_of_pytorch_fid(state, weights, tmp_path, dims, sizes):
    extract = fid_computer.inception_extractor(dims, weights, CPU)
    with mock.patch.object(inception, "load_state_dict_from_url", return_value=state):
        network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[dims]]).eval()
    for size in sizes:
        colours = np.random.default_rng(size).integers(0, 256, size=(2, size, size, 3), dtype=np.uint8)
        paths = [tmp_path / "0.png", tmp_path / "1.png"]
        for path, colour in zip(paths, colours, strict=True):
            Image.fromarray(colour).save(path)
        with torch.inference_mode():
            expected = network(torch.stack([to_tensor(Image.open(path)) for path in paths]))[0].mean(dim=(2, 3))
        actual = fid_computer.compute_features(paths, extract, batch_size=2)
        assert actual.shape == (2, dims) and actual.dtype == np.float32 and expected.std(dim=0).max() > 0.01
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_features_of_mixed_sizes_are_those_of_each_alone(extract, tmp_path):
    for i, size in enumerate([(8, 8), (28, 28), (40, 20), (299, 299), (350, 310)]):
        noise = np.random.default_rng(i).integers(0, 256, size=(*size, 3), dtype=np.uint8)
        Image.fromarray(noise).convert("L" if i == 1 else "RGB").save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    together = fid_computer.compute_features(paths, extract, batch_size=5)
    np.testing.assert_allclose(together, fid_computer.compute_features(paths, extract, batch_size=1), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 5, 1000])
def test_any_network_can_be_plugged_in(fake, batch_size):
    paths, sizes = sorted(fake.iterdir()), []

    def extract(images):
        sizes.append(len(images))
        return torch.stack([image.double().mean(dim=(1, 2)) for image in images])

    expected = [np.array(Image.open(path)).mean().repeat(3) for path in paths]
    np.testing.assert_allclose(fid_computer.compute_features(paths, extract, batch_size), expected, rtol=1e-6)
    assert sizes == {1: [1] * 5, 2: [2, 2, 1], 5: [5], 1000: [5]}[batch_size]


class ReadsAtOnce:
    """An executor that does at once what it is asked for: whatever a real one may have read by then."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future

    def shutdown(self, cancel_futures):
        assert cancel_futures


def test_reading_ahead_is_bounded(fake, monkeypatch):
    seen, paths = [], sorted(fake.iterdir()) * 20
    monkeypatch.setattr(image_files, "ThreadPoolExecutor", ReadsAtOnce)
    monkeypatch.setattr(image_files, "read_image", lambda path, mode: seen.append(path) or Image.new(mode, (2, 2)))
    batches = image_files.read_batches(paths, batch_size=5)
    for number in range(1, 5):  # the batch asked for, and two more
        assert len(next(batches)) == 5 and seen == paths[:5 * (number + 2)]
    batches.close()
    assert len(seen) == 30


def test_features_are_in_the_order_of_the_files(tmp_path):
    for i in range(7):
        Image.new("L", (4, 4), 10 * i).save(tmp_path / f"{i}.png")

    def extract(images):
        return torch.stack([image.float().mean(dim=(1, 2)) for image in images])

    paths = sorted(tmp_path.iterdir())
    assert fid_computer.compute_features(paths, extract, 3)[:, 0].tolist() == [0, 10, 20, 30, 40, 50, 60]
    assert fid_computer.compute_features(paths[::-1], extract, 3)[:, 0].tolist() == [60, 50, 40, 30, 20, 10, 0]


def test_out_of_memory_is_one_line(fake, real, monkeypatch, capsys):
    def extract(images):
        return torch.empty(2**60, dtype=torch.uint8)  # no machine has as much

    monkeypatch.setattr(fid_computer, "inception_extractor", lambda *args: extract)
    monkeypatch.setattr(sys, "argv", ["fid_computer.py", "--fake", str(fake), "--real", str(real), "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        run(fid_computer.main)
    assert end.value.code.startswith("error: out of memory: lower --batch-size") and "\n" not in end.value.code


# Its weights


def test_weights_are_downloaded_once(tmp_path, monkeypatch):
    def download(url, file, hash_prefix, progress):
        assert url == inception.FID_WEIGHTS_URL and 0 < socket.getdefaulttimeout() <= 10
        calls.append(hash_prefix)
        Path(file).touch()

    calls = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "new"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    before = socket.getdefaulttimeout()
    assert fid_computer.cached_weights() == fid_computer.cached_weights()
    assert calls == ["6726825d"] and socket.getdefaulttimeout() == before


def test_a_wrong_download_is_not_kept(tmp_path, monkeypatch):
    (tmp_path / "wrong").write_bytes(b"a page of the hotel's network")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(fid_computer, "WEIGHTS_URL", (tmp_path / "wrong").as_uri())
    with pytest.raises(UserError, match=r"cannot be downloaded .*hash"):
        fid_computer.cached_weights()
    assert not list((tmp_path / "home" / "hub" / "checkpoints").iterdir())


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("malicious",)


def write_weights(kind, state, file):
    if kind == "random bytes":
        file.write_bytes(os.urandom(1000))
    elif kind == "empty":
        file.touch()
    elif kind == "cut short":
        torch.save(state, file)
        os.truncate(file, file.stat().st_size // 2)
    elif kind == "malicious":
        file.write_bytes(pickle.dumps(Malicious(), protocol=2))
    else:
        torch.save({"list": [1], "other names": {"a": torch.ones(2)}}[kind], file)


@pytest.mark.parametrize("kind", ["random bytes", "empty", "cut short", "malicious", "list", "other names"])
def test_bad_weights(kind, state, fails, fake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_weights(kind, state, tmp_path / "bad.pth")
    message = fails("--fake", fake, "--real", fake, "--dims", 64, "--weights", "bad.pth")
    assert message.startswith("bad.pth does not hold") and inception.FID_WEIGHTS_URL in message


def test_missing_weights_file(fails, fake):
    assert "nowhere.pth cannot be read" in fails("--fake", fake, "--real", fake, "--weights", "nowhere.pth")


def test_no_weights_and_no_network(fake, tmp_path):
    result = command("--fake", fake, "--real", fake, TORCH_HOME=str(tmp_path / "home"))
    assert_failed(result, str(tmp_path / "home" / "hub" / "checkpoints" / fid_computer.WEIGHTS_NAME),
                  inception.FID_WEIGHTS_URL, "--weights")


def test_no_weights_and_no_network_in_two_processes(fake, tmp_path):
    """One tries, and the other ends with it; neither with a traceback."""
    first, second = forks.start_ranks(2, [SCRIPT, "--fake", fake, "--real", fake, "--device", "cpu"], REPOSITORY,
                                      os.environ | OFFLINE | {"TORCH_HOME": str(tmp_path / "home")})
    (out, err), other = first.communicate(), second.communicate()
    assert first.returncode == 1 and second.returncode == 1 and out == other[0] == ""
    assert err.count("error: Inception's weights are not at") == 1 and "Traceback" not in err + other[1]
    assert "another of the 2 processes is gone" in other[1]


# The command


def test_command_and_its_saved_statistics(real, fake, weights, tmp_path, call):
    Image.new("RGBA", (30, 50), "red").save(fake / "another.png")  # another size and mode
    (fake / "notes.txt").write_text("not an image")
    stats = tmp_path / "real.npz"
    args = ["--fake", str(fake), "--dims", "64", "--weights", str(weights), "--device", "cpu"]
    result = command(*args, "--real", str(real), "--save-stats", str(stats))
    assert result.returncode == 0, result.stderr
    name, score, rest = result.stdout.split(maxsplit=2)
    assert name == "FID" and float(score) > 0.01
    assert rest == f"(64 Inception features; 6 images in {fake} against 7 in {real})\n"
    left_out, *warned = result.stderr.splitlines()
    assert left_out == f"{fake}: left out 1 file: 1 .txt"
    assert [line[:18] for line in warned] == ["warning: 7 images ", "warning: 6 images "] and "64 features" in warned[0]

    with np.load(stats) as data:
        assert (data["mean"].shape, data["cov"].shape, data["count"], data["dims"]) == ((64,), (64, 64), 7, 64)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fake", "real.npz"]  # no half-written file is left
    out, _ = call(*args, "--real", stats, "--batch-size", 3)
    assert out.split()[:2] == ["FID", score] and f"6 images in {fake} against 7 in {stats})" in out


def test_inception_computes_in_full_precision(weights, monkeypatch):
    """cuDNN would round to TF32: the score would depend on the GPU."""
    conv, seen, forward = torch.backends.cudnn.conv, [], torch.nn.Conv2d.forward
    before, extract = conv.fp32_precision, fid_computer.inception_extractor(64, weights, CPU)
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda module, x: (
        seen.append(conv.fp32_precision), forward(module, x))[1])
    extract([torch.zeros(3, 9, 9)])
    assert {*seen} == {"ieee"} and conv.fp32_precision == before


@pytest.mark.parametrize("count", [64, 65])
def test_as_many_images_as_features_are_too_few(count, stats, tmp_path, call):
    """Their mean takes one away: so many differences from it are singular."""
    few = tmp_path / "few.npz"
    save_stats(few, np.zeros(64), np.eye(64), count)
    err = call("--fake", few, "--real", stats, "--dims", 64)[1]
    assert err.startswith(f"warning: 64 images in {few} are too few for 64 features") if count == 64 else not err


def test_each_flag_reaches_the_network(fake, real, weights, call, monkeypatch, capsys):
    seen, sizes = [], []

    def extractor(*args):
        seen.append(args)
        return lambda images: (sizes.append(len(images)), torch.randn(len(images), args[0]))[1]

    monkeypatch.setattr(fid_computer, "inception_extractor", extractor)
    out, _ = call("--fake", fake, "--real", real, "--dims", 192, "--weights", weights, "--device", "cpu",
                  "--batch-size", 4)
    assert seen == [(192, weights, CPU)] and sizes == [4, 3, 4, 1]  # 7 real ones and 5 fakes
    assert f"(192 Inception features; 5 images in {fake} against 7 in {real})" in out


def test_distance_of_a_folder_to_itself(fake, weights, call):
    out, err = call("--fake", fake, "--real", fake, "--dims", 64, "--weights", weights)
    assert out.startswith("FID 0.0000 ") and f"warning: --real and --fake are both {fake}" in err


def test_pytorch_fid_statistics_are_read(tmp_path, stats, call):
    mean, cov, _ = read_stats(stats, 64)
    theirs = tmp_path / "theirs.npz"
    np.savez_compressed(theirs, mu=mean + 1, sigma=cov)
    out, err = call("--fake", stats, "--real", theirs, "--dims", 64)
    assert out == f"FID 64.0000  (64 Inception features; 1,000 images in {stats} against ? in {theirs})\n" and not err


def test_help_does_not_wait_for_the_network(monkeypatch, call, capsys):
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)  # importing it raises ImportError
    with pytest.raises(SystemExit) as stop:
        call("--help")
    assert stop.value.code == 0 and "examples:" in capsys.readouterr().out


def test_missing_folder(fake, tmp_path):
    assert_failed(command("--fake", fake, "--real", tmp_path / "rael"), str(tmp_path / "rael"), "missing")


def test_broken_image_among_good_ones(fake, stats, weights, fails):
    whole = (fake / "00003.png").read_bytes()
    (fake / "00003.png").write_bytes(whole[:len(whole) // 2])
    message = fails("--fake", stats, "--real", fake, "--dims", 64, "--weights", weights, "--save-stats",
                    stats.with_name("new.npz"))
    assert str(fake / "00003.png") in message


def test_broken_image_as_a_command(fake, stats, weights):
    (fake / "00001.png").write_bytes(b"no image")
    assert_failed(command("--fake", fake, "--real", stats, "--dims", "64", "--weights", weights), "00001.png")


def test_folders_without_enough_images(fake, tmp_path, fails):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} holds no image" in fails("--fake", tmp_path / "empty", "--real", fake)
    save_digits(tmp_path / "one", slice(0, 1))
    assert f"{tmp_path / 'one'} holds 1 image" in fails("--fake", fake, "--real", tmp_path / "one")
    assert "00000.png is not a folder" in fails("--fake", fake / "00000.png", "--real", fake)


def write_stats(kind, stats, file):
    arrays = dict(mean=np.zeros(64), cov=np.eye(64), count=10, dims=64)
    changes = {"other names": dict(mean=None), "other shape": dict(cov=np.eye(63)),
               "nan": dict(mean=np.full(64, np.nan)),
               "malicious": dict(mean=np.array([Malicious()] * 64)),
               "words": dict(count="many"), "scalar": dict(mean=1.0), "one image": dict(count=1),
               "asymmetric": dict(cov=np.eye(64) + np.eye(64, k=1) / 1000),
               "negative variance": dict(cov=np.diag(np.r_[-1e-6, np.ones(63)])),
               "negative eigenvalue": dict(cov=np.eye(64) - 1.03 / 64)}
    if kind == "random bytes":
        file.write_bytes(os.urandom(1000))
    elif kind == "empty":
        file.touch()
    elif kind == "cut short":
        file.write_bytes(stats.read_bytes()[:-1000])
    elif kind == "one array":
        with open(file, "wb") as stream:
            np.save(stream, np.eye(64))
    else:
        np.savez(file, **{name: value for name, value in {**arrays, **changes[kind]}.items() if value is not None})


@pytest.mark.parametrize("kind", ["random bytes", "empty", "cut short", "one array", "other names", "other shape",
                                  "nan", "malicious", "words", "scalar", "one image", "asymmetric",
                                  "negative variance", "negative eigenvalue"])
def test_malformed_statistics(kind, stats, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_stats(kind, stats, tmp_path / "bad.npz")
    words = "holds cov, count, dims" if kind == "other names" else "is damaged"
    assert f"{tmp_path / 'bad.npz'} {words}" in fails("--fake", stats, "--real", tmp_path / "bad.npz", "--dims", 64)


@pytest.mark.parametrize("name", ["arr_0", "pool_3"])
def test_features_are_no_statistics(name, fails, stats, tmp_path):
    """What other programs keep under that ending."""
    np.savez(tmp_path / "theirs.npz", **{name: np.zeros((100, 64))})
    message = fails("--fake", stats, "--real", tmp_path / "theirs.npz", "--dims", 64)
    assert f"theirs.npz holds {name}, but no mean and cov, or mu and sigma" in message and "give the folder" in message


def test_a_small_file_of_huge_arrays_is_not_unpacked(stats, fails, tmp_path):
    """100 MB in 100 kB. Those of another name, such as a batch of images, are not looked at."""
    zeros = np.zeros(10**8 // 8)
    np.savez_compressed(tmp_path / "huge.npz", mean=np.zeros(64), cov=np.eye(64), count=zeros, dims=64)
    np.savez_compressed(tmp_path / "batch.npz", mu=np.zeros(64), sigma=np.eye(64), arr_0=zeros)
    del zeros
    tracemalloc.start()
    assert "huge.npz is damaged" in fails("--fake", stats, "--real", tmp_path / "huge.npz", "--dims", 64)
    assert np.array_equal(read_stats(tmp_path / "batch.npz", 64)[1], np.eye(64))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7


@pytest.mark.parametrize("precision", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [3, 1000])
def test_rounding_is_no_damage(precision, rank, tmp_path):
    """Statistics of pytorch-fid, of fewer images than features too, whose smallest eigenvalues are rounded below 0."""
    features = np.random.default_rng(0).normal(size=(rank, 192)) * np.geomspace(1e-3, 10, 192)
    cov = np.cov(features, rowvar=False).astype(precision)
    np.savez(tmp_path / "theirs.npz", mu=features.mean(axis=0).astype(precision), sigma=cov)
    assert rank > 3 or np.linalg.eigvalsh(cov)[0] < 0
    assert np.array_equal(read_stats(tmp_path / "theirs.npz", 192)[1], cov)


def test_statistics_that_do_not_fit(stats, fails):
    assert f"{stats} holds the statistics of 64 features, but --dims is 2048" in fails("--fake", stats, "--real", stats)
    assert "nothing.npz cannot be read: No such file" in fails("--fake", stats, "--real", "nothing.npz", "--dims", 64)


def test_statistics_that_cannot_be_written(real, stats, fails, tmp_path, monkeypatch):
    inputs = ["--fake", stats, "--real", real, "--dims", 64, "--weights", "unread.pth"]  # it is noticed before all work
    (tmp_path / "folder.npz").mkdir()
    for target in ("nowhere/stats.npz", "folder.npz", "stats.txt", "stats.npz/stats.npz"):
        assert f"{target} cannot be written" in fails(*inputs, "--save-stats", tmp_path / target)
    assert "--save-stats" in fails("--fake", real, "--real", stats, "--dims", 64, "--save-stats", tmp_path / "new.npz")
    monkeypatch.setattr(os, "replace", mock.Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="cannot be written: No space left"):
        save_stats(stats, np.zeros(64), np.eye(64), 10)
    assert list(tmp_path.glob(".*")) == [] and read_stats(stats, 64)[2] == 1000
    assert list(tmp_path.glob("*.tmp")) == []


def test_bad_flags(stats, fails):
    for size in (0, -3):
        assert f"--batch-size is {size}" in fails("--batch-size", size)
    assert "--device cuda:99 cannot" in fails("--fake", stats, "--real", stats, "--dims", 64, "--device", "cuda:99")
