"""Merlin (Quantum Detectors, Medipix3) ``.mib`` files, mapped into memory.

A file is a row of frames, each a text header ``MQ1,sequence,header bytes,chips,width,height,type,
layout,chip select,timestamp,exposure,…[,MQ1A,timestamp,exposure in ns,bits]``, NUL-padded to the
size that its third field states, and big-endian pixels. ``U08``, ``U16`` and ``U32`` frames lie as
they are seen. ``R64`` is the read-out's raw form of 1, 6 or 12 bits: big-endian 64-bit words whose
lowest bits, byte or 16 bits are their first pixel. A raw quad comes as 256 rows of the four chips
side by side, fourth (bottom right) first, and its lower two chips stand on their heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prenet4d_server.errors import FileError, HalfWrittenFile
from prenet4d_server.files.base import Metadata, Pixels, ScanFile, copy_frames, or_partial

_PLAIN: dict[str, np.dtype[Any]] = {
    "U08": np.dtype(">u1"),
    "U16": np.dtype(">u2"),
    "U32": np.dtype(">u4"),
}
_RAW: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint8),
    6: np.dtype(np.uint8),
    12: np.dtype(np.uint16),
}
_MAX_HEADER = 1 << 16


@dataclass(frozen=True, slots=True)
class MibHeader:
    """What a frame's header says; ``width`` and ``height`` are those of the bytes that follow."""

    sequence: int
    header_bytes: int
    chips: int
    width: int
    height: int
    kind: str
    """``U08``, ``U16``, ``U32`` or ``R64``."""
    layout: str
    """``1x1``, ``2x2``, ``2x2G``, …"""
    timestamp: str
    exposure_s: float
    bits: int | None
    """The counters' depth, where the header has its newer part."""

    @classmethod
    def parse(cls, raw: bytes, name: str) -> MibHeader:
        """Read a header from the first bytes of a frame.

        Raises:
            FileError: these are not the bytes of a Merlin header; ``name`` says whose they are.
        """
        try:
            magic, _, announced = raw[:16].split(b",")[:3]
            size = int(announced)
            fields = [field.strip(" \0") for field in raw[:size].decode("latin-1").split(",")]
            newer = fields.index("MQ1A") if "MQ1A" in fields else None
            header = cls(
                sequence=int(fields[1]),
                header_bytes=size,
                chips=int(fields[3]),
                width=int(fields[4]),
                height=int(fields[5]),
                kind=fields[6],
                layout=fields[7],
                timestamp=fields[9],
                exposure_s=float(fields[10]),
                bits=int(fields[newer + 3]) if newer is not None else None,
            )
        except (ValueError, IndexError) as error:
            raise FileError(
                f"{name} is no Merlin file, or is damaged: fields of its header are missing, "
                "or are no numbers."
            ) from error
        sizes = (header.width, header.height, header.header_bytes, header.chips)
        if magic != b"MQ1" or not all(0 < size <= _MAX_HEADER for size in sizes):
            raise FileError(
                f"{name} has a header that is not Merlin's: it announces {header.header_bytes} "
                f"bytes of header and {header.width} × {header.height} pixels."
            )
        return header

    @property
    def frame_shape(self) -> tuple[int, int]:
        """``(h, w)`` of the frames as they are seen."""
        if self.kind == "R64" and self.chips == 4:
            return 2 * self.height, self.width // 2
        return self.height, self.width


class MerlinScan(ScanFile):
    """A scan in a ``.mib`` file."""

    def __init__(self, path: Path, *, scan_shape: tuple[int, int] | None, partial: bool) -> None:
        """Map the file; see ``open_scan`` for the arguments and errors."""
        with path.open("rb") as file:
            header = MibHeader.parse(file.read(_MAX_HEADER), str(path))
        self._header = header
        pixels, stored = _layout(header, path)
        record = np.dtype([("magic", "S4"), ("header", f"V{header.header_bytes - 4}"), pixels])
        size = path.stat().st_size
        whole, rest = divmod(size, record.itemsize)
        if whole == 0 or (rest and not partial):
            raise HalfWrittenFile(
                f"{path} ends in the middle of a frame: {rest} of {record.itemsize} bytes of it "
                f"are there, after {whole} whole frames. Wait until it is written or copy it "
                f"again{or_partial(whole)}."
            )
        said = _read_hdr(path.with_suffix(".hdr"))
        super().__init__(
            path,
            (whole, *header.frame_shape),
            stored,
            scan_shape=scan_shape or _scan_shape(said, whole),
            metadata=_metadata(header, said),
        )
        self._frames = np.memmap(path, record, mode="r", shape=(whole,))

    def _fill(self, start: int, out: Pixels) -> None:
        frames = self._frames[start : start + len(out)]
        wrong = np.flatnonzero(frames["magic"] != b"MQ1,")
        if len(wrong):
            raise FileError(
                f"Frame {start + wrong[0]} of {self.path} does not begin with a header: "
                "the file is damaged, or its frames are not all of one size."
            )
        pixels = frames["pixels"]
        if self._header.kind == "R64":
            pixels = _decode_raw(pixels, self._header)
        copy_frames(pixels, 0, out)


