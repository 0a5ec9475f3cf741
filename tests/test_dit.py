from support.flops import flops

import copy
import itertools
import math

import pytest
import torch
from diffusers import DiTTransformer2DModel

import dit
from config import PRESETS, Config
from dit import DiT, patchify, sincos_positions, unpatchify
from dit_block import Attention, DiTBlock
from time_emb import TimeEmbedding
from video.dit import ClipDiT


def randomize(model):
    """Gives every weight a value, the zeros of adaLN-Zero included."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.07)
    return model


def diffusers_twin(model, image_size, patch_size, channels, num_classes, hidden_size, depth, num_heads):
    """diffusers' DiT with the weights of `model`."""
    twin = DiTTransformer2DModel(
        num_attention_heads=num_heads, attention_head_dim=hidden_size // num_heads, in_channels=channels,
        out_channels=channels, num_layers=depth, sample_size=image_size, patch_size=patch_size, norm_eps=1e-6,
        num_embeds_ada_norm=num_classes, activation_fn="gelu")
    patches = model.patch_embedding.linear
    p = patch_size
    state = {
        "pos_embed.proj.weight": patches.weight.view(hidden_size, p, p, channels).permute(0, 3, 1, 2),
        "pos_embed.proj.bias": patches.bias,
        "proj_out_1.weight": model.final_layer.modulation[1].weight,
        "proj_out_1.bias": model.final_layer.modulation[1].bias,
        "proj_out_2.weight": model.final_layer.linear.weight,
        "proj_out_2.bias": model.final_layer.linear.bias,
    }
    sin, cos = model.time_embedding.mlp[0].weight.chunk(2, dim=1)  # diffusers puts the cosines first
    for i, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.chunk(3)
        q_bias, k_bias, v_bias = block.attention.qkv.bias.chunk(3)
        names = {
            "norm1.emb.timestep_embedder.linear_1.weight": torch.cat([cos, sin], dim=1),
            "norm1.emb.timestep_embedder.linear_1.bias": model.time_embedding.mlp[0].bias,
            "norm1.emb.timestep_embedder.linear_2.weight": model.time_embedding.mlp[2].weight,
            "norm1.emb.timestep_embedder.linear_2.bias": model.time_embedding.mlp[2].bias,
            "norm1.emb.class_embedder.embedding_table.weight": model.label_embedding.weight,
            "norm1.linear.weight": block.modulation[1].weight, "norm1.linear.bias": block.modulation[1].bias,
            "attn1.to_q.weight": q, "attn1.to_q.bias": q_bias, "attn1.to_k.weight": k, "attn1.to_k.bias": k_bias,
            "attn1.to_v.weight": v, "attn1.to_v.bias": v_bias,
            "attn1.to_out.0.weight": block.attention.out.weight, "attn1.to_out.0.bias": block.attention.out.bias,
            "ff.net.0.proj.weight": block.mlp[0].weight, "ff.net.0.proj.bias": block.mlp[0].bias,
            "ff.net.2.weight": block.mlp[2].weight, "ff.net.2.bias": block.mlp[2].bias,
        }
        state |= {f"transformer_blocks.{i}.{name}": tensor for name, tensor in names.items()}
    missing, unexpected = twin.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"pos_embed.pos_embed"}
    return twin.eval()


@pytest.mark.parametrize("sizes", [(28, 7, 1, 10, 64, 2, 4), (16, 4, 3, 5, 48, 3, 2), (8, 2, 4, 3, 32, 1, 1)])
def test_output_equals_diffusers(sizes):
    image_size, _, channels, num_classes, *_ = sizes
    model = randomize(DiT(*sizes, time_spacing="article")).eval()  # which is diffusers' too
    twin = diffusers_twin(model, *sizes)
    x = torch.randn(6, channels, image_size, image_size)
    t = torch.tensor([0, 1, 17, 500, 998, 999])
    y = torch.arange(6) % (num_classes + 1)
    with torch.no_grad():
        ours, theirs = model(x, t, y), twin(x, timestep=t, class_labels=y).sample
    assert ours.std() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_patchify_and_back():
    x = torch.randn(2, 3, 12, 12)
    patches = patchify(x, (4, 4))
    assert patches.shape == (2, 9, 48)
    assert torch.equal(unpatchify(patches, (4, 4), (3, 3)), x)
    assert torch.equal(patches[1, 5].view(4, 4, 3), x[1, :, 4:8, 8:12].permute(1, 2, 0))  # row by row


def test_untrained_block_is_the_identity_and_output_is_zero():
    model = DiT(8, 2, hidden_size=32, depth=2, num_heads=2)
    x, c = torch.randn(3, 16, 32), torch.randn(3, 32)
    for block in model.blocks:
        assert torch.equal(block(x, c), x)
    assert not model(torch.randn(3, 1, 8, 8), torch.tensor([0, 5, 999]), torch.tensor([0, 9, 10])).any()


