"""The scan maps of the running acquisition, or of the last one: collected, published, handed out.

Used on the pipeline's thread; ``status`` may be read, and :meth:`Mapper.whole` called, from any.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np

from prenet4d_client import messages
from prenet4d_client.wire import Array
from prenet4d_engines.batch import CorrectedBatch
from prenet4d_engines.descan import Descan
from prenet4d_engines.errors import FrameError
from prenet4d_engines.maps import MAP_NAMES, MapAccumulator, Region
from prenet4d_server.errors import CommandFailed
from prenet4d_server.ingest.notices import Started
from prenet4d_server.monitoring.status import MapsStatus
from prenet4d_server.publishing.publisher import Publisher

DESCAN_EVERY_S = 3.0
_NONE_YET = "No acquisition has begun yet: there are no scan maps."
_NO_SHAPE = (
    "There are no scan maps of this acquisition: the shape of its scan is not known. Set "
    "source.scan_shape (prenet4d serve --scan 64x64), or send it with the acquisition's start."
)


class Mapper:
    """Collects each batch's figures, and publishes what has changed at a bounded rate.

    Args:
        publisher: where to.
        every_s: the least time between two updates.
    """

    def __init__(self, publisher: Publisher, every_s: float) -> None:
        self._publisher, self._every_s = publisher, every_s
        self._lock = threading.Lock()
        """Held where the maps' values, or what is said to be published of them, change."""
        self._maps: MapAccumulator | None = None
        self._why_not = _NONE_YET
        self._acquisition_id = ""
        self._detectors: messages.DetectorRadii | None = None
        self._descan: Descan | None = None
        self._published = 0
        """How many updates there were in the service's life: the next one's sequence number."""
        self._announced = False
        """Whether one of them was of this acquisition."""
        self._next = self._next_descan = 0.0
        self._tell()

    def begin(self, started: Started) -> None:
        """Start new maps for an acquisition."""
        maps, why_not = None, _NO_SHAPE
        if started.scan_shape is not None:
            try:
                maps, why_not = MapAccumulator(started.scan_shape), ""
            except (FrameError, MemoryError) as error:
                why_not = f"There are no scan maps of this acquisition: {error}"
        with self._lock:
            self._maps, self._why_not = maps, why_not
            self._acquisition_id = started.acquisition_id
            self._detectors, self._descan = None, None
            self._announced = False
        if not self._published:
            self._publish()  # an empty one: from here on there is a last one to answer with
        self._next_descan = time.monotonic() + DESCAN_EVERY_S
        self._tell()

    def add(self, result: CorrectedBatch, *, automatic: bool) -> None:
        """Enter a batch.

        Args:
            result: the batch.
            automatic: its detectors were found from the pattern.
        """
        if self._maps is None:
            return
        with self._lock:
            self._maps.add(result)
            if (radii := result.detectors) is not None:
                self._detectors = messages.DetectorRadii(
                    bright_field_radius=radii.bright_field_radius,
                    annular_inner=radii.annular_inner,
                    annular_outer=radii.annular_outer,
                    automatic=automatic,
                )

    def publish_if_due(self) -> None:
        """Publish what has changed, if it is time to and somebody listens; to be called often."""
        now = time.monotonic()
        if now < self._next or self._maps is None or self._maps.changed is None:
            return
        self._next = now + self._every_s
        if self._publisher.wants("maps"):
            if now >= self._next_descan:
                self._fit_descan()
            self._publish()
        self._tell()

    def end(self) -> None:
        """Fit the descan of the whole scan, publish the last update, and tell the operator."""
        if self._maps is None:
            return
        self._fit_descan()
        self._publish()
        self._tell()
        if (fit := self._descan) is not None:
            self._publisher.event(
                "info",
                "descan",
                f"The center drifted by {fit.drift:.2f} px over the scan. The fit of the descan "
                f"leaves {fit.residual[0]:.3f} px in y and {fit.residual[1]:.3f} px in x.",
                self._acquisition_id,
                drift=fit.drift,
                residual_y=fit.residual[0],
                residual_x=fit.residual[1],
                outliers=fit.outliers,
            )

    def latest_descan(self) -> Descan | None:
        """Fit the descan of what was seen of the scan so far; ``None``: too little."""
        if self._maps is not None:
            self._fit_descan()
        return self._descan

    def whole(self, newer_than: object = None) -> tuple[dict[str, Any], dict[str, Array]]:
        """The whole maps, as the answer to the command ``maps``; never waits for a batch.

        They include all that was published up to the sequence number that they come with, and more:
        the next update brings that again, so that the answer and the updates join without a seam.

        Args:
            newer_than: publisher and sequence number of the answer that the client has.

        Raises:
            CommandFailed: there are no maps, and why.
        """
        with self._lock:
            if self._maps is None:
                raise CommandFailed(self._why_not)
            ny, nx = self._maps.scan_shape
            header = self._header(self._maps, Region(0, 0, ny, nx)).model_copy(
                update={"publisher": self._publisher.id, "sequence": self._published - 1}
            )
            unchanged = self._announced and self._maps.changed is None
            known = unchanged and newer_than == [header.publisher, header.sequence]
            arrays: dict[str, Array] = {} if known else {"values": self._maps.values.copy()}
        return header.model_dump(mode="json", exclude={"arrays"}), arrays

    def _publish(self) -> None:
        maps = self._maps
        if maps is None:
            return
        with self._lock:
            region = maps.changed or Region(0, 0, 0, 0)
            y0, x0, height, width = region
            values = np.ascontiguousarray(maps.values[:, y0 : y0 + height, x0 : x0 + width])
            if np.may_share_memory(values, maps.values):  # it must not change any more
                values = values.copy()
            update = (self._header(maps, region), {"values": values})
            maps.mark()
            self._published += 1
            self._announced = True
        self._publisher.publish(update)  # which may wait

    def _header(self, maps: MapAccumulator, region: Region) -> messages.Maps:
        return messages.Maps(
            acquisition_id=self._acquisition_id,
            scan_shape=maps.scan_shape,
            region=region,
            names=MAP_NAMES,
            detectors=self._detectors,
            frames=maps.frames,
            descan=None
            if self._descan is None
            else messages.Descan.model_validate(self._descan.model_dump()),
        )

    def _fit_descan(self) -> None:
        if self._maps is not None:
            self._descan = self._maps.descan()
        self._next_descan = time.monotonic() + DESCAN_EVERY_S

    def _tell(self) -> None:
        """Show other threads how it stands."""
        self.status = MapsStatus(
            available=self._maps is not None,
            why_not=self._why_not,
            positions=self._maps.frames if self._maps is not None else 0,
            detectors=self._detectors,
            descan_px=None if self._descan is None else self._descan.drift,
        )