def _layout(header: MibHeader, path: Path) -> tuple[tuple[str, Any, Any], np.dtype[Any]]:
    """How a frame's pixels lie in the file, as a field of a NumPy record, and their dtype."""
    h, w = header.height, header.width
    if header.kind in _PLAIN:
        return ("pixels", _PLAIN[header.kind], (h, w)), _PLAIN[header.kind]
    if header.kind != "R64":
        raise FileError(
            f"{path} holds frames of type {header.kind!r}; U08, U16, U32 and R64 can be read."
        )
    if header.bits not in _RAW:
        raise FileError(
            f"{path} holds raw frames of {header.bits or 'an unknown number of'} bits; raw frames "
            "of 1, 6 and 12 bits can be read. Save 24-bit frames as U32."
        )
    quad = header.chips == 4 and header.layout.startswith("2x2") and w == 4 * h
    if not quad and header.chips != 1:
        raise FileError(
            f"{path} holds raw frames of {header.chips} chips laid out as {header.layout!r} in "
            f"{w} × {h} pixels; one chip and quads (2x2) can be read. Save them as U16."
        )
    if (h * w) % 64:
        raise FileError(f"{path} announces raw frames of {w} × {h} pixels: no whole 64-bit words.")
    words = h * w // (64 if header.bits == 1 else 8 // _RAW[header.bits].itemsize)
    return ("pixels", ">u8", (words,)), _RAW[header.bits]


def _decode_raw(words: Pixels, header: MibHeader) -> Pixels:
    """Turn (n, words) big-endian 64-bit words into frames (n, h, w)."""
    little = np.ascontiguousarray(words.astype("<u8"))
    if header.bits == 1:
        pixels = np.unpackbits(little.view(np.uint8), axis=-1, bitorder="little")
    else:
        pixels = little.view(_RAW[header.bits or 0].newbyteorder("<"))
    n, h, w = len(words), header.height, header.width
    if header.chips == 1:
        return pixels.reshape(n, h, w)
    fourth, third, second, first = np.moveaxis(pixels.reshape(n, h, 4, h), 2, 0)
    top = np.concatenate((first, second), axis=2)
    bottom = np.concatenate((third[:, ::-1, ::-1], fourth[:, ::-1, ::-1]), axis=2)
    return np.concatenate((top, bottom), axis=1)


def _read_hdr(path: Path) -> dict[str, str]:
    """The ``key:<tab>value`` lines of the file that Merlin writes beside a ``.mib``."""
    try:
        text = path.read_text("latin-1")
    except OSError:
        return {}
    pairs = (line.partition("\t") for line in text.splitlines())
    return {key.strip().rstrip(":"): value.strip() for key, tab, value in pairs if tab and value}


def _scan_shape(said: dict[str, str], n_frames: int) -> tuple[int, int] | None:
    """``(ny, nx)`` where the ``.hdr`` has one that the frames fit in."""

    def number(key: str) -> int:
        value = said.get(key, "")
        return int(value) if value.isdecimal() else 0

    ny, nx = number("ScanY"), number("ScanX")
    if not ny * nx:
        nx = number("Frames per Trigger (Number)")
        ny = number("Frames in Acquisition (Number)") // nx if nx > 1 else 0
    return (ny, nx) if ny * nx >= n_frames else None


def _metadata(header: MibHeader, said: dict[str, str]) -> Metadata:
    return {
        "detector": "Merlin",
        "chips": header.chips,
        "layout": header.layout,
        "counter_depth_bits": header.bits,
        "exposure_s": header.exposure_s,
        "started": header.timestamp,
        **{f"merlin: {key}": value for key, value in said.items()},
    }
