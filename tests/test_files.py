import os
import subprocess
import sys

import pytest

from ultramem.files import MARKER_NAME, find_damage, has_checksums, staged_file, staged_folder, write_checksums


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
    output = tmp_path / "out.json"
    output.write_text("old")
    with staged_file(output) as stage:
        stage.write_text("new")
        assert output.read_text() == "old"
    assert output.read_text() == "new"
    assert names(tmp_path) == ["out.json"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_file_stays_after_any_exception(tmp_path, error):
    output = tmp_path / "out.json"
    output.write_text("old")

    def fill():
        with staged_file(output) as stage:
            stage.write_text("half")
            raise error

    with pytest.raises(error):
        fill()
    assert output.read_text() == "old"
    assert names(tmp_path) == ["out.json"]


def test_what_a_killed_process_left_of_a_file_is_written_over(tmp_path):
    (tmp_path / "out.json.tmp").write_text("left over, and longer than what follows")
    with staged_file(tmp_path / "out.json") as stage:
        stage.write_text("new")
    assert (tmp_path / "out.json").read_text() == "new"
    assert names(tmp_path) == ["out.json"]


def test_folder_appears_when_the_block_ends(tmp_path):
    with staged_folder(tmp_path / "deep" / "out") as stage:
        (stage / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert names(tmp_path / "deep") == ["out"]
    assert names(tmp_path / "deep" / "out") == ["file"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_any_exception_leaves_nothing(tmp_path, error):
    def fill():
        with staged_folder(tmp_path / "out") as stage:
            (stage / "file").write_text("x")
            raise error

    with pytest.raises(error):
        fill()
    assert names(tmp_path) == []


def test_old_folder_stays_until_the_new_one_is_complete(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(KeyboardInterrupt), staged_folder(tmp_path / "out"):
        raise KeyboardInterrupt
    assert names(tmp_path / "out") == ["old"]
    with staged_folder(tmp_path / "out") as stage:
        (stage / "new").touch()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["new"]


def test_old_folder_comes_back_when_the_rename_fails(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    stage_path = type(tmp_path)(tmp_path / f"out.partial-{os.getpid()}")
    rename = type(tmp_path).rename

    def failing_rename(self, target):
        if self == stage_path:
            raise OSError("no rename today")
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing_rename)
    with pytest.raises(OSError, match="no rename today"), staged_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_left_overs_of_dead_runs_are_removed_and_nothing_else(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for folder, has_marker in (
        (f"out.partial-{ended.pid}", True),
        (f"out.partial-{os.getppid()}", True),  # still running
        (f"other.partial-{ended.pid}", True),  # of another output
        ("out.partial-mine", True),  # no process number
        (f"out.partial-{ended.pid}0", False),  # not ours
    ):
        (tmp_path / folder).mkdir()
        if has_marker:
            (tmp_path / folder / MARKER_NAME).touch()
    before = names(tmp_path)
    with staged_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == sorted({*before, "out"} - {f"out.partial-{ended.pid}"})


def checked_folder(folder):
    """Two files with checksums, one of them below."""
    (folder / "below").mkdir()
    for name, size in (("a.bin", 100), ("below/b.bin", 9_000_000)):
        (folder / name).write_bytes(os.urandom(size))
    write_checksums(folder, [folder / "a.bin", folder / "below" / "b.bin"])
    return folder


def flip(file, position):
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_undamaged_files_and_folders_without_checksums(tmp_path):
    assert find_damage(tmp_path) == []
    assert not has_checksums(tmp_path)
    folder = checked_folder(tmp_path)
    assert has_checksums(folder)
    assert find_damage(folder) == []
    # What is not in the list may come and go.
    (folder / "notes.txt").write_text("new")
    assert find_damage(folder) == []


@pytest.mark.parametrize("position", [0, 5_000_000, 8_999_999])
def test_every_flipped_bit_is_found(tmp_path, position):
    folder = checked_folder(tmp_path)
    flip(folder / "below" / "b.bin", position)
    assert find_damage(folder) == ["below/b.bin has changed since it was written (its checksum differs)"]


def test_what_is_missing_or_cut_short_and_a_damaged_list(tmp_path):
    folder = checked_folder(tmp_path)
    (folder / "a.bin").unlink()
    os.truncate(folder / "below" / "b.bin", 8_999_999)
    damage = ["a.bin is missing", "below/b.bin has 8,999,999 bytes instead of 9,000,000"]
    assert find_damage(folder) == damage
    assert [find_damage(folder, part, 2) for part in (0, 1)] == [damage[:1], damage[1:]]
    (folder / "checksums.json").write_text('{"a.bin": 3}')
    assert find_damage(folder)[0].startswith("checksums.json cannot be read (")
