from support.commands import UserError

import json
import os
import shutil

import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY
from diffusers import AutoencoderKL

from latent import vae as module
from latent.vae import CONFIG, OLD_NAMES, VAE, WEIGHTS, load_vae, save_vae

SD = dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2)  # Stable Diffusion's: f = 8, 84 M parameters
SMALL = dict(block_out_channels=(8, 16), norm_num_groups=4)
ODD = dict(block_out_channels=(8, 16, 24), norm_num_groups=8, layers_per_block=2, latent_channels=3, in_channels=1,
           out_channels=1, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False)


def diffusers_twin(**settings):
    levels = len(settings["block_out_channels"])
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",)
                         * levels, **settings).eval()


@pytest.fixture
def folder(tmp_path):
    """The folder of a small VAE, as diffusers writes it."""
    diffusers_twin(**SMALL, scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def change_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))


def change_weights(folder, change):
    state = safetensors.torch.load_file(folder / WEIGHTS)
    safetensors.torch.save_file(change(state), folder / WEIGHTS)


@pytest.mark.parametrize(("settings", "size"), [(SD, (32, 16)), (SMALL, (12, 16)), (ODD, (16, 24))])
@torch.no_grad()
def test_equals_diffusers(settings, size):
    """The same weights, names and settings; the network in its own configuration and a small one, images not square."""
    theirs, ours = diffusers_twin(**settings), VAE(**settings).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(2, theirs.config.in_channels, *size) * 2 - 1
    mean, std = ours.posterior(x)
    expected = theirs.encode(x).latent_dist
    assert mean.shape == (2, theirs.config.latent_channels, size[0] // ours.factor, size[1] // ours.factor)
    assert expected.mean.std() > 0.05 and expected.std.std() > 0.01
    torch.testing.assert_close(mean, expected.mean, atol=1e-5, rtol=0)
    torch.testing.assert_close(std, expected.std, atol=1e-5, rtol=0)
    z = torch.randn(mean.shape)
    images = theirs.decode(z).sample
    assert images.shape == x.shape and images.std() > 0.05
    torch.testing.assert_close(ours.reconstruct(z), images, atol=1e-5, rtol=0)


def test_a_folder_of_diffusers_loads_as_it_is(folder):
    theirs, ours = AutoencoderKL.from_pretrained(folder), load_vae(folder)
    x, z = torch.rand(1, 3, 8, 8), torch.randn(1, 4, 4, 4)
    mean, std = ours.encode(x)
    with torch.no_grad():
        expected = theirs.encode(x).latent_dist
        torch.testing.assert_close(mean, expected.mean * theirs.config.scaling_factor)
        torch.testing.assert_close(std, expected.std * theirs.config.scaling_factor)
        torch.testing.assert_close(ours.decode(z), theirs.decode(z / theirs.config.scaling_factor).sample)
    assert not any(weight.requires_grad for weight in ours.parameters())


def test_the_old_names_of_the_attention(folder):
    new = load_vae(folder).state_dict()
    names = {f"mid_block.attentions.0.{name}.": f"mid_block.attentions.0.{old}." for old, name in OLD_NAMES.items()}

    def rename(state):
        renamed = {}
        for name, weight in state.items():
            for now, before in names.items():
                name = name.replace(now, before)
            renamed[name] = weight
        return renamed

    change_weights(folder, rename)
    stored = safetensors.torch.load_file(folder / WEIGHTS)
    assert "decoder.mid_block.attentions.0.proj_attn.bias" in stored and len(set(stored) - set(new)) == 16
    assert all(torch.equal(weight, new[name]) for name, weight in load_vae(folder).state_dict().items())
    AutoencoderKL.from_pretrained(folder)  # which are those that diffusers knows too


@pytest.mark.parametrize(("words", "mean", "std"), [
    ({"scaling_factor": 0.18215}, [0], [1 / 0.18215]), ({"scaling_factor": "gone"}, [0], [1 / 0.18215]),
    ({"scaling_factor": 2, "shift_factor": 0.3}, [0.3], [0.5]),
    ({"scaling_factor": 0.5, "latents_mean": [1, 2, 3, 4], "latents_std": [2, 3, 4, 5]}, [1, 2, 3, 4], [4, 6, 8, 10])])
def test_statistics_in_diffusers_words(folder, words, mean, std):
    """As its pipelines use them: z = latents * latents_std / scaling_factor + latents_mean (or shift_factor)."""
    change_config(folder, **words)
    vae = load_vae(folder)
    assert vae.mean.flatten().tolist() == pytest.approx(mean) and vae.std.flatten().tolist() == pytest.approx(std)


@pytest.mark.parametrize("settings", [SMALL, ODD])
def test_diffusers_loads_what_is_saved(settings, tmp_path):
    ours = VAE(**settings).eval()
    channels = ours.settings["latent_channels"]
    ours.normalize_by([0.1 * i for i in range(channels)], [1.0 + i for i in range(channels)])
    save_vae(ours, tmp_path / "new" / "vae")
    theirs, again = AutoencoderKL.from_pretrained(tmp_path / "new" / "vae"), load_vae(tmp_path / "new" / "vae")
    z = torch.randn(1, channels, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(theirs.decode(z).sample, ours.reconstruct(z))
        assert torch.equal(again.decode(z), ours.decode(z))
    assert theirs.config.latents_std == ours.std.flatten().tolist() and theirs.config.scaling_factor == 1
    assert again.settings == ours.settings and again.fingerprint == ours.fingerprint
    assert torch.equal(again.mean, ours.mean) and torch.equal(again.std, ours.std)
    assert sorted(file.name for file in (tmp_path / "new" / "vae").iterdir()) == [CONFIG, WEIGHTS]


def test_float16_where_it_loses_nothing(tmp_path):
    for vae, dtype in ((VAE(**SMALL), torch.float32), (VAE(**SMALL).half().float(), torch.float16)):
        save_vae(vae, tmp_path)
        kept = safetensors.torch.load_file(tmp_path / WEIGHTS)
        again, theirs = load_vae(tmp_path), AutoencoderKL.from_pretrained(tmp_path, torch_dtype=torch.float32)
        for name, weight in vae.state_dict().items():
            assert kept[name].dtype == dtype
            assert torch.equal(again.state_dict()[name], weight) and torch.equal(theirs.state_dict()[name], weight)


def test_latents_are_normalized_both_ways():
    vae = VAE(**SMALL).eval()
    vae.normalize_by((1.0, 2.0, 3.0, 4.0), (0.5, 1.0, 2.0, 4.0))
    x = torch.rand(3, 3, 8, 8)
    mean, std = vae.encode(x)
    with torch.no_grad():
        plain_mean, plain_std = vae.posterior(x)
        for c in range(4):
            torch.testing.assert_close(mean[:, c], (plain_mean[:, c] - (c + 1)) / 2 ** (c - 1))
            torch.testing.assert_close(std[:, c], plain_std[:, c] / 2 ** (c - 1))
        torch.testing.assert_close(vae.decode(mean), vae.reconstruct(plain_mean))


@pytest.mark.parametrize("size", [4, 64])
def test_a_decoded_image_is_the_same_in_any_batch(size):
    """To the last bit; batches of 16 here, and of 4."""
    vae = VAE(**SMALL).eval()
    latents = torch.randn(19, 4, size, size)
    together = vae.decode(latents)
    assert torch.equal(vae.decode(latents.flip(0)).flip(0), together)
    for i in (0, 7, 18):
        assert torch.equal(vae.decode(latents[i:i + 1]), together[i:i + 1])
    assert together.shape == (19, 3, 2 * size, 2 * size)


def test_the_fingerprint_is_that_of_the_encoder():
    """Other decoders of the same latents are welcome."""
    vae = VAE(**SMALL)
    fingerprint, decoder = vae.fingerprint, vae.hash_of("decoder", "post_quant_conv")
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1
        assert vae.fingerprint == fingerprint and vae.hash_of("decoder", "post_quant_conv") != decoder
        vae.quant_conv.bias[0] += 1e-3
        assert vae.fingerprint != fingerprint
    assert VAE(**SMALL | dict(norm_num_groups=2)).fingerprint != fingerprint
    other = VAE(**SMALL | dict(norm_num_groups=2))
    other.load_state_dict(vae.state_dict())
    assert other.fingerprint != vae.fingerprint


def test_latents_that_are_not_finite():
    for broken in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="not all finite"):
            VAE(**SMALL).decode(torch.full((1, 4, 4, 4), broken))


FOLDERS = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), "holds no config.json"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
    "empty config": (lambda folder: (folder / CONFIG).write_text(""), "config.json is damaged"),
    "list": (lambda folder: (folder / CONFIG).write_text("[1]"), "config.json is damaged"),
    "deep": (lambda folder: (folder / CONFIG).write_text("[" * 10**5), "config.json is damaged"),
    "class": (lambda folder: change_config(folder, _class_name="AutoencoderDC"), "'AutoencoderDC', not of an"),
    "no class": (lambda folder: change_config(folder, _class_name="gone"), "not of an AutoencoderKL"),
    "blocks": (lambda folder: change_config(folder, down_block_types=["AttnDownEncoderBlock2D"] * 2),
               "down_block_types is"),
    "number of blocks": (lambda folder: change_config(folder, up_block_types=["UpDecoderBlock2D"]), "up_block_types"),
    "act": (lambda folder: change_config(folder, act_fn="gelu"), "act_fn is 'gelu'"),
    "huge": (lambda folder: change_config(folder, block_out_channels=[10**9, 10**9]), "block_out_channels is"),
    "text": (lambda folder: change_config(folder, layers_per_block="2"), "layers_per_block is '2'"),
    "groups": (lambda folder: change_config(folder, norm_num_groups=3), "norm_num_groups 3 does not divide"),
    "flag": (lambda folder: change_config(folder, use_quant_conv=1), "use_quant_conv is 1"),
    "scale": (lambda folder: change_config(folder, scaling_factor=0), r"scaling_factor is \[0\]"),
    "std": (lambda folder: change_config(folder, latents_std=[1, 1, 1, 0]), "latents_std is"),
    "statistics": (lambda folder: change_config(folder, latents_mean=[1, 2]), "with 4 latent channels"),
    "channels": (lambda folder: change_config(folder, latent_channels=8), "does not fit its config.json"),
    "widths": (lambda folder: change_config(folder, block_out_channels=[8, 24]), "does not fit its config.json"),
    "layers": (lambda folder: change_config(folder, layers_per_block=2), "is missing"),
    "a number for a list": (lambda folder: change_config(folder, block_out_channels=8), "block_out_channels is 8"),
    "a number for blocks": (lambda folder: change_config(folder, down_block_types=2), "down_block_types is 2"),
    "a huge scale": (lambda folder: change_config(folder, scaling_factor=10**400), r"scaling_factor is \[1000"),
    "a tiny scale": (lambda folder: change_config(folder, scaling_factor=1e-300), r"scaling_factor is \[1e-300\]"),
    "a huge mean": (lambda folder: change_config(folder, latents_mean=[0, 0, 0, 10**400]), "latents_mean or shift"),
    "a huge shift": (lambda folder: change_config(folder, shift_factor=-10**400), "latents_mean or shift_factor"),
    "a huge std": (lambda folder: change_config(folder, latents_std=[1, 1, 1, 1e300]), "latents_std is"),
    "no attention": (lambda folder: change_config(folder, mid_block_add_attention=False), "is not a part of it"),
    "cut": (lambda folder: os.truncate(folder / WEIGHTS, 9000), "is damaged or cut short"),
    "no tensors": (lambda folder: (folder / WEIGHTS).write_bytes(b"hello"), "is damaged or cut short"),
    "long header": (lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x7f" + b"{}"), "is damaged"),
    "integers": (lambda folder: change_weights(folder, lambda state: state | {
        "quant_conv.bias": torch.zeros(8, dtype=torch.long)}), "does not hold finite numbers"),
    "nan": (lambda folder: change_weights(folder, lambda state: state | {
        "quant_conv.bias": torch.full((8,), float("nan"))}), "does not hold finite numbers"),
}


