"""The official weights, against diffusers' DiT put right: its own conversion of them has other frequencies of the time
and another epsilon, so that it is no reference as it is."""

from support.commands import UserError
from support.noise import noise_source

import argparse
import dataclasses
import fractions
import json
import os
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, assert_refused, flags_of
from diffusers import AutoencoderKL, DDPMScheduler, DiTTransformer2DModel
from PIL import Image

import generator
import train
from config import Config
from dataset import to_uint8
from demo import export, share
from diffusion import ddim, ddpm, dpm
from dit import sincos_positions
from edit import draw as edit_draw
from inference import generate, parse_labels
from latent import draw, import_dit
from latent import generator as latent_generator
from latent.config import IMAGES, LatentConfig
from latent.import_dit import class_names, make_config
from latent.official import SiT
from latent.vae import VAE, load_vae, save_vae
from measure.score import draw_fakes
from record.checkpoint import load_checkpoint, load_model, save_checkpoint

D, DEPTH, HEADS, CLASSES = 48, 2, 3, 1000


def official_shapes(width=D, depth=DEPTH, classes=CLASSES, side=4, channels=4, patch=2, mlp=4, out=2):
    """The weights of DiT's code, by its models.py; side: patches along each axis."""
    shapes = {
        "pos_embed": (1, side * side, width), "x_embedder.proj.weight": (width, channels, patch, patch),
        "x_embedder.proj.bias": (width,), "t_embedder.mlp.0.weight": (width, 256), "t_embedder.mlp.0.bias": (width,),
        "t_embedder.mlp.2.weight": (width, width), "t_embedder.mlp.2.bias": (width,),
        "y_embedder.embedding_table.weight": (classes + 1, width)}
    for i in range(depth):
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in {
            "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,), "attn.proj.weight": (width, width),
            "attn.proj.bias": (width,), "mlp.fc1.weight": (mlp * width, width), "mlp.fc1.bias": (mlp * width,),
            "mlp.fc2.weight": (width, mlp * width), "mlp.fc2.bias": (width,),
            "adaLN_modulation.1.weight": (6 * width, width), "adaLN_modulation.1.bias": (6 * width,)}.items()}
    values = patch * patch * channels * out
    return shapes | {
        "final_layer.linear.weight": (values, width), "final_layer.linear.bias": (values,),
        "final_layer.adaLN_modulation.1.weight": (2 * width, width),
        "final_layer.adaLN_modulation.1.bias": (2 * width,)}


def official_weights(seed=0, **sizes):
    generator = torch.Generator().manual_seed(seed)
    shapes = official_shapes(**sizes)
    weights = {name: torch.randn(shape, generator=generator) * 0.07 for name, shape in shapes.items()}
    side = round(shapes["pos_embed"][1] ** 0.5)
    weights["pos_embed"] = sincos_positions((side, side), shapes["pos_embed"][2])  # held against diffusers' below
    return weights


def diffusers_twin(weights, activation="gelu-approximate", out=2):
    """diffusers' DiT with official weights, and what it does otherwise put right. Nothing of ours is in it."""
    twin = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=D // HEADS, in_channels=4, out_channels=4 * out, num_layers=DEPTH,
        sample_size=8, patch_size=2, norm_eps=1e-6, num_embeds_ada_norm=CLASSES, activation_fn=activation)
    state = {"pos_embed.proj.weight": "x_embedder.proj.weight", "pos_embed.proj.bias": "x_embedder.proj.bias",
             "proj_out_1.weight": "final_layer.adaLN_modulation.1.weight",
             "proj_out_1.bias": "final_layer.adaLN_modulation.1.bias",
             "proj_out_2.weight": "final_layer.linear.weight", "proj_out_2.bias": "final_layer.linear.bias"}
    state = {theirs: weights[name] for theirs, name in state.items()}
    for i, block in enumerate(twin.transformer_blocks):
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        for theirs, name in (("attn1.to_out.0", "attn.proj"), ("ff.net.0.proj", "mlp.fc1"), ("ff.net.2", "mlp.fc2"),
                             ("norm1.linear", "adaLN_modulation.1")):
            for part in ("weight", "bias"):
                state[f"transformer_blocks.{i}.{theirs}.{part}"] = weights[f"blocks.{i}.{name}.{part}"]
        for part in ("weight", "bias"):
            for theirs, value in zip("qkv", weights[f"blocks.{i}.attn.qkv.{part}"].chunk(3), strict=True):
                state[f"transformer_blocks.{i}.attn1.to_{theirs}.{part}"] = value
            for layer in (0, 2):
                state[f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_{layer // 2 + 1}.{part}"] = (
                    weights[f"t_embedder.mlp.{layer}.{part}"])
        state[f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"] = (
            weights["y_embedder.embedding_table.weight"])
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}
    torch.testing.assert_close(twin.pos_embed.pos_embed, weights["pos_embed"], atol=1e-6, rtol=0)
    return twin.eval()


@pytest.fixture(scope="module")
def weights():
    return official_weights()


@pytest.fixture
def bring(call, tmp_path):
    """Saves what DiT's code would save, and brings it over by the command: bring(content) returns the checkpoint."""

    def bring(content, *flags):
        torch.save(content, tmp_path / "official.pt")
        code, out, err = call(import_dit, tmp_path / "official.pt", tmp_path / "xl.pth", "--num-heads", HEADS, *flags)
        assert code == 0, err
        assert "draw with: python -m latent.draw --checkpoint" in out and "64 x 64" in out
        return tmp_path / "xl.pth"

    return bring


