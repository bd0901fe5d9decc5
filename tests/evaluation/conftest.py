"""The models that evaluation is tested with: one of transformers' own and ours."""

import pytest

from tiny_models import tiny_llama, tiny_ultramem


@pytest.fixture(params=[tiny_llama, tiny_ultramem])
def make_model(request):
    """Function from vocabulary size to a model."""
    return request.param
