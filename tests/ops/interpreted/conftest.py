"""Tests that Triton's interpreter runs: `tests/ops/test_triton_kernels.py` starts them in processes of their own.

TRITON_INTERPRET must be set before triton is imported, and then holds for the whole process.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
