from support.commands import UserError
from support.files import write_atomically

import argparse
import copy
import dataclasses
import json
import os
import pickle
import shlex
import shutil
import types
import zipfile

import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY, TINY, assert_refused, same

import demo.share
import dit_block
import generator
import inference
import measure.classifier
import train
from config import Config
from latent.config import LatentConfig
from record import checkpoint
from record.checkpoint import load_checkpoint, load_model, save_checkpoint
from video.config import ANY, ClipConfig

CONFIG = Config(dataset="mnist", image_size=8, channels=1, num_classes=10, patch_size=2, hidden_size=32, depth=1,
                num_heads=2)


@pytest.fixture
def saved(tmp_path):
    model = CONFIG.build_model()
    torch.nn.init.normal_(model.final_layer.linear.weight)
    save_checkpoint(tmp_path / "model.pth", CONFIG, 7, 1.5, model.state_dict())
    return tmp_path / "model.pth", model


def change(path, **changes):
    content = torch.load(path, weights_only=True)
    content.update(changes)
    torch.save(content, path)


def test_rebuilds_the_model_without_a_flag(saved):
    path, model = saved
    again, config = load_model(path, precision="fp32", kinds=ANY)
    assert config == CONFIG
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3, 800]), torch.tensor([1, 10])
    assert not again.training and not again(x, t, y).requires_grad
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
            load_checkpoint(name, ANY)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: data[:100], lambda data: data[:len(data) // 2], lambda data: data[:-1],
    lambda data: os.urandom(5000), lambda data: b"hello\n"])
def test_files_that_are_no_checkpoint(saved, damage):
    path, _ = saved
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="not a checkpoint, or is cut short") as caught:
        load_checkpoint(path, ANY)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoints_of_other_projects(tmp_path):
    for content in ({"state_dict": {}}, [1, 2], torch.zeros(3), {"format": "dit-checkpoint-0"}):
        torch.save(content, tmp_path / "other.pth")
        with pytest.raises(UserError, match="not a checkpoint of this project"):
            load_checkpoint(tmp_path / "other.pth", ANY)
    with zipfile.ZipFile(tmp_path / "other.pth", "w") as file:
        file.writestr("readme", "hello")
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "other.pth", ANY)


@pytest.mark.parametrize("changes", [
    {"config": {}}, {"config": {"hidden_size": 16384, "depth": 256}}, {"config": 3},
    {"config": {**vars(CONFIG), "steps": "many"}}, {"config": {**vars(CONFIG), "lr": float("nan")}},
    {"config": {**vars(CONFIG), "patch_size": 0}}, {"ema": None}, {"model": {}}, {"optimizers": []},
    {"step": -1}, {"step": 1.5}, {"step": None}])
def test_damaged_content(saved, changes):
    path, _ = saved
    change(path, **changes)
    with pytest.raises(UserError, match="damaged checkpoint") as caught:
        load_checkpoint(path, ANY)
    assert "\n" not in str(caught.value)


class RMSNorm(torch.nn.RMSNorm):
    def __init__(self, size, eps, elementwise_affine):
        super().__init__(size, eps)


class SwiGLU(torch.nn.Sequential):
    """In the place of the block's MLP; it has the same names, but twice the width."""

    def __init__(self, first, _, last):
        super().__init__(torch.nn.Linear(first.in_features, 2 * first.out_features), torch.nn.GLU(), last)


@pytest.mark.parametrize(("name", "layer", "words"), [
    ("LayerNorm", RMSNorm, "'blocks.0.norm_1.weight' is missing"),
    ("Sequential", lambda *parts: (SwiGLU if len(parts) == 3 else torch.nn.Sequential)(*parts),
     "blocks.0.mlp.0.weight is (512, 128), not (1024, 128)")])
