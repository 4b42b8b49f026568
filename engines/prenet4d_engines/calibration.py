"""The calibration: an ellipticity that was found once and can be used again.

Lens distortion outlives a scan, so a calibration made on one acquisition serves the next ones with
the same camera length and detector. It is one small document that a person can read; in a file
(``prenet4d_engines.calibration_file``) it is TOML or JSON.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from prenet4d_engines.descan import Descan
from prenet4d_engines.errors import CalibrationError, FrameError
from prenet4d_engines.geometry import Ellipticity, checked_center

Finite = Annotated[float, Field(allow_inf_nan=False)]
Sigma = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Side = Annotated[int, Field(ge=1)]


class Calibration(BaseModel):
    """What a corrector knows about the distortion of one detector."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    version: Literal[1] = 1
    """Of this document's form."""
    ratio: Annotated[float, Field(ge=1, lt=10)]
    """Ellipticity a/b."""
    theta: Annotated[float, Field(ge=0, lt=math.pi)]
    """Direction of the major axis, radians from +x toward +y."""
    ratio_sigma: Sigma | None = None
    """One sigma of the ratio; absent where the ellipticity was given, not measured."""
    theta_sigma: Sigma | None = None
    """One sigma of theta, radians."""
    reference_center: tuple[Finite, Finite]
    """``(cy, cx)`` where corrected patterns are centered, pixels."""
    frame_shape: tuple[Side, Side]
    """``(h, w)`` of the frames it was made on, pixels."""
    detector: str = "unknown"
    """The detector it was made on."""
    date: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    """When it was made."""
    patterns: Annotated[int, Field(ge=0)] = 0
    """How many patterns were averaged for it."""
    how: str = "prenet4d"
    """How it was found, in words."""
    descan: Descan | None = None
    """How the center drifted over the scan that it was made on; kept on request."""

    @model_validator(mode="after")
    def _center_lies_on_the_frame(self) -> Self:
        try:
            checked_center(self.reference_center, self.frame_shape)
        except FrameError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def ellipticity(self) -> Ellipticity:
        """The distortion it stands for."""
        return Ellipticity(self.ratio, self.theta)

    def to_json(self) -> str:
        """Write the calibration as JSON text."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Calibration:
        """Read what :meth:`to_json` wrote.

        Raises:
            CalibrationError: the text is no calibration; the message names the field at fault.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise _explained(error) from None

    @classmethod
    def from_document(cls, document: object) -> Calibration:
        """Read a calibration from plain values, as they come out of JSON, TOML or msgpack.

        Raises:
            CalibrationError: the document is no calibration; the message names the field at fault.
        """
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise _explained(error) from None


def _explained(error: ValidationError) -> CalibrationError:
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(key) for key in first["loc"])
    if where == "version" and isinstance(first["input"], int):
        return CalibrationError(
            f"This is a calibration of version {first['input']}; this prenet4d reads version 1. "
            "Use the prenet4d that made it, or calibrate anew."
        )
    if first["type"] == "missing":
        return CalibrationError(f"This is not a calibration that can be used: it has no {where}.")
    what = f"its {where} is wrong" if where else "it cannot be read"
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    return CalibrationError(f"This is not a calibration that can be used: {what}: {message}.")
