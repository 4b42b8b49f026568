"""Where patterns come from: programs, networks and settings, kept with every recording."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from prenet4d_engines import weights
from prenet4d_server.config import Settings

_PACKAGES = ("prenet4d", "numpy", "torch", "tensorrt")
# Who may do what, and where it listens, is nobody's business who reads a recording.
_SECTIONS = {"source", "ring", "batch", "corrector"}


def provenance(settings: Settings, engine: str) -> dict[str, Any]:
    """What the service announces with every acquisition.

    Args:
        settings: the service's; only what can change a pattern is told.
        engine: what corrects and where it runs, in a sentence.

    Returns:
        ``versions`` of programs, ``engine``, ``weights`` (network → SHA-256), ``machine`` and
        ``configuration``.
    """
    corrects = settings.corrector.backend != "identity"
    return {
        "versions": {"python": platform.python_version(), **_versions()},
        "engine": engine,
        "weights": {name: weights.card(name)["sha256"] for name in weights.NAMES}
        if corrects
        else {},
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "configuration": settings.model_dump(mode="json", include=_SECTIONS),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
