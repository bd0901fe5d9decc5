"""The one table of tolerances: how far two computations of the same numbers may lie apart, by the dtype they ran in."""

import torch

TOLERANCES = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-11},
    # The pass mark of the published fixtures.
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    # Two roundings to eight bits of mantissa.
    torch.bfloat16: {"rtol": 2**-7, "atol": 2**-7},
    # The same to eleven bits.
    torch.float16: {"rtol": 2**-10, "atol": 2**-10},
}


def assert_close(actual, expected, dtype=None):
    """Compare values; ``dtype`` names the precision of the computation where it is not that of ``actual``."""
    torch.testing.assert_close(actual, expected.to(actual.dtype), **TOLERANCES[dtype or actual.dtype])


def assert_bit_equal(actual, expected):
    """Compare dtype, shape and every bit."""
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert torch.equal(actual, expected)
