"""Recordings in Zarr: the same as in HDF5, in shards, and readable while they are written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prenet4d_client.messages import Aligned, Event
from prenet4d_client.wire import Message
from prenet4d_server.errors import FileError
from prenet4d_server.recording.recorder import Recorder, Summary

from .test_recorder import SCAN, H, W, batch, end, patterns_of, start, telemetry, whole_scan, write

zarr = pytest.importorskip("zarr", minversion="3", reason="zarr ≥ 3 is not installed here")
recording_zarr = pytest.importorskip("prenet4d_server.recording.zarr")


@pytest.mark.parametrize("compression", ["none", "bslz4", "gzip"])
def test_a_whole_scan(tmp_path: Path, compression: Any) -> None:
    patterns = patterns_of(20)
    path = tmp_path / "scan.zarr"
    provenance = {"weights": {"center": "abc"}, "calibration": {"ratio": 1.05}}
    messages = whole_scan(
        patterns, detector="sim", metadata={"voltage_kV": 200}, provenance=provenance
    )
    summary = write(path, messages, compression=compression)
    assert summary == Summary(files=[path], finished=1, patterns=20)
    root = zarr.open_group(path, mode="r")
    data = root["corrected"]
    assert (data.shape, data.dtype) == ((*SCAN, H, W), np.float32)
    np.testing.assert_array_equal(data[:].reshape(20, H, W), np.nan_to_num(patterns))
    assert data.metadata.dimension_names == ("y", "x", "ky", "kx")
    at = np.arange(20).reshape(SCAN)
    np.testing.assert_array_equal(root["maps/center"][..., 0], at)
    np.testing.assert_array_equal(root["maps/dose"][:], at)
    np.testing.assert_array_equal(root["maps/flags"][:], at % 3)
    assert root["maps/received"][:].all()
    np.testing.assert_allclose(root["coverage"][:], np.isfinite(patterns).mean(0), atol=1e-6)
    assert not root["pixel_mask"][0, 7]
    assert root["batches/ratio"][:].tolist() == [1.05] * 7
    states = root["batches/state"].attrs["states"]
    assert [states[code] for code in root["batches/state"][:]] == ["locked"] * 7
    told = dict(root.attrs)
    assert (told["complete"], told["reason"]) == (True, "")
    assert (told["frames_corrected"], told["frames_rejected"]) == (20, 2)
    assert told["acquisition"]["metadata"] == {"voltage_kV": 200}
    assert told["provenance"] == provenance


def test_chunks_serve_single_patterns_and_virtual_detectors(tmp_path: Path) -> None:
    from prenet4d_server.recording.layout import Acquisition, StoreOptions

    options = StoreOptions(("corrected",), "bslz4", "zero", overwrite=False)
    path = tmp_path / "scan.zarr"
    recording_zarr.ZarrStore(path, Acquisition("a", (256, 256), (128, 128)), options)
    data = zarr.open_group(path, mode="r")["corrected"]
    assert data.shards[1] > data.chunks[1]
    # One pattern: at most eight times what it needs. A detector of a ninth of it: no more than
    # that ninth of the scan, and few chunks.
    assert data.chunks[0] * data.chunks[1] <= 8
    assert all(2 < 256 / side < 4 for side in data.chunks[2:])


@pytest.mark.parametrize("compression", ["none", "bslz4", "gzip"])
@pytest.mark.parametrize("fill", ["zero", "nan"])
def test_zarr_reads_shards_of_cut_chunks_and_missing_positions(
    tmp_path: Path, compression: Any, fill: Any
) -> None:
    from prenet4d_server.recording.layout import Acquisition, StoreOptions

    path = tmp_path / "scan.zarr"
    options = StoreOptions(("corrected",), compression, fill, overwrite=False)
    store = recording_zarr.ZarrStore(path, Acquisition("a", (100, 130), (3, 19)), options)
    truth = np.full((57, 100, 130), 0 if fill == "zero" else np.nan, np.float32)
    rng = np.random.default_rng(3)
    for first, last in ((20, 31), (1, 4), (4, 7), (50, 57)):  # over a line's end, and in parts
        truth[first:last] = rng.gamma(0.5, 2, (last - first, 100, 130))
        store.write_patterns("corrected", np.arange(first, last), truth[first:last])
        store.flush()
    store.close({"complete": True})
    data = zarr.open_group(path, mode="r")["corrected"]
    assert data.chunks[2] * 3 > 100
    np.testing.assert_array_equal(data[:].reshape(57, 100, 130), truth)


def test_without_a_scan_shape_the_store_grows(tmp_path: Path) -> None:
    patterns = patterns_of(20)
    path = tmp_path / "scan.zarr"
    summary = write(path, whole_scan(patterns, scan=None))
    assert (summary.patterns, summary.complete) == (20, True)
    root = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(root["corrected"][:], np.nan_to_num(patterns))
    assert root["maps/center"].shape == (20, 2)


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_patterns_may_come_in_any_order(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    scan = data.draw(st.sampled_from([(3, 33), None]))
    order = data.draw(st.permutations(range(99)))
    order = order[: data.draw(st.integers(1, 99))]
    patterns = patterns_of(99)
    path = tmp_path_factory.mktemp("any") / "scan.zarr"
    with pytest.MonkeyPatch.context() as patch, Recorder(path) as recorder:
        # Several shards in a scan line, more than are kept open, and several chunks in a shard.
        patch.setattr(recording_zarr, "SHARD_BYTES", 16 * 4 * H * W)
        recorder.write(start(scan=scan))
        for first in range(0, len(order), 10):
            indices = order[first : first + 10]
            recorder.write(batch(indices, patterns[indices], scan=scan))
            if data.draw(st.booleans()):
                recorder.flush()
    stored = zarr.open_group(path, mode="r")["corrected"][:].reshape(-1, H, W)
    came = np.isin(np.arange(len(stored)), order)
    np.testing.assert_array_equal(stored[came], np.nan_to_num(patterns)[: len(stored)][came])
    assert not stored[~came].any()


def test_an_interleaved_scan_keeps_all_its_patterns(tmp_path: Path) -> None:
    patterns = patterns_of(7 * 32)
    halves = np.arange(len(patterns)).reshape(7, 2, 16)  # of every line, the left one first
    order = halves.swapaxes(0, 1).ravel().tolist()
    path = tmp_path / "scan.zarr"
    with Recorder(path) as recorder:
        recorder.write(start(scan=(7, 32)))
        for first in range(0, len(order), 16):
            indices = order[first : first + 16]
            recorder.write(batch(indices, patterns[indices], scan=(7, 32)))
        recorder.write(end(len(order)))
    assert recorder.summary.complete
    stored = zarr.open_group(path, mode="r")["corrected"][:].reshape(-1, H, W)
    np.testing.assert_array_equal(stored, np.nan_to_num(patterns))


def test_metadata_that_json_has_no_number_for_leaves_valid_json(tmp_path: Path) -> None:
    metadata = {"voltage_kV": float("nan"), "tilt": float("inf"), "dwell_s": 0.5}
    write(tmp_path / "scan.zarr", whole_scan(patterns_of(20), metadata=metadata))

    def refuse(name: str) -> None:
        raise ValueError(name)

    told = json.loads((tmp_path / "scan.zarr" / "zarr.json").read_text(), parse_constant=refuse)
    kept = told["attributes"]["acquisition"]["metadata"]
    assert kept == {"voltage_kV": None, "tilt": None, "dwell_s": 0.5}


def test_a_store_can_be_read_while_it_is_written(tmp_path: Path) -> None:
    patterns = patterns_of(20)
    path = tmp_path / "scan.zarr"
    with Recorder(path, content=("corrected", "aligned"), fill="nan") as recorder:
        recorder.write(start())
        recorder.write(telemetry([0, 1, 2]))
        recorder.write(batch([0, 1, 2], patterns[:3]))
        recorder.write(batch([0, 1, 2], patterns[:3] + 1, kind=Aligned))
        event = Event(time=5.0, level="warning", code="backlog", message="full")
        recorder.write(Message(event, {}))
        recorder.flush()
        root = zarr.open_group(path, mode="r")
        np.testing.assert_array_equal(root["corrected"][0, :3], patterns[:3])
        np.testing.assert_array_equal(root["aligned"][0, :3], patterns[:3] + 1)
        assert np.isnan(root["corrected"][1]).all()
        assert root["maps/received"][:].ravel().nonzero()[0].tolist() == [0, 1, 2]
        assert not root.attrs["complete"]
        assert root.attrs["events"] == [
            {"time": 5.0, "level": "warning", "code": "backlog", "message": "full"}
        ]
        recorder.write(batch(list(range(3, 20)), patterns[3:]))
        recorder.write(end(20))
    root = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(root["corrected"][:].reshape(20, H, W), patterns)


def test_only_a_zarr_store_is_replaced_and_only_when_asked(tmp_path: Path) -> None:
    mine = tmp_path / "mine.zarr"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear")
    for overwrite in (False, True):
        with pytest.raises(FileError, match="no Zarr store"):
            Recorder(mine, overwrite=overwrite)
    assert (mine / "diary.txt").read_text() == "dear"
    path = tmp_path / "scan.zarr"
    write(path, whole_scan(patterns_of(20)))
    with pytest.raises(FileError, match="exists"):
        Recorder(path)
    write(path, whole_scan(patterns_of(20) + 1), overwrite=True)
    assert zarr.open_group(path, mode="r")["corrected"][0, 0, H - 1, 0] > 2


@pytest.mark.filterwarnings("default")
def test_hyperspy_opens_it_lazily(tmp_path: Path) -> None:
    hyperspy = pytest.importorskip("hyperspy.api", reason="HyperSpy is not installed here")
    array = pytest.importorskip("dask.array")
    patterns = patterns_of(20)
    write(tmp_path / "scan.zarr", whole_scan(patterns))
    data = array.from_zarr(str(tmp_path / "scan.zarr"), component="corrected")
    signal = hyperspy.signals.Signal2D(data).as_lazy()
    assert signal.axes_manager.navigation_shape == SCAN[::-1]
    np.testing.assert_array_equal(
        signal.inav[2, 1].data.compute(), np.nan_to_num(patterns[SCAN[1] + 2])
    )