def test_weights_of_another_network(name, layer, words, call, monkeypatch, tmp_path):
    """Whoever changes the block is told that the shipped weights are of the one before, and not that they are broken;
    and both are to be had again."""
    change = types.SimpleNamespace(**vars(torch.nn) | {name: layer})
    monkeypatch.setattr(dit_block, "nn", change)
    shipped = REPOSITORY / "weights" / "mnist.pth"
    for result in (call(inference, "--checkpoint", shipped, "--out", tmp_path / "a.png"),
                   call(demo.share, shipped, tmp_path / "a.pth")):
        assert_refused(result, shipped, "the weights of another network than dit.py makes", words)
        assert "damaged" not in result[2]
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("changes", [{"config": {**vars(CONFIG), "hidden_size": 64}}, {"ema": {}},
                                     {"ema": {"weight": torch.zeros(1)}}])
def test_weights_that_do_not_fit_their_settings(saved, changes):
    path, _ = saved
    change(path, **changes)
    with pytest.raises(UserError, match=r"another network than dit\.py makes") as caught:
        load_checkpoint(path, ANY)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [{"no such\nsetting": 1}, {**vars(CONFIG), "no such\nsetting": 1}])
def test_checkpoints_of_another_version(saved, config):
    path, _ = saved
    change(path, config=config)
    words = r"made by another version of this code.*'no such\\nsetting' is not known"
    with pytest.raises(UserError, match=words) as caught:
        load_checkpoint(path, ANY)
    assert "\n" not in str(caught.value)


def test_weights_that_claim_more_than_the_file_holds(saved):
    path, _ = saved
    big = Config(**{**vars(CONFIG), "hidden_size": 4096, "depth": 200})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in big.build_model().state_dict().items()}
    change(path, config=vars(big), ema={name: torch.zeros(1).expand(shape) for name, shape in shapes.items()})
    with pytest.raises(UserError, match="claim more than the file holds"):
        load_checkpoint(path, ANY)


def test_weights_that_share_what_is_stored(saved):
    """Each is whole, but all are views of the same numbers: to load them would take more than the file."""
    path, _ = saved
    deep = Config(**{**vars(CONFIG), "depth": 9})
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in deep.build_model().state_dict().items()}
    numbers = torch.randn(max(shape.numel() for shape in shapes.values()))
    change(path, config=vars(deep), ema={name: numbers[:shape.numel()].view(shape) for name, shape in shapes.items()})
    with pytest.raises(UserError, match="claim more than the file holds"):
        load_checkpoint(path, ANY)


def replaced(tree, keys, value):
    """A copy of nested dicts and lists in which what lies at `keys` is `value`, or `value(old)`."""
    if not keys:
        return value(tree) if callable(value) else value
    new = copy.copy(tree)
    new[keys[0]] = replaced(new[keys[0]], keys[1:], value)
    return new


