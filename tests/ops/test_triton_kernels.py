"""The Triton kernels: run by Triton's interpreter, compiled for an H100 without one, and refused where they cannot run.

The interpreter is chosen when triton is imported, so that what it runs lies in `interpreted/` and runs in a process of
its own, here as in `TRITON_INTERPRET=1 pytest tests/ops/interpreted`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).with_name("interpreted")


def run_interpreted(name):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # A worker's own settings are not the child's.
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", str(INTERPRETED / name)],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]


@pytest.mark.parametrize("name", ["test_tables.py", "test_search.py"])
def test_interpreted_kernels(name):
    run_interpreted(name)


@pytest.mark.slow
def test_published_fixtures_through_interpreted_kernels():
    run_interpreted("test_fixtures.py")
