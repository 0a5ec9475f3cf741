"""Floating-point operations, counted as torch sees them."""

import math

import torch


def flops(call):
    """The floating-point operations of the matrix products in `call()`: 2 M K N where (M, K) meets (K, N)."""
    from torch.utils.flop_counter import FlopCounterMode  # here, since it takes a while to import

    def attention(products):  # of N x N weights in the kernel that torch does not count
        return lambda shape, *_, **__: 2 * products * math.prod(shape) * shape[-2]  # shape (B, h, N, D/h)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    with FlopCounterMode(display=False, custom_mapping={kernel: attention(2), backward: attention(4)}) as counter:
        call()
    return counter.get_total_flops()
