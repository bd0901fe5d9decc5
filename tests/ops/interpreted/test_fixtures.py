"""The published fixtures through the Triton kernels: outputs, slots, scores and every gradient."""

from pathlib import Path

import pytest

from ultramem.evaluation.parity import check_fixture
from ultramem.ops import use_backend
from ultramem.ops.triton import tables

FIXTURES = sorted((Path(__file__).parents[2] / "golden").glob("*.safetensors"))


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_fixtures_pass(path, monkeypatch):
    launches = []
    launch = tables.launch
    monkeypatch.setattr(tables, "launch", lambda *args, **kwargs: (launches.append(args[0]), launch(*args, **kwargs)))
    with use_backend("triton"):
        report = check_fixture(path)
    assert not report.failures
    assert tables.bag_kernel in launches