@pytest.fixture
def vae(tmp_path):
    """The folder of a small VAE with f = 8, as diffusers writes it."""
    AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                  block_out_channels=(4, 8, 8, 8), norm_num_groups=4).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@torch.no_grad()
def test_output_equals_diffusers_put_right(weights, bring):
    model, _ = load_model(bring(weights), precision="fp32", kinds=IMAGES)
    x, t = torch.randn(6, 4, 8, 8), torch.tensor([0, 1, 17, 500, 998, 999])
    y = torch.tensor([0, 207, 360, 998, 999, 1000])
    expected, exact = (diffusers_twin(weights, name)(x, timestep=t, class_labels=y).sample
                       for name in ("gelu-approximate", "gelu"))
    ours = model(x, t, y)
    assert ours.shape == (6, 8, 8, 8) and expected.std() > 0.1
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)
    assert (ours - exact).abs().max() > 8e-6  # their GELU is an approximation, and taken over with the weights


class Plausible(torch.nn.Module):
    """A network that is right about data N(0, 1), but for the label, and so keeps what it sees at that size."""

    null_label = 1000

    def forward(self, x, t, y):
        noise = (1 - (1 - torch.linspace(1e-4, 0.02, 1000).double()).cumprod(0)).sqrt().float()[t].view(-1, 1, 1, 1)
        return torch.cat([noise * x + 0.01 * torch.sin(y.view(-1, 1, 1, 1) + x), torch.cos(5 * x + t[0] / 50)], dim=1)


class FirstAnswer(Plausible):
    def forward(self, x, t, y):
        return super().forward(x, t, y).chunk(2, dim=1)[0]


def official_samples(network, noise, y):
    """What DiT's sample.py draws, with diffusers' scheduler: latents (B, 4, 8, 8) for the labels y (B,)."""
    scheduler = DDPMScheduler(1000, 1e-4, 0.02, "linear", variance_type="learned_range", clip_sample=False,
                              timestep_spacing="linspace")
    scheduler.alphas_cumprod = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    scheduler.set_timesteps(250)
    x = noise()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noise())
        for t in scheduler.timesteps:
            cond, uncond = (network(x, t.expand(len(x)), labels) for labels in (y, torch.full_like(y, 1000)))
            cond[:, :3] = uncond[:, :3] + 4 * (cond[:, :3] - uncond[:, :3])
            x = scheduler.step(cond, t, x).prev_sample.float()
    return x


def test_the_settings_are_those_of_the_official_sampler():
    """250 steps from 999 to 0, learned variance, guidance 4 on three channels, no clamping."""
    config = make_config({name: torch.empty(shape, device="meta") for name, shape in official_shapes().items()}, {},
                         HEADS)
    y = torch.tensor([207, 360])
    expected = official_samples(Plausible(), noise_source(0, range(2), (4, 8, 8), "cpu"), y)
    assert 0.5 < expected.std() < 2
    drawn = generate(Plausible(), config, y)
    torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=0)
    for other in (dict(variance="fixed"), dict(spacing="trailing"), dict(guided_channels=0), dict(guidance=3.0),
                  dict(sample_steps=249)):
        network = Plausible() if "variance" not in other else FirstAnswer()
        assert (generate(network, LatentConfig(**vars(config) | other), y) - expected).abs().max() > 0.01, other
    with pytest.raises(UserError, match="--no-clamp"):
        LatentConfig(**vars(config) | dict(clamp=True))


def test_draws_as_the_official_sampler_does(weights, bring, vae, call, tmp_path):
    """The command's picture against diffusers' network, scheduler and VAE."""
    path = bring(weights)
    code, out, err = call(draw, "--checkpoint", path, "--vae", vae, "--labels", "golden retriever", 360, "--count",
                          1, "--precision", "fp32", "--seed", 3, "--device", "cpu", "--out", tmp_path / "a.png")
    assert code == 0, err
    assert "2 images, ddpm with 250 steps, guidance 4, seed 3" in out
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "a.png"))).permute(2, 0, 1)[:, -66:]
    shown = torch.stack([picture[:, :64, 2:66], picture[:, :64, 68:132]])

    twin = diffusers_twin(weights)
    x = official_samples(lambda x, t, y: twin(x, timestep=t, class_labels=y).sample,
                         noise_source(3, range(2), (4, 8, 8), "cpu"), torch.tensor([207, 360]))
    with torch.no_grad():
        images = AutoencoderKL.from_pretrained(vae).decode(x / 0.18215).sample
    expected = ((images + 1) * 127.5).round().clamp(0, 255)
    assert expected.std() > 10
    assert (shown.float() - expected).abs().max() <= 1


# SiT


def sit_weights(weights):
    """As they come out of SiT's code: the half of the outputs that it does not use has stayed at zero."""
    unused = {name: weight.clone() for name, weight in weights.items() if name.startswith("final_layer.linear")}
    for weight in unused.values():
        weight.view(4, 2, 4, -1)[:, 1] = 0
    return weights | unused


