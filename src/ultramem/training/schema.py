"""Raw YAML data against typed dataclasses: unknown keys and bad types are named before anything is built."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable
from enum import Enum
from typing import Any

import torch
import yaml

from ultramem.errors import ConfigError


def parse_overrides(overrides: Iterable[str]) -> list[tuple[str, Any]]:
    """Splits ``a.b=c`` arguments into dotted paths and YAML values.

    Raises:
        ConfigError: an argument without ``=`` or a value that is not YAML.
    """
    parsed = []
    for override in overrides:
        path, separator, text = override.partition("=")
        if not separator or not path.strip():
            raise ConfigError(f"override '{override}' is not of the form section.key=value, e.g. optimizer.lr=0.001")
        try:
            parsed.append((path.strip(), yaml.safe_load(text) if text.strip() else None))
        except yaml.YAMLError as error:
            raise ConfigError(f"override '{override}': the value is not valid YAML ({error})") from error
    return parsed


def set_dotted(data: dict[str, Any], path: str, value: Any) -> None:
    """Sets ``data["a"]["b"] = value`` for the path ``a.b``; a missing or null section on the way is created."""
    *sections, key = path.split(".")
    for depth, section in enumerate(sections):
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise ConfigError(f"override '{path}': '{'.'.join(sections[: depth + 1])}' is a value, not a section")
    data[key] = value


def check_keys(data: dict[str, Any], allowed: Iterable[str], path: str) -> None:
    """Raises a ConfigError for the first key of ``data`` that is not allowed: its full path and the nearest one."""
    allowed = list(allowed)
    for key in data:
        if key in allowed:
            continue
        full_path = f"{path}.{key}" if path else str(key)
        nearest = difflib.get_close_matches(str(key), allowed, n=1, cutoff=0.5)
        prefix = f"{path}." if path else ""
        hint = f"did you mean '{prefix}{nearest[0]}'? " if nearest else ""
        raise ConfigError(f"unknown key '{full_path}': {hint}Allowed here: {', '.join(sorted(allowed))}")


def check_section(data: Any, section: type, path: str = "") -> dict[str, Any]:
    """Checks one section against a dataclass, recursively, and returns it with numbers in their declared type.

    YAML reads ``1e-4`` as text and ``1e10`` as a float; where a number is declared, both become that number.

    Args:
        data: the section as YAML gave it; None stands for an empty section.
        section: a dataclass whose annotations use bool, int, float, str, enums, lists, tuples, dicts, dataclasses and
            unions of these. Other annotations accept any value.
        path: dotted path of the section, for messages.

    Raises:
        ConfigError: an unknown key (names the nearest), or a value of the wrong type (names the field, what was given
            and what is expected).
    """
    data = {} if data is None else data
    if not isinstance(data, dict):
        raise ConfigError(f"'{path}' is a section with keys of its own, but {_describe(data)} was given")
    # transformers' configs mention torch in annotations of modules that import it for type checkers only.
    hints = typing.get_type_hints(section, localns={"torch": torch})
    fields = [field.name for field in dataclasses.fields(section) if field.init and not field.name.startswith("_")]
    check_keys(data, fields, path)
    return {key: _check_value(value, hints[key], f"{path}.{key}" if path else key) for key, value in data.items()}


def _check_value(value: Any, hint: Any, path: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_typing_union(hint) else (hint,)
    if value is None and (type(None) in options or Any in options):
        return None
    for option in options:
        if dataclasses.is_dataclass(option) and (isinstance(value, dict) or value is None):
            return check_section(value, option, path)
    for option in options:
        accepted, converted = _convert(value, option, path)
        if accepted:
            return converted
    expected = " or ".join(_expected(option) for option in options)
    raise ConfigError(f"'{path}' expects {expected}, but {_describe(value)} was given")


def _is_typing_union(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Union


def _convert(value: Any, option: Any, path: str) -> tuple[bool, Any]:
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if option is bool:
        return isinstance(value, bool), value
    if option in (int, float):
        return _convert_number(value, option)
    if option is str:
        return isinstance(value, str), value
    if option is type(None):
        return value is None, None
    if isinstance(option, type) and issubclass(option, Enum):
        names = [member.value for member in option]
        return value in names, option(value) if value in names else None
    if origin is typing.Literal:
        return value in arguments, value
    if option is list or origin is list:
        item = arguments[0] if arguments else Any
        is_list = isinstance(value, list | tuple)
        return is_list, [_check_value(v, item, f"{path}[{i}]") for i, v in enumerate(value)] if is_list else None
    if option is tuple or origin is tuple:
        is_list = isinstance(value, list | tuple) and len(value) == len(arguments)
        pairs = enumerate(zip(value, arguments, strict=True)) if is_list else ()
        return is_list, tuple(_check_value(v, item, f"{path}[{i}]") for i, (v, item) in pairs)
    if option is dict or origin is dict:
        item = arguments[1] if arguments else Any
        is_dict = isinstance(value, dict)
        return is_dict, {str(k): _check_value(v, item, f"{path}.{k}") for k, v in value.items()} if is_dict else None
    if dataclasses.is_dataclass(option):
        return False, None
    return True, value


def _convert_number(value: Any, kind: type) -> tuple[bool, Any]:
    if isinstance(value, bool):
        return False, None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return False, None
    if kind is float and isinstance(value, int | float):
        return True, float(value)
    if kind is int and isinstance(value, int | float) and value == value and abs(value) != float("inf"):
        return int(value) == value, int(value)
    return False, None


def _expected(option: Any) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
    if option in names:
        return names[option]
    if isinstance(option, type) and issubclass(option, Enum):
        return "one of " + ", ".join(str(member.value) for member in option)
    if typing.get_origin(option) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(option)))
    if option is tuple or typing.get_origin(option) is tuple:
        return f"a list of {len(typing.get_args(option))} values"
    if option is list or typing.get_origin(option) is list:
        return "a list"
    is_section = dataclasses.is_dataclass(option) or option is dict or typing.get_origin(option) is dict
    return "a section with keys of its own" if is_section else str(option)


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    kind = {bool: "true/false value", int: "number", float: "number", str: "text", list: "list", dict: "section"}
    return f"the {kind.get(type(value), type(value).__name__)} {value!r}"
