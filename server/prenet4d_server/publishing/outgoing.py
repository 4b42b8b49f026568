"""What the pipeline has to say, as messages of the wire protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from prenet4d_client import messages
from prenet4d_client.messages import Counters, Ellipticity, Latencies
from prenet4d_client.wire import Array
from prenet4d_engines.batch import CorrectedBatch
from prenet4d_server.ingest.notices import Ended, Started

Outgoing: TypeAlias = tuple[messages.Header, Mapping[str, Array] | None]
"""A header without publisher and sequence, and its arrays, which must not change any more.

``None`` in their place: nobody wanted them when they were made. The message is counted, so that
whoever comes later sees the gap, and not sent.
"""


def acquisition_start(started: Started, provenance: Mapping[str, Any]) -> Outgoing:
    """An acquisition begins."""
    start = messages.AcquisitionStart(
        acquisition_id=started.acquisition_id,
        frame_shape=started.frame_shape,
        dtype=started.dtype,  # type: ignore[arg-type] # the model checks it
        scan_shape=started.scan_shape,
        expected_frames=started.expected_frames,
        saturation_value=started.saturation_value,
        gain=started.gain,
        detector=started.detector,
        metadata={"series": started.series, **started.metadata},
        provenance=dict(provenance),
    )
    mask = started.pixel_mask
    return start, {} if mask is None else {"pixel_mask": mask}


def acquisition_end(ended: Ended, counters: Counters) -> Outgoing:
    """An acquisition is over, and this became of its frames."""
    end = messages.AcquisitionEnd(
        acquisition_id=ended.acquisition_id,
        aborted=ended.aborted,
        reason=ended.reason,
        frames=ended.sent,
        counters=counters,
    )
    return end, {}


def ellipticity_of(result: CorrectedBatch) -> Ellipticity:
    """The distortion that was taken out of a batch."""
    return Ellipticity(
        ratio=result.ellipticity.ratio,
        theta=result.ellipticity.theta,
        ratio_sigma=result.ratio_sigma,
        theta_sigma=result.theta_sigma,
    )


def telemetry(
    started: Started,
    result: CorrectedBatch,
    number: int,
    *,
    latencies: Latencies,
    frames_per_second: float,
    backlog: int,
    counters: Counters,
) -> Outgoing:
    """What was found in a batch, and how the service is doing."""
    header = messages.Telemetry(
        acquisition_id=started.acquisition_id,
        batch=number,
        frame_shape=started.frame_shape,
        scan_shape=started.scan_shape,
        expected_frames=started.expected_frames,
        reference_center=result.reference_center,
        ellipticity=ellipticity_of(result),
        state=result.state,
        patterns_averaged=result.patterns_averaged,
        latency=latencies,
        frames_per_second=frames_per_second,
        backlog=backlog,
        counters=counters,
    )
    arrays: dict[str, Array] = {
        "indices": result.indices,
        "center": result.center,
        "center_sigma": result.center_sigma,
        "tracked": result.tracked,
        "tracked_sigma": result.tracked_sigma,
        "shift": result.shift,
        "dose": result.dose,
        "flags": result.flags,
    }
    return header, arrays


def patterns(
    kind: type[messages.Corrected] | type[messages.Aligned],
    started: Started,
    number: int,
    indices: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32] | None,
) -> Outgoing:
    """A batch's patterns; ``values`` is ``None`` where nobody wants them."""
    header = kind(
        acquisition_id=started.acquisition_id, batch=number, scan_shape=started.scan_shape
    )
    return header, None if values is None else {"indices": indices, "patterns": values}


def mean(
    acquisition_id: str,
    values: npt.NDArray[np.float32],
    averaged: int,
    ellipticity: Ellipticity,
) -> Outgoing:
    """The running mean of ``averaged`` patterns."""
    header = messages.Mean(
        acquisition_id=acquisition_id, patterns=averaged, ellipticity=ellipticity
    )
    return header, {"mean": values}


def preview(
    started: Started, result: CorrectedBatch, raw: npt.NDArray[Any], longest_side: int
) -> Outgoing:
    """The last frame of a batch, binned to at most so many pixels a side, in memory of its own.

    Args:
        started: the acquisition.
        result: what became of the batch.
        raw: (h, w) its last frame as it came.
        longest_side: in pixels.
    """
    binning = -(-max(raw.shape) // longest_side)
    center = np.asarray(result.reference_center) - result.shift[-1]
    header = messages.Preview(
        acquisition_id=started.acquisition_id,
        index=int(result.indices[-1]),
        scan_shape=started.scan_shape,
        frame_shape=started.frame_shape,
        binning=binning,
        center=(float(center[0]), float(center[1])),
        reference_center=result.reference_center,
        ellipticity=ellipticity_of(result),
        dose=float(result.dose[-1]),
    )
    return header, {
        "raw": _binned(raw, binning),
        "corrected": _binned(result.corrected[-1], binning),
    }


def _binned(image: npt.NDArray[Any], binning: int) -> npt.NDArray[np.float32]:
    """The means of (binning, binning) pixels, in new memory."""
    h, w = (side // binning for side in image.shape)
    blocks = image[: h * binning, : w * binning].reshape(h, binning, w, binning)
    means: npt.NDArray[np.float32] = blocks.mean(axis=(1, 3), dtype=np.float32)
    return means
