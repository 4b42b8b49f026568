"""Making a corrector for each acquisition; the networks are loaded once, at start-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from prenet4d_engines.batch import PatternCorrector
from prenet4d_engines.config import CorrectorConfig

from prenet4d_server.config import CorrectorSettings
from prenet4d_server.notices import Started

CorrectorMaker: TypeAlias = Callable[[Started], PatternCorrector]


def load_correctors(settings: CorrectorSettings) -> tuple[str, CorrectorMaker]:
    """Load what corrects patterns.

    Returns:
        What it is and where it runs, in a sentence, and a function that makes the corrector for an
        acquisition. torch is imported only where something is to be corrected.

    Raises:
        EngineError: the backend or precision that was asked for does not run here.
    """
    if settings.backend == "identity":
        from prenet4d_engines.identity import IdentityCorrector

        def pass_on(start: Started) -> PatternCorrector:
            return IdentityCorrector(start.frame_shape)

        return "Nothing is corrected (identity): this measures all but the correction.", pass_on

    from prenet4d_engines.backends import select
    from prenet4d_engines.corrector import Corrector

    backend = select(settings.backend, precision=settings.precision, threads=settings.threads)
    config = CorrectorConfig(**settings.model_dump())

    def correct(start: Started) -> PatternCorrector:
        return Corrector(
            start.frame_shape,
            scan_shape=start.scan_shape,
            pixel_mask=start.pixel_mask,
            gain=start.gain,
            saturation_value=start.saturation_value,
            detector=start.detector,
            config=config,
            backend=backend,
        )

    return backend.description, correct
