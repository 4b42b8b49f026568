"""What every file format is turned into: frames of one dtype, read a block at a time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_server.errors import FileError

Pixels: TypeAlias = npt.NDArray[Any]
Mask: TypeAlias = npt.NDArray[np.bool_]
Metadata: TypeAlias = Mapping[str, str | int | float | bool | None]

RECORDING = "prenet4d recording"
"""What the recorder's files say under ``format``."""
CHOOSE = "Name one as the dataset, or put it into a file of its own."
"""What to do where several arrays could be the scan."""
BLOCK_BYTES = 16 << 20
"""How much ``blocks()`` reads at a time unless told."""
_SMALLEST, _LARGEST = 8, 8192
_LONGEST_TEXT = 10_000


class ScanFile(ABC):
    """A scan in a file, read lazily; used as a context manager.

    Frames come as the wire knows them: unsigned integers of up to 32 bits stay what they are (in
    native byte order), bool becomes uint8, and everything else becomes float32: other floats, and
    signed or 64-bit integers, whose range nobody knows before the last frame is read (exact below
    2²⁴ counts). The dtype hence depends on the file's dtype alone, never on its values.
    """

    def __init__(
        self,
        path: Path,
        shape: tuple[int, ...],
        stored: np.dtype[Any],
        *,
        scan_shape: tuple[int, int] | None = None,
        pixel_mask: Mask | None = None,
        metadata: Metadata | None = None,
    ) -> None:
        """Check that an array of this shape and dtype can be a scan.

        Args:
            path: the file.
            shape: ``(h, w)``, ``(n, h, w)`` or ``(ny, nx, h, w)``.
            stored: the dtype in the file.
            scan_shape: ``(ny, nx)`` as the user says it, if they do.
            pixel_mask: (h, w), ``True`` where a pixel can be trusted.
            metadata: what the file says about the acquisition.
        """
        if not 2 <= len(shape) <= 4:
            raise FileError(
                f"{path} holds an array of shape {shape}; a scan is (h, w), (n, h, w) or "
                "(ny, nx, h, w)."
            )
        h, w = shape[-2:]
        if not (_SMALLEST <= h <= _LARGEST and _SMALLEST <= w <= _LARGEST):
            raise FileError(
                f"{path} holds an array of shape {shape}: its last two axes, {h} × {w}, are no "
                f"detector of {_SMALLEST} to {_LARGEST} pixels a side. The frames' rows and "
                "columns must be the last two axes."
            )
        self.path = path
        self.frame_shape: tuple[int, int] = (h, w)
        self.n_frames = int(np.prod(shape[:-2], dtype=np.int64))
        self.dtype = wire_dtype(stored, path)
        if self.n_frames == 0:
            raise FileError(
                f"{path} holds no frames: its shape is {shape}. Wait until it is written, or "
                "choose another file."
            )
        self.scan_shape = _scan_shape(path, shape, scan_shape, self.n_frames)
        self.pixel_mask = pixel_mask
        self.metadata = _sendable(metadata or {})
        self.corrected = False
        """Whether prenet4d recorded it: its patterns are centered and undistorted already."""

    @property
    def saturation_value(self) -> float | None:
        """Counts at and above which a pixel is saturated, where the file says so (NXdetector)."""
        said = self.metadata.get("saturation_value")
        if self.corrected or not isinstance(said, int | float) or not 0 < said < math.inf:
            return None
        return float(said)

    @property
    def warning(self) -> str:
        """What to mind where its patterns are sent to be corrected; empty where nothing."""
        if not self.corrected:
            return ""
        return (
            f"Mind that {self.path} was recorded by prenet4d: its patterns are corrected once more."
        )

    @abstractmethod
    def _fill(self, start: int, out: Pixels) -> None:
        """Put ``len(out)`` frames from ``start`` on into ``out``; may raise OSError."""

    def read_into(self, start: int, out: Pixels) -> None:
        """Read the frames ``start … start + len(out)`` into ``out``; safe from several threads.

        Args:
            start: the first frame's index.
            out: (n, h, w) of ``dtype``, C-contiguous; every pixel is overwritten.

        Raises:
            FileError: the frames cannot be read.
        """
        stop = start + len(out)
        if start < 0 or stop > self.n_frames:
            raise FileError(
                f"{self.path} has {self.n_frames} frames; {start} to {stop} were asked for."
            )
        try:
            self._fill(start, out)
        except OSError as error:
            raise FileError(
                f"Frames {start} to {stop} of {self.path} cannot be read: {error}. "
                "The file is damaged or its disk is gone."
            ) from error

    def read(self, start: int, stop: int) -> Pixels:
        """Read the frames ``start … stop`` as a new array (stop - start, h, w) of ``dtype``."""
        out = np.empty((stop - start, *self.frame_shape), self.dtype)
        self.read_into(start, out)
        return out

    def blocks(self, size: int | None = None) -> Iterator[Pixels]:
        """Read all frames in order, ``size`` of them (default: some 16 MB) at a time."""
        if size is None:
            h, w = self.frame_shape
            size = max(1, BLOCK_BYTES // (h * w * self.dtype.itemsize))
        for start in range(0, self.n_frames, size):
            yield self.read(start, min(start + size, self.n_frames))

    def close(self) -> None:  # noqa: B027  (what is mapped has nothing to close)
        """Give the file back; may be called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def refuse_dataset(path: Path, dataset: str | None) -> None:
    """Raise where a dataset is named in a file that has one array alone.

    Raises:
        FileError: one is named.
    """
    if dataset is not None:
        raise FileError(f"{path} holds one array, without a name: leave the dataset out.")


def or_partial(frames: int) -> str:
    """The end of a sentence: how to read a file's whole frames; empty where there are none."""
    if not frames:
        return ""
    return f"; in Python, open_scan(…, partial=True) reads the {frames} frames that are whole"


def wire_dtype(stored: np.dtype[Any], path: Path) -> np.dtype[Any]:
    """The dtype in which frames stored as ``stored`` are handed out; see :class:`ScanFile`.

    Raises:
        FileError: values of this dtype are not counts.
    """
    if stored.kind == "b":
        return np.dtype(np.uint8)
    if stored.kind == "u" and stored.itemsize <= 4:
        return stored.newbyteorder("=")
    if stored.kind in "iuf":
        return np.dtype(np.float32)
    raise FileError(f"{path} holds values of dtype {stored}; counts are integers or floats.")


def as_text(found: str | bytes) -> str:
    """Text that any receiver can decode, of text or a path that may not be UTF-8."""
    if isinstance(found, bytes):
        return found.decode("utf-8", "replace")
    return found.encode("utf-8", "replace").decode()


def _sendable(metadata: Metadata) -> Metadata:
    """What messages can carry of it: UTF-8, not too long, and no integers of more than 64 bits."""
    return {
        as_text(name): as_text(value)[:_LONGEST_TEXT] if isinstance(value, str) else value
        for name, value in metadata.items()
        if not isinstance(value, int) or -(2**63) <= value < 2**64
    }


def copy_frames(array: Any, start: int, out: Pixels) -> None:
    """Copy frames of a 2D, 3D or 4D array, anything that slices like NumPy's, into ``out``."""
    if array.ndim == 2:
        _cast(array[:], out[0] if len(out) else out)
    elif array.ndim == 3:
        _cast(array[start : start + len(out)], out)
    else:
        nx = array.shape[1]
        done = 0
        while done < len(out):
            y, x = divmod(start + done, nx)
            n = min(nx - x, len(out) - done)
            _cast(array[y, x : x + n], out[done : done + n])
            done += n


def make_counts(frames: Pixels) -> None:
    """Make counts of patterns that prenet4d recorded, in place.

    Interpolation undershoots zero beside bright pixels, and pixels without a source may be NaN: the
    service refuses both in what a detector sends. They become 0.
    """
    if frames.dtype.kind == "f":
        np.nan_to_num(frames, copy=False, nan=0.0, posinf=np.inf)
        np.maximum(frames, 0, out=frames)


def _cast(pixels: Pixels, out: Pixels) -> None:
    # A float64 beyond float32's range becomes inf, which the intake refuses as bad counts.
    with np.errstate(over="ignore"):
        np.copyto(out, pixels, casting="unsafe")


def _scan_shape(
    path: Path, shape: tuple[int, ...], asked: tuple[int, int] | None, n_frames: int
) -> tuple[int, int] | None:
    found = (shape[0], shape[1]) if len(shape) == 4 else None
    if asked is None:
        return found
    ny, nx = asked
    if ny < 1 or nx < 1 or ny * nx < n_frames:
        raise FileError(
            f"{path} has {n_frames} frames{f' ({found[0]} × {found[1]})' if found else ''}, more "
            f"than a scan of {ny} × {nx} takes. Give the scan's shape as rows × columns."
        )
    if found and found[0] > 1 and nx != found[1] and ny * nx != n_frames:
        raise FileError(
            f"{path} is a scan of {found[0]} × {found[1]}, whose lines {ny} × {nx} would tear "
            "apart. Leave the scan's shape out: the file knows it."
        )
    return asked
