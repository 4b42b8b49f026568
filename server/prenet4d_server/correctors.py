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
from prenet4d_engines.virtual import DetectorRadii
from prenet4d_server.config import CorrectorSettings
from prenet4d_server.errors import CommandFailed
from prenet4d_server.notices import Started

CorrectorMaker: TypeAlias = Callable[[Started], PatternCorrector]


def load_correctors(
    settings: CorrectorSettings, wants_virtual: Callable[[], bool] = lambda: True
) -> tuple[str, CorrectorMaker]:
    """Load what corrects patterns.

    Args:
        settings: which, and how.
        wants_virtual: whether anybody looks at the scan maps: virtual detectors cost nothing beside
            the networks, but as much as all the rest where nothing is corrected.

    Returns:
        What it is and where it runs, in a sentence, and a function that makes the corrector for an
        acquisition. torch is imported only where something is to be corrected.

    Raises:
        EngineError: the backend or precision that was asked for does not run here.
    """
    if settings.backend == "identity":
        from prenet4d_engines.identity import IdentityCorrector

        def pass_on(start: Started) -> PatternCorrector:
            return IdentityCorrector(
                start.frame_shape, pixel_mask=start.pixel_mask, wants_virtual=wants_virtual
            )

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
    made on frames of its shape. So do the reference center and the detectors that the operator
    chose. Used on the pipeline's thread alone.
    """

    def __init__(self, make: CorrectorMaker, *, center_is_configured: bool = False) -> None:
        """Nothing runs yet.

        Args:
            make: makes the corrector for an acquisition.
            center_is_configured: a calibration that is loaded does not change the reference center.
        """
        self._make = make
        self._center_is_configured = center_is_configured
        self._frame_shape = (0, 0)
        self._center: tuple[tuple[int, int], tuple[float, float]] | None = None  # frames' shape too
        self.detectors: DetectorRadii | None = None
        """Those that the operator chose; ``None``: they are found from the pattern."""
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

    @property
    def state(self) -> State | None:
        """Where the calibration stands; ``None`` before the first acquisition."""
        return None if self._corrector is None else self._corrector.state

    def begin(self, started: Started) -> None:
        """Make the corrector for an acquisition.

        Raises:
            EngineError: such frames cannot be corrected.
        """
        self._running = True
        self._corrector = None
        self._frame_shape = started.frame_shape
        corrector = self._make(started)
        known = self._calibration
        if known is not None and known.frame_shape == started.frame_shape:
            corrector.load(known)
            if self._frozen:
                corrector.freeze()
        if self._center is not None and self._center[0] == started.frame_shape:
            corrector.set_reference_center(self._center[1])
        corrector.set_detectors(self.detectors)
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

    def set_reference_center(self, center: tuple[float, float] | None) -> None:
        """Move centers there in this acquisition and the next ones; ``None``: where they were.

        Raises:
            EngineError: it does not lie on the frame.
        """
        self._existing().set_reference_center(center)
        self._center = None if center is None else (self._frame_shape, center)

    def set_detectors(self, radii: DetectorRadii | None) -> None:
        """Use these virtual detectors now and in the next acquisitions; ``None``: find them."""
        if self._corrector is not None:
            self._corrector.set_detectors(radii)
        self.detectors = radii

    def calibration(self) -> Calibration:
        """The calibration in use, or to be used in the next acquisition."""
        if self._calibration is not None and not self._running:
            return self._calibration
        return self._existing().calibration()

    def load(self, document: object) -> None:
        """Take over a calibration, now and for the acquisitions to come.

        Its reference center comes along, unless the configuration says another.

        Raises:
            CalibrationError: it is none, or does not fit the frames that are coming in.
        """
        calibration = Calibration.from_document(document)
        if self._corrector is not None and self._running:
            self._corrector.load(calibration)
            if not self._center_is_configured:
                self._corrector.set_reference_center(calibration.reference_center)
        self._calibration = calibration
        if not self._center_is_configured:
            self._center = (calibration.frame_shape, calibration.reference_center)

    def _existing(self) -> PatternCorrector:
        if self._corrector is None:
            raise CommandFailed("No acquisition has begun yet: there is nothing to do this to.")
        return self._corrector