def sit_samples(network, x, y, steps=250, start=0):
    """What SiT's sample.py draws in the mode ODE with Euler's method on steps + 1 times: from noise at 0 to the image
    at 1, along the velocity, of which three channels are guided, from the time `start` on. Nothing of ours is in it."""
    with torch.no_grad():
        for i in range(steps):
            t = torch.full((len(x),), i / steps)
            cond, uncond = (network(x, t, labels)[:, :4] for labels in (y, torch.full_like(y, 1000)))
            if i / steps >= start:
                cond[:, :3] = uncond[:, :3] + 4 * (cond[:, :3] - uncond[:, :3])
            x = x + cond / steps
    return x


@pytest.mark.parametrize("kind", ["released", "trained", "halved"])
def test_a_sit_draws_as_its_sampler_does(kind, weights, bring):
    """Known by its zeros, or by the flags of its train.py, and with half of the outputs or all."""
    theirs = sit_weights(weights)
    twin = diffusers_twin(theirs)
    content = theirs
    if kind == "trained":  # too short for zeros to tell anything
        flags = argparse.Namespace(path_type="Linear", prediction="velocity", num_classes=1000, results_dir="x")
        content = dict(ema=weights, model=theirs, args=flags)
    elif kind == "halved":
        content = dict(model=plain_weights(theirs), args=argparse.Namespace(prediction="velocity"))
    path = bring(content)
    model, config = load_model(path, precision="fp32", kinds=IMAGES)
    assert (config.process, config.sampler, config.sample_steps, config.eta) == ("sit", "ddim", 250, 0)
    assert model.final_layer.linear.out_features == 4 * 4 and not config.clamp
    y = torch.tensor([207, 360])
    noise = noise_source(0, range(2), (4, 8, 8), "cpu")()
    expected = sit_samples(lambda x, t, y: twin(x, timestep=t, class_labels=y).sample, noise, y)
    assert (expected - noise).std() > 0.05
    drawn = generate(model, config, y)
    torch.testing.assert_close(drawn, expected, atol=2e-5, rtol=1e-4)


def test_a_sit_says_what_it_is(weights, call, tmp_path):
    for content, said in ((weights, False), (sit_weights(weights), True)):
        torch.save(content, tmp_path / "official.pt")
        code, out, _ = call(import_dit, tmp_path / "official.pt", tmp_path / "xl.pth", "--num-heads", HEADS)
        assert code == 0 and ("it is a SiT" in out) == said
        assert load_checkpoint(tmp_path / "xl.pth", IMAGES)["config"].process == ("sit" if said else "ddpm")


@pytest.mark.parametrize(("flags", "words"), [
    (dict(path_type="GVP", prediction="velocity"), "'velocity' on the path 'GVP'"),
    (dict(path_type="Linear", prediction="noise"), "predicts 'noise'"),
    (dict(path_type="cosine", prediction="v"), "predicts 'v' on the path 'cosine'")])
def test_what_is_another_process_is_refused(flags, words, weights, call, tmp_path):
    torch.save(dict(ema=weights, args=argparse.Namespace(**flags)), tmp_path / "official.pt")
    result = call(import_dit, tmp_path / "official.pt", tmp_path / "xl.pth", "--num-heads", HEADS)
    assert_refused(result, "official.pt", words, "known here are 'velocity' on the path 'Linear'")
    assert not (tmp_path / "xl.pth").exists()


def plain_weights(weights):
    """Weights whose network answers with the velocity alone, as LightningDiT and REPA have them."""
    return {name: weight.view(4, 2, 4, -1)[:, 0].reshape(16, *weight.shape[1:])
            if name.startswith("final_layer.linear") else weight for name, weight in weights.items()}


def repa_samples(network, x, y, scale, steps=50, high=1.0):
    """What REPA's generate.py draws in the mode ode: from noise at t = 1 to the image at 0, against the velocity
    eps - x_0, of which all channels are guided from t = `high` on (--guidance-high). Nothing of ours is in it."""
    with torch.no_grad():
        for i in range(steps, 0, -1):
            t = torch.full((len(x),), i / steps)
            cond, uncond = (network(x, t, labels) for labels in (y, torch.full_like(y, 1000)))
            x = x - (uncond + scale * (cond - uncond) if i / steps <= high else cond) / steps
    return x


@pytest.mark.parametrize("kind", ["released", "trained", "without projectors"])
def test_a_repa_draws_as_its_sampler_does(kind, weights, bring):
    """Known by its projectors or its flags: its image lies at the other end of t, and its velocity has another sign."""
    theirs = plain_weights(weights)
    twin = diffusers_twin(theirs, out=1)
    projectors = {f"projectors.0.{i}.{part}": torch.randn(7) for i in (0, 2, 4) for part in ("weight", "bias")}
    flags = argparse.Namespace(path_type="linear", prediction="v", num_classes=1000, enc_type="dinov2-vit-b")
    content = {"released": theirs | projectors, "trained": dict(model={}, ema=theirs | projectors, args=flags, steps=9),
               "without projectors": dict(ema=theirs, args=flags)}[kind]
    model, config = load_model(bring(content), precision="fp32", kinds=IMAGES)
    assert (config.process, config.sampler, config.sample_steps, config.guidance) == ("sit", "ddim", 50, 1.5)
    y, noise = torch.tensor([207, 360]), noise_source(0, range(2), (4, 8, 8), "cpu")()
    expected = repa_samples(lambda x, t, y: twin(x, timestep=t, class_labels=y).sample, noise, y, 1.5)
    assert (expected - noise).std() > 0.05
    torch.testing.assert_close(generate(model, config, y), expected, atol=2e-5, rtol=1e-4)
    if kind == "released":
        part = repa_samples(lambda x, t, y: twin(x, timestep=t, class_labels=y).sample, noise, y, 1.5, high=0.7)
        assert (part - expected).abs().max() > 1e-3
        config = dataclasses.replace(config, guidance_high=0.7)
        torch.testing.assert_close(generate(model, config, y), part, atol=2e-5, rtol=1e-4)


