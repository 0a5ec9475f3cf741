from support.commands import UserError
from support.settings import add_flags, given_flags

import argparse
import ctypes
import dataclasses
import math

import pytest

import video.config
from config import PRESETS, Config
from diffusion import DDPM
from latent.config import LatentConfig
from video.config import ANY, ClipConfig


def parse(*words, of=ClipConfig, names=None):
    parser = argparse.ArgumentParser()
    add_flags(parser, of, names)
    return given_flags(parser.parse_args(words), of)


def test_every_preset_is_valid():
    for preset in PRESETS.values():
        for of in (Config, LatentConfig):
            of(**preset)
    for preset in video.config.PRESETS.values():
        ClipConfig(**preset)


def test_defaults_are_those_that_were_measured():
    """The README's figures are of these: whoever changes one measures anew."""
    images = dict(
        dataset="mnist", data_dir="", image_size=(), channels=0, ground="black", num_classes=0, classes=(),
        patch_size=(), hidden_size=128, depth=4, num_heads=4, mlp_ratio=4.0, time_spacing="dit", T=1000,
        process="flow", beta_start=1e-4, beta_end=0.02, shift=2.2, loss="l2", steps=5000, batch_size=64,
        optimizer="muon", lr=4e-3, lr_decay="sqrt", warmup=100, weight_decay=0.0, grad_clip=1.0, ema_decay=0.9999,
        label_dropout=0.1, precision="auto", compile=False, recompute=False, seed=0, log_every=50, sample_every=1000,
        checkpoint_every=1000, sampler="dpm", sample_steps=6, guidance=1.4, eta=0.0)
    latents = images | dict(
        dataset="sprites", flips=False, vae="", latents="latents", vae_hash="", latent_shape=(), latent_mean=(),
        latent_std=(), gelu="none", variance="fixed", clamp=True, spacing="trailing", guided_channels=0,
        guidance_high=1.0)
    clips = latents | dict(dataset="moving", digits=1, speeds=False, sizes=(), rope=False, qk_norm=False,
                           motion=0.0, given=0.0)
    for of, expected in zip(ANY, (images, latents, clips), strict=True):
        assert dataclasses.asdict(of()) == expected


def test_article_preset():
    article = Config(**PRESETS["article"])
    assert (article.T, article.process, article.beta_start, article.beta_end) == (1000, "ddpm", 1e-4, 0.02)
    assert (article.loss, article.sampler, article.sample_steps) == ("l1", "ddpm", 1000)
    assert (article.patch_size, article.hidden_size, article.depth, article.num_heads) == ((4, 4), 64, 3, 4)


def test_flags_are_the_fields_and_hold_only_what_was_given():
    assert parse() == {}
    assert parse("--lr", "0.5", "--batch-size", "7", "--dataset", "sprites") == {
        "lr": 0.5, "batch_size": 7, "dataset": "sprites"}
    for field in dataclasses.fields(ClipConfig):
        name = field.name.replace("_", "-")
        if field.type is bool:
            assert parse("--" + name) == {field.name: True} and parse("--no-" + name) == {field.name: False}
        elif field.name == "sizes":
            assert parse("--sizes", "1x8x8,16x32x64") == {"sizes": ((1, 8, 8), (16, 32, 64))}
        elif field.name in ("image_size", "patch_size"):
            assert parse("--" + name, "28x20") == {field.name: (28, 20)} and parse("--" + name, "0") == {field.name: ()}
        elif "help" in field.metadata:
            value = field.default or ("x" if field.type is str else 0)
            assert parse("--" + name, str(value)) == {field.name: value}


def test_flags_of_some_fields_only(capsys):
    assert parse("--seed", "3", names=("seed",)) == {"seed": 3}
    with pytest.raises(SystemExit):
        parse("--lr", "1", names=("seed",))
    capsys.readouterr()


@pytest.mark.parametrize("values", [
    {"steps": 0}, {"steps": -1}, {"steps": 1.0}, {"steps": True}, {"lr": math.nan}, {"lr": math.inf}, {"lr": "1"},
    {"T": 1}, {"label_dropout": 1.5}, {"hidden_size": 10**9}, {"dataset": "mnist2"}, {"dataset": None}, {"seed": -1},
    {"batch_size": 0}, {"sampler": 3}, {"image_size": 28, "patch_size": 5}, {"hidden_size": 30, "num_heads": 3},
    {"num_heads": 3}, {"sample_steps": 1001}, {"T": 10, "sample_steps": 11}, {"beta_start": 0.1, "beta_end": 0.05},
])
def test_bad_values(values):
    with pytest.raises(UserError) as caught:
        Config(**values)
    message = str(caught.value)
    assert any(name in message for name in values) and "\n" not in message