@pytest.mark.parametrize(("options", "first"), [
    (dict(variant="fp16"), "diffusion_pytorch_model.fp16.safetensors"),
    (dict(safe_serialization=False), "diffusion_pytorch_model.bin"),
    (dict(safe_serialization=False, variant="fp16"), "diffusion_pytorch_model.fp16.bin")])
def test_other_files_that_diffusers_writes(options, first, folder, tmp_path):
    """Also in a pipeline's folder; and where there are several, the first one is what it was."""
    theirs, expected = AutoencoderKL.from_pretrained(folder), load_vae(folder).state_dict()
    pipeline = tmp_path / "pipeline"
    theirs.save_pretrained(pipeline / "vae", **options)
    (pipeline / "model_index.json").write_text("{}")
    assert (pipeline / "vae" / first).is_file() and not (pipeline / "vae" / WEIGHTS).exists()
    for place in (pipeline, pipeline / "vae"):
        for name, weight in load_vae(place).state_dict().items():
            assert torch.equal(weight, expected[name]), name
    shutil.copy(folder / WEIGHTS, pipeline / "vae")
    (pipeline / "vae" / first).write_bytes(b"")
    load_vae(pipeline)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


BIN = "diffusion_pytorch_model.bin"
OTHER_FOLDERS = {
    "executes": (lambda folder: torch.save({"a": Malicious()}, folder / BIN), "it holds posix"),
    "no weights": (lambda folder: torch.save([1], folder / BIN), "is damaged or cut short"),
    "numbers": (lambda folder: torch.save({"a": 1}, folder / BIN), "does not fit"),
}


