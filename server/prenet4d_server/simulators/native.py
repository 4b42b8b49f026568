"""A simulated detector that speaks prenet4d's own protocol, as ``FrameSender`` does."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, Unpack

import numpy as np
import zmq

from prenet4d_client import messages, wire
from prenet4d_server.simulators.base import FrameFeed, Frames, Options, Parts, run
from prenet4d_server.sources.zmq_source import connect


def simulate_native(
    feed: FrameFeed,
    address: str = "tcp://127.0.0.1:5560",
    *,
    lz4: bool = False,
    frames_per_message: int = 1,
    **options: Unpack[Options],
) -> None:
    """Connect to a service and stream a feed's frames to it.

    Args:
        feed: what the detector sees.
        address: where the service listens.
        lz4: compress the frames.
        frames_per_message: more is cheaper, and later.
        options: see :class:`~prenet4d_server.simulators.base.Options`.

    Raises:
        ConfigError: an option makes no sense.
        NoAnswer: nobody takes what is sent.
    """

    def attach(socket: zmq.Socket[bytes]) -> str:
        connect(socket, address)
        return address

    run(_Native(feed, lz4, frames_per_message), feed, attach, options)


class _Native:
    def __init__(self, feed: FrameFeed, lz4: bool, frames_per_message: int) -> None:
        self.frames_per_message = frames_per_message
        self._feed = feed
        self._lz4 = lz4
        self._life = uuid.uuid4().hex[:12]
        self._sequence = 0

    def start(self, series: int) -> Iterator[Parts]:
        mask = self._feed.pixel_mask
        header = messages.AcquisitionStart(
            **self._identity(series),
            frame_shape=self._feed.frame_shape,
            dtype=self._feed.dtype.name,  # type: ignore[arg-type]  # validated by the model
            scan_shape=self._feed.scan_shape,
            expected_frames=self._feed.n_frames,
            detector="Simulated native detector (prenet4d)",
        )
        yield wire.encode(header, None if mask is None else {"pixel_mask": mask})

    def encode(self, frames: Frames, *, corrupt: bool = False) -> tuple[Frames, bool]:
        return np.ascontiguousarray(frames), corrupt

    def message(self, series: int, first: int, encoded: tuple[Frames, bool]) -> Parts:
        frames, corrupt = encoded
        header = messages.Frames(**self._identity(series), sequence=self._sequence)
        self._sequence += 1
        indices = np.arange(first, first + len(frames), dtype=np.int64)
        parts = wire.encode(header, {"indices": indices, "frames": frames}, lz4=self._lz4)
        return [*parts[:-1], parts[-1][: len(parts[-1]) // 2]] if corrupt else parts

    def end(self, series: int) -> Iterator[Parts]:
        yield wire.encode(messages.AcquisitionEnd(**self._identity(series)))

    def _identity(self, series: int) -> dict[str, Any]:
        return {"publisher": self._life, "acquisition_id": f"{self._life}-{series}"}
