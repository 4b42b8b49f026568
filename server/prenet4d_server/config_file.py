"""Settings read from a TOML file, the environment and flags; and an example of such a file.

What is said later wins: defaults, then the TOML file, then environment variables
(``PRENET4D_SOURCE__KIND=dectris2``: section and field joined by two underscores), then what the
caller passes (the command line's flags).
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ByteSize, ValidationError
from pydantic_settings import SettingsError

from prenet4d_engines.toml_text import toml_comment, toml_value
from prenet4d_server.config import ENVIRONMENT_PREFIX, FILE, Settings
from prenet4d_server.errors import ConfigError


def load_settings(path: Path | str | None = None, **sections: Any) -> Settings:
    """Read the settings from a TOML file, the environment and keyword arguments; later ones win.

    Args:
        path: a TOML file laid out as :func:`example_toml` shows.
        sections: ``source={"kind": "native"}``, …: only what is to be changed.

    Raises:
        ConfigError: the file cannot be read, or something in it, in the environment or in
            ``sections`` is unknown or makes no sense; the message names it.
    """
    _refuse_unknown_environment()
    try:
        return Settings(**{FILE: _read_toml(path) if path else {}, **sections})
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None
    except SettingsError as error:  # a section as a whole, which is JSON and no name or number
        raise ConfigError(
            f"The environment cannot be read: {error}. Set one value at a time, with two "
            f"underscores: {ENVIRONMENT_PREFIX}SOURCE__KIND=native."
        ) from None


def _read_toml(path: Path | str) -> dict[str, Any]:
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"The configuration {path} cannot be read: {error.strerror}.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"The configuration {path} is not valid TOML: {error}.") from None


def _refuse_unknown_environment() -> None:
    """A misspelled section would otherwise be ignored in silence, as pydantic-settings has it."""
    for name in os.environ:
        if name.startswith(ENVIRONMENT_PREFIX):
            section = name.removeprefix(ENVIRONMENT_PREFIX).split("__")[0].lower()
            if section not in Settings.model_fields:
                raise ConfigError(
                    f"The environment variable {name} sets an unknown section {section!r}."
                    + _did_you_mean(section, Settings.model_fields)
                )


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, and where."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        *path, key = [str(part) for part in first["loc"]]
        known: Any = Settings
        for part in path:
            known = known.model_fields[part].annotation
        return f"There is no setting {where!r}." + _did_you_mean(key, known.model_fields)
    in_words = _memory_in_words if first["loc"] in _MEMORY else _in_words
    message = in_words(first["type"], first["input"], first.get("ctx", {}))
    message = message or first["msg"].removeprefix("Value error, ")
    return f"{where}: {message}." if where and not message.endswith(".") else message


def _in_words(fault: str, value: Any, limits: Mapping[str, Any]) -> str:
    """What pydantic says in a programmer's words; empty where its own will do."""
    kind, _, how = fault.rpartition("_")
    if kind in _NO and how in ("parsing", "type"):
        return f"{value!r} is {_NO[kind]}"
    if fault == "too_short" and isinstance(value, str):
        return f"it has {len(value)} characters, and must have at least {limits['min_length']}"
    return "a value is missing" if fault == "missing" else ""


def _memory_in_words(fault: str, value: Any, limits: Mapping[str, Any]) -> str:
    """The same for an amount of memory, which may be said with a unit."""
    if fault == "greater_than_equal":
        return f"{value!r} is too little: {ByteSize(limits['ge']).human_readable()} is the least"
    if fault == "less_than_equal":
        return f"{value!r} is too much: {ByteSize(limits['le']).human_readable()} is the most"
    return f"{value!r} is no amount of memory: write for example 512MiB"


_NO = {
    "int": "no whole number",
    "float": "no number",
    "bool": "neither true nor false",
    "tuple": "no list: write it in brackets, with commas between its parts",
}
_MEMORY = {
    (section, key)
    for section, field in Settings.model_fields.items()
    for key, inner in getattr(field.annotation, "model_fields", {}).items()
    if inner.annotation is ByteSize
}
"""Where the settings have amounts of memory."""


def _did_you_mean(key: str, known: Mapping[str, Any]) -> str:
    match = difflib.get_close_matches(key, known, n=1)
    return f" Did you mean {match[0]!r}?" if match else f" There are: {', '.join(known)}."


def example_toml() -> str:
    """A commented configuration that holds every setting at its default."""
    top: list[str] = []
    sections: list[str] = []
    for name, field in Settings.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections += ["", *toml_comment(field.annotation.__doc__), f"[{name}]"]
            for key, inner in field.annotation.model_fields.items():
                sections += toml_comment(inner.description, indent="  ")
                sections.append(_assignment(key, inner.get_default(call_default_factory=True)))
        else:
            top += [*toml_comment(field.description), _assignment(name, field.get_default())]
    head = "# Every setting of the prenet4d service, at its default. Delete what you do not change."
    return "\n".join([head, "", *top, *sections]) + "\n"


def _assignment(key: str, value: Any) -> str:
    if value is None:
        return f"# {key} ="
    if isinstance(value, ByteSize):
        return f'{key} = "{value.human_readable()}"'
    if isinstance(value, Path):
        value = str(value)
    return f"{key} = {toml_value(value)}"
