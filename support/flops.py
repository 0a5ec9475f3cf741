"""Floating-point operations, counted as torch sees them."""


def flops(call):
    """The floating-point operations of the matrix products in `call()`: 2 M K N where (M, K) meets (K, N)."""
    from torch.nn.attention import SDPBackend, sdpa_kernel  # here, since these take a while to import
    from torch.utils.flop_counter import FlopCounterMode

    # Attention is computed by plain products: torch does not count those in its kernel for CPUs.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()