def lightning(**changes):
    """The settings that LightningDiT's train.py saves beside the weights."""
    settings = dict(
        ckpt_path="x.pt", transport=dict(path_type="Linear", prediction="velocity", use_lognorm=True, train_eps=None),
        data=dict(image_size=64, num_classes=1000, latent_norm=False, latent_multiplier=0.5),
        vae=dict(model_name="sd", downsample_ratio=8), sample=dict(timestep_shift=0.3, cfg_interval_start=0.4))
    return {name: part | changes.get(name, {}) if isinstance(part, dict) else part for name, part in settings.items()}


def test_a_plain_lightning_dit_draws_as_a_sit(weights, bring, vae, call, tmp_path):
    theirs = plain_weights(weights)
    content = dict(model=theirs, ema=theirs, opt={}, config=lightning())
    model, config = load_model(bring(content), precision="fp32", kinds=IMAGES)
    assert config.latent_std == (2.0,) and config.latent_mean == (0.0,)
    assert load_checkpoint(bring(content, "--vae", vae), IMAGES)["config"].latent_std == (2.0,)
    y, noise = torch.tensor([207, 360]), noise_source(0, range(2), (4, 8, 8), "cpu")()
    twin = diffusers_twin(theirs, out=1)
    expected = sit_samples(lambda x, t, y: twin(x, timestep=t, class_labels=y).sample, noise, y, start=0.4)
    torch.testing.assert_close(generate(model, config, y), expected, atol=2e-5, rtol=1e-4)
    code, out, _ = call(import_dit, tmp_path / "official.pt", tmp_path / "xl.pth", "--num-heads", HEADS)
    assert code == 0 and "it draws without timestep_shift: not known here" in out


@pytest.mark.parametrize(("extra", "settings", "words"), [
    ({"blocks.0.mlp.w12.weight": 1, "blocks.1.norm1.weight": 1, "feat_rope.freqs_cos": 1}, {},
     "its network has SwiGLU, RMSNorm, rotary positions"),
    ({}, dict(data=dict(latent_norm=True)), "official.pt: its latents were normalised by a file latents_stats.pt"),
    ({}, dict(data=dict(latent_multiplier="1")), "latent_multiplier is '1'"),
    ({}, dict(vae=dict(downsample_ratio=16)), "16 times smaller than images"),
    ({}, dict(sample=dict(cfg_interval_start="0.1")), "cfg_interval_start is '0.1'"),
    ({}, dict(sample=dict(cfg_interval_start=1.5)), "cfg_interval_start is 1.5"),
    ({}, dict(transport=dict(path_type="GVP")), "'velocity' on the path 'GVP'")])
def test_a_lightning_dit_that_is_another_is_refused(extra, settings, words, weights, call, tmp_path):
    theirs = plain_weights(weights) | {name: torch.zeros(size) for name, size in extra.items()}
    torch.save(dict(ema=theirs, config=lightning(**settings)), tmp_path / "official.pt")
    result = call(import_dit, tmp_path / "official.pt", tmp_path / "xl.pth", "--num-heads", HEADS)
    assert_refused(result, "official.pt", words)
    assert not (tmp_path / "xl.pth").exists()


def test_the_process_of_a_sit():
    """Its loss is that of the velocity at its own time; each of our samplers gets to the image by it."""
    process, x_0 = SiT(), torch.randn(3, 4, 2, 2)
    t, noise = torch.tensor([0, 499, 999]), torch.randn(3, 4, 2, 2)
    tau = ((t + 1) / 1000).view(-1, 1, 1, 1)
    seen = []

    def network(x, time, y):
        seen.append((x, time))
        return x_0 - noise + 2

    assert torch.allclose(process.losses(network, x_0, t, None, noise), torch.tensor(4.0))
    torch.testing.assert_close(seen[0][0], (1 - tau) * x_0 + tau * noise, atol=2e-5, rtol=0)
    torch.testing.assert_close(seen[0][1], 1 - tau.flatten())
    assert process.random_t(torch.tensor([0.0, 0.5, 0.9999])).tolist() == [0, 500, 999]
    for sampler in (ddim, dpm, ddpm):
        *_, x = sampler(lambda x, t: process.to_x_0((x_0 - x) / ((t + 1) / 1000), x, t), noise,
                        process.descending_steps(8), lambda: torch.randn_like(noise))
        torch.testing.assert_close(x, x_0, atol=1e-4, rtol=0)


# Its files


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_the_names(prefix, weights, bring):
    """What DistributedDataParallel and torch.compile put before them."""
    plain = load_checkpoint(bring(weights), IMAGES)["ema"]
    for content in (weights, dict(model=weights), dict(ema=weights, model={})):
        renamed = {name: {prefix + key: value for key, value in part.items()} for name, part in content.items()
                   } if "pos_embed" not in content else {prefix + key: value for key, value in content.items()}
        brought = load_checkpoint(bring(renamed), IMAGES)["ema"]
        assert all(torch.equal(weight, plain[name]) for name, weight in brought.items())


