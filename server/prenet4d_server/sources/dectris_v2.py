"""DECTRIS Stream V2: one CBOR map a ZeroMQ message, images of one or more threshold channels.

Published by DECTRIS in github.com/dectris/documentation (stream_v2, cbor); typed arrays and
multi-dimensional arrays are RFC 8746's. A detector speaks it on port 31001 once its stream is
configured with ``format = "cbor"``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cbor2
import numpy as np
from cbor2 import CBORTag

from prenet4d_server.errors import BadMessage, BadStart, CorruptFrame, WrongFrame
from prenet4d_server.sources.compression import Buffer, Codec
from prenet4d_server.sources.dectris import (
    FRAME_TYPES,
    Announcement,
    DectrisSource,
    number,
    positive,
    scalars,
    sides,
    text,
)
from prenet4d_server.sources.encoded import EncodedFrame, EventList
from prenet4d_server.sources.zmq_source import MAX_BYTES

COMPRESSION = 56500
"""DECTRIS' tag around ``[algorithm, element size, bytes]``, in place of a byte string."""
ROW_MAJOR, COLUMN_MAJOR = 40, 1040
"""Tags around ``[[h, w], typed array]``."""
TYPED_ARRAYS: dict[int, np.dtype[Any]] = {
    64: np.dtype("u1"),
    65: np.dtype(">u2"),
    66: np.dtype(">u4"),
    68: np.dtype("u1"),  # "clamped", which concerns writing only
    69: np.dtype("<u2"),
    70: np.dtype("<u4"),
    81: np.dtype(">f4"),
    85: np.dtype("<f4"),
}

_MAX = 1 << 31
"""No side of an image and no element of it is as large."""
_COLUMN_MAJOR = {ROW_MAJOR: False, COLUMN_MAJOR: True}
_CODECS: dict[str, Codec] = {"bslz4": "bslz4", "lz4": "lz4-h5"}
_IMAGE = b"dtypeeimage"
"""``"type": "image"`` in CBOR, which begins an image message."""


