from support.commands import UserError
from support.files import write_atomically

import dataclasses
import os
import pickle
import zipfile

import pytest
import torch
from conftest import assert_refused

import checkpoint
from checkpoint import build_model, load_checkpoint, load_model, save_checkpoint
from config import Config

CONFIG = Config(dataset="digits", image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=1,
                num_heads=2)


@pytest.fixture
def saved(tmp_path):
    model = build_model(CONFIG)
    torch.nn.init.normal_(model.final_layer.linear.weight)
    save_checkpoint(tmp_path / "model.pth", CONFIG, 7, 1.5, model.state_dict())
    return tmp_path / "model.pth", model


def change(path, **changes):
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save(content, path)


def test_rebuilds_the_model_without_a_flag(saved):
    path, model = saved
    again, config = load_model(path, precision="fp32")
    assert config == CONFIG
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 800]), torch.tensor([1, 10])
    with torch.no_grad():
        assert torch.equal(again(x, t, y), model(x, t, y))


def test_only_plain_values_and_names(saved):
    content = torch.load(saved[0], weights_only=True)
    assert content["config"]["hidden_size"] == 32 and content["step"] == 7
    assert set(content["ema"]) == set(dict(saved[1].named_parameters()))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def test_malicious_pickle_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "ema": Malicious()}, "evil.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious()))
    for name in ("evil.pth", "plain.pth"):
        with pytest.raises(UserError, match="not a checkpoint"):
            load_checkpoint(name)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:100], lambda data: data[:len(data) // 2], lambda data: data[:-1],
    lambda data: os.urandom(5000), lambda data: b"hello\n"])
def test_files_that_are_no_checkpoint(saved, damage):
    path, _ = saved
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="not a checkpoint, or is cut short") as caught:
        load_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoints_of_other_projects(tmp_path):
    for content in ({"state_dict": {}}, [1, 2], torch.zeros(3), {"format": "dit-checkpoint-0"}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match="not a checkpoint of this project"):
            load_checkpoint(tmp_path / "other.pth")
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "other.pth")


@pytest.mark.parametrize("changes", [
    {"config": {}}, {"config": {"hidden_size": 16384, "depth": 256}}, {"config": {"no_such_field": 1}}, {"config": 3},
    {"config": {**vars(CONFIG), "steps": "many"}}, {"config": {**vars(CONFIG), "lr": float("nan")}},
    {"config": {**vars(CONFIG), "patch_size": 0}}, {"config": {**vars(CONFIG), "hidden_size": 64}},
    {"ema": {}}, {"ema": None}, {"ema": {"weight": 1}}, {"model": {}}, {"step": -1}, {"step": 1.5}, {"step": None}])
def test_damaged_content(saved, changes):
    path, _ = saved
    change(path, **changes)
    with pytest.raises(UserError, match="damaged checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_weights_that_claim_more_than_the_file_holds(saved):
    path, _ = saved
    big = Config(**{**vars(CONFIG), "hidden_size": 4096, "depth": 200})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build_model(big).state_dict().items()}
    change(path, config=vars(big), ema={name: torch.zeros(1).expand(shape) for name, shape in shapes.items()})
    with pytest.raises(UserError, match="claim more than the file holds"):
        load_checkpoint(path)


def test_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pth")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path)


def test_a_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"half of the n")
        raise OSError("disk full")

    with pytest.raises(UserError, match="cannot be written: disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(tmp_path / "missing" / "file", lambda file: None)
    with pytest.raises(UserError, match="cannot be written"):
        write_atomically(tmp_path, lambda file: file.write(b"over a folder"))


def test_weights_to_share(saved, call):
    path, model = saved
    small = path.with_name("small.pth")
    code, out, _ = call(checkpoint, path, small, "--guidance", 1.25)
    assert code == 0 and "trained for 7 steps" in out
    again, config = load_model(small, precision="fp32")
    assert config == dataclasses.replace(CONFIG, guidance=1.25)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert_refused(call(checkpoint, path.with_name("none.pth"), small), "none.pth")
