"""``ScanMaps``: the scan maps as numpy arrays that fill in while the scan is running."""

from __future__ import annotations

import logging
import time
from math import prod
from typing import Self

import numpy as np
import numpy.typing as npt

from prenet4d_client._sockets import (
    LEAST_ANSWER_S,
    check_usable,
    checked_timeout,
    deadline_after,
)
from prenet4d_client.control import ControlClient
from prenet4d_client.errors import CommandRefused, NoAnswer, OversizeMessage, ProtocolError
from prenet4d_client.messages import Maps
from prenet4d_client.subscriber import Subscriber
from prenet4d_client.wire import MAX_MESSAGE_BYTES, Array

_log = logging.getLogger(__name__)

_QUIET_S = 2.0
"""After so long without an update, ask: a scan's last one may have been lost on the way."""
_ANSWER_S = 5.0


class ScanMaps:
    """The scan maps by name, kept up to date while one iterates.

    ::

        with ScanMaps() as maps:
            for update in maps:
                print(update.frames, maps["bright_field"].shape)

    A map is a (ny, nx) float32 array, NaN where no frame came yet; ``names`` and the ``maps``
    message in PROTOCOL.md say which there are. The arrays are read-only views of memory that the
    next update changes: copy what is to be kept. Each turn yields the description of what has
    changed, a ``Maps`` header; its ``region`` is the whole scan where the maps had to be asked for.

    Nothing is missed: who comes late, or misses updates, gets the whole maps from the control
    socket. A new acquisition, or a service that was started again, brings new arrays. Iterating
    never ends by itself. To be used from one thread at a time.

    Args:
        stream: the service's stream address.
        control: the service's control address.
        timeout: seconds without anything new before :class:`NoAnswer` is raised; ``None`` waits for
            ever, and 0 only takes what is there. The control socket gets 1 s at least to answer.
        max_bytes: the largest maps to accept; larger ones raise :class:`OversizeMessage`.
        server_key: the service's public CURVE key (Z85), where it has one.

    Raises:
        InvalidUse: an address, the timeout or the key cannot be one.
    """

    def __init__(
        self,
        stream: str = "tcp://127.0.0.1:5561",
        control: str = "tcp://127.0.0.1:5563",
        *,
        timeout: float | None = None,
        max_bytes: int = MAX_MESSAGE_BYTES,
        server_key: str | bytes | None = None,
    ) -> None:
        self.latest: Maps | None = None
        """The description of the latest update; ``None`` before the first."""
        self._values: Array = np.empty((0, 0, 0), np.float32)
        self._complete = False
        self._why_none = ""
        """What the control socket said instead of the maps, when it was asked last."""
        self._timeout = None if timeout is None else checked_timeout(timeout)
        self._max_bytes = max_bytes
        patience = _ANSWER_S if timeout is None else min(timeout, _ANSWER_S)
        # The stream first: what is published after the whole maps were asked for will come.
        self._stream = Subscriber(
            stream,
            "maps",
            timeout=min(patience, _QUIET_S),
            max_bytes=max_bytes,
            server_key=server_key,
        )
        try:
            self._control = ControlClient(
                control,
                timeout=max(patience, LEAST_ANSWER_S),
                max_bytes=max_bytes,
                server_key=server_key,
            )
        except BaseException:
            self._stream.close()
            raise

    @property
    def names(self) -> tuple[str, ...]:
        """The maps there are; none before the first update."""
        return self.latest.names if self.latest else ()

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        if name not in self.names:
            there = ", ".join(self.names) or "none before the first update"
            raise KeyError(f"There is no map {name!r}; there are {there}.")
        view: npt.NDArray[np.float32] = self._values[self.names.index(name)]
        view.flags.writeable = False
        return view

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Maps:
        check_usable(self._stream._socket, self)
        deadline = deadline_after(self._timeout)
        while (update := self._whole() or self._update()) is None:
            if deadline is not None and time.monotonic() >= deadline:
                raise NoAnswer(
                    f"No scan maps came from {self._stream.address} within {self._timeout:g} s. "
                    f"{self._why_none or 'The service has none that are newer: is a scan running?'}"
                )
        self.latest = update
        return update

    def close(self) -> None:
        """Leave the stream; may be called twice."""
        self._stream.close()
        self._control.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _whole(self) -> Maps | None:
        """Ask for the whole maps where something may be missing; ``None`` where none come."""
        if self._complete:
            return None
        try:
            self._why_none = ""
            answer = self._control.maps(self.latest)
        except (CommandRefused, NoAnswer) as why:
            self._why_none = str(why)
            return None
        except OversizeMessage:
            raise
        except ProtocolError as error:
            _log.warning("Skipped the maps from %s: %s", self._control.address, error)
            self._why_none = str(error)
            return None
        self._complete = True
        if answer is None:
            return None
        header, values = answer
        self._values = np.array(values, np.float32)
        return header

    def _update(self) -> Maps | None:
        """Wait for an update and enter it; ``None`` where it does not go on from the one before."""
        try:
            message = self._stream.receive()
        except NoAnswer:
            self._complete = False
            return None
        header, latest = message.header, self.latest
        if not isinstance(header, Maps):
            return None
        if latest is None or header.publisher != latest.publisher:
            self._complete = False
            return None
        if header.sequence <= latest.sequence:  # the whole maps held it already
            return None
        if header.sequence > latest.sequence + 1:
            self._complete = False
            return None
        if _scan(header) != _scan(latest):
            self._values = self._empty(header)
        y0, x0, height, width = header.region
        self._values[:, y0 : y0 + height, x0 : x0 + width] = message.arrays["values"]
        return header

    def _empty(self, header: Maps) -> Array:
        shape = (len(header.names), *header.scan_shape)
        if 4 * prod(shape) > self._max_bytes:
            raise OversizeMessage(
                f"Maps of {shape} values need {4 * prod(shape)} bytes; at most {self._max_bytes} "
                "are accepted."
            )
        return np.full(shape, np.nan, np.float32)


def _scan(header: Maps) -> tuple[object, ...]:
    return header.acquisition_id, header.names, header.scan_shape
