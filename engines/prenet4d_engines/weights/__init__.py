"""The weights that ship with the package: safetensors, each beside its model card (JSON).

A card says what the network was trained on, how long and where, what it reached and where its
limits are; it also carries the SHA-256 that `load` checks before a single value is used.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from prenet4d_engines.errors import WeightsError

if TYPE_CHECKING:
    from torch import nn

Name = Literal["denoise", "center", "refine", "ellipse"]
NAMES: Final[tuple[Name, ...]] = ("denoise", "center", "refine", "ellipse")
FOLDER: Final = Path(__file__).parent


def card(name: Name, folder: Path = FOLDER) -> dict[str, Any]:
    """Return the model card of a network.

    Raises:
        WeightsError: There is no such network, or its card is missing or unreadable.
    """
    if name not in NAMES:
        raise WeightsError(f"There are no weights {name!r}. Choose one of {', '.join(NAMES)}.")
    path = folder / f"{name}.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")  # noqa: TRY004, TRY301 - as for any damage
    except (OSError, ValueError) as error:
        raise WeightsError(f"The model card {path} cannot be read: {error}.") from error
    return found


def untrained(name: Name) -> nn.Module:
    """Return a network as it is before training: train mode, CPU, float32."""
    from prenet4d_engines.models import CenterNet, Denoiser, EllipseNet, RefineNet

    networks: dict[Name, type[nn.Module]] = {
        "denoise": Denoiser,
        "center": CenterNet,
        "refine": RefineNet,
        "ellipse": EllipseNet,
    }
    return networks[name]()


def load(name: Name, folder: Path = FOLDER) -> nn.Module:
    """Return a network with its shipped weights: eval mode, CPU, float32.

    Args:
        name: "denoise", "center", "refine" or "ellipse".
        folder: Where the weights and their card are; by default those of the package.

    Raises:
        WeightsError: The weights are missing, differ from their card's SHA-256, or do not fit
            the network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as parse

    expected = card(name, folder).get("sha256")
    path = folder / f"{name}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"The weights {path} cannot be read: {error}.") from error
    if hashlib.sha256(data).hexdigest() != expected:
        raise WeightsError(
            f"The weights {path} are not those that their model card describes. Reinstall "
            "prenet4d, or ship them again with their card."
        )
    network = untrained(name)
    try:
        network.load_state_dict(parse(data))
    except (SafetensorError, RuntimeError) as error:
        raise WeightsError(f"The weights {path} do not fit the network: {error}.") from error
    return network.eval()


__all__ = ["NAMES", "Name", "card", "load", "untrained"]
