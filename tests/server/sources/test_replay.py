"""A file replayed: every frame once, in order, at the rate asked for, and faults told."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import numpy.typing as npt
import pytest

from prenet4d_server.errors import CorruptFrame, FileError
from prenet4d_server.ingest.notices import Remark, Started, pack, unpack
from prenet4d_server.ingest.ring import Layout
from prenet4d_server.sources.base import (
    AcquisitionEnd,
    AcquisitionStart,
    FrameBlock,
    Source,
    SourceEvent,
)
from prenet4d_server.sources.replay import ReplaySource


def frames_of(*shape: int) -> npt.NDArray[np.uint16]:
    return np.random.default_rng(1).integers(0, 999, shape).astype(np.uint16)


def play(source: ReplaySource) -> Iterator[SourceEvent]:
    while not source.finished:
        yield from source.poll(1.0)


def read(start: AcquisitionStart, blocks: Sequence[SourceEvent]) -> npt.NDArray[Any]:
    read_frames = []
    for event in blocks:
        block = cast("FrameBlock", event)
        assert block.series == start.series
        out = np.empty((len(block.indices), *start.frame_shape), start.dtype)
        assert not block.read_into(0, out)
        read_frames.append(out)
    indices = np.concatenate([cast("FrameBlock", block).indices for block in blocks])
    np.testing.assert_array_equal(indices, np.arange(len(indices)))
    return np.concatenate(read_frames)


def test_a_replay_is_a_source(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", frames_of(3, 8, 8))
    source: Source = ReplaySource(tmp_path / "scan.npy")
    assert source.address == str(tmp_path / "scan.npy")
    source.close()
    source.close()


def test_start_frames_and_end_in_order_once_for_each_repeat(tmp_path: Path) -> None:
    truth = frames_of(30, 40, 8, 8)
    np.save(tmp_path / "scan.npy", truth)
    with ReplaySource(tmp_path / "scan.npy", repeat=2, gain=2.5) as source:
        events = list(play(source))
        assert source.poll(0.0) == []
    starts = [i for i, event in enumerate(events) if isinstance(event, AcquisitionStart)]
    ends = [i for i, event in enumerate(events) if isinstance(event, AcquisitionEnd)]
    assert len(starts) == len(ends) == 2
    assert (starts[0], ends[0] + 1, ends[1] + 1) == (0, starts[1], len(events))
    seen = set()
    for first, last in zip(starts, ends, strict=True):
        start, end = events[first], events[last]
        assert isinstance(start, AcquisitionStart)
        assert isinstance(end, AcquisitionEnd)
        assert (start.scan_shape, start.expected_frames, start.gain) == ((30, 40), 1200, 2.5)
        assert end.series == start.series
        seen.add(start.series)
        np.testing.assert_array_equal(
            read(start, events[first + 1 : last]), truth.reshape(1200, 8, 8)
        )
    assert len(seen) == 2


def test_frames_come_no_sooner_than_the_rate_says(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", frames_of(40, 8, 8))
    rate = 200.0
    with ReplaySource(tmp_path / "scan.npy", rate=rate) as source:
        before = time.monotonic()
        sent = 0
        while not source.finished:
            for event in source.poll(0.02):
                if not isinstance(event, AcquisitionStart | AcquisitionEnd):
                    sent += len(cast("FrameBlock", event).indices)
            assert sent <= (time.monotonic() - before) * rate
    assert sent == 40


@pytest.mark.parametrize("rate", [1e308, math.inf])
def test_a_rate_beyond_all_measure_is_as_fast_as_it_goes(tmp_path: Path, rate: float) -> None:
    np.save(tmp_path / "scan.npy", frames_of(40, 8, 8))
    with ReplaySource(tmp_path / "scan.npy", rate=rate) as source:
        source.poll(0.0)
        source._begun -= 100.0  # it has been playing for long
        block = cast("FrameBlock", source.poll(0.0)[0])
    assert len(block.indices) == 40


def test_a_poll_does_not_wait_for_a_frame_that_is_far_off(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", frames_of(4, 8, 8))
    with ReplaySource(tmp_path / "scan.npy", rate=1e-6) as source:
        assert isinstance(source.poll(0.0)[0], AcquisitionStart)
        for _ in range(3):
            assert source.poll(0.01) == []
        assert not source.finished


def test_the_mask_and_what_the_file_says_come_with_the_start(tmp_path: Path) -> None:
    mask = np.zeros((8, 10), np.uint32)
    mask[3, 4] = 1
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["entry/data/data_000001"] = frames_of(6, 8, 10)
        file["entry/data/data_000002"] = frames_of(5, 8, 10)
        file["entry/instrument/detector/detectorSpecific/pixel_mask"] = mask
        file["entry/instrument/detector/count_time"] = 0.25
        file["entry/instrument/detector/saturation_value"] = np.uint32(4095)
    with ReplaySource(tmp_path / "scan.h5", scan_shape=(3, 4)) as source:
        start = source.poll(0.0)[0]
    assert isinstance(start, AcquisitionStart)
    assert start.pixel_mask is not None
    np.testing.assert_array_equal(start.pixel_mask, mask == 0)
    assert (start.scan_shape, start.expected_frames) == ((3, 4), 11)
    assert start.saturation_value == 4095
    assert start.metadata["count_time"] == 0.25


@pytest.mark.parametrize("said", [0, -1, np.nan, np.inf, b"many"])
def test_a_saturation_that_is_none_is_not_taken(tmp_path: Path, said: object) -> None:
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["scan"] = frames_of(6, 8, 10)
        file["entry/instrument/detector/saturation_value"] = said
    with ReplaySource(tmp_path / "scan.h5") as source:
        start = source.poll(0.0)[0]
    assert isinstance(start, AcquisitionStart)
    assert start.saturation_value is None


@pytest.mark.parametrize("suffix", ["npy", "npz", "h5"])
def test_parts_of_a_block_are_read_by_several_threads(tmp_path: Path, suffix: str) -> None:
    truth = frames_of(200, 16, 16)
    path = tmp_path / f"scan.{suffix}"
    if suffix == "npy":
        np.save(path, truth)
    elif suffix == "npz":
        np.savez_compressed(path, truth)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("frames", data=truth, chunks=(7, 16, 16), compression="gzip")
    with ReplaySource(path) as source, ThreadPoolExecutor(4) as pool:
        source.poll(0.0)
        block = cast("FrameBlock", source.poll(0.0)[0])
        out = np.zeros_like(truth)
        list(pool.map(lambda at: block.read_into(at, out[at : at + 9]), range(0, 200, 9)))
    np.testing.assert_array_equal(out, truth)


def test_a_damaged_frame_is_told_and_costs_none_of_its_neighbors(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    truth = frames_of(6, 64, 64)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("frames", data=truth, chunks=(1, 64, 64), compression="gzip")
        chunk = data.id.get_chunk_info(3)
    raw = bytearray(path.read_bytes())
    raw[chunk.byte_offset : chunk.byte_offset + chunk.size] = bytes(chunk.size)
    path.write_bytes(raw)
    with ReplaySource(path) as source:
        source.poll(0.0)
        block = cast("FrameBlock", source.poll(0.0)[0])
        out = np.zeros_like(truth)
        faults = block.read_into(1, out[1:])
    assert [(i, type(error)) for i, error in faults] == [(3, CorruptFrame)]
    good = [1, 2, 4, 5]
    np.testing.assert_array_equal(out[good], truth[good])


def test_text_that_is_not_utf_8_reaches_the_main_process(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xe9.h5"))
    with h5py.File(path, "w") as file:
        data = file.create_dataset("frames", data=frames_of(6, 8, 10))
        text = h5py.h5t.C_S1.copy()
        text.set_size(h5py.h5t.VARIABLE)
        units = h5py.h5a.create(data.id, b"units", text, h5py.h5s.create(h5py.h5s.SCALAR))
        units.write(np.array(b"\xb5m", h5py.string_dtype("ascii")))
    with ReplaySource(path) as source:
        start = source.poll(0.0)[0]
    assert isinstance(start, AcquisitionStart)
    layout = Layout(start.frame_shape, start.dtype, slots=4, base=0)
    told = unpack(pack(Started.of(start, "scan", 0, layout)))
    assert isinstance(told, Started)
    assert told.metadata["units"] == "?m"
    assert (told.series, source.address) == ("n?.h5-1", f"{tmp_path}/n?.h5")
    broken = Remark("error", "file_error", f"{path} is damaged.")
    assert unpack(pack(broken)) == replace(broken, message=f"{source.address} is damaged.")


def test_a_file_that_cannot_be_read_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="There is no file"):
        ReplaySource(tmp_path / "scan.npy")