@pytest.mark.parametrize(("of", "given", "size"), [
    (Config, 28, (28, 28)), (Config, "28", (28, 28)), (Config, "28x20", (28, 20)), (Config, [28, 20], (28, 20)),
    (Config, (28, 20), (28, 20)), (Config, 0, ()), (Config, "0", ()), (Config, (), ()),
    (ClipConfig, "16x32x24", (16, 32, 24)), (ClipConfig, (1, 8, 8), (1, 8, 8))])
def test_sizes(of, given, size):
    assert of(image_size=given, patch_size=()).image_size == size


@pytest.mark.parametrize("given", [-1, 1025, "x", "28x", "2x8x8x8", "x28", (28,), (2, 8, 8, 8), (28, 0), (28.0, 28),
                                   (0, 28, 28), None, True, "2000", 2.5])
def test_sizes_that_are_none(given):
    for of in (Config, ClipConfig):
        with pytest.raises(UserError, match="image_size") as caught:
            of(image_size=given)
        assert "\n" not in str(caught.value)
    for of, given, words in ((Config, "16x32x32", "height and width"), (ClipConfig, "32x32", "frames, height")):
        with pytest.raises(UserError, match=f"image_size is .*must be {words}"):
            of(image_size=given)


def test_patches_that_do_not_divide_name_what_does():
    with pytest.raises(UserError, match=r"5 does not divide image_size 28: choose one of \[1, 2, 4, 7, 14, 28\]"):
        Config(image_size=28, patch_size=5)
    with pytest.raises(UserError, match=r"7 does not divide image_size 28x20: .*\[1, 2, 4, 7, 14, 28\] x \[1, 2, 4, 5"):
        Config(image_size=(28, 20), patch_size=7)
    assert Config(image_size=(28, 20), patch_size=(7, 5)).patch_size == (7, 5)
    with pytest.raises(UserError, match=r"4x8x8 does not divide image_size 9x8x8: .*\[1, 3, 9\] x \[1, 2, 4, 8\] x"):
        ClipConfig(image_size="9x8x8", patch_size="4x8x8")
    with pytest.raises(UserError, match=r"patch_size is \(8, 8\), but must be frames, height and width"):
        ClipConfig(image_size="8x8x8", patch_size=8)


def test_rope_needs_pairs_of_channels():
    with pytest.raises(UserError, match="rope turns pairs of channels, but a head has 3"):
        ClipConfig(rope=True, hidden_size=12, num_heads=4)
    ClipConfig(rope=True, hidden_size=8, num_heads=4)


def test_several_sizes():
    config = ClipConfig(image_size="16x32x32", patch_size="2x8x8", channels=1, sizes="1x32x32,8x32x64")
    assert config.sizes == ((1, 32, 32), (8, 32, 64)) and config.largest == (16, 32, 64)
    assert ClipConfig(**dataclasses.asdict(config)) == config
    assert ClipConfig(sizes="0").sizes == ()
    for wrong in ("x", "8x8,", 3, ((8, 8, 8), 5), [[8, 8, 0]], "1025x8x8"):
        with pytest.raises(UserError, match="sizes"):
            ClipConfig(sizes=wrong)
    for image_size in ("32", "1x1x1x1"):
        with pytest.raises(UserError, match="size"):
            ClipConfig(image_size=image_size, sizes="1x32x32")


def test_limits_themselves_are_valid():
    assert Config(T=10, sample_steps=10).sample_steps == 10
    assert Config(process="ddpm", beta_start=0.01, beta_end=0.01).beta_end == 0.01


def test_a_signal_too_small_for_a_float():
    with pytest.raises(UserError, match="beta_end"):
        Config(process="ddpm", beta_end=0.999)
    with pytest.raises(UserError, match="T"):
        Config(process="ddpm", T=100_000)
    config = Config(process="ddpm", beta_end=0.03)
    assert config.log_signal() == pytest.approx(DDPM(beta_end=0.03).alphas_cumprod[-1].log().item() / 2)
    Config(process="flow", beta_end=0.999)  # which has no betas


def test_whole_numbers_are_floats_too():
    assert Config(guidance=2).guidance == 2


BLOCKS = """
import support.commands, ctypes, sys, torch
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
def main():
    before = libc.mallinfo2().hblks
    tensor = torch.ones(4_000_000)
    print(libc.mallinfo2().hblks - before)
support.commands.run(main) if sys.argv[1] == "command" else main()
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library is not glibc")
@pytest.mark.parametrize(("how", "mapped"), [("command", 0), ("function", 1)])
def test_commands_keep_their_memory(how, mapped, command):
    """A tensor of 16 MB comes out of the memory at hand, instead of pages mapped for it alone."""
    process = command("-c", BLOCKS, how)
    assert process.stdout.strip() == str(mapped), process.stderr
