"""What correctors ask of the arrays and shapes that they are given, without any need of torch."""

from __future__ import annotations

from operator import index
from typing import Any

import numpy as np
import numpy.typing as npt

from prenet4d_engines.errors import FrameError

DTYPES = ("uint8", "uint16", "uint32", "float32")
"""Of the frames."""


def checked_frame_shape(frame_shape: tuple[int, int]) -> tuple[int, int]:
    """Return a frame's shape ``(h, w)`` as two integers.

    Raises:
        FrameError: it is no pair of integers from 8 on.
    """
    try:
        h, w = (index(side) for side in frame_shape)
    except (TypeError, ValueError):
        h = w = 0
    if min(h, w) < 8:
        raise FrameError(
            f"A frame's shape is (rows, columns), at least 8 × 8 pixels, not {frame_shape}."
        )
    return h, w


def checked_scan_shape(scan_shape: tuple[int, int]) -> tuple[int, int]:
    """Return a scan's shape ``(ny, nx)`` as two integers.

    Raises:
        FrameError: it is no pair of positive integers.
    """
    try:
        ny, nx = (index(side) for side in scan_shape)
    except (TypeError, ValueError):
        ny = nx = 0
    if min(ny, nx) < 1:
        raise FrameError(f"A scan's shape is (rows, columns) of probe positions, not {scan_shape}.")
    return ny, nx


def checked_mask(
    pixel_mask: npt.ArrayLike | None, frame_shape: tuple[int, int]
) -> npt.NDArray[np.bool_] | None:
    """Return a pixel mask (h, w) bool, or ``None`` where it masks nothing.

    Raises:
        FrameError: it is no bool array of the frames' shape, or leaves no pixel.
    """
    if pixel_mask is None:
        return None
    try:
        mask = np.asarray(pixel_mask)
    except ValueError:  # rows of unlike lengths
        raise FrameError("The pixel mask is (h, w) bool; no array can be made of this.") from None
    if mask.shape != frame_shape:
        raise FrameError(f"The pixel mask is {mask.shape} and the frames are {frame_shape}.")
    if mask.dtype != np.bool_:
        raise FrameError(
            f"The pixel mask is bool, True where a pixel can be trusted; {mask.dtype} came. "
            "Where 0 marks the good pixels, as in DECTRIS files, give mask == 0."
        )
    if not mask.any():
        raise FrameError("The pixel mask leaves no valid pixel; True marks the valid ones.")
    return None if mask.all() else mask


def check_frames(
    frames: npt.NDArray[Any], indices: npt.NDArray[np.int64], frame_shape: tuple[int, int]
) -> None:
    """Say whether these are frames (n, h, w) that can be corrected, with an index (n,) each.

    Raises:
        FrameError: the arrays are not those of an acquisition with frames of this shape.
    """
    for given in (frames, indices):
        if not isinstance(given, np.ndarray):
            raise FrameError(
                f"Frames and indices come as numpy arrays, not as {type(given).__name__}: "
                "make them so with numpy.asarray."
            )
    if frames.ndim != 3 or frames.shape[1:] != frame_shape:
        raise FrameError(
            f"Frames come as (n, {frame_shape[0]}, {frame_shape[1]}), not {frames.shape}."
        )
    if frames.dtype.name not in DTYPES:
        raise FrameError(f"Frames come as {', '.join(DTYPES)}, not {frames.dtype}.")
    if indices.shape != frames.shape[:1] or indices.dtype.kind not in "iu":
        raise FrameError(
            f"Each of the {len(frames)} frames needs one integer index; "
            f"{indices.dtype} {indices.shape} came."
        )
