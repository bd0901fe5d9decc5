"""The measured points of a figure, kept as CSV: each group written as soon as measured, the settings beside."""

import csv
import io
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ultramem.errors import ConfigError
from ultramem.files import staged_file

COLUMNS = (
    "size",
    "sparse_ratio",
    "batch_size",
    "kv_length_tokens",
    "model",
    "active_parameters",
    "total_parameters",
    "flops_per_token",
    "num_runs",
    "median_s",
    "fastest_s",
    "slowest_s",
    "bytes_read",
    "weights_bytes",
    "keys_bytes",
    "embedding_bytes",
    "tables_bytes",
    "experts_bytes",
    "kv_cache_bytes",
    "num_rows",
    "num_experts",
)
_WORDS = ("size", "model")
_FRACTIONS = ("sparse_ratio", "median_s", "fastest_s", "slowest_s")

Point = dict[str, Any]
GroupKey = tuple[str, float, int]


@dataclass
class PointStore:
    """Rows of one figure on disk.

    Attributes:
        file: the CSV.
        points: what it holds.
    """

    file: Path
    points: list[Point] = field(default_factory=list)

    @property
    def groups(self) -> set[GroupKey]:
        """Groups that are there: size, sparse ratio as planned, batch size."""
        return {group_key(point) for point in self.points}

    def add(self, points: list[Point]) -> None:
        """Append a group; it is on the disk when this returns."""
        text = _rows(points)
        with open(self.file, "a", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self.points += points


def group_key(point: Point) -> GroupKey:
    """What the models of a group have in common."""
    return point["size"], point["sparse_ratio"], point["batch_size"]


def open_points(folder: Path, figure: str, settings: dict[str, Any], num_models: int, restart: bool) -> PointStore:
    """Continue what a run before left, or start.

    Args:
        folder: of the figure; made if it is not there.
        figure: name of the files.
        settings: everything that decides the points.
        num_models: points of a complete group; others are dropped.
        restart: begin anew whatever is there.

    Raises:
        ConfigError: points measured with other settings are there, or they cannot be read or written.
    """
    file, settings_file = folder / f"{figure}.csv", folder / f"{figure}.settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        points: list[Point] = []
        if file.exists() and not restart:
            _check_settings(folder, settings_file, settings)
            points = _complete_groups(_read(file), num_models)
        with staged_file(settings_file) as stage:
            stage.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        with staged_file(file) as stage:
            stage.write_text(",".join(COLUMNS) + "\n" + _rows(points), encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot hold the measurements ({error.strerror}): name another folder with --output."
        ) from error
    return PointStore(file, points)


def _check_settings(folder: Path, settings_file: Path, settings: dict[str, Any]) -> None:
    remedy = "Give --restart to measure anew in its place, or another folder with --output."
    try:
        before = json.loads(settings_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(f"{folder} holds measurements whose {settings_file.name} cannot be read. {remedy}") from None
    now = json.loads(json.dumps(settings))
    changed = [
        f"{name} {before.get(name)!r} → {now.get(name)!r}"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise ConfigError(f"{folder} holds measurements of another setting ({'; '.join(changed)}). {remedy}")


def _rows(points: list[Point]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writerows(points)
    return text.getvalue()


def _read(file: Path) -> list[Point]:
    """Points in order; a line that a crash tore ends the list."""
    points = []
    with open(file, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            try:
                points.append({name: _parse(name, row[name]) for name in COLUMNS})
            except (KeyError, TypeError, ValueError):
                break
    return points


def _parse(name: str, cell: str) -> Any:
    return cell if name in _WORDS else float(cell) if name in _FRACTIONS else int(cell)


def _complete_groups(points: list[Point], num_models: int) -> list[Point]:
    counts: dict[GroupKey, int] = {}
    for point in points:
        counts[group_key(point)] = counts.get(group_key(point), 0) + 1
    return [point for point in points if counts[group_key(point)] == num_models]
