"""Values and comments as TOML, for files that a person reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any


def toml_value(value: Any) -> str:
    """Write a boolean, number, text, time or flat list of these; times as UTC."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat()
    # JSON's are TOML's too, but for one character; escaped, others would become two surrogates.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def toml_comment(text: str | None, indent: str = "") -> Iterator[str]:
    """Make lines of comment of a docstring, none where there is no text."""
    for line in (text or "").strip().splitlines():
        yield f"#{indent} {line.strip()}".replace("``", "").rstrip()