WEIGHT = "blocks.0.mlp.0.weight"
DAMAGES = {
    "a number": (["optimizers"], 7), "none": (["optimizers"], []), "missing": (["optimizers"], None),
    "one of two": (["optimizers"], lambda states: states[:1]),
    "one too many": (["optimizers"], lambda states: [*states, states[1]]),
    "in the wrong order": (["optimizers"], lambda states: states[::-1]),
    "a state missing": (["optimizers", 0], lambda state: dict(list(state.items())[1:])),
    "a stranger's state": (["optimizers", 0], lambda state: state | {99: state[0]}),
    "a state of nothing": (["optimizers", 0, 1], {}),
    "misshapen exp_avg": (["optimizers", 0, 2, "exp_avg"], torch.zeros(3)),
    "exp_avg of whole numbers": (["optimizers", 0, 2, "exp_avg"], lambda old: old.long()),
    "sparse exp_avg": (["optimizers", 0, 2, "exp_avg"], lambda old: old.to_sparse()),
    "exp_avg that is no number": (["optimizers", 0, 2, "exp_avg"], lambda old: old * float("nan")),
    "half momentum": (["optimizers", 1, 0, "momentum"], lambda old: old.half()),
    "momentum of one number": (["optimizers", 1, 0, "momentum"], lambda old: old.flatten()[:1].expand(old.shape)),
    "momentum without memory": (["optimizers", 1, 0, "momentum"], lambda old: old.to("meta")),
    "squares below 0": (["optimizers", 0, 2, "exp_avg_sq"], lambda old: old - 1),
    "steps below 0": (["optimizers", 0, 2, "step"], lambda old: old - 1e9),
    "steps as a list": (["optimizers", 0, 0, "step"], [1]),
    "no window": (["window"], None), "misshapen window": (["window"], torch.zeros(5, 2)),
    "window of whole numbers": (["window"], torch.zeros(4, 2, dtype=torch.long)),
    "window of losses below 0": (["window"], torch.full((4, 2), -1.0)),
    "window with one below 0": (["window"], torch.tensor([[1.0, 1.0]] * 3 + [[1.0, -1.0]])),
    "infinite window": (["window"], torch.full((4, 2), float("inf"))),
    "no model": (["model"], None), "a weight missing": (["model"], lambda model: dict(list(model.items())[1:])),
    "sparse average": (["ema", WEIGHT], lambda old: old.to_sparse()),
    "average that is no number": (["ema", WEIGHT], lambda old: old * float("nan")),
    "complex average": (["ema", WEIGHT], lambda old: old.to(torch.complex64)),
    "average of whole numbers": (["ema", WEIGHT], lambda old: old.int()),
    "no fingerprint": (["data"], None), "seconds of yesterday": (["seconds"], -1.0),
    "classes that are too many": (["config", "classes"], ("a",) * 11),
    "classes that are numbers": (["config", "classes"], tuple(range(10))),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_within(damage, call, trained, tmp_path):
    """One clear line from every command that reads it, and nothing is drawn or trained."""
    run = shutil.copytree(trained, tmp_path / "run")
    content = torch.load(run / "model.pth", weights_only=True)
    torch.save(replaced(content, *DAMAGES[damage]), run / "model.pth")
    before = (run / "model.pth").read_bytes()
    assert_refused(call(train, *TINY, "--steps", 9, "--run-dir", run, "--resume"), run / "model.pth", "damaged")
    assert_refused(call(inference, "--checkpoint", run / "model.pth", "--out", tmp_path / "a.png"), "damaged")
    assert (run / "model.pth").read_bytes() == before and not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("format", ["dit-checkpoint-1", "dit-checkpoint-2"])
def test_an_older_version_is_named(format, saved, call):
    """By every command that reads it: it is not damaged."""
    path, _ = saved
    content = torch.load(path, weights_only=True)
    del content["kind"]
    torch.save(content | {"format": format}, path)
    for result in (call(inference, "--checkpoint", path), call(demo.share, path, path.with_name("a.pth")),
                   call(train, *TINY, "--resume", "--run-dir", path.parent)):
        assert_refused(result, path, "made by an older version of this code")


def test_each_kind_names_its_command(saved, call, tmp_path):
    """What another command draws is refused in one line that says which; what no command draws is damaged."""
    path, _ = saved
    for kinds in ([Config], [Config, LatentConfig], ANY):
        assert load_checkpoint(path, kinds)["config"] == CONFIG
    with pytest.raises(UserError, match=r"model of images: draw with it by python inference\.py"):
        load_checkpoint(path, [ClipConfig])
    latents = LatentConfig(**vars(CONFIG))
    change(path, kind="latents", config=vars(latents))
    assert load_checkpoint(path, ANY)["config"] == latents
    moving = REPOSITORY / "weights" / "moving.pth"
    for file, kind, by in ((path, "latents", "-m latent.draw, train it by python -m latent.train_dit"),
                           (moving, "clips", "-m video.draw, train it by python -m video.train_dit")):
        for result in (call(inference, "--checkpoint", file, "--out", tmp_path / "a.png"),
                       call(generator, "--checkpoint", file, "--real", tmp_path / "b", "--fake", tmp_path / "c")):
            assert_refused(result, file, f"a model of {kind}: draw with it by python {by}")
    assert os.listdir(tmp_path) == ["model.pth"]
    for kind in ("other", None, ["clips"], 7):
        change(path, kind=kind)
        with pytest.raises(UserError, match="damaged checkpoint: its kind is"):
            load_checkpoint(path, ANY)


def test_a_sampling_flag_that_a_model_does_not_know(saved, call, tmp_path):
    path, _ = saved
    args = argparse.Namespace(checkpoint=path, device="cpu", spacing="linspace")
    with pytest.raises(UserError, match=r"--spacing .*images"):
        inference.load_for_sampling(args, ANY)
    assert_refused(call(demo.share, path, tmp_path / "a.pth", "--spacing", "linspace"), "--spacing", "images")
    assert os.listdir(tmp_path) == ["model.pth"]


def test_parts_that_are_gone(call, trained, tmp_path):
    run = shutil.copytree(trained, tmp_path / "run")
    content = torch.load(run / "model.pth", weights_only=True)
    for name in content:
        torch.save({key: value for key, value in content.items() if key != name}, run / "model.pth")
        assert_refused(call(train, *TINY, "--steps", 9, "--run-dir", run, "--resume"), run / "model.pth")


def test_what_trains_on_is_what_was_saved(trained):
    """The check passes a sound file unchanged, and drops what does not belong there."""
    content = torch.load(trained / "model.pth", weights_only=True)
    loaded = load_checkpoint(trained / "model.pth", ANY)
    assert set(content) - set(loaded) == {"format", "kind"}
    assert dataclasses.asdict(loaded["config"]) == content["config"]
    for name in ("ema", "model", "optimizers", "window", "data", "step", "seconds"):
        assert same(loaded[name], content[name]), name
    assert [set(state[0]) for state in content["optimizers"]] == [{"step", "exp_avg", "exp_avg_sq"}, {"momentum"}]
    assert not same(content["model"], content["ema"])


def test_weights_to_share_are_not_written_onto_their_source(call, trained, tmp_path, monkeypatch):
    run = shutil.copytree(trained, tmp_path / "run")
    before = (run / "model.pth").read_bytes()
    (tmp_path / "link.pth").symlink_to(run / "model.pth")
    for out in (run / "model.pth", run / ".." / "run" / "model.pth", tmp_path / "link.pth"):
        assert_refused(call(demo.share, run / "model.pth", out), "is read by this command")
    monkeypatch.chdir(tmp_path)
    for out in (".", "/", "nodir/x.pth"):
        assert_refused(call(demo.share, run / "model.pth", out), "cannot be written")
    assert (run / "model.pth").read_bytes() == before


def test_weights_to_share_hold_the_average_alone(call, trained, tmp_path):
    assert call(demo.share, trained / "model.pth", tmp_path / "small.pth")[0] == 0
    content, small = (torch.load(path, weights_only=True) for path in (trained / "model.pth", tmp_path / "small.pth"))
    assert set(small) == {"format", "kind", "config", "step", "seconds", "ema"}
    assert same(small["ema"], {name: weight.half() for name, weight in content["ema"].items()})
    assert (small["step"], small["seconds"]) == (content["step"], content["seconds"])
    assert_refused(call(train, *TINY, "--steps", 9, "--run-dir", tmp_path, "--resume"), "there is no checkpoint")
    (tmp_path / "small.pth").rename(tmp_path / "model.pth")
    assert_refused(call(train, *TINY, "--steps", 9, "--run-dir", tmp_path, "--resume"), "weights to draw with")


def test_an_archive_that_grows(saved, call, tmp_path):
    """What torch writes is as large as its file. A compressed one is not read: a few kilobytes may fill a memory."""
    path, _ = saved
    whole = zipfile.ZipFile(path)
    entries = {entry.filename: whole.read(entry) for entry in whole.infolist()}
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in entries.items():
            packed.writestr(name, data)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="its archive is compressed"):
        patch.setattr(torch, "load", None)
        load_checkpoint(tmp_path / "packed.pth", ANY)
    assert_refused(call(inference, "--checkpoint", tmp_path / "packed.pth"), "packed.pth", "compressed")


