"""What the page's process is told by who starts it; light, for the service reads it too."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from prenet4d_server.config import LogSettings


class ServiceAddress(BaseModel):
    """How to reach the service."""

    model_config = ConfigDict(frozen=True)

    stream: str
    control: str
    server_key: str | None = None
    """Its public CURVE key, where it has one."""
    client_keys: tuple[str, str] | None = None
    """CURVE keys ``(public, secret)`` that the service knows an operator by."""


class PageSettings(BaseModel):
    """What to show, and who may command."""

    model_config = ConfigDict(frozen=True)

    service: ServiceAddress
    operator_token: str | None = None
    """Who shows it may command; ``None``: nobody may."""
    updates_per_second: float = 2.0
    gives_way: bool = False
    """Whether the process runs only while nobody else wants the processor."""
    log: LogSettings = LogSettings()
