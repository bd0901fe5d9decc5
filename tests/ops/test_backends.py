"""Which kernels run: what is asked for, what can run, and what is said when it cannot."""

import importlib.util
import logging
import os
import subprocess
import sys

import pytest
import torch

from ultramem.errors import BackendError
from ultramem.ops import backends, bag, gather_dot, pooled_read, scatter, use_backend
from ultramem.ops.cpu import build

IDX = torch.tensor([[0, 2], [1, 1]])
W, X, TABLE = torch.ones(2, 2), torch.ones(2, 4), torch.arange(12.0).view(3, 4)

# Reads with what can run, twice, then insists on the kernels.
PROGRAM = """
import logging, torch
logging.basicConfig(format="%(levelname)s %(message)s")
from ultramem.errors import BackendError
from ultramem.ops import bag
idx, w, table = torch.tensor([[0, 2]]), torch.ones(1, 2), torch.arange(6.0).view(3, 2)
print(bag(idx, w, table).tolist(), bag(idx, w, table).tolist())
try:
    bag(idx, w, table, backend="cpu")
except BackendError as error:
    print("BackendError", error)
"""


def run_program(program=PROGRAM, **environment):
    """A fresh process, so that kernels are looked for anew; returns (output, logged)."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **{name: str(value) for name, value in environment.items()}},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout, done.stderr


@pytest.fixture
def asked(monkeypatch):
    """What each operator's dispatch was asked for, as (operator, backend)."""
    calls = []

    def record(operator, backend, *tensors, **kwargs):
        calls.append((operator, backend))
        return backends.choose(operator, "reference", *tensors, **kwargs)

    for name in ("bag", "gather_dot", "scatter", "pooled_read"):
        monkeypatch.setattr(sys.modules[f"ultramem.ops.{name}"], "choose", record)
    # Calls past the dispatcher leave nothing to choose.
    monkeypatch.setattr(backends, "_direct", None)
    return calls


def test_an_argument_goes_before_the_surrounding_choice(asked):
    bag(IDX, W, TABLE)
    with use_backend("cpu"):
        bag(IDX, W, TABLE)
        with use_backend("triton"):
            bag(IDX, W, TABLE)
        bag(IDX, W, TABLE, backend="auto")
    bag(IDX, W, TABLE)
    assert [backend for _, backend in asked] == [backends._chosen, "cpu", "triton", "auto", backends._chosen]


def test_the_surrounding_choice_ends_with_an_error(asked):
    with pytest.raises(RuntimeError, match="inside"), use_backend("triton"):
        raise RuntimeError("inside")
    assert backends.requested(None) == backends._chosen != "triton"


def test_every_operator_takes_a_backend(asked):
    gather_dot(IDX, X, TABLE, backend="cpu")
    bag(IDX, W, TABLE, backend="cpu")
    scatter(IDX, W, X, 3, backend="cpu")
    pooled_read(IDX, W, TABLE, X, TABLE, backend="cpu")
    # The fused read's reference is the two others.
    assert [name for name, _ in asked] == ["gather_dot", "bag", "scatter", "pooled_read", "gather_dot", "bag"]
    assert {backend for _, backend in asked} == {"cpu"}


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_run_on_what_the_forward_was_asked_for(asked, compiled, fresh_compiler):
    table, x, w = TABLE.clone().requires_grad_(), X.clone().requires_grad_(), W.clone().requires_grad_()

    def loss():
        return pooled_read(IDX, w, table, x, table).square().sum()

    with use_backend("cpu"):
        total = torch.compile(loss, backend="aot_eager", fullgraph=True)() if compiled else loss()
    total.backward()
    assert {name for name, _ in asked} == {"gather_dot", "bag", "scatter"}
    assert {backend for _, backend in asked} == {"cpu"}


@pytest.mark.parametrize("choose", [lambda: bag(IDX, W, TABLE, backend="gpu"), lambda: use_backend("gpu").__enter__()])
def test_an_unknown_name_is_told(choose):
    with pytest.raises(BackendError, match=r"unknown backend 'gpu': .* take auto, reference, cpu, triton\."):
        choose()