def test_flags_that_are_no_plain_values(weights, call, bring, tmp_path):
    """A list is left alone; a stranger is called by its name, in a whole sentence."""
    flags = argparse.Namespace(lr=1e-4, steps=3, betas=[0.9, 0.99], resume=None, num_classes=1000)
    bring(dict(ema=weights, args=flags))
    assert import_dit.read_official(tmp_path / "official.pt")[1] == dict(lr=1e-4, steps=3, num_classes=1000)
    torch.save(dict(ema=weights, args=argparse.Namespace(a=fractions.Fraction(1, 3))), tmp_path / "official.pt")
    _, _, err = result = call(import_dit, tmp_path / "official.pt", tmp_path / "xl.pth", "--num-heads", HEADS)
    assert_refused(result, "(it holds fractions.Fraction, which is neither a tensor nor a plain value)")
    assert err.rstrip().endswith(")")


def test_work_for_one_process(weights, monkeypatch, tmp_path):
    """Of those that torchrun starts, the first alone writes."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    torch.save(weights, tmp_path / "official.pt")
    monkeypatch.setattr(sys, "argv", ["import_dit.py", str(tmp_path / "official.pt"), str(tmp_path / "xl.pth")])
    runpy.run_module("latent.import_dit", run_name="__main__")
    assert not (tmp_path / "xl.pth").exists()


def test_a_checkpoint_of_its_train_py(weights, bring):
    """Its average is taken, its flags are no obstacle, and its optimizer stays behind."""
    flags = argparse.Namespace(model="DiT-S/2", num_classes=1000, image_size=64, data_path="x", vae="ema")
    other = {name: weight + 1 for name, weight in weights.items()}
    plain = load_checkpoint(bring(weights), IMAGES)["ema"]
    for content in (dict(model=other, ema=weights, opt={"state": {0: {"exp_avg": torch.zeros(9)}}}, args=flags),
                    dict(model=weights, args=flags)):
        path = bring(content)
        brought = load_checkpoint(path, IMAGES)
        assert all(torch.equal(weight, plain[name]) for name, weight in brought["ema"].items())
        assert set(brought) == {"config", "step", "seconds", "ema"}
        assert os.path.getsize(path) < sum(weight.nbytes for weight in weights.values()) + 40_000


def test_old_files_and_half_precision(weights, tmp_path, call, bring):
    plain = load_checkpoint(bring(weights), IMAGES)["ema"]
    torch.save(weights, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert call(import_dit, tmp_path / "old.pt", tmp_path / "old.pth", "--num-heads", HEADS)[0] == 0
    brought = load_checkpoint(tmp_path / "old.pth", IMAGES)["ema"]
    assert all(torch.equal(weight, plain[name]) for name, weight in brought.items())
    for dtype in (torch.float16, torch.bfloat16):
        half = load_checkpoint(bring({name: weight.to(dtype) for name, weight in weights.items()}), IMAGES)["ema"]
        assert all(torch.equal(weight, plain[name].to(dtype)) for name, weight in half.items())


@pytest.mark.parametrize(("side", "size", "count"), [(16, 256, 675_129_632), (32, 512, 676_014_368)])
def test_the_released_weights_by_their_shapes(side, size, count):
    """DiT-XL/2 at both sizes: 292 weights; the sizes that they tell, and how the model draws."""
    shapes = official_shapes(width=1152, depth=28, side=side)
    weights = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    assert len(weights) == 292 and sum(weight.numel() for weight in weights.values()) == count
    config = make_config(weights, {})
    assert (config.image_size, config.channels, config.latent_shape) == ((size, size), 3, (4, size // 8, size // 8))
    assert (config.hidden_size, config.depth, config.num_heads, config.mlp_ratio) == (1152, 28, 16, 4)
    assert (config.patch_size, config.num_classes, config.network_options()["out_channels"]) == ((2, 2), 1000, 8)
    assert (config.process, config.T, config.beta_start, config.beta_end) == ("ddpm", 1000, 1e-4, 0.02)
    assert (config.sampler, config.sample_steps, config.guidance) == ("ddpm", 250, 4)
    assert (config.variance, config.spacing, config.guided_channels, config.clamp) == ("learned", "linspace", 3, False)
    assert (config.time_spacing, config.vae, config.vae_hash) == ("dit", "stabilityai/sd-vae-ft-mse", "")
    assert config.latent_mean == (0,) and config.latent_std == pytest.approx((1 / 0.18215,))
    assert config.class_names[207] == "golden retriever"


@pytest.mark.parametrize(("width", "depth", "heads"), [(384, 12, 6), (768, 12, 12), (1024, 24, 16)])
def test_the_heads_of_the_other_sizes(width, depth, heads):
    shapes = official_shapes(width=width, depth=depth, classes=7, out=1)
    config = make_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, {})
    assert (config.num_heads, config.classes, config.variance) == (heads, (), "fixed")
    assert "out_channels" not in config.network_options()


def test_the_names_of_imagenet():
    names = class_names(1000)
    assert len(names) == 1000 and (names[0], names[999]) == ("tench", "toilet tissue") and class_names(10) == ()
    assert parse_labels(["golden retriever", "otter"], names) == [207, 360]
    assert parse_labels(["207", "360"], names) == parse_labels(["golden retriever,otter"], names) == [207, 360]


class Malicious:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def without(weights, *names):
    return {name: weight for name, weight in weights.items() if name not in names}


FILES = {
    "executes": (lambda w: w | {"pos_embed": Malicious()}, "no file of DiT's code"),
    "executes in its flags": (lambda w: dict(ema=w, args=argparse.Namespace(a=Malicious())), "more than weights"),
    "executes in its optimizer": (lambda w: dict(ema=w, opt=Malicious()), "more than weights"),
    "an object of torch": (lambda w: torch.nn.Linear(2, 2), "more than weights and flags"),
    "a list": (lambda w: [1, 2], "holds no weights by name"), "empty": (lambda w: {}, "holds no weights by name"),
    "numbers": (lambda w: w | {"pos_embed": 3}, "holds no weights by name"),
    "ours": (lambda w: {"format": "dit-checkpoint-2", "ema": w}, "is a checkpoint of this project already"),
    "another architecture": (lambda w: {"conv1.weight": torch.zeros(4, 3, 3, 3)}, "not the weights of a DiT"),
    "no blocks": (lambda w: {name: v for name, v in w.items() if "blocks" not in name}, "not the weights of a DiT"),
    "flat patches": (lambda w: w | {"x_embedder.proj.weight": torch.zeros(D, 16)}, "not the weights of a DiT"),
    "numbered by words": (lambda w: w | {"blocks.a.b": torch.zeros(1)}, "not the weights of a DiT"),
    "many blocks": (lambda w: w | {"blocks.999999999.b": torch.zeros(1)}, "depth is 1000000000"),
    "no width": (lambda w: w | {"x_embedder.proj.weight": torch.zeros(0, 4, 2, 2)}, "not the weights of a DiT"),
    "missing": (lambda w: without(w, "blocks.1.attn.qkv.bias"), "'blocks.1.attn.qkv.bias' is missing"),
    "a block missing": (lambda w: without(w, *(n for n in w if n.startswith("blocks.0."))), "not the weights of a DiT"),
    "normalised queries": (lambda w: w | {"blocks.0.attn.q_norm.weight": torch.zeros(16)}, "normalised queries and"),
    "extra": (lambda w: w | {"blocks.0.attn.x": torch.zeros(16)}, "'blocks.0.attn.x' is not a part of it"),
    "misshaped": (lambda w: w | {"blocks.1.mlp.fc2.bias": torch.zeros(D + 1)}, "is (49,), not (48,)"),
    "other outputs": (lambda w: w | {"final_layer.linear.weight": torch.zeros(48, D)}, "final_layer.linear.weight is"),
    "learned positions": (lambda w: w | {"pos_embed": w["pos_embed"] + 0.1}, "sines and cosines"),
    "nan": (lambda w: w | {"x_embedder.proj.bias": torch.full((D,), float("nan"))}, "not all finite"),
    "whole numbers": (lambda w: w | {"x_embedder.proj.bias": torch.zeros(D).long()}, "plain tensors of floats"),
    "sparse": (lambda w: w | {"t_embedder.mlp.2.weight": torch.eye(D).to_sparse()}, "plain tensors of floats"),
    "claims more": (lambda w: w | {"t_embedder.mlp.2.weight": torch.zeros(1).expand(D, D)}, "claim more than the file"),
    "no null label": (lambda w: dict(ema=w, args=argparse.Namespace(num_classes=1001)), "has no null label"),
}


@pytest.mark.parametrize("kind", FILES)
def test_wrong_files(kind, weights, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, words = FILES[kind]
    torch.save(content(weights), "official.pt")
    config = Config(num_classes=10, channels=1, image_size=8, patch_size=2, hidden_size=32, depth=1, num_heads=2)
    save_checkpoint("xl.pth", config, 0, 0.0, config.build_model().state_dict())
    before = (tmp_path / "xl.pth").read_bytes()  # weights like those to be written
    result = call(import_dit, "official.pt", "xl.pth", "--num-heads", HEADS)
    assert_refused(result, "official.pt", words)
    assert (tmp_path / "xl.pth").read_bytes() == before and not (tmp_path / "hacked").exists()


def test_files_that_are_cut_or_not_there(weights, call, tmp_path):
    path, out = tmp_path / "official.pt", tmp_path / "xl.pth"
    torch.save(weights, path)
    whole = path.read_bytes()
    for part in (whole[:-1], whole[:len(whole) // 2], whole[:100], b""):
        path.write_bytes(part)
        assert_refused(call(import_dit, path, out, "--num-heads", HEADS), path, "is cut short")
    assert_refused(call(import_dit, tmp_path / "none.pt", out), "there is no file", "none.pt")
    path.write_bytes(whole)
    assert_refused(call(import_dit, path, path, "--num-heads", HEADS), "is read by this command")
    assert_refused(call(import_dit, path, tmp_path / "no" / "xl.pth", "--num-heads", HEADS), "cannot be written")
    assert_refused(call(import_dit, path, out), "no size of the paper", "--num-heads")
    assert_refused(call(import_dit, path, out, "--num-heads", 5), "num_heads 5")
    assert_refused(call(import_dit, path, out, "--num-heads", HEADS, "--vae", tmp_path), "holds no config.json")
    assert path.read_bytes() == whole and not out.exists()


def test_as_a_user_calls_it(command, weights, tmp_path):
    """What --num-heads does, is in the file; --vae is tested below."""
    assert flags_of(import_dit) == {"official", "out", "num_heads", "vae"}
    torch.save(weights, tmp_path / "official.pt")
    process = command("latent.import_dit", tmp_path / "official.pt", tmp_path / "xl.pth", "--num-heads", HEADS)
    assert process.returncode == 0 and process.stderr == ""
    count = sum(weight.numel() for weight in weights.values()) - 16 * D  # the positions are no parameters
    assert process.stdout.splitlines() == [
        f"{tmp_path / 'xl.pth'}: {count:,} parameters, 2 blocks of width 48; "
        "images of 64 x 64, 1,000 classes",
        f"draw with: python -m latent.draw --checkpoint {tmp_path / 'xl.pth'} --vae sd-vae-ft-ema --labels 207 360"]


def test_bound_to_its_own_vae(weights, bring, vae, call, tmp_path):
    """--vae: the checkpoint knows the VAE, its statistics and its hash, and draws with no other encoder's."""
    config = json.loads((vae / "config.json").read_text())
    statistics = dict(latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[2.0, 3.0, 4.0, 5.0], scaling_factor=1.0)
    (vae / "config.json").write_text(json.dumps(config | statistics))
    path = bring(weights, "--vae", vae)
    made = load_checkpoint(path, IMAGES)["config"]
    assert (made.vae, made.vae_hash) == (str(vae), load_vae(vae).fingerprint)
    assert (made.latent_mean, made.latent_std) == ((1, 2, 3, 4), (2, 3, 4, 5))
    flags = ["--checkpoint", path, "--labels", 1, "--count", 1, "--sample-steps", 2, "--device", "cpu", "--out",
             tmp_path / "a.png"]
    assert call(draw, *flags)[0] == 0
    before = (tmp_path / "a.png").read_bytes()
    # What the folder says of statistics is not what the model has learned with
    (vae / "config.json").write_text(json.dumps(config | statistics | dict(scaling_factor=9.0)))
    assert call(draw, *flags)[0] == 0 and (tmp_path / "a.png").read_bytes() == before

    (tmp_path / "a.png").unlink()
    other = VAE(**load_vae(vae).settings)
    save_vae(other, tmp_path / "other")
    assert_refused(call(draw, *flags, "--vae", tmp_path / "other"), "is another VAE", made.vae_hash)
    shutil.move(vae, tmp_path / "moved")
    assert_refused(call(draw, *flags), f"there is no folder {str(vae)!r}")
    assert not (tmp_path / "a.png").exists()
    assert call(draw, *flags, "--vae", tmp_path / "moved")[0] == 0
    assert (tmp_path / "a.png").read_bytes() == before


