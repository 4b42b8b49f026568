"""What an operator may do from the page; who only looks sees the same buttons at rest."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable
from html import escape
from typing import Any, TypeAlias

from bokeh.document import Document
from bokeh.models import Button, Div, FileInput, TextInput

from prenet4d_client import ControlClient
from prenet4d_client.errors import Prenet4dError
from prenet4d_engines.calibration_file import parse_calibration
from prenet4d_engines.errors import CalibrationError
from prenet4d_server.page.feed import Feed
from prenet4d_server.page.theme import look

Command: TypeAlias = Callable[[ControlClient], object]
VIEWER = (
    "You are looking only. To command, enter the operator's token: the service's log tells it, or "
    "where it is kept."
)
OPERATOR = "You may command."


class Actions:
    """The buttons, and a line that tells what came of the last one.

    Callbacks are there for operators alone: whatever a viewer's browser sends, nothing listens.
    """

    def __init__(self, doc: Document, feed: Feed, *, operator: bool) -> None:
        self._doc = doc
        self._feed = feed
        self._operator = operator
        self.said = Div(name="said", text=_say(OPERATOR if operator else VIEWER), **look())
        self.recalibrate = self._button(
            "recalibrate", "Recalibrate ellipticity", self._on_recalibrate
        )
        self.freeze = self._button("freeze", "Freeze", self._on_freeze)
        self.center = TextInput(
            name="center", placeholder="y, x or beam's", disabled=not operator,
            **look(),
        )  # fmt: skip
        self.set_center = self._button("set_center", "Set reference center", self._on_set_center)
        self.clear_center = self._button(
            "clear_center", "Clear reference center", self._on_clear_center
        )
        self.auto_radii = self._button("auto_radii", "Automatic radii", self._on_auto_radii)
        self.record = self._button("record", "Start recording", self._on_record)
        self.file = FileInput(
            name="file", accept=".json,.toml", title="Load a calibration", disabled=not operator,
            **look(),
        )  # fmt: skip
        if operator:
            self.file.on_change("value", self._on_value)

    @property
    def roots(self) -> tuple[Any, ...]:
        """Everything that the page places."""
        return (
            self.recalibrate, self.freeze, self.center, self.set_center, self.clear_center,
            self.auto_radii, self.record, self.file, self.said,
        )  # fmt: skip

    def update(self, feed: Feed) -> None:
        """Let the labels say what a press would do now."""
        status = feed.status
        if status is None:
            return
        frozen = status.state == "frozen"
        self.freeze.update(
            label="Unfreeze" if frozen else "Freeze", button_type="primary" if frozen else "default"
        )
        recording = status.recording
        runs = recording is not None and recording.state in ("starting", "recording")
        label = "Stop recording" if runs else "Start recording"
        self.record.update(
            label="No folder to record in" if recording is None else label,
            button_type="danger" if runs else "default",
            disabled=not self._operator or recording is None,
        )

    def set_radii(self, disk: float, inner: float, outer: float) -> None:
        """Use these radii of the virtual detectors, in pixels, for the frames to come."""
        self._do(
            f"Radii {disk:.1f}, {inner:.1f} to {outer:.1f} px",
            lambda service: service.set_detectors(disk, inner, outer),
        )

    def _button(self, name: str, label: str, press: Callable[[], None]) -> Button:
        button = Button(
            name=name, label=label, disabled=not self._operator, **look(),
        )  # fmt: skip
        if self._operator:
            button.on_click(press)
        return button

    def _on_recalibrate(self) -> None:
        self._do("Recalibrating", ControlClient.recalibrate)

    def _on_freeze(self) -> None:
        status = self._feed.status
        if status is not None and status.state == "frozen":
            self._do("Unfreezing", ControlClient.unfreeze)
        else:
            self._do("Freezing", ControlClient.freeze)

    def _on_set_center(self) -> None:
        telemetry = self._feed.telemetry
        text = self.center.value.strip()
        if text:
            try:
                cy, cx = (float(part) for part in text.split(","))
            except ValueError:
                self._tell("bad", f"{text!r} is no center: write y, x in pixels, as 127.5, 127.5.")
                return
        elif telemetry is not None and len(telemetry.tracked):
            cy, cx = (float(value) for value in telemetry.tracked[-1])
        else:
            self._tell("bad", "No center has been found yet: write y, x in pixels.")
            return
        self._do(
            f"Reference center {cy:.2f}, {cx:.2f} px",
            lambda service: service.set_reference_center(cy, cx),
        )

    def _on_clear_center(self) -> None:
        self._do("Reference center of the configuration", ControlClient.clear_reference_center)

    def _on_auto_radii(self) -> None:
        self._do("Radii found from the pattern", ControlClient.clear_detectors)

    def _on_record(self) -> None:
        recording = self._feed.status.recording if self._feed.status else None
        if recording is not None and recording.state in ("starting", "recording"):
            self._do("Stopping the recording", ControlClient.stop_recording)
        else:
            self._do("Starting a recording", ControlClient.start_recording)

    def _on_value(self, _attr: str, _old: object, value: str) -> None:
        if value:
            self._doc.add_next_tick_callback(self._on_file)  # the file's name comes after it

    def _on_file(self) -> None:
        name, content = self.file.filename, self.file.value
        self.file.clear()  # so that the same file can be loaded again
        try:
            calibration = parse_calibration(base64.b64decode(content), name)
        except CalibrationError as error:
            self._tell("bad", str(error))
            return
        document = calibration.model_dump(mode="json")
        self._do(f"Calibration {name}", lambda service: service.load_calibration(document))

    def _do(self, what: str, command: Command) -> None:
        """Have the service carry out a command, without holding up the page."""
        self._tell("muted", f"{what} …")

        async def act() -> None:
            try:
                await asyncio.to_thread(self._ask, command)
            except Prenet4dError as error:
                self._tell("bad", str(error))
            else:
                self._tell("good", f"{what}: done.")

        self._doc.add_next_tick_callback(act)

    def _ask(self, command: Command) -> None:
        with self._feed.client() as service:
            command(service)

    def _tell(self, kind: str, text: str) -> None:
        self.said.text = _say(text, kind)


def _say(text: str, kind: str = "muted") -> str:
    return f'<p class="{kind}" role="status">{escape(text)}</p>'
