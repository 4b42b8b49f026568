"""Calibrations as files that a person can read: TOML with comments, or JSON; the suffix decides."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from prenet4d_engines.calibration import Calibration
from prenet4d_engines.errors import CalibrationError
from prenet4d_engines.toml_text import toml_comment, toml_value
from prenet4d_engines.whole_file import folder_fault, write_whole

_HEAD = "# A calibration of prenet4d: the ellipticity that it takes out of every pattern."


def write_calibration(
    calibration: Calibration, path: Path | str, *, overwrite: bool = False
) -> None:
    """Write a calibration to a file, at once or not at all.

    Args:
        calibration: what to write.
        path: ends in ``.toml`` or ``.json``.
        overwrite: replace a file that is there.

    Raises:
        CalibrationError: the path has another suffix, its folder is missing or may not be written
            into, or there is a file already.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check_target(path, overwrite=overwrite)
    text = to_toml(calibration) if _suffix(path) == ".toml" else calibration.to_json()
    write_whole(path, text.encode())


def check_target(path: Path, *, overwrite: bool = False) -> None:
    """Tell early whether a calibration can be written there.

    Raises:
        CalibrationError: the path has another suffix, its folder is missing or may not be written
            into, or there is a file already.
    """
    _suffix(path)
    check_free(path, overwrite=overwrite)


def check_free(path: Path, *, overwrite: bool = False) -> None:
    """Tell early whether a file, a calibration or what comes with it, can be written there.

    Raises:
        CalibrationError: its folder is missing or may not be written into, or there is a file
            already.
    """
    if fault := folder_fault(path):
        raise CalibrationError(fault)
    if path.exists() and not overwrite:
        raise CalibrationError(
            f"There is a file {path} already: choose another name, or overwrite it (--overwrite)."
        )


def read_calibration(path: Path | str) -> Calibration:
    """Read what :func:`write_calibration`, or a person, wrote.

    Raises:
        CalibrationError: the file cannot be read, or is no calibration; the message names the file
            and what is wrong with it.
    """
    path = Path(path)
    _suffix(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}.") from None
    return parse_calibration(content, path)


def parse_calibration(content: bytes, path: Path | str) -> Calibration:
    """Read a calibration from what a file of that name holds.

    Raises:
        CalibrationError: it is no calibration; the message names the file and what is wrong.
    """
    path = Path(path)
    toml = _suffix(path) == ".toml"
    try:
        text = content.decode("utf-8-sig")  # some editors begin with the byte order mark
    except UnicodeDecodeError:
        raise CalibrationError(f"{path} is not a calibration: it holds no text.") from None
    try:
        document = tomllib.loads(text) if toml else json.loads(text)
    except (ValueError, RecursionError) as error:  # both parsers' errors are ValueErrors
        kind = "TOML" if toml else "JSON"
        raise CalibrationError(
            f"{path} is not valid {kind}; perhaps it was not written to its end: {error}."
        ) from None
    try:
        return Calibration.from_document(document)
    except CalibrationError as error:
        raise CalibrationError(f"{path}: {error}") from None


def to_toml(calibration: Calibration) -> str:
    """Write a calibration as TOML text, each value under the explanation of it.

    What is ``None`` is left out.
    """
    lines = [_HEAD, ""]
    lines += _assignments(calibration)
    if calibration.descan is not None:
        lines += [*toml_comment(type(calibration).model_fields["descan"].description), "[descan]"]
        lines += _assignments(calibration.descan)
    return "\n".join(lines).rstrip("\n") + "\n"


def _assignments(model: BaseModel) -> Iterator[str]:
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if value is not None and not isinstance(value, BaseModel):
            yield from toml_comment(field.description)
            yield f"{name} = {toml_value(value)}"
            yield ""


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".toml", ".json"):
        raise CalibrationError(
            f"A calibration is kept in a .toml or a .json file; {path.name!r} is neither."
        )
    return suffix
