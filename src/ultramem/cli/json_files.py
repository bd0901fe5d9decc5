"""`--json FILE`: checked before the work begins, written whole or not at all."""

import json
import math
import os
from pathlib import Path
from typing import Any

from ultramem.errors import ConfigError
from ultramem.files import staged_file


def check_writable(json_file: Path, example: str) -> None:
    """Raise ConfigError if a file could not be written there.

    Args:
        json_file: what `--json` gave.
        example: a file name for the message.
    """
    if json_file.is_dir():
        raise ConfigError(f"--json {json_file} is a folder: name a file in it, for example {json_file / example}.")
    if not json_file.parent.is_dir():
        raise ConfigError(
            f"--json {json_file}: there is no folder {json_file.parent}. Make it first, or name a file in a folder "
            f"that exists."
        )
    if not os.access(json_file.parent, os.W_OK):
        raise ConfigError(
            f"--json {json_file}: the folder {json_file.parent} cannot be written to. Name a file in another folder, "
            f"or change its permissions."
        )


def write_json(json_file: Path, numbers: Any) -> None:
    """Write nested values, with null for NaN and infinities, which JSON does not have."""
    text = json.dumps(_finite_or_none(numbers), indent=2, allow_nan=False)
    with staged_file(json_file) as stage:
        stage.write_text(text + "\n", encoding="utf-8")


def _finite_or_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite_or_none(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