@pytest.mark.parametrize("damage", OTHER_FOLDERS)
def test_other_files_that_are_damaged(damage, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / WEIGHTS).unlink()
    break_it, words = OTHER_FOLDERS[damage]
    break_it(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_vae(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value) and not (tmp_path / "hacked").exists()


def test_a_vae_that_was_replaced_is_read_again(folder):
    """At the same place, with the same encoder: a better decoder, say. While it stays, it is read once."""
    asked = (str(folder), "", (3, 8, 8), (4, 4, 4), (0.0,), (2.0,), "cpu")
    vae = module.open_vae(*asked)
    assert module.open_vae(*asked) is vae
    z = torch.randn(1, 4, 4, 4)
    before = vae.decode(z)
    change_weights(folder, lambda state: state | {"decoder.conv_out.bias": torch.full((3,), 5.0)})
    assert (module.open_vae(*asked).decode(z) - before).abs().min() > 4
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="there is no folder"):
        module.open_vae(*asked)


@pytest.mark.parametrize("damage", FOLDERS)
def test_folders_that_are_no_vae(damage, folder):
    break_it, words = FOLDERS[damage]
    break_it(folder)
    with pytest.raises(UserError, match=words) as caught:
        load_vae(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_half_precision_is_read_as_float32(dtype, folder):
    """And a quarter of it, which PyTorch can hold, and little more."""
    full = load_vae(folder).state_dict()
    change_weights(folder, lambda state: {name: weight.to(dtype) for name, weight in state.items()})
    for name, weight in load_vae(folder).state_dict().items():
        assert weight.dtype == torch.float32 and torch.equal(weight, full[name].to(dtype).float())
    change_weights(folder, lambda state: state | {"quant_conv.bias": torch.full((8,), float("nan")).to(dtype)})
    with pytest.raises(UserError, match=r"quant_conv\.bias does not hold finite numbers"):
        load_vae(folder)


@pytest.mark.parametrize("name", ["", "no/such/folder", "../vae", "/no/vae", "a b", "a/b/", "-x", "vae_sprites",
                                  "run/vae", "./vae"])
def test_names_that_are_no_folder_and_no_name_of_a_hub(name, tmp_path, monkeypatch):
    """A path that has been moved among them: its last folder is gone, or the command is called elsewhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(module, "download", None)  # it is not even asked
    with pytest.raises(UserError) as caught:
        load_vae(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a/a..b", "a/a--b", "a/" + "x" * 200])
def test_names_that_the_hub_refuses(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="cannot be had from the Hugging Face hub") as caught:
        load_vae(name)
    assert "\n" not in str(caught.value)


def test_by_its_name_on_the_hub(folder, tmp_path, monkeypatch):
    """What is in its cache needs no network; what is not is asked for once."""
    import huggingface_hub as hub

    monkeypatch.chdir(tmp_path)
    shutil.move(folder, tmp_path / "cache")
    asked = []

    def download(repository, file, local_files_only=False):
        asked.append((repository, file, local_files_only))
        if local_files_only and not cached:
            raise hub.errors.LocalEntryNotFoundError("not here")
        return str(tmp_path / "cache" / file)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url: asked.append(url))
    for cached in (True, False):
        asked.clear()
        assert load_vae("sd-vae-ft-ema").factor == 2
        repository = "stabilityai/sd-vae-ft-ema"
        assert asked == ([(repository, CONFIG, True), (repository, WEIGHTS, True)] if cached else [
            (repository, CONFIG, True), f"https://huggingface.co/{repository}/resolve/main/{CONFIG}",
            (repository, CONFIG, False), (repository, WEIGHTS, False)])
    asked.clear()
    assert load_vae("somebody/vae").factor == 2 and asked[0][0] == "somebody/vae"


def test_without_a_network(command, tmp_path):
    """The hub's own client, at a port where nobody answers: one line, at once."""
    code = ("from latent.vae import load_vae\nfrom support.commands import run\n"
            "run(lambda: load_vae('sd-vae-ft-ema'))")
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "NO_PROXY": "*",
                   "no_proxy": "*", "PYTHONPATH": str(REPOSITORY)}
    process = command("-c", code, cwd=tmp_path, env=environment)
    assert process.returncode == 1
    *first, last = process.stderr.splitlines()
    assert first == ["downloading the VAE stabilityai/sd-vae-ft-ema ..."]
    assert last.startswith("error: the VAE stabilityai/sd-vae-ft-ema cannot be had") and "--vae" in last
