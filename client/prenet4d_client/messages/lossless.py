"""Receiver ↔ service: the conversation on the lossless path, besides what is published."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from prenet4d_client.messages.header import Header


class Register(Header):
    """A receiver asks for every message of ``topics`` and grants its first credit.

    Who is registered already begins afresh by it.
    """

    type: Literal["register"] = "register"
    name: Annotated[str, AfterValidator(lambda name: name.strip() or "unnamed")]
    """Who this is, for people to read; where it is empty, ``unnamed``."""
    topics: tuple[str, ...]
    """Message types, from the same list as on the stream."""
    credit: Annotated[int, Field(ge=1)]
    """One credit is one message."""


class Registered(Header):
    """The service's answer to ``register``."""

    type: Literal["registered"] = "registered"
    heartbeat_s: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """Silence longer than this means that the other side is gone; each side sends a heartbeat (or
    anything else) every quarter of it."""


class Credit(Header):
    """The receiver can take ``credit`` more messages."""

    type: Literal["credit"] = "credit"
    credit: Annotated[int, Field(ge=1)]


class Heartbeat(Header):
    """Still here; sent both ways."""

    type: Literal["heartbeat"] = "heartbeat"


class Goodbye(Header):
    """A receiver leaves, or the service drops it: ``reason`` says why."""

    type: Literal["goodbye"] = "goodbye"
    reason: str = ""
