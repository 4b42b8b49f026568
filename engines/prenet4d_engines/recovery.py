"""A corrector that survives its device: what was under way when it failed is done again.

The batches that were submitted and not returned are kept, and so is what was known of the scan
before the oldest of them: its track and its calibration. When a device fails, slots and what was
recorded on them are let go of, a new corrector goes on from there, and no frame is lost. Only the
mean pattern is: it lay on the device, and starts over.

What no device raises, a fault in our own program, is told as what it is: the batch that meets it
again fails by it, the others are done, and the device is left alone.

Some CUDA errors leave the whole process without that GPU. Other GPUs then go on, or the CPU where
the user allows it; else batches fail, each with a sentence that says what to do.
"""

from __future__ import annotations

import logging
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from prenet4d_engines.backends import TorchBackend
from prenet4d_engines.batch import CorrectedBatch, Float32, Outcome, State
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.corrector import Corrector, Indices
from prenet4d_engines.errors import BackendError, FrameError
from prenet4d_engines.stages import Station
from prenet4d_engines.virtual import DetectorRadii

Tell: TypeAlias = Callable[[Literal["warning", "error"], str, str], None]
"""Told what happened: how bad, a code that stays the same, a sentence."""

FAULTS = (RuntimeError, BackendError, MemoryError)
"""What a device, its libraries and its memory raise; torch's errors are RuntimeErrors."""

T = TypeVar("T")
_log = logging.getLogger(__name__)


def log(level: Literal["warning", "error"], code: str, message: str) -> None:  # noqa: ARG001
    """Write what happened to the log."""
    _log.log(logging.ERROR if level == "error" else logging.WARNING, "%s", message)