def test_how_weights_start():
    """As the paper's code has it: Xavier for what is linear, the time's MLP and the labels at 0.02, biases at 0."""
    model = DiT(16, 2, channels=3, num_classes=200, hidden_size=64, depth=2, num_heads=2)
    zero = {"final_layer.linear.weight"} | {name for name, _ in model.named_parameters() if "modulation" in name}
    for name, weight in model.named_parameters():
        if name in zero or name.endswith("bias"):
            assert not weight.any(), name
        elif name.startswith(("time_embedding", "label_embedding")):
            assert weight.std().item() == pytest.approx(0.02, rel=0.05) and weight.abs().max() > 0.05, name
        else:
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.97 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name


def test_all_weights_learn():
    """After a few steps every weight has a gradient: the zeros do not cut a part of the network off."""
    model = DiT(8, 2, hidden_size=32, depth=2, num_heads=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(torch.randn(16, 1, 8, 8), torch.arange(16) * 60, torch.arange(16) % 11)
        (output - torch.randn(16, 1, 8, 8)).square().mean().backward()
        optimizer.step()
    dead = [name for name, p in model.named_parameters() if not p.grad.any() and not name.endswith("qkv.bias")]
    assert not dead


def test_attention_is_scaled_by_the_width_of_a_head():
    attention = randomize(Attention(32, 4))
    x = torch.randn(2, 7, 32)
    q, k, v = attention.qkv(x).chunk(3, dim=2)
    heads = []
    for head in range(4):
        part = slice(8 * head, 8 * head + 8)
        weights = (q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(8)).softmax(dim=2)
        heads.append(weights @ v[..., part])
    torch.testing.assert_close(attention(x), attention.out(torch.cat(heads, dim=2)))


@pytest.mark.parametrize("tokens", [16, 49])
def test_attention_in_bfloat16_is_that_of_fp32(tokens):
    """On the CPU it is written out: the result and the gradients are those of torch's own, to bfloat16's rounding."""
    attention = randomize(Attention(32, 4))
    x, g = torch.randn(2, 5, tokens, 32)
    rounded = x.bfloat16().requires_grad_()
    ours = copy.deepcopy(attention).bfloat16()(rounded)
    x.requires_grad_()
    exact = attention(x)
    torch.testing.assert_close(ours.float(), exact, atol=0.02, rtol=0.02)
    gradient, exact_gradient = torch.autograd.grad(ours, rounded, g.bfloat16())[0], torch.autograd.grad(exact, x, g)[0]
    torch.testing.assert_close(gradient.float(), exact_gradient, atol=0.02, rtol=0.02)


def test_block_is_steered_per_image():
    block = randomize(DiTBlock(32, 2))
    x, c = torch.randn(2, 5, 32), torch.randn(2, 32)
    swapped = block(x, c.flip(0))
    assert not torch.allclose(block(x, c), swapped)
    torch.testing.assert_close(block(x.flip(0), c.flip(0)), block(x, c).flip(0))


@pytest.mark.parametrize(("spacing", "gaps"), [("dit", 4), ("article", 3)])
def test_time_embedding_is_sin_then_cos(spacing, gaps):
    """The frequencies of DiT's official code, log(10000) / half apart, and of the article."""
    embedding = TimeEmbedding(16, num_sinusoids=8, spacing=spacing)
    seen = []
    embedding.mlp[0].register_forward_hook(lambda module, args, output: seen.append(args[0]))
    embedding(torch.tensor([3, 700]))
    for row, t in zip(seen[0], (3, 700), strict=True):
        angles = [t * math.exp(-math.log(10000) * i / gaps) for i in range(4)]
        expected = torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles])
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)


def test_positions_differ_and_name_their_row_and_column():
    positions = sincos_positions((4, 4), 16)[0].view(4, 4, 16)
    assert torch.equal(positions[:, 0, :8], positions[:, 0, :8][:1].expand(4, -1))  # first half: the column
    assert torch.equal(positions[0, :, 8:], positions[0, :, 8:][:1].expand(4, -1))  # second half: the row
    assert torch.pdist(positions.view(16, 16)).min() > 0.1


