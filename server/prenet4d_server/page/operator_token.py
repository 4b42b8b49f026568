"""The operator's token: what the settings say, what a file holds, or a new one."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from urllib.parse import quote

from prenet4d_server.config import LEAST_TOKEN
from prenet4d_server.errors import ConfigError


class OperatorToken:
    """What makes whoever shows it an operator.

    Args:
        said: the token itself, where the settings have it.
        file: the file that holds it, where they name one; where there is none, it is made, with a
            new token, for its owner alone to read.

    Raises:
        ConfigError: the file cannot be read or made, or what it holds or was said is no token.
    """

    def __init__(self, said: str | None, file: Path | None) -> None:
        if said is not None and len(said) < LEAST_TOKEN:
            raise ConfigError(
                f"The operator's token has fewer than {LEAST_TOKEN} characters and would be "
                "guessed: give a longer one, or none to have one made."
            )
        self._file, self._said = file, said is not None
        self.secret = said or (_kept(file) if file else secrets.token_urlsafe(16))

    def address(self, url: str) -> str:
        """Where operators open the page: with the token only if it is told nowhere else."""
        if self._file is not None:
            return f"{url}/?token=TOKEN, with the token in {self._file}"
        if self._said:
            return f"{url}/?token=TOKEN, with the token that was set"
        return f"{url}/?token={quote(self.secret)}"


def _kept(file: Path) -> str:
    try:
        return _read(file) if file.exists() else _make(file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"The operator's token in {file} cannot be had: {reason}.") from None


def _read(file: Path) -> str:
    token = file.read_text(encoding="utf-8").strip()
    if len(token) < LEAST_TOKEN or len(token.split()) != 1:
        raise ConfigError(
            f"{file} holds no operator's token: write one word of at least {LEAST_TOKEN} "
            "characters into it, or delete it to have one made."
        )
    return token


def _make(file: Path) -> str:
    token = secrets.token_urlsafe(16)
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as made:
        made.write(token + "\n")
    return token