def test_a_vae_that_does_not_fit(weights, bring, vae, call, tmp_path):
    path = bring(weights)
    flags = ["--checkpoint", path, "--sample-steps", 2, "--out", tmp_path / "a.png"]
    small = dict(block_out_channels=(4, 8, 8, 8), norm_num_groups=4)
    for name, settings in (("shallow", small | dict(block_out_channels=(4, 8))), ("grey", small | dict(out_channels=1)),
                           ("thin", small | dict(latent_channels=3))):
        save_vae(VAE(**settings), tmp_path / name)
        assert_refused(call(draw, *flags, "--vae", tmp_path / name), tmp_path / name, "(4, 8, 8)", "(3, 64, 64)")
    assert_refused(call(draw, *flags, "--vae", ""), "--vae", "is empty")
    (tmp_path / "empty").mkdir()
    assert_refused(call(draw, *flags, "--vae", tmp_path / "empty"), "holds no config.json")
    pixels = LatentConfig(image_size=8, channels=1, patch_size=4, num_classes=2, hidden_size=4, num_heads=1, depth=1)
    save_checkpoint(tmp_path / "pixels.pth", pixels, 0, 0.0, pixels.build_model().state_dict())
    for path, words in ((tmp_path / "pixels.pth", "pixels.pth draws images without a VAE: leave --vae out"),
                        (REPOSITORY / "weights" / "mnist.pth", "mnist.pth is a model of images: draw with it by python "
                                                               "inference.py")):
        flags[1] = path
        assert_refused(call(draw, *flags, "--vae", vae), words)
    assert not (tmp_path / "a.png").exists()


