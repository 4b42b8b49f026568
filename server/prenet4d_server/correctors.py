"""One corrector for each acquisition, and what outlives it: networks, calibration, frozen or not.

The networks are loaded once, at start-up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from prenet4d_engines.batch import Float32, PatternCorrector, State
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.config import CorrectorConfig
from prenet4d_engines.errors import EngineError

from prenet4d_server.config import CorrectorSettings
from prenet4d_server.errors import CommandFailed
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

    backend = select(
        settings.backend,
        precision=settings.precision,
        threads=settings.threads,
        engines=settings.engines,
    )
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


class Correction:
    """The corrector of the running acquisition, and the operator's say in it.

    Lens distortion outlives a scan: each acquisition goes on from the last calibration that was
    made on frames of its shape. Used on the pipeline's thread alone.
    """

    def __init__(self, make: CorrectorMaker) -> None:
        self._make = make
        self._corrector: PatternCorrector | None = None
        self._running = False
        self._calibration: Calibration | None = None
        self._frozen = False

    @property
    def corrector(self) -> PatternCorrector:
        """The acquisition's corrector.

        Raises:
            EngineError: this acquisition cannot be corrected.
        """
        if self._corrector is None:
            raise EngineError("there is no corrector for this acquisition")
        return self._corrector

    def begin(self, started: Started) -> None:
        """Make the corrector for an acquisition.

        Raises:
            EngineError: such frames cannot be corrected.
        """
        self._running = True
        self._corrector = None
        corrector = self._make(started)
        known = self._calibration
        if known is not None and known.frame_shape == started.frame_shape:
            corrector.load(known)
            if self._frozen:
                corrector.freeze()
        self._corrector = corrector

    def end(self, state: State | None) -> None:
        """The acquisition is over, its calibration being in this state; a good one is kept."""
        self._running = False
        if self._corrector is not None and state in ("locked", "frozen"):
            self._calibration = self._corrector.calibration()

    def mean(self) -> tuple[Float32, int] | None:
        """The running mean, (h, w), and its number of patterns; ``None`` before the first one."""
        if self._corrector is None:
            return None
        values, averaged = self._corrector.mean()
        return (values, averaged) if averaged else None

    def freeze(self) -> None:
        """Keep the ellipticity as it is, in this acquisition and the next ones."""
        self._existing().freeze()
        self._frozen = True
        self._calibration = self.calibration()

    def unfreeze(self) -> None:
        """Let the ellipticity follow the patterns again."""
        self._existing().unfreeze()
        self._frozen = False

    def recalibrate(self) -> None:
        """Forget the ellipticity and find it anew."""
        self._existing().recalibrate()
        self._calibration = None
        self._frozen = False

    def calibration(self) -> Calibration:
        """The calibration in use, or to be used in the next acquisition."""
        if self._calibration is not None and not self._running:
            return self._calibration
        return self._existing().calibration()

    def load(self, document: object) -> None:
        """Take over a calibration, now and for the acquisitions to come.

        Raises:
            CalibrationError: it is none, or does not fit the frames that are coming in.
        """
        calibration = Calibration.from_document(document)
        if self._corrector is not None and self._running:
            self._corrector.load(calibration)
        self._calibration = calibration

    def _existing(self) -> PatternCorrector:
        if self._corrector is None:
            raise CommandFailed("No acquisition has begun yet: there is nothing to do this to.")
        return self._corrector
