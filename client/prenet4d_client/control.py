"""``ControlClient``: ask the service how it is, and tell it what to do."""

from __future__ import annotations

import uuid
import weakref
from collections.abc import Mapping
from typing import Any, Self

import zmq
from pydantic import ValidationError

from prenet4d_client._sockets import (
    check_usable,
    checked_timeout,
    connect,
    deadline_after,
    disconnect,
    wait,
)
from prenet4d_client.errors import (
    CommandRefused,
    InvalidUse,
    MalformedMessage,
    NoAnswer,
    OversizeMessage,
    PayloadMismatch,
    ProtocolError,
)
from prenet4d_client.messages import ControlReply, ControlRequest, Maps
from prenet4d_client.wire import MAX_MESSAGE_BYTES, Array, Message, decode, encode, explain


class ControlClient:
    """Sends commands to the service, one at a time, and waits for each answer.

    ::

        with ControlClient("tcp://127.0.0.1:5563") as service:
            print(service.status())
            service.freeze()

    Every method raises :class:`CommandRefused` where the service declines (its sentence says why),
    :class:`NoAnswer` where none comes within ``timeout`` (the command may have been carried out all
    the same; the client can go on being used), :class:`ProtocolError` where the answer breaks the
    protocol, and :class:`InvalidUse` where an argument cannot be sent. To be used from one thread
    at a time.

    Args:
        address: the service's control address.
        timeout: seconds to wait for each answer, more than 0.
        max_bytes: the largest answer to accept.
        server_key: the service's public CURVE key (Z85), where it has one.
        keys: CURVE keys ``(public, secret)`` that the service knows an operator by, where its
            configuration names operators; others may only ask.

    Raises:
        InvalidUse: the address, the timeout or a key cannot be one.
    """

    def __init__(
        self,
        address: str = "tcp://127.0.0.1:5563",
        *,
        timeout: float = 5.0,
        max_bytes: int = MAX_MESSAGE_BYTES,
        server_key: str | bytes | None = None,
        keys: tuple[str | bytes, str | bytes] | None = None,
    ) -> None:
        self.address = address
        if not checked_timeout(timeout):
            raise InvalidUse("timeout is 0, and no answer comes at once: give a few seconds.")
        self._timeout = timeout
        self._max_bytes = max_bytes
        self._server_key = server_key
        self._keys = keys
        self._publisher = uuid.uuid4().hex
        self._sequence = 0
        self._socket = self._connect()

    def status(self) -> dict[str, Any]:
        """Return what the service is doing: state, acquisition, rates, counters, receivers."""
        return self._result("status")

    def config(self) -> dict[str, Any]:
        """Return the configuration that the service runs with."""
        return self._result("config")

    def freeze(self) -> None:
        """Keep the present ellipticity, whatever the patterns say, until :meth:`unfreeze`."""
        self._result("freeze")

    def unfreeze(self) -> None:
        """Follow the patterns again."""
        self._result("unfreeze")

    def recalibrate(self) -> None:
        """Forget the running mean and the ellipticity, and find them anew."""
        self._result("recalibrate")

    def save_calibration(self, *, descan: bool = False) -> dict[str, Any]:
        """Return the present calibration, to be kept in a file and loaded for a later scan.

        Args:
            descan: with the fit of the running or the last scan's descan.
        """
        return self._result("save_calibration", **({"descan": True} if descan else {}))

    def load_calibration(self, calibration: Mapping[str, Any]) -> None:
        """Use a calibration that :meth:`save_calibration` returned.

        Raises:
            InvalidUse: it is no map; a file of one has to be read first.
        """
        if not isinstance(calibration, Mapping):
            raise InvalidUse(
                f"A calibration is a map as save_calibration() returns it, and no "
                f"{type(calibration).__name__}: read the file first that it was kept in."
            )
        self._result("load_calibration", calibration=dict(calibration))

    def set_reference_center(self, cy: float, cx: float) -> None:
        """Move the centers of the next frames to ``(cy, cx)``, pixels, (0, 0) the first pixel's.

        The running mean starts over; the ellipticity stays. It holds for later acquisitions with
        frames of this shape too, until :meth:`clear_reference_center`.
        """
        self._result("set_reference_center", center=[_number("cy", cy), _number("cx", cx)])

    def clear_reference_center(self) -> None:
        """Use the reference center of the configuration again, or the middle of the frame."""
        self._result("clear_reference_center")

    def set_detectors(
        self, bright_field_radius: float, annular_inner: float, annular_outer: float
    ) -> None:
        """Set the virtual detectors' radii, in pixels, for the frames to come.

        What the scan maps hold of earlier frames stays as it was measured. The radii hold for later
        acquisitions too, until :meth:`clear_detectors`.
        """
        self._result(
            "set_detectors",
            bright_field_radius=_number("bright_field_radius", bright_field_radius),
            annular_inner=_number("annular_inner", annular_inner),
            annular_outer=_number("annular_outer", annular_outer),
        )

    def clear_detectors(self) -> None:
        """Find the virtual detectors' radii from the pattern again."""
        self._result("clear_detectors")

    def maps(self, newer_than: Maps | None = None) -> tuple[Maps, Array] | None:
        """Return the whole scan maps of the running or the last acquisition.

        :class:`ScanMaps` calls this when it needs to, and keeps the maps up to date.

        Args:
            newer_than: what came with the answer before: ``None`` is returned if nothing has
                changed since.

        Returns:
            their description, whose ``sequence`` is that of the last published ``maps`` message
            that they include, and their values, (k, ny, nx) float32, in the order of its ``names``.
        """
        known = None if newer_than is None else [newer_than.publisher, newer_than.sequence]
        reply = self._ask("maps", newer_than=known)
        if "values" not in reply.arrays:
            return None
        try:
            header = Maps.model_validate(reply.result)
        except ValidationError as error:
            raise MalformedMessage(f"The maps came with a wrong {explain(error)}.") from None
        values = reply.arrays["values"]
        if values.shape != (len(header.names), *header.scan_shape):
            raise PayloadMismatch(
                f"{len(header.names)} maps of {header.scan_shape} were announced; "
                f"an array of {values.shape} came."
            )
        return header, values

    def snapshot(self) -> Message:
        """Return what a subscriber who comes late has missed.

        Its ``result`` holds the status, the acquisition and the ellipticity; its array ``mean``,
        where there is one yet, (h, w) float32 counts, is the running mean.
        """
        return self._ask("snapshot")

    def start_recording(self, name: str | None = None) -> dict[str, Any]:
        """Have the service record what it publishes, into the folder that it is configured with.

        Args:
            name: of the file, without folder and suffix; by default the time of day.

        Returns:
            The recording as ``status()["recording"]`` shows it. Where its ``state`` is
            ``recording``, nothing is missed from now on; ``starting``: it takes a little longer.
        """
        return self._result("start_recording", **({} if name is None else {"name": name}))

    def stop_recording(self) -> dict[str, Any]:
        """Stop the recording and close its files; returns it as :meth:`start_recording` does."""
        return self._result("stop_recording")

    def close(self) -> None:
        """Close the connection; may be called twice."""
        disconnect(self._socket)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _result(self, command: str, **arguments: object) -> dict[str, Any]:
        result: dict[str, Any] = self._ask(command, **arguments).result
        return result

    def _ask(self, command: str, **arguments: object) -> Message:
        check_usable(self._socket, self)
        request = ControlRequest(
            publisher=self._publisher,
            sequence=self._sequence,
            command=command,
            arguments=arguments,
        )
        try:
            parts = encode(request)
        except (MalformedMessage, OversizeMessage) as error:
            raise InvalidUse(str(error)) from None
        self._sequence += 1
        try:
            reply = self._exchange(parts, request.sequence)
        except ProtocolError:
            self._reconnect()
            raise
        if reply is None:
            self._reconnect()
            raise NoAnswer(
                f"No service answered {command!r} at {self.address} within {self._timeout:g} s: "
                "is it running, is this its control address, does it ask for another key, and does "
                "no receiver hold it back?"
            )
        if not reply.ok:
            raise CommandRefused(reply.error or f"The service refuses to {command}.")
        return reply

    def _exchange(self, request: list[Any], sequence: int) -> Message | None:
        """Send the request and return its reply, or ``None`` where none comes in time."""
        self._socket.send_multipart(request)
        deadline = deadline_after(self._timeout)
        while wait(self._socket, deadline):
            answer = self._socket.recv_multipart(copy=False)
            reply = decode([part.buffer for part in answer], max_bytes=self._max_bytes)
            if not isinstance(reply.header, ControlReply):
                raise ProtocolError(f"The service answered with a {reply.header.type} message.")
            if reply.header.sequence == sequence:
                return reply
        return None

    def _connect(self) -> zmq.Socket[bytes]:
        socket = connect(
            zmq.DEALER,
            self.address,
            usual_port=5563,
            server_key=self._server_key,
            keys=self._keys,
            options={},
        )
        self._forgotten = weakref.finalize(self, disconnect, socket)
        self._forgotten.atexit = False  # another thread may be using it
        return socket

    def _reconnect(self) -> None:
        """Start afresh, so that an answer which comes too late finds nobody."""
        self._forgotten()
        self._socket = self._connect()


def _number(what: str, value: float) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidUse(f"{what} is {value!r}; it must be a number.") from None
