"""What can be set about the correction, with its default; the service's settings contain this."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0)]


class CorrectorConfig(BaseModel):
    """Settings of the corrector."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    center_mode: Literal["tracked", "single"] = "tracked"
    """Which center is applied: ``tracked`` over the scan, or each frame's own."""
    reference_center: tuple[float, float] | None = None
    """``(cy, cx)`` in pixels where centers are moved to; unset: the middle of the frame."""
    min_dose: Annotated[float, Field(ge=0)] = 100.0
    """Frames with fewer electrons are flagged ``LOW_DOSE``."""
    min_beam_probability: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Frames in which the network sees a usable beam with less probability are ``NO_BEAM``."""
    ellipse_every: Count = 64
    """Patterns between two readings of the ellipticity; they form one window."""
    patterns_to_lock: Count = 256
    """Patterns to average before the calibration may be called locked."""
    averaging_window: Count = 1024
    """Patterns that the running mean remembers; older ones fade out."""
    max_ellipse_sigma: Positive = 0.03
    """Readings with a larger sigma of ln(ratio) are not applied."""
    lock_sigma: Positive = 0.01
    """Sigma of ln(ratio), and change between two readings, below which the calibration locks."""
    lost_after: Count = 3
    """Windows in a row that must contradict a locked calibration, or show no beam, to lose it."""
    backend: Literal["auto", "tensorrt", "torch"] = "auto"
    """What runs the networks; ``auto`` takes the best that works here and says why."""
    engines: Path | None = None
    """Folder of the TensorRT engines; unset: ``prenet4d/engines`` in the user's cache folder."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic inside the networks; ``auto``: the fastest that agrees with float32 here."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads, each for frames of its own; unset: one for each core. Every GPU is used."""

    cpu_fallback: bool = False
    """When a GPU fails in the middle of a scan and does not come back: true: the CPU goes on, many
    times slower. false: the frames that follow are rejected."""

    @model_validator(mode="after")
    def _can_lock(self) -> Self:
        if self.averaging_window < self.patterns_to_lock:
            raise ValueError(
                f"averaging_window ({self.averaging_window}) must be at least patterns_to_lock "
                f"({self.patterns_to_lock}), or the calibration can never lock."
            )
        return self