def test_a_named_pipe_is_no_checkpoint(call, tmp_path):
    """To read it is to wait for ever."""
    os.mkfifo(tmp_path / "model.pth")
    assert_refused(call(inference, "--checkpoint", tmp_path / "model.pth"), "model.pth", "it is no file")


# Weights as the field shares them


def test_weights_as_safetensors(trained, call, tmp_path):
    """The same settings, and the same pictures to the bit; other programs find the tensors by their names."""
    for name in ("small.pth", "small.safetensors"):
        assert call(demo.share, trained, tmp_path / name, "--guidance", 1.25, "--sample-steps", 2)[0] == 0
        flags = ["--count", 1, "--labels", 3, 7, "--device", "cpu", "--out", tmp_path / f"{name}.png"]
        code, _, err = call(inference, "--checkpoint", tmp_path / name, *flags)
        assert code == 0, err
    assert (tmp_path / "small.pth.png").read_bytes() == (tmp_path / "small.safetensors.png").read_bytes()
    pth, shared = (load_checkpoint(tmp_path / name, ANY) for name in ("small.pth", "small.safetensors"))
    assert same(pth["ema"], shared["ema"]) and pth["config"] == shared["config"]
    assert (pth["step"], pth["seconds"]) == (shared["step"], shared["seconds"]) and set(pth) == set(shared)
    assert same(safetensors.torch.load_file(tmp_path / "small.safetensors"), pth["ema"])
    # By whatever name; and made smaller again
    (tmp_path / "run").mkdir()
    shutil.copy(tmp_path / "small.safetensors", tmp_path / "run" / "model.pth")
    assert call(demo.share, tmp_path / "run", tmp_path / "again.pth")[0] == 0
    assert same(load_checkpoint(tmp_path / "again.pth", ANY)["ema"], pth["ema"])
    (tmp_path / "run" / "log.csv").write_text("")
    assert_refused(call(train, *TINY, "--steps", 9, "--run-dir", tmp_path / "run", "--resume"), "weights to draw with")


