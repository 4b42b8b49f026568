"""One corrector for each acquisition, and what outlives it: networks, calibration, frozen or not.

The networks are loaded once, at start-up.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_engines.batch import Float32, PatternCorrector, State
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.config import CorrectorConfig
from prenet4d_engines.errors import BackendError, EngineError
from prenet4d_engines.virtual import DetectorRadii
from prenet4d_server.config import CorrectorSettings
from prenet4d_server.errors import CommandFailed
from prenet4d_server.ingest.notices import Started

if TYPE_CHECKING:
    from prenet4d_engines.corrector import Corrector
    from prenet4d_engines.stages import Station

log = logging.getLogger(__name__)
Tell: TypeAlias = Callable[[Literal["warning", "error"], str, str], None]
"""Told of a fault: how bad, a code that stays the same, a sentence."""


class CorrectorMaker(Protocol):
    """Makes the corrector for an acquisition."""

    def __call__(self, start: Started, tell: Tell) -> PatternCorrector:
        """Make it.

        Raises:
            EngineError: such frames cannot be corrected.
        """
        ...

    def pin(self, memory: npt.NDArray[np.uint8]) -> Callable[[], None]:
        """Get memory (n,) that frames will lie in ready for the GPU; return what undoes it."""
        ...


def load_correctors(
    settings: CorrectorSettings, wants_virtual: Callable[[], bool] = lambda: True
) -> tuple[str, CorrectorMaker]:
    """Load what corrects patterns.

    Args:
        settings: which, and how.
        wants_virtual: whether anybody looks at the scan maps: virtual detectors cost nothing beside
            the networks, but as much as all the rest where nothing is corrected.

    Returns:
        What it is and where it runs, in a sentence, and what makes the corrector for an
        acquisition. torch is imported only where something is to be corrected.

    Raises:
        EngineError: the backend or precision that was asked for does not run here.
    """
    if settings.backend == "identity":
        about = "Nothing is corrected (identity): this measures all but the correction."
        return about, _Identities(wants_virtual)
    correctors = _Correctors(settings)
    return correctors.description, correctors


class _Identities:
    def __init__(self, wants_virtual: Callable[[], bool]) -> None:
        self._wants_virtual = wants_virtual

    def __call__(self, start: Started, tell: Tell) -> PatternCorrector:  # noqa: ARG002
        from prenet4d_engines.identity import IdentityCorrector

        return IdentityCorrector(
            start.frame_shape, pixel_mask=start.pixel_mask, wants_virtual=self._wants_virtual
        )

    def pin(self, memory: npt.NDArray[np.uint8]) -> Callable[[], None]:  # noqa: ARG002
        return lambda: None


class _Correctors:
    """The networks, loaded once, on every GPU or on the CPU."""

    def __init__(self, settings: CorrectorSettings) -> None:
        from prenet4d_engines.backends import select_all
        from prenet4d_engines.stages import Station

        fields = settings.model_dump()
        self._config = CorrectorConfig(**fields)
        backends = select_all(
            settings.backend,  # type: ignore[arg-type]  # not identity
            precision=settings.precision,
            threads=settings.threads,
            engines=settings.engines,
        )
        self._stations = [Station(backend) for backend in backends]
        self._on_gpu = backends[0].device.type == "cuda"
        self.description = backends[0].description
        if len(backends) > 1:
            self.description += f" {len(backends)} GPUs take turns."

    def __call__(self, start: Started, tell: Tell) -> PatternCorrector:
        from prenet4d_engines.corrector import Corrector
        from prenet4d_engines.recovery import RecoveringCorrector, cpu_station

        if not self._stations:
            raise BackendError("No GPU works any more: start the service again.")

        def make(stations: Sequence[Station]) -> Corrector:
            return Corrector(
                start.frame_shape,
                scan_shape=start.scan_shape,
                pixel_mask=start.pixel_mask,
                gain=start.gain,
                saturation_value=start.saturation_value,
                detector=start.detector,
                config=self._config,
                stations=stations,
            )

        may_fall_back = self._on_gpu and self._config.cpu_fallback
        return RecoveringCorrector(
            make,
            self._stations,
            fallback=(lambda: cpu_station(self._config.threads)) if may_fall_back else None,
            tell=tell,
        )

    def pin(self, memory: npt.NDArray[np.uint8]) -> Callable[[], None]:
        if not self._on_gpu:
            return lambda: None
        from prenet4d_engines.cuda import pin

        try:
            return pin(memory)
        except BackendError as error:
            log.warning("%s", error)
            return lambda: None


class Correction:
    """The corrector of the running acquisition, and the operator's say in it.

    Lens distortion outlives a scan: each acquisition goes on from the last calibration that was
    made on frames of its shape and not contradicted since, frozen if that was. So do the reference
    center and the detectors that the operator chose. Used on the pipeline's thread alone.
    """

    def __init__(
        self, make: CorrectorMaker, *, tell: Tell, center_is_configured: bool = False
    ) -> None:
        """Nothing runs yet.

        Args:
            make: makes the corrector for an acquisition.
            tell: told of faults of what it runs on.
            center_is_configured: a calibration that is loaded does not change the reference center.
        """
        self._make, self._tell = make, tell
        self._center_is_configured = center_is_configured
        self._frame_shape = (0, 0)
        self._center: tuple[tuple[int, int], tuple[float, float]] | None = None  # frames' shape too
        self.detectors: DetectorRadii | None = None
        """Those that the operator chose; ``None``: they are found from the pattern."""
        self._corrector: PatternCorrector | None = None
        self._running = False
        # By the shape of their frames; and which shape the last one that was kept is of.
        self._calibrations: dict[tuple[int, int], Calibration] = {}
        self._frozen: set[tuple[int, int]] = set()
        self._latest = (0, 0)

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
        corrector = self._make(started, self._tell)
        known = self._calibrations.get(started.frame_shape)
        if known is not None:
            corrector.load(known)
        elif self._latest in self._calibrations:
            self._tell(
                "warning",
                "calibration_unused",
                "The calibration for frames of {} × {} is not used: these are {} × {}, "
                "and begin without one.".format(*self._latest, *started.frame_shape),
            )
        if started.frame_shape in self._frozen:
            corrector.freeze()
        if self._center is not None and self._center[0] == started.frame_shape:
            corrector.set_reference_center(self._center[1])
        corrector.set_detectors(self.detectors)
        self._corrector = corrector

    def end(self) -> None:
        """The acquisition is over; a good calibration is kept, one that it contradicted is not."""
        if self._corrector is not None:
            if self._corrector.stands:
                self._keep(self._corrector.calibration())
            elif self._corrector.state == "lost":
                self._calibrations.pop(self._frame_shape, None)
        self._running = False

    def mean(self) -> tuple[Float32, int] | None:
        """The running mean, (h, w), and its number of patterns; ``None`` before the first one."""
        if self._corrector is None:
            return None
        values, averaged = self._corrector.mean()
        return (values, averaged) if averaged else None

    def freeze(self) -> None:
        """Keep the ellipticity as it is, in this acquisition and the next ones like it."""
        self._existing().freeze()
        frozen = self.calibration()
        if self._existing().stands:
            self._keep(frozen)
        self._frozen.add(frozen.frame_shape)

    def unfreeze(self) -> None:
        """Let the ellipticity follow the patterns again."""
        self._existing().unfreeze()
        self._frozen -= self._meant()

    def recalibrate(self) -> None:
        """Forget the ellipticity and find it anew."""
        self._existing().recalibrate()
        for frame_shape in self._meant():
            self._calibrations.pop(frame_shape, None)
            self._frozen.discard(frame_shape)

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
        if self._latest in self._calibrations and not self._running:
            return self._calibrations[self._latest]
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
        self._keep(calibration)
        if not self._center_is_configured:
            self._center = (calibration.frame_shape, calibration.reference_center)

    def _meant(self) -> set[tuple[int, int]]:
        """The shapes of frames that a command is about; between scans, also what was loaded."""
        return {self._frame_shape} if self._running else {self._frame_shape, self._latest}

    def _keep(self, calibration: Calibration) -> None:
        self._latest = calibration.frame_shape
        self._calibrations[self._latest] = calibration

    def _existing(self) -> PatternCorrector:
        if self._corrector is None:
            raise CommandFailed("No acquisition has begun yet: there is nothing to do this to.")
        return self._corrector