def test_an_unknown_name_in_the_environment_is_told_by_the_first_operator(monkeypatch):
    monkeypatch.setenv("ULTRAMEM_OPS", "gpu")
    spec = importlib.util.spec_from_file_location("imported_anew", backends.__file__)
    imported_anew = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(imported_anew)
    monkeypatch.setattr(backends, "_chosen", imported_anew._chosen)
    with pytest.raises(BackendError, match="unknown backend 'gpu'"):
        bag(IDX, W, TABLE)


@pytest.mark.parametrize(
    ("table", "cause"),
    [
        (TABLE.double(), "float32, bfloat16, the operands are float64, float32"),
        (TABLE.half(), "float32, bfloat16, the operands are float16, float32"),
        (TABLE.to("meta"), "kernels are for cpu tensors, these are on meta"),
    ],
)
def test_kernels_that_were_asked_for_and_do_not_fit_the_operands_raise(table, cause):
    with pytest.raises(BackendError, match=rf"bag: backend 'cpu' was asked for but cannot run: .*{cause}.*'reference'"):
        backends.choose("bag", "cpu", table, W)


def test_an_operator_without_such_kernels_says_so():
    with pytest.raises(BackendError, match="bag has no triton kernel"):
        backends.choose("bag", "triton", TABLE, available=("cpu",))


@pytest.mark.parametrize("table", [TABLE.double(), TABLE.half(), TABLE.to("meta")])
def test_what_kernels_are_not_written_for_goes_to_the_reference_quietly(table, caplog):
    with caplog.at_level(logging.DEBUG):
        assert backends.choose("bag", "auto", table, W) == "reference"
    assert not caplog.records


def test_without_a_compiler_everything_works_and_one_reason_is_logged(tmp_path):
    out, logged = run_program(PATH=tmp_path, TORCH_EXTENSIONS_DIR=tmp_path, ULTRAMEM_OPS="auto")
    first, second = out.splitlines()
    assert first == "[[4.0, 6.0]] [[4.0, 6.0]]"
    assert logged.count("WARNING") == logged.count("plain PyTorch reference") == 1
    assert "there is no C++ compiler" in logged
    assert "install g++" in logged
    assert second.startswith("BackendError bag: backend 'cpu' was asked for but cannot run: the C++ kernels cannot be")


@pytest.fixture
def read_anew(monkeypatch, caplog):
    """Read twice by what can run, looking for kernels anew with such an environment; returns what was logged."""

    def read(**environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        for module, name in ((build, "_answer"), (build, "_loaded"), (backends, "_reasons"), (backends, "_logged")):
            monkeypatch.setattr(module, name, type(getattr(module, name))())
        monkeypatch.setattr(backends, "_direct", None)
        with use_backend("auto"):
            for _ in range(2):
                assert bag(IDX, W, TABLE).tolist() == [[8.0, 10.0, 12.0, 14.0]] * 2
        (record,) = caplog.records
        return record.getMessage()

    return read


def test_a_failed_build_is_told_in_the_compilers_first_error(read_anew, tmp_path):
    compiler = tmp_path / "broken-c++"
    compiler.write_text(
        "#!/bin/sh\ncase \"$*\" in *' -c '*) echo 'common.h:1: error: no such luck' >&2; exit 1;; esac\n"
        'exec c++ "$@"\n'
    )
    compiler.chmod(0o755)
    logged = read_anew(CXX=compiler, TORCH_EXTENSIONS_DIR=tmp_path / "built")
    assert "cannot be built: common.h:1: error: no such luck" in logged
    assert not [path for path in (tmp_path / "built").iterdir() if path.is_dir()], "a failed build left its folder"


def test_a_folder_that_cannot_be_written_is_told(read_anew, tmp_path):
    (tmp_path / "file").write_text("")
    assert "the C++ kernels cannot be built or loaded" in read_anew(TORCH_EXTENSIONS_DIR=tmp_path / "file")


@pytest.mark.slow
def test_two_processes_build_at_once_and_a_third_loads(tmp_path):
    program = "from ultramem.ops.cpu import why_unavailable; print(why_unavailable())"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in both] == ["None", "None"]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    # What is built needs no compiler any more.
    out, _ = run_program(program, TORCH_EXTENSIONS_DIR=tmp_path, PATH="")
    assert out.strip() == "None"
