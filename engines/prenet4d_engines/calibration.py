"""The calibration: an ellipticity that was found once and can be used again.

Lens distortion outlives a scan, so a calibration made on one acquisition serves the next ones with
the same camera length and detector. It is one small JSON document that a person can read.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prenet4d_engines.descan import Descan
from prenet4d_engines.errors import CalibrationError
from prenet4d_engines.geometry import Ellipticity

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
    """One sigma; ``None`` where the ellipticity was given, not measured."""
    theta_sigma: Sigma | None = None
    """One sigma, radians."""
    reference_center: tuple[Finite, Finite]
    """``(cy, cx)`` where corrected patterns are centered, pixels."""
    frame_shape: tuple[Side, Side]
    """``(h, w)`` of the frames it was made on, pixels."""
    detector: str = "unknown"
    """The detector it was made on."""
    date: datetime = Field(default_factory=lambda: datetime.now(UTC))
    """When it was made."""
    patterns: Annotated[int, Field(ge=0)] = 0
    """How many patterns were averaged for it."""
    how: str = "prenet4d"
    """How it was found, in words."""
    descan: Descan | None = None
    """How the center drifted over the scan that it was made on; kept on request."""

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
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(key) for key in first["loc"])
    what = f"its {where} is wrong" if where else "it cannot be read"
    return CalibrationError(f"This is not a calibration that can be used: {what}: {first['msg']}.")
