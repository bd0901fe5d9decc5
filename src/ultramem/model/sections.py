"""Settings whose fields depend on their ``type``: memories and FFNs."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, TypeVar

from huggingface_hub.errors import StrictDataclassError

from ultramem.errors import ConfigError

C = TypeVar("C")


def make_section(name: str, what: str, settings: Mapping[str, Any], types: Mapping[str, type[C]]) -> C:
    """Build typed settings from a mapping.

    Args:
        name: the section, for messages.
        what: what it describes, for messages.
        settings: of the section; ``type`` names one of ``types`` and is by default the first.
        types: config class by type.

    Raises:
        ConfigError: an unknown type or field, or a value of the wrong type; names the field and what is allowed.
    """
    kind = settings.get("type", next(iter(types)))
    if kind not in types:
        raise ConfigError(f"{name}.type must be one of {', '.join(types)}; got {kind!r}.")
    allowed = [entry.name for entry in fields(types[kind])]  # type: ignore[arg-type]
    if unknown := sorted(set(settings) - set(allowed)):
        raise ConfigError(
            f"{name}.{unknown[0]} is no setting of {what} of type {kind}; allowed are {', '.join(allowed)}."
        )
    try:
        return types[kind](**settings)
    except StrictDataclassError as error:
        raise ConfigError(f"{name}: {' '.join(str(error).split())}") from None