def test_settings_that_are_lists_of_numbers_and_names_survive_json(saved, tmp_path):
    settings = {**vars(CONFIG), "num_classes": 2, "classes": ("a\ud800 \n", "ö"), "channels": 3, "vae": "x",
                "latent_shape": (4, 8, 8), "latent_mean": (0.1, 0.2, 0.3, 1e-7), "latent_std": (1.0,), "clamp": False}
    config = LatentConfig(**settings)
    with torch.device("cpu"):
        weights = config.build_model().state_dict()
    save_checkpoint(tmp_path / "a.safetensors", config, 3, 0.0, weights)
    assert load_checkpoint(tmp_path / "a.safetensors", ANY)["config"] == config


SHARED = {
    "cut": (lambda path: os.truncate(path, os.path.getsize(path) - 1), "not a checkpoint"),
    "a long header": (lambda path: path.write_bytes(b"\xff" * 3 + bytes(5) + b"{" + bytes(2**24)), "not a checkpoint"),
    "no metadata": (lambda path: rewrite(path, None), "not a checkpoint of this project"),
    "of transformers": (lambda path: rewrite(path, {"format": "pt"}), "not a checkpoint of this project"),
    "no JSON": (lambda path: rewrite(path, {"checkpoint": "hello"}), "not a checkpoint"),
    "deep JSON": (lambda path: rewrite(path, {"checkpoint": "[" * 100_000}), "not a checkpoint"),
    "a list": (lambda path: rewrite(path, {"checkpoint": "[1, 2]"}), "not a checkpoint"),
    "an older format": (lambda path: rewrite(path, {"checkpoint": '{"format": "dit-checkpoint-0"}'}), "no format"),
    "no settings": (lambda path: rewrite(path, {"checkpoint": json.dumps({"format": checkpoint.FORMAT})}), "damaged"),
    "whole numbers": (lambda path: rewrite(path, ..., lambda w: w.int()), "not all plain tensors of floats"),
    "fp8": (lambda path: rewrite(path, ..., lambda w: w.to(torch.float8_e4m3fn)), "not all plain tensors of floats"),
    "nan": (lambda path: rewrite(path, ..., lambda w: w * float("nan")), "not all finite"),
    "another shape": (lambda path: rewrite(path, ..., lambda w: w.flatten()), "another network"),
}


def rewrite(path, metadata, change=lambda weight: weight):
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata() if metadata is ... else metadata
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file({name: change(weight) for name, weight in weights.items()}, path, metadata)