@pytest.mark.parametrize(("name", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_sizes_of_the_paper(name, millions):
    """Table 1 of 2212.09748; there the input is a latent of 32 x 32 x 4 and there are 1000 classes."""
    preset = PRESETS[name]
    with torch.device("meta"):
        model = DiT(32, preset["patch_size"], 4, 1000, preset["hidden_size"], preset["depth"], preset["num_heads"])
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


@pytest.mark.parametrize("sizes", [{"patch_size": 5}, {"hidden_size": 66}, {"num_heads": 3}])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match=str(next(iter(sizes.values())))):
        DiT(**sizes)


def test_recomputed_blocks_have_the_same_gradients():
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([1, 500, 999]), torch.tensor([0, 3, 10])
    model = DiT(8, 2, hidden_size=32, depth=3, num_heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    kept, gradients = [], []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda a, sizes=sizes: sizes.append(a.numel()) or a, lambda a: a):
            output = model(x, t, y)
        output.square().sum().backward()
        kept.append(sum(sizes))
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert kept[1] < kept[0] / 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_plain_numbers_hold_for_all_images():
    """As in a notebook: DiT()(x, 5, 1)."""
    model = randomize(DiT())
    x = torch.randn(3, 1, 28, 28)
    with torch.no_grad():
        expected = model(x, torch.tensor([5, 5, 5]), torch.tensor([1, 1, 1]))
        for t, y in ((5, 1), (torch.tensor(5), torch.tensor([1]))):
            assert torch.equal(model(x, t, y), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_images_of_integers_are_refused(dtype):
    with pytest.raises(TypeError, match="floats in"):
        DiT()(torch.zeros(1, 1, 28, 28, dtype=dtype), 5, 1)


@pytest.mark.parametrize(("size", "patch"), [((6, 8), (2, 4)), ((4, 6, 8), (2, 3, 4)), ((12,), (3,)), ((8, 4), (8, 1))])
def test_patchify_on_any_grid(size, patch):
    """Against slices: patch number i holds what lies at its place, channels last."""
    x = torch.randn(2, 3, *size)
    grid = [s // p for s, p in zip(size, patch, strict=True)]
    patches = patchify(x, patch)
    for i, place in enumerate(itertools.product(*map(range, grid))):
        window = tuple(slice(k * p, (k + 1) * p) for k, p in zip(place, patch, strict=True))
        assert torch.equal(patches[:, i], x[(slice(None), slice(None), *window)].movedim(1, -1).reshape(2, -1))
    assert torch.equal(unpatchify(patches, patch, grid), x)


def test_positions_on_any_grid():
    """Each axis has its own channels, the last axis first; what is left over is zero."""
    frames, rows, columns = 2, 3, 4
    positions = sincos_positions((frames, rows, columns), 32)[0].view(frames, rows, columns, 32)
    for axis, channels in enumerate([slice(20, 30), slice(10, 20), slice(0, 10)]):
        first = positions.select(axis, 0)
        assert not torch.equal(first, positions.select(axis, 1))
        changed = (positions.select(axis, 1) != first).any(dim=1).any(dim=0)
        assert changed[channels].any() and not changed.clone().index_fill_(0, torch.arange(32)[channels], 0).any()
    assert not positions[..., 30:].any()
    assert torch.pdist(positions.reshape(-1, 32)).min() > 0.1


@pytest.mark.parametrize(("size", "patch"), [((28, 20), (7, 5)), ((4, 8, 8), (2, 4, 4))])
def test_images_that_are_not_square_and_clips(size, patch):
    model = randomize(DiT(size, patch, channels=2, hidden_size=32, depth=1, num_heads=2))
    x = torch.randn(2, 2, *size)
    assert model(x, 5, 1).shape == x.shape and model.grid == [s // p for s, p in zip(size, patch, strict=True)]
    assert DiT(8, 2, hidden_size=32, num_heads=2).grid == [4, 4]  # a number stands for a square
    for wrong in ((7, 7), (7, 5, 1), (3, 4)):
        with pytest.raises(ValueError, match="does not divide"):
            DiT((28, 20), wrong)


def test_other_sizes_are_refused():
    model = DiT((8, 12), (2, 4), hidden_size=32, num_heads=2)
    for size in ((8, 16), (6, 12), (12, 8)):
        with pytest.raises(ValueError, match="is not of the input_size"):
            model(torch.zeros(1, 1, *size), 5, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_flops_are_those_of_the_matrix_products(dtype, device):
    """Counted by hand, attention included, whatever computes it; backward twice as many, but for the first layers'
    gradient of their input, which nobody asks for."""
    config = Config(image_size="12x20", patch_size="4x5", channels=3, num_classes=7, hidden_size=24, num_heads=3,
                    depth=2, mlp_ratio=2.5)
    B, N, P, D, M = 5, 12, 60, 24, 60
    block = N * (4 * D * D + 2 * D * M) + 2 * N * N * D + 6 * D * D  # qkv, out, the MLP; attention; the modulation
    forward = 2 * B * (N * P * D + 256 * D + D * D + 2 * block + 2 * D * D + N * D * P)
    with torch.device(device):
        network = config.build_model().to(device, dtype)
        x, t = torch.zeros(B, 3, 12, 20), torch.zeros(B, dtype=torch.long)
    assert flops(lambda: network(x, t, t)) == forward
    assert flops(lambda: network(x, t, t).sum().backward()) == 3 * forward - 2 * B * (N * P * D + 256 * D)


def test_its_command_prints_them_of_the_default_network(call):
    code, out, _ = call(dit)
    assert code == 0 and "1,283,889 parameters, 0.0270 Gflops for an image" in out


def test_on_meta_no_weight_is_computed():
    """Names, shapes and types are there, and the positions, which no file holds, with their values."""
    for network, options in ((DiT, {}), (ClipDiT, dict(input_size=(4, 8, 12), patch_size=(2, 4, 3), rope=True))):
        with torch.device("meta"):
            shapes = network(**options)
        real = network(**options)
        assert [(name, a.shape, a.dtype, a.device.type) for name, a in shapes.named_parameters()] == [
            (name, a.shape, a.dtype, "meta") for name, a in real.named_parameters()]
        assert {name for name, _ in shapes.named_buffers()} == {name for name, _ in real.named_buffers()}
        assert all(torch.equal(a, dict(real.named_buffers())[name]) for name, a in shapes.named_buffers())
