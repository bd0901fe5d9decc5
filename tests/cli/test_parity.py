import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

from ultramem.cli import main

GOLDEN = Path(__file__).parents[1] / "golden"
FIXTURES = sorted(GOLDEN.glob("*.safetensors"))


def read_base():
    with safe_open(GOLDEN / "ultramem_v2_base.safetensors", "pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.fixture
def wrong(tmp_path):
    """The base fixture with one number of its output changed."""
    settings, tensors = read_base()
    tensors["out.y"][1, 2, 3] += 0.5
    save_file(tensors, tmp_path / "wrong.safetensors", metadata=settings)
    return tmp_path / "wrong.safetensors"


@pytest.fixture
def unknown(tmp_path):
    """The base fixture under the name of a layer that nobody knows."""
    settings, tensors = read_base()
    save_file(tensors, tmp_path / "unknown.safetensors", metadata=settings | {"layer": "ultramem_v9"})
    return tmp_path / "unknown.safetensors"


def test_a_line_per_fixture(invoke):
    result = invoke("parity", *FIXTURES)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [path.name for path in FIXTURES]
    for line in lines:
        name, output, number, gradients, gradient_number, verdict = line.replace(",", "").split()
        assert (output, gradients, verdict) == ("output", "gradients", "ok"), name
        assert 0 < float(number) < 1e-5
        assert 0 < float(gradient_number) < 1e-4


def test_a_failure_is_named_and_the_rest_still_runs(invoke, wrong):
    result = invoke("parity", FIXTURES[0], wrong, FIXTURES[1])
    assert result.exit_code == 1
    first, second, third = result.stdout.splitlines()
    assert first.endswith("ok")
    assert third.endswith("ok")
    assert second.startswith("wrong.safetensors: output 5.00e-01, gradients ")
    assert second.endswith("FAILED: output differs by up to 5.00e-01")
    assert "1 of 3 fixtures failed (pass mark: 1e-5 + 1e-4 relative)." in result.stderr


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("missing.safetensors", "missing.safetensors cannot be read as a safetensors fixture: "),
        ("unknown.safetensors", "unknown.safetensors is no fixture of a layer that is built here: "),
    ],
)
def test_what_is_no_fixture_is_named_and_the_rest_still_runs(invoke, tmp_path, wrong, unknown, name, said):
    result = invoke("parity", FIXTURES[0], tmp_path / name, wrong, FIXTURES[1])
    assert result.exit_code == 2
    first, second, third, fourth = result.stdout.splitlines()
    assert first.endswith("ok")
    assert second.startswith(f"{name}: ERROR: {tmp_path}")
    assert said in second
    assert "Name " in second
    assert "FAILED: output differs" in third
    assert fourth.endswith("ok")
    assert "1 of 4 fixtures failed" in result.stderr
    assert "1 of 4 files could not be compared." in result.stderr


def test_the_help_names_fixtures_that_can_be_compared(invoke):
    assert "tests/golden/*.safetensors" in invoke("parity", "--help").stdout


def test_no_file_at_all_is_a_usage_error(invoke):
    assert invoke("parity").exit_code == 2


def test_the_command_exits_with_2_and_one_line_on_a_missing_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ultramem", "parity", str(tmp_path / "missing.safetensors")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    output = capsys.readouterr()
    (line,) = output.out.splitlines()
    assert line.startswith("missing.safetensors: ERROR: ")
    assert "missing.safetensors cannot be read as a safetensors fixture" in line
    assert output.err == "1 of 1 files could not be compared.\n"