@pytest.mark.parametrize("damage", SHARED)
def test_damaged_safetensors(damage, saved, call, tmp_path):
    """Checked as strictly as what torch wrote."""
    path = tmp_path / "shared.safetensors"
    assert call(demo.share, saved[0], path)[0] == 0
    break_it, words = SHARED[damage]
    break_it(path)
    assert_refused(call(inference, "--checkpoint", path, "--out", tmp_path / "a.png"), path, words)
    assert not (tmp_path / "a.png").exists()


def test_weights_beyond_half_precision(saved, call, tmp_path):
    """They stay as they are; the others are halved."""
    path, model = saved
    ema = {name: weight.clone() for name, weight in model.state_dict().items()}
    ema["blocks.0.mlp.0.weight"][0, 0] = 65_520.0  # which rounds to infinity
    ema["blocks.0.mlp.2.weight"][0, 0] = 65_504.0
    change(path, ema=ema)
    code, out, _ = call(demo.share, path, tmp_path / "small.pth")
    assert code == 0 and f"1 of {len(ema)} tensors hold numbers that half precision cannot" in out
    small = load_checkpoint(tmp_path / "small.pth", ANY)["ema"]
    assert torch.equal(small["blocks.0.mlp.0.weight"], ema["blocks.0.mlp.0.weight"])
    assert {name for name, weight in small.items() if weight.dtype != torch.float16} == {"blocks.0.mlp.0.weight"}
    code, out, _ = call(demo.share, path.with_name("small.pth"), tmp_path / "again.safetensors")
    assert code == 0 and same(load_checkpoint(tmp_path / "again.safetensors", ANY)["ema"], small)


@pytest.mark.parametrize("named", ["vae", "vae/", "link", "beside"])
def test_the_vae_is_copied_beside_shared_weights(named, saved, call, tmp_path, monkeypatch):
    """The command that it prints makes the folder that is then looked for, whatever the VAE was called."""
    path, _ = saved
    (tmp_path / "made" / "the vae").mkdir(parents=True)
    (tmp_path / "made" / "link").symlink_to("the vae")
    (tmp_path / "new place").mkdir()
    monkeypatch.chdir(tmp_path / "made")
    vae = {"vae": "the vae", "vae/": "the vae/", "link": str(tmp_path / "made" / "link"), "beside": "the vae"}[named]
    if named == "beside":  # of the checkpoint, and not of where the command is called
        monkeypatch.chdir(tmp_path)
        path = shutil.move(path, tmp_path / "made" / "model.pth")
    config = LatentConfig(**{**vars(CONFIG), "vae": vae, "latent_shape": (1, 8, 8), "latent_mean": (0.0,),
                             "latent_std": (1.0,), "clamp": False, "latents": "/home/me/latents"})
    change(path, kind="latents", config=vars(config))
    code, out, _ = call(demo.share, path, tmp_path / "new place" / "small.pth")
    assert code == 0
    hint = next(line for line in out.splitlines() if "cp -r" in line)
    words = shlex.split(hint[hint.index("cp -r"):])
    assert words == ["cp", "-r", str(tmp_path / "made" / "the vae"), f"{tmp_path / 'new place'}/"]
    shared = load_checkpoint(tmp_path / "new place" / "small.pth", ANY)["config"]
    assert (shared.vae, shared.latents) == ("the vae", LatentConfig.latents)
    assert "cp -r" not in call(demo.share, path, tmp_path / "made" / "small.pth")[1]  # where it is already


def test_every_flag_of_weights_to_share(saved, call, tmp_path):
    """Each changes its setting, and no other."""
    path, _ = saved
    values = {"sampler": "ddim", "sample_steps": 3, "guidance": 2.5, "eta": 0.25, "spacing": "linspace",
              "guided_channels": 1, "guidance_high": 0.6, "clamp": False}
    assert set(values) == set(ClipConfig.SAMPLING) - {"seed", "precision", "vae"}
    config = LatentConfig(**vars(CONFIG))
    change(path, kind="latents", config=vars(config))
    for name, value in values.items():
        flag = name.replace("_", "-")
        flags = [f"--no-{flag}"] if value is False else [f"--{flag}", value]
        flags += ["--sampler", "ddim"] if name == "eta" else []
        assert call(demo.share, path, tmp_path / "small.pth", *flags)[0] == 0
        expected = {name: value, **({"sampler": "ddim"} if name == "eta" else {})}
        assert load_checkpoint(tmp_path / "small.pth", ANY)["config"] == dataclasses.replace(config, **expected), name


