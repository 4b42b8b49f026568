"""A batch's way through one device: its buffers, and the three stages that are recorded on them.

``look`` makes counts of the frames as they came, denoises them and finds their centers; then the
host tracks the centers and says where each frame is to go. ``average`` adds up the recentered raw
frames, ``straighten`` takes shift and ellipse out of the denoised and of the raw ones. Where frames
go, the reference center, the ellipse and the virtual detectors enter as tensors: what was recorded
outlives their change.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prenet4d_engines.backends import Backend
from prenet4d_engines.centers import find_centers
from prenet4d_engines.geometry import Ellipticity
from prenet4d_engines.lanes import Fetched, Lanes, lanes_for
from prenet4d_engines.models import denoiser
from prenet4d_engines.reading import Reader
from prenet4d_engines.resample import recentered_sum, resample_by
from prenet4d_engines.virtual import VIRTUAL_NAMES, sums


@dataclass(frozen=True)
class Camera:
    """What all frames of an acquisition have in common."""

    frame_shape: tuple[int, int]
    """``(h, w)``, pixels."""
    mask: bytes | None
    """(h, w) bool, row by row, where a pixel can be trusted; ``None``: everywhere."""
    gain: float
    """Counts per electron."""
    saturation: float | None
    """Counts at and above which a pixel is saturated."""

    def trusted(self, device: torch.device) -> Tensor:
        """Return the mask, (h, w) bool."""
        if self.mask is None:
            return torch.ones(self.frame_shape, dtype=torch.bool, device=device)
        values = np.frombuffer(self.mask, dtype=np.bool_).reshape(self.frame_shape)
        return torch.tensor(values, device=device)


class Slot:
    """One batch on its way through a device; holds up to ``capacity`` frames.

    Args:
        station: where it works.
        camera: of the frames.
        dtype: of the frames as they come.
        capacity: frames.
    """

    def __init__(
        self, station: Station, camera: Camera, dtype: np.dtype[np.generic], capacity: int
    ):
        self.station, self.camera, self.dtype, self.capacity = station, camera, dtype, capacity
        self._lanes, self._backend = station.lanes, station.backend
        (h, w), device = camera.frame_shape, station.lanes.device
        self._mask = camera.trusted(device)
        self._valid = None if camera.mask is None else self._mask
        came = torch.from_numpy(np.zeros(0, dtype)).dtype
        self._frames = self._lanes.buffer((capacity, h, w), came)
        # Of each frame the denoised and the raw one, which one resampling moves together.
        self._both = torch.empty((capacity, 2, h, w), device=device)
        self._moved = torch.empty((2, capacity, h, w), device=device)
        # Of each frame the center in pixels, and whether to average it.
        self._places = torch.zeros((capacity, 3), dtype=torch.float64, device=device)
        # The reference center, and the distortion row by row.
        self._geometry = torch.zeros(6, dtype=torch.float64, device=device)
        self._weights = torch.empty((h * w, len(VIRTUAL_NAMES)), device=device)
        self._weights_sent: object = None

    def look(self, frames: npt.NDArray[np.generic]) -> Fetched:
        """Send frames (n, h, w) and look at them; fetches (n, 19), see `placing.FOUND`."""
        n = len(frames)
        if n == 0:  # no network reads an empty batch
            frames = np.zeros((1, *self.camera.frame_shape), self.dtype)
        with self.station.watched():
            self._frames = self._lanes.send(frames, self._frames)
            return self._lanes.fetch(self._looking()[:n])

    def place(
        self,
        centers: npt.NDArray[np.float64],
        averaged: npt.NDArray[np.bool_],
        reference: tuple[float, float],
        ellipticity: Ellipticity,
    ) -> None:
        """Say where the frames that were looked at go.

        Args:
            centers: (n, 2) ``[cy, cx]`` that are moved to the reference, pixels.
            averaged: (n,) which of them to average.
            reference: ``(cy, cx)``, pixels.
            ellipticity: the distortion to take out.
        """
        places = np.zeros((self.capacity, 3))
        places[:, :2] = reference
        places[: len(centers)] = np.column_stack((centers, averaged))
        self._places = self._lanes.put(places, self._places)
        geometry = np.concatenate((reference, ellipticity.matrix.ravel()))
        self._geometry = self._lanes.put(geometry, self._geometry)

    def average(self) -> Tensor:
        """Add up the recentered raw frames; returns (2, h, w) on the device: counts, weights."""
        with self.station.watched():
            return self._averaging()

    def straighten(
        self, n: int, weights: npt.NDArray[np.float32]
    ) -> tuple[Fetched, Fetched, Fetched]:
        """Take shift and ellipse out of the first ``n`` frames.

        Args:
            n: how many were looked at.
            weights: (h · w, 5) of the virtual detectors.

        Returns:
            The corrected and the aligned patterns, (n, h, w) counts each, and what the virtual
            detectors add up, (n, 5).
        """
        with self.station.watched():
            if weights is not self._weights_sent:
                self._weights, self._weights_sent = self._lanes.put(weights, self._weights), weights
            added = self._lanes.fetch(self._straightening()[:n])
            corrected, aligned = (self._lanes.deliver(each[:n]) for each in self._moved)
        return corrected, aligned, added

    @cached_property
    def _looking(self) -> Callable[[], Tensor]:
        spread = self._backend.spread
        return self._lanes.record(lambda: torch.cat(spread(self._look, self.capacity)))

    @cached_property
    def _averaging(self) -> Callable[[], Tensor]:
        spread = self._backend.spread
        return self._lanes.record(lambda: torch.stack(spread(self._average, self.capacity)).sum(0))

    @cached_property
    def _straightening(self) -> Callable[[], Tensor]:
        spread = self._backend.spread
        return self._lanes.record(lambda: torch.cat(spread(self._straighten, self.capacity)))

    def _look(self, part: slice) -> Tensor:
        gain, saturation = self.camera.gain, self.camera.saturation
        raw = self._both[part, 1]
        raw.copy_(self._frames[part])
        if self._frames.is_floating_point():
            raw.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(min=0.0)
        counts = raw if self._valid is None else torch.where(self._valid, raw, 0.0)
        electrons = counts / gain if gain != 1 else counts
        dose = electrons.sum((1, 2))
        self._both[part, 0] = self._denoise(electrons, dose <= 0)
        saturated = torch.zeros_like(dose)
        if saturation is not None:  # of counts as they came: divided by the gain, they are rounded
            saturated = (counts.amax((1, 2)) >= saturation).float()
        found = find_centers(electrons, self._mask, self._backend)
        few = torch.stack((found.usable, dose, saturated), 1)
        return torch.cat((found.center, found.sigma, few, found.others.flatten(1)), 1)

    def _denoise(self, electrons: Tensor, blank: Tensor) -> Tensor:
        x, context = denoiser.stabilise(electrons, self._mask)
        denoised = denoiser.restore(self._backend.denoise(x), context)
        if self.camera.gain != 1:
            denoised = denoised * self.camera.gain
        return denoised.masked_fill_(blank[:, None, None], 0.0)

    def _average(self, part: slice) -> Tensor:
        places = self._places[part]
        shifts = self._geometry[:2] - places[:, :2]
        return recentered_sum(self._both[part, 1], shifts, self._valid, places[:, 2])

    def _straighten(self, part: slice) -> Tensor:
        reference, matrix = self._geometry[:2], self._geometry[2:].view(2, 2)
        places, out = self._places[part, :2], self._moved[:, part].transpose(0, 1)
        resample_by(self._both[part], places, reference, matrix, self._valid, out=out)
        return sums(self._moved[1, part], self._weights)


class Station:
    """One device at work: what runs the networks there, its queues, and the slots in use.

    On a GPU slots are kept, with what was recorded on them, for the next batch and the next
    acquisition with the same detector. Used by one thread at a time.

    Args:
        backend: runs the networks.
        lanes: of the backend's device; unset: new ones.
    """

    def __init__(self, backend: Backend, lanes: Lanes | None = None):
        self.backend, self.lanes = backend, lanes or lanes_for(backend.device)
        self.most: int | None = None
        """Frames that a slot may hold; ``None``: any number."""
        self.short = False
        """Whether its memory did not suffice."""
        self._asked = 1
        self._kind: tuple[Camera, np.dtype[np.generic]] | None = None
        self._free: dict[int, list[Slot]] = {}
        self._readers: dict[tuple[int, int], Reader] = {}

    def reader(self, frame_shape: tuple[int, int]) -> Reader:
        """Return what reads the ellipticity of means of this shape."""
        if frame_shape not in self._readers:
            with self.lanes.computing():
                self._readers[frame_shape] = Reader(self.lanes, self.backend, frame_shape)
        return self._readers[frame_shape]

    def take(self, camera: Camera, dtype: np.dtype[np.generic], n: int) -> Slot:
        """Return a slot that nobody uses, for ``n`` frames, at most ``most``.

        Raises:
            torch.OutOfMemoryError: the device's memory does not suffice for it.
        """
        if (camera, dtype) != self._kind:  # another detector: its slots are of no use any more
            self._kind = camera, dtype
            self._free.clear()
            self.lanes.settle()
        self._asked = self.lanes.bucket(n)
        if free := self._free.get(self._asked):
            return free.pop()
        with self.watched(), self.lanes.computing():
            return Slot(self, camera, dtype, self._asked)

    def give_back(self, slot: Slot) -> None:
        """Hand a slot to the next batch; everything that it works on must have been fetched."""
        if self.lanes.keeps and (slot.camera, slot.dtype) == self._kind:
            self._free.setdefault(slot.capacity, []).append(slot)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Note where the device's memory does not suffice for what is done meanwhile."""
        try:
            yield
        except torch.OutOfMemoryError:
            self.short = True
            raise

    def shrink(self) -> int:
        """Use smaller slots from now on, of half of what was asked for last.

        Returns:
            How many frames they hold at most; 0: they cannot be smaller.
        """
        self.short = False
        if self._asked > 1:
            self.most = self._asked // 2
        return self._asked // 2

    def clear(self) -> None:
        """Let go of all slots and of what was recorded, and of the memory that they had.

        Raises:
            RuntimeError: the device does not work any more.
        """
        self.lanes.settle()
        self._free.clear()
        self._readers.clear()
        gc.collect()  # slots and what was recorded on them know each other
        self.lanes.settle()
