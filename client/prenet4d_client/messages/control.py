"""Control client ↔ service: commands and their answers."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from prenet4d_client.messages.header import ArrayRule, Header


class ControlRequest(Header):
    """One command to the service."""

    type: Literal["control_request"] = "control_request"
    command: str
    """``status``, ``config``, ``freeze``, ``unfreeze``, ``recalibrate``, ``save_calibration``,
    ``load_calibration``, ``set_reference_center``, ``clear_reference_center``, ``set_detectors``,
    ``clear_detectors``, ``maps``, ``snapshot``, ``start_recording`` or ``stop_recording``."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """``save_calibration`` may take ``descan``, true: with the fit of the descan;
    ``load_calibration`` takes ``calibration``, a map as ``save_calibration`` returned it;
    ``set_reference_center`` takes ``center``, ``[cy, cx]`` in pixels; ``set_detectors`` takes
    ``bright_field_radius``, ``annular_inner`` and ``annular_outer``, in pixels; ``maps`` may take
    ``newer_than``, the publisher and the sequence number of the answer before, and then answers
    without ``values`` if nothing has changed; ``start_recording`` may take ``name``, of the file,
    without folder and suffix."""


class ControlReply(Header):
    """The answer to the request with the same ``sequence``; 0 where the request cannot be read."""

    LAYOUT: ClassVar = {
        "mean": ArrayRule(
            ("float32",),
            ("h", "w"),
            "``snapshot``: the running mean, if there is one.",
            optional=True,
        ),
        "values": ArrayRule(
            ("float32",),
            ("k", "height", "width"),
            "``maps``: the whole maps; ``result`` holds the fields of a ``maps`` message for them, "
            "with the ``sequence`` of the last one that was published. They include that, and may "
            "hold more, which the next one brings again.",
            optional=True,
        ),
    }
    type: Literal["control_reply"] = "control_reply"
    ok: bool
    """Whether it was done."""
    error: str = ""
    """Where it was not: why, in one sentence."""
    result: dict[str, Any] = Field(default_factory=dict)
    """What the command returns. ``status`` and ``snapshot``: what the service is doing; ``config``:
    its settings, by their names in ``prenet4d config``; ``save_calibration``: the calibration;
    ``maps``: see ``values``; ``start_recording`` and ``stop_recording``: what ``status`` has under
    ``recording``; the others: nothing."""