def test_missing_checkpoint(tmp_path):
    with pytest.raises(UserError, match="there is no checkpoint"):
        load_checkpoint(tmp_path / "none.pth", ANY)
    with pytest.raises(UserError, match="not a checkpoint"):
        load_checkpoint(tmp_path, ANY)


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


def test_what_is_no_file_is_not_written(call, trained, tmp_path, monkeypatch):
    """To root, a device is a file like another that can be replaced."""
    os.mkfifo(tmp_path / "device.gif")
    monkeypatch.setattr(inference, "sample", None)
    for result in (call(demo.share, trained / "model.pth", tmp_path / "device.gif"),
                   call(measure.classifier, "--out", tmp_path / "device.gif"),
                   call(inference, "--checkpoint", trained, "--out", tmp_path / "device.gif")):
        assert_refused(result, "device.gif cannot be written: it is no file")
    assert (tmp_path / "device.gif").is_fifo() and os.listdir(tmp_path) == ["device.gif"]


def test_what_a_link_leads_to_is_written(tmp_path):
    """A checkpoint may lie on another disk than its run folder."""
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    link = tmp_path / "run" / "model.pth"
    link.symlink_to("../disk/big.pth")
    for content in (b"first", b"second"):
        write_atomically(link, lambda file, content=content: file.write(content))
        assert link.is_symlink() and (tmp_path / "disk" / "big.pth").read_bytes() == content
    assert os.listdir(tmp_path / "disk") == ["big.pth"] and os.listdir(tmp_path / "run") == ["model.pth"]


def test_a_run_folder_stands_for_its_checkpoint(call, trained, tmp_path):
    for source in (trained, trained / "model.pth"):
        assert call(demo.share, source, tmp_path / f"{source.name}.pth")[0] == 0
    assert (tmp_path / "run.pth").read_bytes() == (tmp_path / "model.pth.pth").read_bytes()
    (tmp_path / "empty").mkdir()
    assert_refused(call(demo.share, tmp_path / "empty", tmp_path / "a.pth"), "empty holds no model.pth")


def test_an_eta_that_no_sampler_asks_for(call, trained, tmp_path):
    small = tmp_path / "small.pth"
    assert_refused(call(demo.share, trained, small, "--eta", 0.5), "--eta", "ddim", "dpm")
    assert_refused(call(train, *TINY, "--eta", 0.5, "--run-dir", tmp_path / "run"), "--eta", "ddim", "dpm")
    assert not small.exists() and not (tmp_path / "run").exists()
    assert call(demo.share, trained, small, "--eta", 0.5, "--sampler", "ddim")[0] == 0
    assert (load_checkpoint(small, ANY)["config"].eta, load_checkpoint(small, ANY)["config"].sampler) == (0.5, "ddim")


def test_weights_to_share(saved, call):
    path, model = saved
    change(path, config={**vars(CONFIG), "data_dir": "/home/me/pictures"})  # which concerns nobody
    small = path.with_name("small.pth")
    code, out, _ = call(demo.share, path, small, "--guidance", 1.25)
    assert code == 0 and "trained for 7 steps" in out
    again, config = load_model(small, precision="fp32", kinds=ANY)
    assert config == dataclasses.replace(CONFIG, guidance=1.25)
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert_refused(call(demo.share, path.with_name("none.pth"), small), "none.pth")


def test_the_command_alone_knows_the_samplers(command, tmp_path):
    """In a process where nothing else has imported diffusion.py."""
    process = command("demo.share", REPOSITORY / "weights" / "mnist.pth", tmp_path / "a.pth", "--sampler", "heun")
    assert process.returncode == 0, process.stderr
    assert load_checkpoint(tmp_path / "a.pth", ANY)["config"].sampler == "heun"
