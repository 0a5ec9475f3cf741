"""The Muon optimizer, for the matrices within a network (https://kellerjordan.github.io/posts/muon, 2502.16982); and
torch's AdamW, for the rest."""

from collections import defaultdict

import torch

ADAMW_RMS = 0.2  # the root mean square of AdamW's updates, which ours are scaled to


def orthogonalize(matrices, steps=4):
    """Moves the singular values of matrices (K, M, N) to between 0.68 and 1.21, by the quintic Newton-Schulz iteration
    of Muon. Those below 0.006 of a matrix's norm stay smaller: four steps make them up to 141 times as large. Computes
    in the type of `matrices`."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    X = matrices.mT if tall else matrices  # the smaller of X X^T and X^T X
    X = X / X.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # a X + (b A + c A^2) X
    return X.mT if tall else X


def plain(method):
    """A method without the wrapper that keeps torch's compiler away from it. The wrapper imports that compiler, sympy
    and Triton: a second and 120 MB, which a training that compiles nothing does not need."""
    return getattr(method, "__wrapped__", method)


class Plain:
    """The methods of torch's optimizers that are wrapped so; to inherit from first."""

    add_param_group, zero_grad, state_dict, load_state_dict = (plain(getattr(torch.optim.Optimizer, name)) for name in (
        "add_param_group", "zero_grad", "state_dict", "load_state_dict"))


class AdamW(Plain, torch.optim.AdamW):
    step = torch.no_grad()(plain(torch.optim.AdamW.step))


class Muon(Plain, torch.optim.Optimizer):
    """Momentum whose updates are orthogonalized: no direction of a weight matrix learns faster than another.

    params: matrices (M, N), or kernels (M, C, h, w), taken as matrices (M, C h w). An update is scaled to the size of
    AdamW's (2502.16982, equation 4), so that both take the same lr. Matrices of one shape, perhaps once transposed, are
    iterated as one batch.
    dtype: of the iteration. bfloat16 is as good, but slow without bf16 matrix units; torch's own Muon always takes it.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, weight_decay=0.0, dtype=torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            alike = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    alike[tuple(sorted(weight.flatten(1).shape))].append(weight)
            for (_, N), weights in alike.items():
                gradients = [weight.grad.flatten(1) for weight in weights]
                for weight in weights:
                    if not self.state[weight]:
                        self.state[weight]["momentum"] = torch.zeros_like(weight.flatten(1))
                momenta = [self.state[weight]["momentum"] for weight in weights]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                looked_ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
                wide = [matrix if matrix.shape[1] == N else matrix.mT for matrix in looked_ahead]
                updates = orthogonalize(torch.stack(wide).to(self.dtype)).to(weights[0].dtype)
                updates *= ADAMW_RMS * N**0.5 * group["lr"]
                updates = [(update if weight.flatten(1).shape[1] == N else update.mT).reshape(weight.shape)
                           for update, weight in zip(updates, weights, strict=True)]
                if group["weight_decay"]:
                    torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_sub_(weights, updates)


def flatten(network):
    """Lays the parameters of a network out in one tensor, and returns that. They are then parts of it, and what is done
    to all of them is one operation."""
    parameters = list(network.parameters())
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.data = part.view_as(parameter)
    return flat


def split_parameters(network, muon):
    """The parameters of a network in two lists: those for AdamW and, with `muon`, those for Muon: the matrices and
    kernels within the blocks, but for the modulations."""
    lists = [], []
    for name, weight in network.named_parameters():
        lists[muon and "block" in name and weight.ndim > 1 and ".modulation." not in name].append(weight)
    return lists
