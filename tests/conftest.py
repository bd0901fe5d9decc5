"""What all tests share: a seeded generator, property tests that repeat, uninitialised memory that bites."""

import pytest
import torch
from hypothesis import settings

from ultramem.ops import use_backend

# Tests time out by their suite, not by example: the first example of a test compiles and imports.
settings.register_profile("ultramem", deadline=None, derandomize=True, database=None, max_examples=25)
settings.load_profile("ultramem")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(params=["auto", "reference"])
def backend(request):
    """Run a test's operators on kernels where they can run, then on the plain PyTorch reference."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def fresh_compiler():
    """Forget compiled functions: a few recompilations of one function are the compiler's limit."""
    torch.compiler.reset()


@pytest.fixture
def poisoned_memory():
    """Fill what `torch.empty` returns with NaN (integers: the largest), so that a forgotten element shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
