"""The network of clips: sizes up to its own, and rotary positions."""

import itertools
import math

import pytest
import torch
from test_dit import randomize

from video.dit import ClipDiT, RotaryAttention, rotate, rotations


def test_smaller_inputs_have_the_positions_of_their_corner():
    """A clip of fewer frames, a narrower one: the weights and the places are those of the largest."""
    model = randomize(ClipDiT((4, 8, 12), (2, 4, 4), channels=2, hidden_size=48, depth=2, num_heads=2))
    for size in ((2, 8, 12), (4, 4, 8), (2, 4, 4)):
        small = randomize(ClipDiT(size, (2, 4, 4), 2, hidden_size=48, depth=2, num_heads=2))
        x = torch.randn(3, 2, *size)
        small.load_state_dict(model.state_dict())
        assert torch.equal(model(x, 5, 1), small(x, 5, 1))


def test_an_image_is_a_clip_of_one_frame():
    """Where a patch is deeper than the clip, the last frame fills it up."""
    model = randomize(ClipDiT((4, 8, 8), (2, 4, 4), hidden_size=48, depth=2, num_heads=2))
    image = torch.randn(3, 1, 1, 8, 8)
    assert torch.equal(model(image, 5, 1), model(image.expand(-1, -1, 2, -1, -1), 5, 1)[:, :, :1])
    x = torch.randn(3, 1, 3, 7, 8)
    whole = torch.cat([x, x[:, :, :, -1:]], dim=3)
    whole = torch.cat([whole, whole[:, :, -1:]], dim=2)
    assert torch.equal(model(x, 5, 1), model(whole, 5, 1)[:, :, :3, :7])
    x.requires_grad_()
    model(x, 5, 1).sum().backward()
    assert x.grad.abs().min() > 0


def test_larger_inputs_are_refused():
    model = ClipDiT((4, 8, 8), (2, 4, 4), hidden_size=32, num_heads=2)
    for size in ((6, 8, 8), (5, 8, 8), (4, 8, 12)):
        with pytest.raises(ValueError, match="larger than the input_size"):
            model(torch.zeros(1, 1, *size), 5, 1)


def test_rotary_positions_turn_each_pair():
    """As multiplication by exp(i angle) does; pairs of (i, i + half), the axes' shares one after the other."""
    turns = rotations((3, 4, 5), 16)
    assert turns.shape == (2, 3, 4, 5, 8)
    angles = torch.tensor([2 * 100**-(i / 4) for i in range(4)] + [3 * 100**-(i / 2) for i in range(2)]
                          + [4 * 100**-(i / 2) for i in range(2)])  # of the last patch
    x = torch.randn(2, 3, 60, 16)
    expected = torch.complex(x[:, :, -1, :8], x[:, :, -1, 8:]) * torch.exp(1j * angles)
    torch.testing.assert_close(rotate(x, turns.flatten(1, -2))[:, :, -1],
                               torch.cat([expected.real, expected.imag], dim=-1))


@pytest.mark.parametrize("grid", [(4, 6), (3, 4, 5)])
def test_rotary_attention_sees_distances_alone(grid):
    """A query and a key have the same product wherever they are, if they are as far apart."""
    q, k = torch.randn(2, 1, 1, 1, 16)
    turned_q, turned_k = (rotate(x.expand(1, 1, math.prod(grid), 16), rotations(grid, 16).flatten(1, -2))
                          .view(*grid, 16) for x in (q, k))
    step = (0,) * (len(grid) - 1)
    first = turned_q[(*step, 0)] @ turned_k[(*step, 2)]
    for place in itertools.product(*map(range, grid[:-1])):
        torch.testing.assert_close(turned_q[(*place, 1)] @ turned_k[(*place, 3)], first)
    assert (turned_q[(*step, 0)] @ turned_k[(*step, 3)] - first).abs() > 1e-3


def test_rope_gives_the_network_places():
    """Without positions in its embedding a network cannot tell an image from one with its patches swapped; with rotary
    ones it can. They are no weights, and of a smaller clip those of the corner."""
    x = torch.randn(1, 1, 2, 8, 8)
    swapped = x.flip(2)
    for rope in (False, True):
        model = randomize(ClipDiT((2, 8, 8), (1, 4, 4), hidden_size=32, depth=2, num_heads=2, rope=rope))
        model.patch_embedding.positions.zero_()
        assert torch.allclose(model(swapped, 5, 1), model(x, 5, 1).flip(2), atol=1e-5) != rope
    plain = ClipDiT((2, 8, 8), (1, 4, 4), hidden_size=32, depth=2, num_heads=2)
    assert model.state_dict().keys() == plain.state_dict().keys()
    small = ClipDiT((1, 4, 8), (1, 4, 4), hidden_size=32, depth=2, num_heads=2, rope=True)
    small.load_state_dict(model.state_dict())
    small.patch_embedding.positions.zero_()
    assert torch.equal(model(x[:, :, :1, :4], 5, 1), small(x[:, :, :1, :4], 5, 1))


def test_normalised_queries_and_keys_do_not_depend_on_their_size():
    """But on their scale; and what is small does not blow up."""
    attention, x = RotaryAttention(32, 2, qk_norm=True), torch.randn(2, 6, 32)
    rotation = rotations([2, 3], 16).flatten(1, -2)
    with torch.no_grad():
        attention.qkv.bias[:64] = 0
        before = attention(x, rotation)
        attention.qkv.weight[:64] *= 30
        torch.testing.assert_close(attention(x, rotation), before, rtol=1e-4, atol=1e-5)
        attention.scale.mul_(3)
        assert (attention(x, rotation) - before).abs().max() > 1e-3
        assert attention(torch.zeros(1, 6, 32), rotation).isfinite().all()
