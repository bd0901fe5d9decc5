import subprocess
import sys

import pytest

import ultramem
from ultramem import cli
from ultramem.errors import UltraMemError


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "ultramem.cli", *arguments], capture_output=True, text=True, timeout=120
    )


def test_help_lists_the_verbs_and_imports_nothing_heavy():
    script = (
        "import sys; from ultramem.cli import app; from typer.testing import CliRunner\n"
        "print(CliRunner().invoke(app, ['--help']).output)\n"
        "print('HEAVY', sorted({'olmo_core', 'datasets', 'matplotlib', 'tensorboard'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    for verb in ("data", "train", "eval", "generate", "info", "parity", "plot"):
        assert f" {verb} " in output
    assert "HEAVY []" in output


def test_version(invoke):
    assert invoke("--version").output == f"ultramem {ultramem.__version__}\n"


def test_an_error_for_the_user_is_one_line_and_status_2(tmp_path):
    result = run("info", str(tmp_path / "absent"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'absent'} does not exist; expected a model folder")


def test_a_wrong_option_is_explained(invoke):
    result = invoke("generate", "somewhere", "--prompt", "x", "--temprature", "1")
    assert result.exit_code == 2
    assert "--temprature" in result.output


@pytest.mark.parametrize(
    ("raised", "status", "shown"),
    [
        (UltraMemError("first line\n  [second] line"), 2, "Error: first line [second] line\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_status_and_text_of_what_a_verb_raises(monkeypatch, capsys, raised, status, shown):
    def fail(**_):
        raise raised

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == status
    assert capsys.readouterr().err == shown


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch):
    def fail(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main()
