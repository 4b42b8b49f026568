"""prenet4d server: the live service.

``Service`` and ``serve`` run it, ``load_settings`` and ``Settings`` say how. The names are imported
when they are first used, so that the ingest process, which needs few of them, stays light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prenet4d_server.config import Settings
    from prenet4d_server.config_file import example_toml, load_settings
    from prenet4d_server.errors import ServiceError
    from prenet4d_server.service import Service, serve
    from prenet4d_server.sockets import generate_keys

__all__ = [
    "Service",
    "ServiceError",
    "Settings",
    "example_toml",
    "generate_keys",
    "load_settings",
    "serve",
]

_HOMES = {
    "Service": "service",
    "ServiceError": "errors",
    "Settings": "config",
    "example_toml": "config_file",
    "generate_keys": "sockets",
    "load_settings": "config_file",
    "serve": "service",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
