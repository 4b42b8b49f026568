"""A simulated DECTRIS detector that speaks Stream V2 (CBOR)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, Unpack

import cbor2
import numpy as np
from cbor2 import CBORTag

from prenet4d_server.errors import ConfigError
from prenet4d_server.simulators.base import FrameFeed, Frames, Options, Parts, run
from prenet4d_server.sockets import bind
from prenet4d_server.sources.compression import Codec, compress
from prenet4d_server.sources.dectris_v2 import COMPRESSION, ROW_MAJOR

Compression: TypeAlias = Literal["bslz4", "lz4", "none"]

CODECS: dict[Compression, Codec] = {"bslz4": "bslz4", "lz4": "lz4-h5", "none": "none"}
_TYPED_ARRAY_TAGS = {"uint8": 64, "uint16": 69, "uint32": 70, "float32": 85}
_MAP = 0xA0
"""What CBOR adds to the number of fields, below 24, for a map's first byte."""
_CLOCK_HZ = 50_000_000
_TICKS = _CLOCK_HZ // 1000
"""A frame's time, as the detector says, whatever the ``rate``."""


def simulate_dectris_v2(
    feed: FrameFeed,
    address: str = "tcp://127.0.0.1:31001",
    *,
    compression: Compression = "bslz4",
    channels: Sequence[str] = ("threshold_1",),
    **options: Unpack[Options],
) -> None:
    """Be a DECTRIS detector: listen, and stream a feed's frames to whoever connects.

    Args:
        feed: what the detector sees.
        address: where to listen.
        compression: of the images.
        channels: names of the threshold channels. The first one shows the feed; each further one
            half the counts of the one before, as higher thresholds count fewer electrons.
        options: see :class:`~prenet4d_server.simulators.base.Options`.

    Raises:
        BindError: the address is in use, or not this machine's.
        ConfigError: an option makes no sense.
        NoAnswer: nobody takes what is sent.
    """
    if compression not in CODECS:
        raise ConfigError(f"There is no compression {compression!r}; use {', '.join(CODECS)}.")
    detector = _DectrisV2(feed, compression, channels)
    run(detector, feed, lambda socket: bind(socket, address, "the detector's address"), options)


class _DectrisV2:
    frames_per_message = 1

    def __init__(
        self,
        feed: FrameFeed,
        compression: Compression,
        channels: Sequence[str],
    ) -> None:
        self._feed = feed
        self._compression = compression
        self._channels = channels
        self._began = datetime.now(UTC)
        self._life = uuid.uuid4().hex[:12].upper()
        self._same_fields: dict[int, bytes] = {}
        """Series → how all its image messages begin."""

    def start(self, series: int) -> Iterator[Parts]:
        same = {
            "type": "image",
            "real_time": [_TICKS, _CLOCK_HZ],
            "series_date": self._began,
            "series_id": series,
            "series_unique_id": self._unique(series),
        }
        # Nine fields in all, with the four that change.
        self._same_fields = {series: bytes([_MAP + 9]) + cbor2.dumps(same)[1:]}
        height, width = self._feed.frame_shape
        dtype = self._feed.dtype
        frame_time = _TICKS / _CLOCK_HZ
        message: dict[str, Any] = {
            "type": "start",
            "arm_date": self._began,
            "beam_center_x": (width - 1) / 2,
            "beam_center_y": (height - 1) / 2,
            "channels": list(self._channels),
            "count_time": frame_time,
            "detector_description": "Simulated DECTRIS detector (prenet4d)",
            "detector_serial_number": self._life,
            "frame_time": frame_time,
            "image_dtype": dtype.name,
            "image_size_x": width,
            "image_size_y": height,
            "number_of_images": self._feed.n_frames,
            "series_id": series,
            "series_unique_id": self._unique(series),
            "threshold_energy": {
                name: 4000.0 * (number + 1) for number, name in enumerate(self._channels)
            },
        }
        if dtype.kind == "u":
            message["saturation_value"] = int(np.iinfo(dtype).max) - 1
        if self._feed.pixel_mask is not None:
            bad = (~self._feed.pixel_mask).astype(np.uint32)
            message["pixel_mask"] = {name: _array(bad, "bslz4") for name in self._channels}
        yield [cbor2.dumps(message)]

    def encode(self, frames: Frames, *, corrupt: bool = False) -> bytes:
        """The message's last field, which is all of it that is large."""
        images = {
            name: _array(
                frames[0] >> number if frames.dtype.kind == "u" else frames[0] / 2**number,
                self._compression,
                corrupt=corrupt,
            )
            for number, name in enumerate(self._channels)
        }
        return cbor2.dumps("data") + cbor2.dumps(images)

    def message(self, series: int, first: int, encoded: bytes) -> Parts:
        begin = first * _TICKS
        fields = {
            "image_id": first,
            "start_time": [begin, _CLOCK_HZ],
            "stop_time": [begin + _TICKS, _CLOCK_HZ],
        }
        return [self._same_fields[series] + cbor2.dumps(fields)[1:] + encoded]

    def end(self, series: int) -> Iterator[Parts]:
        fields = {"series_id": series, "series_unique_id": self._unique(series)}
        yield [cbor2.dumps({"type": "end", **fields})]

    def _unique(self, series: int) -> str:
        return f"{self._life}-{series}"


def _array(pixels: Frames, compression: Compression, *, corrupt: bool = False) -> CBORTag:
    content: Any = compress(pixels, CODECS[compression])
    if corrupt:
        content = content[: len(content) // 2]
    if compression != "none":
        element_size = pixels.itemsize if compression == "bslz4" else 0
        content = CBORTag(COMPRESSION, [compression, element_size, content])
    typed = CBORTag(_TYPED_ARRAY_TAGS[pixels.dtype.name], content)
    return CBORTag(ROW_MAJOR, [list(pixels.shape), typed])
