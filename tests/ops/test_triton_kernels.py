"""The Triton kernels: run by Triton's interpreter, compiled for an H100 without one, and refused where they cannot run.

The interpreter is chosen when triton is imported, so that what it runs lies in `interpreted/` and runs in a process of
its own, here as in `TRITON_INTERPRET=1 pytest tests/ops/interpreted`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ultramem.errors import BackendError
from ultramem.ops import gather_dot
from ultramem.ops import triton as triton_backend
from ultramem.ops.triton import search_kernels, table_kernels
from ultramem.ops.triton.launch import untuned

INTERPRETED = Path(__file__).with_name("interpreted")


def run_interpreted(*names, options=()):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    # A worker's own settings are not the child's.
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    files = [str(INTERPRETED / name) for name in names]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *files, *options],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-10000:] + result.stderr[-2000:]


def test_interpreted_kernels():
    # One process: importing takes it as long as half of these tests.
    run_interpreted("test_tables.py", "test_search.py")


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["ultramem_v2", "not ultramem_v2"])
def test_published_fixtures_through_interpreted_kernels(selection):
    run_interpreted("test_fixtures.py", options=("-k", selection))


def test_cpu_tensors_are_refused_outside_the_interpreter():
    assert not triton_backend.interpreted()
    idx, table = torch.zeros(2, 1, dtype=torch.int64), torch.ones(3, 4)
    text = (
        r"gather_dot: backend 'triton' was asked for but cannot run: its kernels are for cuda tensors, these are on "
        r"cpu \(tests: set TRITON_INTERPRET=1 before python starts\)\. .*'reference'"
    )
    with pytest.raises(BackendError, match=text):
        gather_dot(idx, table[:2], table, backend="triton")


def test_what_is_in_the_way_is_named(monkeypatch):
    why = triton_backend.why_unavailable.__wrapped__
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device is to be had" in why()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert why() == "Tesla T4 has compute capability 7.5 and the kernels need 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert why() is None
    monkeypatch.setitem(sys.modules, "triton.language", None)
    monkeypatch.setattr(triton_backend, "_import_error", triton_backend._import_error.__wrapped__)
    assert re.match(r"triton cannot be imported \(.*\); pip install 'ultramem\[triton\]'", why())


def compilations(every_tiling):
    """Kernels with the types of their pointers and their constants, as the operators start them."""
    half, single, index = "*bf16", "*fp32", "*i64"
    shape = {"HAS_BLOCKS": False, "FEW_TOKENS": False}
    lookup = {"idx_ptr": index, "w_ptr": single, "x_ptr": half, "table_ptr": half, "block_ptr": None}
    for dtype, has_blocks in [("*bf16", True), ("*bf16", False), ("*fp16", False), ("*fp32", True)][
        : 4 if every_tiling else 1
    ]:
        tables = {**lookup, "x_ptr": dtype, "table_ptr": dtype, "block_ptr": index if has_blocks else None}
        constants = {**shape, "HAS_BLOCKS": has_blocks}
        yield table_kernels.gather_dot_kernel, {**tables, "out_ptr": dtype}, constants
        yield table_kernels.bag_kernel, {**tables, "out_ptr": dtype}, constants
        sums = {**tables, "row_ptr": "*i32", "entry_ptr": index, "out_ptr": single, "partial_ptr": single}
        yield table_kernels.segment_sum_kernel, sums, {**constants, "CHUNK": 256}
    partials = {"row_ptr": "*i32", "out_ptr": single, "partial_ptr": single}
    yield table_kernels.add_partials_kernel, partials, {"CHUNK": 256, "BLOCK_P": 16, "BLOCK_V": 128}
    optional = ["cores_ptr", "core_ptr", "row_direction_ptr", "col_direction_ptr"]
    names = ["row_ptr", "col_ptr", "scores_ptr", *optional]
    for has_cores in (True, False):
        types = dict.fromkeys(names, single) | {"found_ptr": "*i32", "slots_ptr": index, "keys_ptr": "*i32"}
        if not has_cores:
            types |= dict.fromkeys(optional)
        yield search_kernels.coarse_kernel, types, {"HAS_DIRECTIONS": has_cores, "BLOCK_S": 512}
        yield search_kernels.pairs_kernel, types, {"HAS_CORES": has_cores, "BLOCK_M": 128 if every_tiling else 32}
        yield search_kernels.rank_kernel, types, {"HAS_CORES": has_cores, "BLOCK_K": 1024 if every_tiling else 32}
    yield search_kernels.put_keys_kernel, {"grad_ptr": single, "keys_ptr": index, "out_ptr": single}, {}


def compile_for_h100(kernel, types, constants, tiling):
    """Machine code of one kernel in one tiling, with sizes that are multiples of 16, as in a real model."""
    function = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
    constants = {**constants, **(tiling.kwargs if tiling else {})}
    signature, attributes = {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants or types.get(name, "") is None:
            signature[name] = "constexpr"
            constants.setdefault(name, None)
        else:
            signature[name] = types.get(name, "i32")
            if name.endswith("_ptr") or name in ("slice_width", "width"):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        function, signature, {name: value for name, value in constants.items() if name in signature}, attributes
    )
    options = {"num_warps": tiling.num_warps if tiling else 4}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def check_compiles(every_tiling):
    for kernel, types, constants in compilations(every_tiling):
        tilings = [None]
        if hasattr(kernel, "configs"):
            first = untuned(kernel, constants)
            fitting = (
                kernel.early_config_prune(kernel.configs, {}, **constants)
                if kernel.early_config_prune
                else kernel.configs
            )
            tilings = fitting if every_tiling else [first]
        for tiling in tilings:
            compiled = compile_for_h100(kernel, types, constants, tiling)
            assert compiled.asm["cubin"]
            if kernel in (table_kernels.gather_dot_kernel, table_kernels.bag_kernel):
                # Rows come 16 bytes a thread: narrower loads would miss the bandwidth.
                assert "ld.global.v4.b32" in compiled.asm["ptx"], (kernel.base_fn.__name__, tiling)


def test_kernels_compile_for_an_h100_without_one():
    check_compiles(every_tiling=False)


@pytest.mark.slow
def test_every_tiling_compiles_for_an_h100_without_one():
    check_compiles(every_tiling=True)
