"""A simulated DECTRIS detector that speaks Stream V1 (JSON headers and blobs)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, TypeAlias, Unpack

import numpy as np

from prenet4d_server.errors import ConfigError
from prenet4d_server.simulators.base import FrameFeed, Frames, Options, Parts, run
from prenet4d_server.sockets import bind
from prenet4d_server.sources.compression import Codec, compress
from prenet4d_server.sources.dectris_v1 import HEADER_PARTS

Compression: TypeAlias = Literal["bslz4", "lz4", "none"]
HeaderDetail: TypeAlias = Literal["none", "basic", "all"]

CODECS: dict[Compression, Codec] = {"bslz4": "bslz4", "lz4": "lz4", "none": "none"}
_FRAME_TIME_S = 1e-3
"""What the detector says, whatever the ``rate``."""


def simulate_dectris_v1(
    feed: FrameFeed,
    address: str = "tcp://127.0.0.1:9999",
    *,
    compression: Compression = "bslz4",
    header_detail: HeaderDetail = "basic",
    **options: Unpack[Options],
) -> None:
    """Be a DECTRIS detector: listen, and stream a feed's frames to whoever connects.

    Args:
        feed: what the detector sees; its counts are uint8, uint16 or uint32.
        address: where to listen.
        compression: of the images.
        header_detail: how much a series' header says: nothing, the configuration, or that and the
            tables, the pixel mask among them.
        options: see :class:`~prenet4d_server.simulators.base.Options`.

    Raises:
        BindError: the address is in use, or not this machine's.
        ConfigError: an option makes no sense, or the feed has counts that this protocol lacks.
        NoAnswer: nobody takes what is sent.
    """
    if feed.dtype.kind != "u":
        raise ConfigError(f"Stream V1 has no {feed.dtype.name} images; use Stream V2 for them.")
    if compression not in CODECS:
        raise ConfigError(f"There is no compression {compression!r}; use {', '.join(CODECS)}.")
    if header_detail not in HEADER_PARTS:
        raise ConfigError(
            f"There is no header detail {header_detail!r}; use {', '.join(HEADER_PARTS)}."
        )
    detector = _DectrisV1(feed, compression, header_detail)
    run(detector, feed, lambda socket: bind(socket, address, "the detector's address"), options)


class _Image(NamedTuple):
    description: bytes
    blob: bytes
    digest: str


class _DectrisV1:
    frames_per_message = 1

    def __init__(
        self,
        feed: FrameFeed,
        compression: Compression,
        header_detail: HeaderDetail,
    ) -> None:
        self._feed = feed
        self._compression = compression
        self._detail = header_detail

    def start(self, series: int) -> Iterator[Parts]:
        head = {"htype": "dheader-1.0", "header_detail": self._detail, "series": series}
        parts = [_json(head), _json(self._configuration()), *self._tables()]
        yield parts[: HEADER_PARTS[self._detail]]

    def encode(self, frames: Frames, *, corrupt: bool = False) -> _Image:
        pixels = frames[0]
        blob = compress(pixels, CODECS[self._compression])
        if corrupt:
            blob = blob[: len(blob) // 2]
        encoding = {"bslz4": f"bs{8 * pixels.itemsize}-lz4<", "lz4": "lz4<", "none": "<"}
        description = _description("dimage_d-1.0", pixels)
        description |= {"encoding": encoding[self._compression], "size": len(blob)}
        return _Image(_json(description), blob, hashlib.md5(blob).hexdigest())

    def message(self, series: int, first: int, encoded: _Image) -> Parts:
        time_ns = round(_FRAME_TIME_S * 1e9)
        head = {"htype": "dimage-1.0", "series": series, "frame": first, "hash": encoded.digest}
        times = {
            "htype": "dconfig-1.0",
            "start_time": first * time_ns,
            "stop_time": (first + 1) * time_ns,
            "real_time": time_ns,
        }
        return [_json(head), encoded.description, encoded.blob, _json(times)]

    def end(self, series: int) -> Iterator[Parts]:
        yield [_json({"htype": "dseries_end-1.0", "series": series})]

    def _configuration(self) -> dict[str, Any]:
        height, width = self._feed.frame_shape
        return {
            "beam_center_x": (width - 1) / 2,
            "beam_center_y": (height - 1) / 2,
            "bit_depth_image": 8 * self._feed.dtype.itemsize,
            "compression": self._compression,
            "count_time": _FRAME_TIME_S,
            "countrate_correction_count_cutoff": int(np.iinfo(self._feed.dtype).max) - 1,
            "description": "Simulated DECTRIS detector (prenet4d)",
            "frame_time": _FRAME_TIME_S,
            "nimages": 1,
            "ntrigger": self._feed.n_frames,
            "threshold_energy": 4000.0,
            "trigger_mode": "exte",
            "x_pixels_in_detector": width,
            "y_pixels_in_detector": height,
        }

    def _tables(self) -> Iterator[bytes]:
        shape = self._feed.frame_shape
        mask = self._feed.pixel_mask
        bad = np.zeros(shape, np.uint32) if mask is None else (~mask).astype(np.uint32)
        tables = {
            "dflatfield-1.0": np.ones(shape, np.float32),
            "dpixelmask-1.0": bad,
            "dcountrate_table-1.0": np.array([[0, 1], [0, 1]], np.float32),
        }
        for kind, table in tables.items():
            yield _json(_description(kind, table))
            yield table.tobytes()


def _description(kind: str, pixels: Frames) -> dict[str, Any]:
    return {"htype": kind, "shape": list(pixels.shape[::-1]), "type": pixels.dtype.name}


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()