def test_shared_weights_find_the_vae_beside_them(weights, bring, vae, call, tmp_path, monkeypatch):
    path = bring(weights, "--vae", vae)
    assert call(share, path, tmp_path / "shared.pth", "--sample-steps", 2)[0] == 0
    assert load_checkpoint(tmp_path / "shared.pth", IMAGES)["config"].vae == "vae"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call(draw, "--checkpoint", "../shared.pth", "--labels", 0, "--count", 1)[0] == 0


def test_all_that_draws_decodes(weights, bring, vae, call, tmp_path, monkeypatch):
    """The grid, the strip, the animation, a notebook's picture, the folder of fakes, those that are scored and the grid
    of a training run show the same images, in their size."""
    path = bring(weights, "--vae", vae)
    flags = ["--checkpoint", path, "--labels", 0, 1, "--count", 1, "--sample-steps", 2, "--device", "cpu"]
    for extra, name in (([], "a.png"), (["--strip"], "b.png"), (["--gif"], "c.gif")):
        assert call(draw, *flags, *extra, "--out", tmp_path / name)[0] == 0
    grid, strip = (np.array(Image.open(tmp_path / name)) for name in ("a.png", "b.png"))
    with Image.open(tmp_path / "c.gif") as animation:
        assert animation.n_frames == 3 and animation.size == (2 + 2 * 66, 14 + 2 + 66)
    model, config = load_model(path, device="cpu", kinds=IMAGES)
    config = LatentConfig(**vars(config) | dict(sample_steps=2))
    latents = generate(model, config, torch.arange(2))
    assert latents.shape == (2, 4, 8, 8) and latents.abs().max() > 1  # not clamped
    images = to_uint8(load_vae(vae).decode(latents))
    for i in range(2):
        expected = images[i].permute(1, 2, 0).numpy()
        assert np.array_equal(grid[-66:-2, 2 + 66 * i:66 + 66 * i], expected)
        assert np.array_equal(strip[2 + 66 * i:66 + 66 * i, -66:-2], expected)
    picture = draw.draw([0, 1], checkpoint=path, device="cpu", sample_steps=2, vae=str(vae))
    assert np.array_equal(np.asarray(picture), grid)
    labels = torch.arange(2)
    fakes = draw_fakes(model, config, labels)
    assert torch.equal(fakes, images) and labels.tolist() == [0, 1]
    # The grid that training draws; it is of ten classes in six rows
    train.show(train.Run(config, model, model, model, [], None), tmp_path / "d.png", lambda: False)
    with Image.open(tmp_path / "d.png") as sample_grid:
        assert sample_grid.size == (2 + 10 * 66, 2 + 6 * 66)
        assert np.array_equal(np.array(sample_grid)[2:66, 68:132], images[1].permute(1, 2, 0).numpy())
    for i, name in enumerate(("ant", "bee")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.effect_noise((70, 90), 50).save(tmp_path / "data" / name / f"{i}.png")
    fill = ["--checkpoint", path, "--count", 2, "--sample-steps", 2, "--data-dir", tmp_path / "data", "--real",
            tmp_path / "real", "--fake", tmp_path / "fake", "--device", "cpu"]
    monkeypatch.setattr(generator, "check_classes", lambda *_: None)  # which would ask for a thousand folders
    code, _, err = call(latent_generator, *fill, "--equal")
    assert code == 0, err
    for i, file in enumerate(sorted((tmp_path / "fake").glob("*.png"))):
        assert np.array_equal(np.array(Image.open(file)), images[i].permute(1, 2, 0).numpy())
    with Image.open(next((tmp_path / "real").glob("*.png"))) as real:
        assert real.size == (64, 64) and real.mode == "RGB"
    # Those of another decoder are not mixed with them
    other = load_vae(vae)
    with torch.no_grad():
        other.decoder.conv_out.bias += 0.1
    save_vae(other, tmp_path / "other")
    assert_refused(call(latent_generator, *fill, "--equal", "--vae", tmp_path / "other"), "another vae")
    shutil.move(vae, tmp_path / "moved")
    assert call(latent_generator, *fill, "--equal", "--vae", tmp_path / "moved")[0] == 0


def test_pictures_are_changed_as_latents(weights, bring, vae, call, tmp_path):
    """What little an edit adds to is the picture as the VAE sees it; what a mask keeps is kept as latents are: whole,
    where all of their pixels are kept."""
    path = bring(weights, "--vae", vae)
    Image.effect_noise((64, 64), 60).convert("RGB").save(tmp_path / "in.png")
    mask = Image.new("L", (64, 64), 255)
    mask.paste(0, (0, 0, 64, 36))  # black: kept; four rows of latents and a half
    mask.save(tmp_path / "mask.png")
    flags = ["--checkpoint", path, "--labels", 0, "--count", 1, "--sample-steps", 2, "--out", tmp_path / "a.png",
             "--device", "cpu"]
    for change in (["--edit", tmp_path / "in.png"], ["--inpaint", tmp_path / "in.png", "--mask", tmp_path / "mask.png"],
                   ["--morph", "0:1"]):
        code, _, err = call(edit_draw, *flags[:2], *flags[4 if "--morph" in change else 2:], *change)
        assert code == 0, err
        with Image.open(tmp_path / "a.png") as picture:
            assert picture.height in (68, 82)
    model, config = load_model(path, device="cpu", kinds=IMAGES)
    picture, known = edit_draw.read_picture(tmp_path / "in.png", config, tmp_path / "mask.png")
    assert known.shape == (1, 1, 64, 64)
    latents = config.from_images(picture)
    assert torch.equal(latents, load_vae(vae).encode(picture)[0]) and latents.shape == (1, 4, 8, 8)
    args = argparse.Namespace(labels=[0], edit=None, morph=None, inpaint=tmp_path / "in.png",
                              mask=tmp_path / "mask.png")
    kept = edit_draw.prepare(model, config, args, 1)[2]["way"].keywords["known"]
    assert kept[0, 0].all(dim=1).tolist() == kept[0, 0].any(dim=1).tolist() == [True] * 4 + [False] * 4
    assert Config().from_images(picture) is picture


def test_the_page_refuses_what_it_cannot_draw(weights, bring, call, tmp_path):
    assert_refused(call(export, "--checkpoint", bring(weights), "--out", tmp_path / "a.html"), "is a model of latents")
