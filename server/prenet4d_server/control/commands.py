"""What the service does when a control client asks for it; on the control thread.

Whatever touches the corrector is handed to the pipeline's thread, between two batches, and answered
when it is done: no client waits for a batch that another one asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from prenet4d_engines.calibration import Calibration
from prenet4d_engines.errors import CalibrationError
from prenet4d_engines.virtual import DetectorRadii
from prenet4d_server.config import Settings
from prenet4d_server.control.socket import Answer, Command, Later
from prenet4d_server.correction.pipeline import Pipeline
from prenet4d_server.errors import CommandFailed
from prenet4d_server.monitoring.status import Status
from prenet4d_server.recording.supervisor import Recordings

PATIENCE_S = 4.0
"""How long a batch is waited for: less than clients wait for an answer."""
_RADII = ("bright_field_radius", "annular_inner", "annular_outer")


class Commands:
    """The commands, each a method that takes the request's arguments and returns its answer.

    Every one of them raises CommandFailed to refuse, with a sentence for the client.

    Args:
        settings: the service's.
        pipeline: carries out what concerns the corrector.
        recordings: those that the operator starts and stops.
        status: tells what the service is doing.
    """

    def __init__(
        self,
        settings: Settings,
        pipeline: Pipeline,
        recordings: Recordings,
        status: Callable[[], Status],
    ) -> None:
        self._settings, self._pipeline, self._recordings = settings, pipeline, recordings
        self._correction = pipeline.correction
        self._status = status

    def table(self) -> dict[str, Command]:
        """Every command under its name on the wire, which is its method's."""
        commands = (
            self.status, self.config, self.freeze, self.unfreeze, self.recalibrate,
            self.save_calibration, self.load_calibration, self.set_reference_center,
            self.clear_reference_center, self.set_detectors, self.clear_detectors, self.maps,
            self.snapshot, self.start_recording, self.stop_recording,
        )  # fmt: skip
        return {command.__name__: command for command in commands}

    def status(self, _: dict[str, Any]) -> Answer:
        """What the service is doing."""
        return self._status().model_dump(mode="json"), {}

    def config(self, _: dict[str, Any]) -> Answer:
        """What it was told to do."""
        return self._settings.model_dump(mode="json"), {}

    def freeze(self, _: dict[str, Any]) -> Later:
        """Keep the ellipticity."""
        said = "The operator froze the ellipticity."
        return _done(self._pipeline.command(self._correction.freeze, "frozen", said))

    def unfreeze(self, _: dict[str, Any]) -> Later:
        """Let it follow the patterns."""
        said = "The operator lets the ellipticity follow the patterns."
        return _done(self._pipeline.command(self._correction.unfreeze, "unfrozen", said))

    def recalibrate(self, _: dict[str, Any]) -> Later:
        """Find it anew."""
        said = "The operator has the ellipticity found anew."
        return _done(self._pipeline.command(self._correction.recalibrate, "recalibrating", said))

    def save_calibration(self, arguments: dict[str, Any]) -> Later:
        """The calibration in use, with the fit of the descan where ``descan`` is true."""
        with_descan = arguments.get("descan") is True
        found = self._pipeline.call(lambda: self._calibration(with_descan))
        return Later(found, lambda: (found.result(), {}), PATIENCE_S)

    def load_calibration(self, arguments: dict[str, Any]) -> Later:
        """Use ``calibration``, now and for the acquisitions to come."""
        try:
            calibration = Calibration.from_document(arguments.get("calibration"))
        except CalibrationError as error:
            raise CommandFailed(str(error)) from None
        loaded = self._pipeline.command(
            lambda: self._correction.load(calibration),
            "calibration_loaded",
            f"A calibration was loaded: ratio {calibration.ratio:.4f}, "
            f"long axis at {math.degrees(calibration.theta):.1f}°.",
        )
        return _done(loaded)

    def set_reference_center(self, arguments: dict[str, Any]) -> Later:
        """Move centers to ``center``."""
        cy, cx = _numbers(arguments.get("center"), 2, "center: [cy, cx] in pixels")
        moved = self._pipeline.command(
            lambda: self._correction.set_reference_center((cy, cx)),
            "reference_center_set",
            f"The operator moved the reference center to ({cy:g}, {cx:g}) px.",
        )
        return _done(moved)

    def clear_reference_center(self, _: dict[str, Any]) -> Later:
        """Move centers back to where they were moved at first."""
        moved = self._pipeline.command(
            lambda: self._correction.set_reference_center(None),
            "reference_center_cleared",
            "The operator moved the reference center back to where it was.",
        )
        return _done(moved)

    def set_detectors(self, arguments: dict[str, Any]) -> Later:
        """Measure with virtual detectors of these radii."""
        given = [arguments.get(name) for name in _RADII]
        bright, inner, outer = _numbers(given, 3, f"{', '.join(_RADII)}, in pixels")
        radii_set = self._pipeline.command(
            lambda: self._correction.set_detectors(DetectorRadii(bright, inner, outer)),
            "detectors_set",
            f"The operator set the virtual detectors: bright field up to {bright:g} px, "
            f"annular dark field from {inner:g} to {outer:g} px.",
        )
        return _done(radii_set)

    def clear_detectors(self, _: dict[str, Any]) -> Later:
        """Find the radii from the pattern."""
        said = "The operator lets the virtual detectors be found from the pattern."
        cleared = self._pipeline.command(
            lambda: self._correction.set_detectors(None), "detectors_cleared", said
        )
        return _done(cleared)

    def maps(self, arguments: dict[str, Any]) -> Answer:
        """The whole scan maps."""
        newer_than = arguments.get("newer_than")
        return self._pipeline.maps.whole(newer_than)

    def snapshot(self, _: dict[str, Any]) -> Later:
        """The status and the running mean."""
        found = self._pipeline.call(self._correction.mean)

        def answer() -> Answer:
            mean = found.result()
            return self._status().model_dump(mode="json"), {} if mean is None else {"mean": mean[0]}

        return Later(found, answer, PATIENCE_S)

    def start_recording(self, arguments: dict[str, Any]) -> Later:
        """Record, into files called ``name``."""
        name = arguments.get("name")
        if not (name is None or isinstance(name, str)):
            raise CommandFailed("The name of a recording is a text.")
        return Later(self._recordings.start(name), self._recording)

    def stop_recording(self, _: dict[str, Any]) -> Later:
        """Close the recording's files."""
        return Later(self._recordings.stop(), self._recording)

    def _recording(self) -> Answer:
        status = self._recordings.status
        return ({} if status is None else status.model_dump(mode="json")), {}

    def _calibration(self, with_descan: bool) -> dict[str, Any]:
        """The calibration in use, on the pipeline's thread."""
        calibration = self._correction.calibration()
        if with_descan:
            if (fit := self._pipeline.maps.latest_descan()) is None:
                raise CommandFailed(
                    "There is no fit of the descan yet: too little of a scan was seen. "
                    "Save the calibration without it, or wait."
                )
            calibration = calibration.model_copy(update={"descan": fit})
        return calibration.model_dump(mode="json")


def _done(carried_out: Future[None]) -> Later:
    """Answer once it is carried out, with nothing but that."""
    return Later(carried_out, lambda: ({}, {}), PATIENCE_S)


def _numbers(values: object, count: int, form: str) -> tuple[float, ...]:
    """Read so many numbers from a request's arguments.

    Raises:
        CommandFailed: they are none; the sentence says that ``form`` was expected.
    """
    if not (
        isinstance(values, (list, tuple))
        and len(values) == count
        and all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in values)
    ):
        raise CommandFailed(f"This command takes {form}.")
    return tuple(float(one) for one in values)
