"""Data packages: found where they are installed, fetched where not. A folder of wheels stands in for the index."""

import zipfile
from importlib import metadata

import pytest

from ultramem.data import packages
from ultramem.data.packages import fetched_package_folder
from ultramem.errors import DataError

REQUEST = ("tiny-sets", "1.2", "tiny_sets", ("tiny_sets/data/",), 1000)


@pytest.fixture(autouse=True)
def index(tmp_path, monkeypatch):
    """The folder where pip finds packages; the cache is in a folder of its own."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def wheel(index):
    path = index / "tiny_sets-1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_sets/data/rows.txt", "1 2 3")
        archive.writestr("tiny_sets/large/rows.txt", "4 5 6")
        about = "tiny_sets-1.2.dist-info"
        archive.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-sets\nVersion: 1.2\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


def test_fetched_once_and_only_what_is_wanted(wheel, tmp_path):
    folder = fetched_package_folder(*REQUEST)
    assert folder == (tmp_path / "cache" / "ultramem" / "tiny-sets-1.2" / "tiny_sets").resolve()
    files = [path.relative_to(folder.parent).as_posix() for path in folder.parent.rglob("*") if path.is_file()]
    assert files == ["tiny_sets/data/rows.txt"]
    assert (folder / "data" / "rows.txt").read_text() == "1 2 3"
    wheel.unlink()
    assert fetched_package_folder(*REQUEST) == folder
    assert {path.name for path in folder.parents[1].iterdir()} == {".lock", "tiny-sets-1.2"}


def test_what_cannot_be_fetched_is_said(tmp_path):
    with pytest.raises(
        DataError, match=r"tiny-sets==1.2, which holds the data, is not installed and cannot be"
    ) as error:
        fetched_package_folder(*REQUEST)
    assert "No matching distribution found for tiny-sets==1.2" in str(error.value)
    assert "install it yourself: pip install --no-deps tiny-sets==1.2" in str(error.value)
    assert [path.name for path in (tmp_path / "cache" / "ultramem").iterdir()] == [".lock"]


def test_an_installed_package_is_taken_in_the_right_version_only(wheel, monkeypatch):
    version = metadata.version("numpy")
    installed = fetched_package_folder("numpy", version, "numpy", (), 0)
    assert (installed / "__init__.py").is_file()
    monkeypatch.setattr(packages, "_installed_version", lambda _: "1.1")
    assert "tiny-sets-1.2" in str(fetched_package_folder(*REQUEST))


@pytest.mark.usefixtures("wheel")
def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be unpacked into .*tiny-sets-1.2 .*XDG_CACHE_HOME"):
        fetched_package_folder(*REQUEST)
