from support.muon import Muon, orthogonalize

import pytest
import torch


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_singular_vectors_stay(shape):
    matrices = torch.randn(3, *shape)
    U, _, V = torch.linalg.svd(matrices, full_matrices=False)
    result = orthogonalize(matrices * 1e3)  # their size does not matter
    turned = U.mT @ result @ V.mT  # in the matrices' own singular vectors: diagonal
    assert (turned - torch.diag_embed(turned.diagonal(dim1=1, dim2=2))).abs().max() < 1e-3
    assert orthogonalize(torch.zeros(1, 3, 5)).eq(0).all()


@pytest.mark.parametrize("shape", [(256, 256), (128, 384), (384, 128)])
def test_singular_values_come_near_one_but_for_the_smallest(shape):
    """What the docstring says, of all singular values; of square matrices a tenth are too small."""
    matrices = torch.randn(2, *shape)
    shares = torch.linalg.svdvals(matrices.double()) / matrices.double().norm(dim=(1, 2))[:, None]
    values = torch.linalg.svdvals(orthogonalize(matrices * 1e-2)).double()
    near, small = values[shares > 0.006], shares < 0.005
    assert near.min() > 0.68 and near.max() < 1.21
    assert (small.double().mean() > 0.03) == (shape[0] == shape[1])
    assert values.gather(1, values.argsort(descending=True))[small].lt(0.68).all()
    moved = shares
    for _ in range(4):
        moved = 3.4445 * moved - 4.7750 * moved**3 + 2.0315 * moved**5
    torch.testing.assert_close(values, moved.sort(descending=True).values, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-3)])
def test_steps_are_those_of_torch(dtype, tolerance, monkeypatch):
    """Against torch's own Muon, on a few steps of a quadratic problem. It casts to bfloat16 by itself, where the order
    of a sum shows: without that cast both are the same."""
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor)
    shapes = [(16, 8), (8, 8), (16, 8), (8, 24), (24, 8), (8, 24)]
    start, goal = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    results = []
    for make in (lambda p: Muon(p, lr=0.02, weight_decay=0.1, dtype=dtype),
                 lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.1, ns_steps=4, adjust_lr_fn="match_rms_adamw")):
        weights = [weight.clone().requires_grad_() for weight in start]
        optimizer = make(weights)
        for _ in range(5):
            optimizer.zero_grad()
            sum(((weight - target) ** 2).sum() for weight, target in zip(weights, goal, strict=True)).backward()
            optimizer.step()
        results.append(torch.cat([(weight - before).flatten() for weight, before in zip(weights, start, strict=True)]))
    ours, theirs = results
    assert (ours - theirs).norm() < tolerance * theirs.norm() and theirs.norm() > 0.1


def test_bfloat16_is_as_good():
    matrices = torch.randn(2, 32, 48)
    torch.testing.assert_close(orthogonalize(matrices.bfloat16()).float(), orthogonalize(matrices), atol=0.05, rtol=0)