class DectrisV2Source(DectrisSource):
    """A :class:`~prenet4d_server.sources.base.Source` for DECTRIS Stream V2.

    Args:
        address: ``tcp://detector:31001``.
        channel: which threshold channel's images to take, by name or by its number from 0 in the
            order in which a series' start names them; the first by default.
        scan_shape: ``(ny, nx)``, which the detector does not know.
        gain: counts per electron.
        max_bytes: larger messages are refused.

    Raises:
        ConfigError: the address makes no sense.
    """

    def __init__(
        self,
        address: str,
        *,
        channel: str | int | None = None,
        scan_shape: tuple[int, int] | None = None,
        gain: float = 1.0,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        super().__init__(address, scan_shape=scan_shape, gain=gain, max_bytes=max_bytes)
        self._channel = channel
        self._chosen: str | None = None
        """The channel's name, as the last start had it."""

    def _read(self, parts: Sequence[Buffer], events: EventList) -> None:
        data = bytes(parts[0])
        refusal = CorruptFrame if _IMAGE in data[:32] else BadMessage
        self._refuse_oversize(parts, refusal)
        try:
            message = cbor2.loads(data)
        except (cbor2.CBORDecodeError, ValueError, TypeError, RecursionError) as error:
            raise refusal(f"A Stream V2 message is not readable as CBOR: {error}.") from None
        if len(parts) != 1 or not isinstance(message, dict):
            raise refusal("A Stream V2 message is one CBOR map in one part; this one is not.")
        kind = message.get("type")
        if kind == "image":
            self._read_image(message, events)
        elif kind == "start":
            self._begin(self._read_start(message), events)
        elif kind == "end":
            self._finish(_series(message), events)
        else:
            raise BadMessage(f"Stream V2 has no message type {text(kind)!r:.40}.")

    def _read_image(self, message: Mapping[str, Any], events: EventList) -> None:
        index, data = message.get("image_id"), message.get("data")
        if type(index) is not int or not isinstance(data, dict):
            raise CorruptFrame("An image message lacks its number (image_id) or its data.")
        # Images may list their channels in another order than the start; where none came, theirs
        # has to do.
        name = self._choose(data) if self._chosen is None else self._chosen
        if name is None or name not in data:
            raise WrongFrame(self._no_channel(data))
        self._take_image(_series(message), index, _read_array(data[name]), events)

    def _read_start(self, message: Mapping[str, Any]) -> Announcement:
        channels = message.get("channels")
        if not isinstance(channels, list) or not all(isinstance(name, str) for name in channels):
            raise BadStart("The start message does not name its channels.")
        channel = self._chosen = self._choose(channels)
        if channel is None:
            raise BadStart(self._no_channel(channels))
        dtype = message.get("image_dtype")
        if dtype is not None and _dtype_name(dtype) not in FRAME_TYPES:
            raise BadStart(f"Images of type {text(dtype)!r:.40} are not supported.")
        # What is said for each channel is, in the metadata, said for the chosen one.
        fields = {
            key: value.get(channel) if isinstance(value, dict) else value
            for key, value in message.items()
            if key != "type"
        }
        mask = fields.get("pixel_mask")
        return Announcement(
            series=_series(message),
            frame_shape=sides(message.get("image_size_x"), message.get("image_size_y")),
            dtype=None if dtype is None else FRAME_TYPES[_dtype_name(dtype)],
            expected_frames=positive(message.get("number_of_images")),
            saturation_value=number(message.get("saturation_value")),
            detector=text(message.get("detector_description") or "DECTRIS"),
            mask=None if mask is None else _read_mask(mask),
            masks=fields.get("pixel_mask_enabled") is True,
            metadata=scalars({**fields, "channel": channel}),
        )

    def _choose(self, channels: Sequence[Any] | Mapping[Any, Any]) -> Any:
        """The name of the channel asked for, or ``None``: it is not among ``channels``."""
        if isinstance(self._channel, str):
            return self._channel if self._channel in channels else None
        number = self._channel or 0
        return list(channels)[number] if 0 <= number < len(channels) else None

    def _no_channel(self, channels: Sequence[Any] | Mapping[Any, Any]) -> str:
        return (
            f"There is no channel {self._chosen or self._channel!r}; the detector sends "
            f"{', '.join(map(text, channels)) or 'none'}."
        )


def _series(message: Mapping[str, Any]) -> str:
    series = message.get("series_unique_id") or message.get("series_id")
    if not isinstance(series, str | int):
        error = CorruptFrame if message.get("type") == "image" else BadMessage
        raise error(f"The {message.get('type')} message does not say which series it belongs to.")
    return text(series)


def _read_array(value: Any) -> EncodedFrame:
    """An image or a mask, not decompressed yet.

    Raises:
        CorruptFrame: it is no two-dimensional typed array.
    """
    try:
        column_major = _COLUMN_MAJOR[value.tag]
        (height, width), typed = value.value
        dtype, content = TYPED_ARRAYS[typed.tag], typed.value
    except (AttributeError, KeyError, TypeError, ValueError):
        height = width = dtype = None
    if dtype is None or not all(
        type(side) is int and 0 <= side <= _MAX for side in (height, width)
    ):
        raise CorruptFrame("The data are no two-dimensional array of a supported type.")
    codec: Codec = "none"
    element_size = 1
    if isinstance(content, CBORTag) and content.tag == COMPRESSION:
        try:
            algorithm, element_size, content = content.value
            codec = _CODECS[algorithm]
        except (KeyError, TypeError, ValueError):
            raise CorruptFrame("The data are compressed in a way that is not supported.") from None
    if type(element_size) is not int or not 0 <= element_size <= _MAX:
        raise CorruptFrame("The compressed data do not say the size of their elements.")
    if not isinstance(content, bytes):
        raise CorruptFrame("The data are neither bytes nor compressed bytes.")
    return EncodedFrame(content, codec, element_size, (height, width), dtype, column_major)


def _read_mask(value: Any) -> EncodedFrame:
    try:
        return _read_array(value)
    except CorruptFrame as error:
        raise BadStart(f"The pixel mask is unreadable. {error}") from None


def _dtype_name(said: object) -> str:
    return text(said).removesuffix("le").removesuffix("be")