class RecoveringCorrector:
    """A `Corrector` whose batches are done again when the device fails; a `PatternCorrector`.

    Args:
        make: makes the acquisition's corrector on some stations.
        stations: the devices; those that fail for good are taken out of the list.
        fallback: makes the station that takes over when no device is left; ``None``: none does.
        tell: told of every fault.

    Raises:
        EngineError: what ``make`` raises.
    """

    def __init__(
        self,
        make: Callable[[Sequence[Station]], Corrector],
        stations: list[Station],
        *,
        fallback: Callable[[], Station] | None = None,
        tell: Tell = log,
    ):
        self._make, self._stations = make, stations
        self._fallback, self._tell = fallback, tell
        self._corrector = make(stations)
        self._waiting: deque[tuple[npt.NDArray[Any], Indices]] = deque()
        self._ready: list[Outcome] = []
        self._dead: BackendError | None = None

    def process(self, frames: npt.NDArray[Any], indices: Indices) -> CorrectedBatch:
        """Correct frames (n, h, w); see `Corrector.process`.

        Raises:
            FrameError: the arrays are not those of this acquisition.
            BackendError, RuntimeError: it failed again and again, or no device is left.
        """
        outcome = [*self.submit(frames, indices), *self.finish()][-1]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def submit(self, frames: npt.NDArray[Any], indices: Indices) -> list[Outcome]:
        """Take a batch; return what became of those that are finished, in their order."""
        try:
            self._corrector.check(frames, indices)
        except FrameError as error:
            return [*self.finish(), error]
        indices = indices.astype(np.int64)  # a copy, like the corrector's own: done again with it
        self._waiting.append((frames, indices))
        return self._advance(lambda: self._corrector.submit(frames, indices))

    def finish(self) -> list[Outcome]:
        """Return what became of the batches that are still on their way."""
        return self._advance(lambda: self._corrector.finish())

    @property
    def state(self) -> State:
        """Where the calibration stands."""
        return self._asked(lambda: self._corrector.state)

    @property
    def stands(self) -> bool:
        """Whether the ellipticity is good for the next acquisition."""
        return self._asked(lambda: self._corrector.stands)

    def mean(self) -> tuple[Float32, int]:
        """Return the running mean (h, w) of the recentered raw patterns and their number."""
        if self._dead is not None:
            return np.full(self._corrector.frame_shape, np.nan, np.float32), 0
        return self._asked(lambda: self._corrector.mean())

    def freeze(self) -> None:
        """Keep the ellipticity as it is until :meth:`unfreeze`."""
        self._asked(lambda: self._corrector.freeze())

    def unfreeze(self) -> None:
        """Let the ellipticity follow the patterns again."""
        self._asked(lambda: self._corrector.unfreeze())

    def recalibrate(self) -> None:
        """Forget the running mean and the ellipticity, and start over."""
        self._asked(lambda: self._corrector.recalibrate())

    def calibration(self) -> Calibration:
        """Return the calibration as it stands."""
        return self._asked(lambda: self._corrector.calibration())

    def load(self, calibration: Calibration) -> None:
        """Take over a calibration made earlier."""
        self._asked(lambda: self._corrector.load(calibration))

    def set_reference_center(self, center: tuple[float, float] | None) -> None:
        """Move centers to ``(cy, cx)``, pixels, from now on; ``None``: to where they were."""
        self._asked(lambda: self._corrector.set_reference_center(center))

    def set_detectors(self, radii: DetectorRadii | None) -> None:
        """Measure with these virtual detectors from now on; ``None``: find their radii."""
        self._corrector.set_detectors(radii)

    def _asked(self, ask: Callable[[], T]) -> T:
        """Ask the corrector for something; where the device fails at it, ask its successor."""
        try:
            return ask()
        except FAULTS as error:
            if self._dead is None:
                self._do_again(error)
            if self._dead is not None:
                raise self._dead from error
            return ask()

    def _advance(self, advance: Callable[[], list[CorrectedBatch]]) -> list[Outcome]:
        if self._dead is None:
            try:
                for batch in advance():
                    self._conclude(batch)
            except Exception as error:  # noqa: BLE001  # the scan goes on; it is told and logged
                self._do_again(error)
        while self._dead is not None and self._waiting:
            self._conclude(self._dead)
        ready, self._ready = self._ready, []
        return ready

    def _conclude(self, outcome: Outcome) -> None:
        self._ready.append(outcome)
        self._waiting.popleft()

    def _do_again(self, error: Exception) -> None:
        """Rebuild the corrector, and do again what was under way, one batch after the other."""
        self._rebuild(error)
        failed_before = False
        while self._waiting and self._dead is None:
            try:
                self._conclude(self._corrector.process(*self._waiting[0]))
                failed_before = False
            except FAULTS as again:
                smaller = isinstance(again, torch.OutOfMemoryError)
                if not smaller and failed_before:
                    self._conclude(again)
                failed_before = not smaller
                self._rebuild(again, give_up=not smaller and self._fallback is not None)
            except Exception as again:  # noqa: BLE001
                self._conclude(again)
                self._rebuild(again)

    def _rebuild(self, error: Exception, *, give_up: bool = False) -> None:
        """Make a new corrector on the devices that still work, and tell about it.

        Args:
            error: what happened.
            give_up: the devices in use are not to be trusted any more.
        """
        why = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        _let_go(error)
        failed = self._corrector
        failed.abandon()  # or its slots would be in the way
        name = _name(self._stations)
        if give_up:
            self._stations.clear()
        again = sum(len(indices) for _, indices in self._waiting)
        memory = isinstance(error, torch.OutOfMemoryError)
        anyone = memory and not any(each.short for each in self._stations)
        self._stations[:] = [
            each for each in self._stations if _works(each, smaller=each.short or anyone)
        ]
        if not self._stations and self._fallback is not None:
            self._stations.append(self._fallback())
            self._fallback = None
            self._tell(
                "error",
                "cpu_fallback",
                f"{name} failed and does not come back ({why}); the CPU goes on, many times "
                "slower, from the first frame that was not published.",
            )
        elif not self._stations:
            self._dead = BackendError(
                f"{name} failed and does not come back ({why}). Start the service again; set "
                "corrector.cpu_fallback to have the CPU go on in such a case."
            )
            self._tell("error", "gpu_failed", str(self._dead))
            return
        elif memory and (least := [each.most for each in self._stations if each.most]):
            self._tell(
                "warning",
                "smaller_batches",
                f"{name} has not enough memory for so many frames at a time; {min(least)} are used "
                f"from now on, and the running mean starts over ({why}).",
            )
        elif not isinstance(error, FAULTS):
            _log.error("The program has a fault.", exc_info=error)
            self._tell(
                "error",
                "corrector_fault",
                f"The correction broke off by a fault in the program ({type(error).__name__}: "
                f"{why}), which the log describes; {again} frames are done again, and the running "
                "mean starts over.",
            )
        else:
            self._tell(
                "warning",
                "corrector_rebuilt",
                f"{name} failed ({why}); {again} frames are done again, and the running mean "
                "starts over.",
            )
        try:
            self._corrector = self._make(self._stations)
            self._corrector.resume(failed)
        except FAULTS as once_more:
            self._rebuild(once_more, give_up=True)


def _name(stations: Sequence[Station]) -> str:
    return "The CPU" if all(each.lanes.device.type == "cpu" for each in stations) else "The GPU"


def _let_go(error: BaseException) -> None:
    """Let go of what an error's traceback holds: all that a failed attempt had on the device."""
    within: BaseException | None = error
    while within is not None:
        traceback.clear_frames(within.__traceback__)
        within = within.__context__


def _works(station: Station, *, smaller: bool) -> bool:
    """Let go of everything that a device holds; tell whether it can go on, with smaller slots."""
    if smaller and not station.shrink():
        return False
    try:
        station.clear()
        return torch.ones(2, device=station.lanes.device).sum().item() == 2
    except RuntimeError as error:
        _log.warning("%s does not work any more: %s", station.lanes.device, error)
        return False


def cpu_station(threads: int | None = None) -> Station:
    """Return the CPU, as what takes over from a GPU."""
    return Station(TorchBackend(threads=threads, device="cpu"))
