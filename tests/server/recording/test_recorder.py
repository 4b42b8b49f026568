"""Recordings: what is in them, who opens them, and what is left when something goes wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import zmq

from prenet4d_client.lossless import LosslessReceiver
from prenet4d_client.messages import (
    AcquisitionEnd,
    AcquisitionStart,
    Aligned,
    Corrected,
    Counters,
    Ellipticity,
    Event,
    Goodbye,
    Header,
    Heartbeat,
    Latencies,
    Latency,
    Registered,
    Telemetry,
)
from prenet4d_client.wire import Message, decode, encode
from prenet4d_server.errors import FileError
from prenet4d_server.files import open_scan
from prenet4d_server.recording.recorder import Recorder, Summary, record
from prenet4d_server.recording.room import want_of_room

from ..no_locks import without_locks

H, W = 16, 20
SCAN = (4, 5)
TIMEOUT_S = 60.0
LATENCY = Latency(p50=1.0, p99=2.0)


def patterns_of(n: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Patterns whose first rows have no source, one row more for each."""
    patterns = np.random.default_rng(seed).random((n, H, W), dtype=np.float32) + 1
    for i in range(n):
        patterns[i, : i % 4] = np.nan
    return patterns


def start(name: str = "a", scan: tuple[int, int] | None = SCAN, **fields: Any) -> Message:
    header = AcquisitionStart(
        acquisition_id=name, frame_shape=(H, W), dtype="uint16", scan_shape=scan, **fields
    )
    return Message(header, {"pixel_mask": np.arange(H * W).reshape(H, W) != 7})


def batch(
    indices: list[int],
    patterns: npt.NDArray[np.float32],
    name: str = "a",
    scan: tuple[int, int] | None = SCAN,
    kind: type[Corrected | Aligned] = Corrected,
) -> Message:
    header = kind(acquisition_id=name, batch=0, scan_shape=scan)
    arrays: dict[str, Any] = {"indices": np.array(indices, np.int64), "patterns": patterns}
    return Message(header, arrays)


def telemetry(
    indices: list[int], name: str = "a", scan: tuple[int, int] | None = SCAN, **fields: Any
) -> Message:
    n = len(indices)
    at = np.array(indices, np.int64)
    pair = np.stack((at, at + 0.5), 1).astype(np.float32)
    header = Telemetry(
        acquisition_id=name,
        **{
            "batch": 0,
            "frame_shape": (H, W),
            "scan_shape": scan,
            "reference_center": (7.5, 9.5),
            "ellipticity": Ellipticity(ratio=1.05, theta=0.3, ratio_sigma=0.001),
            "state": "locked",
            "patterns_averaged": n,
            "latency": Latencies(queue=LATENCY, compute=LATENCY, total=LATENCY),
            "frames_per_second": 100.0,
            "backlog": 0,
            "counters": Counters(received=n, corrected=n),
            **fields,
        },
    )
    arrays: dict[str, Any] = {
        "indices": at,
        "center": pair,
        "center_sigma": pair * 0 + 1,
        "tracked": pair + 1,
        "tracked_sigma": pair * 0 + 2,
        "shift": -pair,
        "dose": at.astype(np.float32),
        "flags": (at % 3).astype(np.uint8),
    }
    return Message(header, arrays)


def end(corrected: int, name: str = "a", **fields: Any) -> Message:
    counters = Counters(
        received=corrected + 2,
        corrected=corrected,
        rejected=2,
        rejected_by_reason={"corrupt": 2},
    )
    return Message(AcquisitionEnd(acquisition_id=name, counters=counters, **fields), {})


def whole_scan(patterns: npt.NDArray[np.float32], **kwargs: Any) -> Iterator[Message]:
    """Batches of three, which cross scan lines."""
    yield start(**kwargs)
    names = {key: value for key, value in kwargs.items() if key in ("name", "scan")}
    for first in range(0, len(patterns), 3):
        indices = list(range(first, min(first + 3, len(patterns))))
        yield telemetry(indices, **names)
        yield batch(indices, patterns[indices], **names)
    yield end(len(patterns), kwargs.get("name", "a"))


def write(path: Path, messages: Iterator[Message] | list[Message], **options: Any) -> Summary:
    with Recorder(path, **options) as recorder:
        for message in messages:
            recorder.write(message)
    return recorder.summary


def data_of(file: h5py.File, kind: str = "corrected") -> h5py.Dataset:
    return file[f"Experiments/{kind}/data"]


# --- what is in a file ---------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["none", "bslz4", "gzip"])
def test_a_whole_scan(tmp_path: Path, compression: Any) -> None:
    patterns = patterns_of(20)
    path = tmp_path / "scan.h5"
    metadata = {"voltage_kV": 200, "operator": "a\0b", "": "no name"}
    messages = whole_scan(patterns, detector="sim", metadata=metadata)
    summary = write(path, messages, compression=compression)
    assert summary == Summary(files=[path], finished=1, patterns=20)
    with h5py.File(path) as file:
        data = data_of(file)
        assert (data.shape, data.dtype) == ((*SCAN, H, W), np.float32)
        np.testing.assert_array_equal(data[:].reshape(20, H, W), np.nan_to_num(patterns))
        ours = file["prenet4d"]
        at = np.arange(20).reshape(SCAN)
        np.testing.assert_array_equal(ours["center"][..., 0], at)
        np.testing.assert_array_equal(ours["tracked"][..., 1], at + 1.5)
        np.testing.assert_array_equal(ours["shift"][..., 0], -at)
        np.testing.assert_array_equal(ours["dose"][:], at)
        np.testing.assert_array_equal(ours["flags"][:], at % 3)
        assert ours["received"][:].all()
        np.testing.assert_allclose(ours["coverage"][:], np.isfinite(patterns).mean(0), atol=1e-6)
        assert not ours["pixel_mask"][0, 7]
        assert ours["batches"]["ratio"].tolist() == [1.05] * 7
        assert (ours["batches"]["reference_cy"][0], ours["batches"]["reference_cx"][0]) == (
            7.5,
            9.5,
        )
        assert ours["batches"]["first_index"].tolist() == [0, 3, 6, 9, 12, 15, 18]
        assert np.isnan(ours["batches"]["theta_sigma"]).all()
        assert ours.attrs["complete"]
        assert ours.attrs["reason"] == b""
        assert (ours.attrs["frames_corrected"], ours.attrs["frames_rejected"]) == (20, 2)
        assert ours.attrs["frames_rejected_by_reason"] == b'{"corrupt": 2}'
        assert ours.attrs["program"].startswith("prenet4d ")
        acquisition = ours["acquisition"].attrs
        assert (acquisition["acquisition_id"], acquisition["detector"]) == ("a", "sim")
        found = dict(ours["acquisition/metadata"].attrs)
        assert found == {"voltage_kV": 200, "operator": "a b"}


@pytest.mark.parametrize("scan", [SCAN, None])
def test_nexus_programs_find_the_default_plot_and_its_axes(tmp_path: Path, scan: Any) -> None:
    provenance = {"weights": {"center": "abc"}}
    write(tmp_path / "scan.nxs", whole_scan(patterns_of(20), scan=scan, provenance=provenance))
    with h5py.File(tmp_path / "scan.nxs") as file:
        assert file.attrs["NX_class"] == "NXroot"
        entry = file[file.attrs["default"]]
        assert entry.attrs["NX_class"] == "NXentry"
        plot = entry[entry.attrs["default"]]
        assert plot.attrs["NX_class"] == "NXdata"
        data = plot[plot.attrs["signal"]]
        axes = [plot[name] for name in plot.attrs["axes"]]
        assert [len(axis) for axis in axes] == list(data.shape)
        assert all((np.diff(axis[:]) == 1).all() for axis in axes)
        names = plot.attrs["axes"]
        assert [plot.attrs[f"{name}_indices"] for name in names] == list(range(data.ndim))
        assert data == data_of(file)
        for name in ("title", "start_time", "end_time", "entry_identifier", "program_name"):
            assert entry[name][()]
        assert entry["end_time"][()] > entry["start_time"][()]
        classes = {
            child.attrs.get("NX_class") for child in entry.values() if isinstance(child, h5py.Group)
        }
        assert classes == {"NXdata", "NXinstrument", "NXprocess"}
        under_names: list[str] = []
        entry.visit(under_names.append)
        # NeXus' own rule for names.
        assert all(re.fullmatch(r"[a-z_]\w*", name.split("/")[-1]) for name in under_names)
        note = json.loads(entry["process/provenance/data"][()])
        assert note == provenance == json.loads(file["prenet4d/provenance"][()])


@pytest.mark.filterwarnings("default")
def test_nexusformat_opens_a_recording(tmp_path: Path) -> None:
    nexus = pytest.importorskip("nexusformat.nexus", reason="nexusformat is not installed here")
    patterns = patterns_of(20)
    write(tmp_path / "scan.nxs", whole_scan(patterns))
    root = nexus.nxload(str(tmp_path / "scan.nxs"))
    plot = root.get_default()
    assert plot.nxsignal.shape == (*SCAN, H, W)
    np.testing.assert_array_equal(plot.nxsignal.nxvalue.reshape(20, H, W), np.nan_to_num(patterns))
    assert [len(axis) for axis in plot.nxaxes] == [*SCAN, H, W]


def test_chunks_hold_parts_of_a_few_neighbouring_patterns(tmp_path: Path) -> None:
    from prenet4d_server.recording.file import Recording
    from prenet4d_server.recording.layout import Acquisition

    for shape in ((256, 256), (96, 128), (514, 1030)):
        path = tmp_path / f"{shape[0]}.h5"
        recording = Recording(path, Acquisition("a", shape, (8, 8)), content=("corrected",))
        recording.close(complete=True)
        with h5py.File(path) as file:
            _, positions, *part = data_of(file).chunks
        assert positions == 4
        for side, pixels in zip(shape, part, strict=True):
            assert pixels <= 96
            assert -(-side // pixels) % 2  # the direct beam lies in the middle one


@pytest.mark.parametrize("scan", [(10, 2), (20, 1), (1, 20)])
@pytest.mark.parametrize("suffix", ["h5", "zarr"])
def test_a_narrow_scan(tmp_path: Path, scan: tuple[int, int], suffix: str) -> None:
    patterns = patterns_of(20)
    path = tmp_path / f"scan.{suffix}"
    if suffix == "zarr":
        zarr = pytest.importorskip("zarr", minversion="3", reason="zarr ≥ 3 is not installed here")
    assert write(path, whole_scan(patterns, scan=scan)).complete
    stored = (
        zarr.open_group(path, mode="r")["corrected"][:]
        if suffix == "zarr"
        else data_of(h5py.File(path))[:]
    )
    np.testing.assert_array_equal(stored.reshape(20, H, W), np.nan_to_num(patterns))


def test_a_recording_can_be_replayed(tmp_path: Path) -> None:
    patterns = patterns_of(20)
    content = ("corrected", "aligned")
    messages = list(whole_scan(patterns))
    messages.insert(1, batch(list(range(20)), patterns + 1, kind=Aligned))
    write(tmp_path / "scan.h5", messages, content=content)
    for dataset, truth in ((None, patterns), ("Experiments/aligned", patterns + 1)):
        with open_scan(tmp_path / "scan.h5", dataset=dataset) as scan:
            assert scan.scan_shape == SCAN
            np.testing.assert_array_equal(scan.read(0, 20), np.nan_to_num(truth))


def test_missing_pixels_stay_nan_when_asked(tmp_path: Path) -> None:
    patterns = patterns_of(4)
    write(tmp_path / "scan.h5", [start(), batch([0, 1, 2, 3], patterns)], fill="nan")
    with h5py.File(tmp_path / "scan.h5") as file:
        np.testing.assert_array_equal(data_of(file)[0, :4], patterns)
        assert np.isnan(data_of(file)[1]).all()


def test_positions_that_never_came_are_marked(tmp_path: Path) -> None:
    patterns = patterns_of(3)
    messages = [start(), telemetry([3, 4, 5]), batch([3, 5, 4], patterns), end(3)]
    assert write(tmp_path / "scan.h5", messages).complete
    with h5py.File(tmp_path / "scan.h5") as file:
        received = file["prenet4d/received"][:].ravel()
        assert np.flatnonzero(received).tolist() == [3, 4, 5]
        flat = data_of(file)[:].reshape(20, H, W)
        np.testing.assert_array_equal(flat[[3, 5, 4]], np.nan_to_num(patterns))
        assert not flat[~received].any()
        assert np.isnan(file["prenet4d/center"][0, 0]).all()


def test_what_was_announced_and_did_not_come_is_counted(tmp_path: Path) -> None:
    some = [batch([3, 4], patterns_of(2)), end(2)]
    stopped = [start("b", expected_frames=20), batch([0], patterns_of(1), "b")]
    summary = write(tmp_path / "scan.h5", [start(expected_frames=20), *some, *stopped])
    assert (summary.patterns, summary.absent) == (3, 18 + 19)
    assert write(tmp_path / "all.h5", whole_scan(patterns_of(20), expected_frames=20)).absent == 0


def test_without_a_scan_shape_the_file_grows(tmp_path: Path) -> None:
    patterns = patterns_of(20)
    path = tmp_path / "scan.h5"
    summary = write(path, whole_scan(patterns, scan=None))
    assert (summary.patterns, summary.complete) == (20, True)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(data_of(file)[:], np.nan_to_num(patterns))
        assert file["prenet4d/center"].shape == (20, 2)
        np.testing.assert_array_equal(file["prenet4d/dose"][:], np.arange(20))
        assert file["Experiments/corrected/axis-0"].attrs["size"] == 20
    with open_scan(path) as scan:
        assert (scan.n_frames, scan.scan_shape) == (20, None)


def test_events_are_kept_with_the_acquisition(tmp_path: Path) -> None:
    event = Event(time=5.0, level="warning", code="backlog", message="ä" * 400)
    write(tmp_path / "scan.h5", [start(), Message(event, {}), end(0)])
    with h5py.File(tmp_path / "scan.h5") as file:
        (row,) = file["prenet4d/events"][:]
        assert (row["time"], row["level"], row["code"]) == (5.0, b"warning", b"backlog")
        assert row["message"].decode() == "ä" * 256


# --- which file ----------------------------------------------------------------------------------


def test_each_acquisition_has_its_file(tmp_path: Path) -> None:
    messages = [m for name in "abc" for m in whole_scan(patterns_of(20), name=name)]
    summary = write(tmp_path / "scan.h5", messages)
    names = ["scan.h5", "scan_002.h5", "scan_003.h5"]
    assert [path.name for path in summary.files] == names
    assert (summary.finished, summary.patterns) == (3, 60)
    for name, path in zip("abc", summary.files, strict=True):
        with h5py.File(path) as file:
            assert file["prenet4d/acquisition"].attrs["acquisition_id"] == name


def test_an_acquisition_whose_name_comes_again_has_a_file_of_its_own(tmp_path: Path) -> None:
    late = batch([0], patterns_of(1))
    again = patterns_of(20, seed=1)
    messages = [*whole_scan(patterns_of(20)), late, *whole_scan(again)]
    summary = write(tmp_path / "scan.h5", messages)
    assert [path.name for path in summary.files] == ["scan.h5", "scan_002.h5"]
    assert (summary.finished, summary.patterns, summary.refused) == (2, 40, 1)
    with open_scan(tmp_path / "scan_002.h5") as scan:
        np.testing.assert_array_equal(scan.read(0, 20), np.nan_to_num(again))


def test_a_disk_that_has_no_locks(tmp_path: Path) -> None:
    records = """
from prenet4d_client.messages import AcquisitionStart
from prenet4d_client.wire import Message
from prenet4d_server.recording.recorder import Recorder

with Recorder("scan.h5") as recorder:
    recorder.write(Message(AcquisitionStart(frame_shape=(8, 8), dtype="uint8"), {}))
print(recorder.summary.finished)
"""
    assert without_locks(records, tmp_path) == "1\n"


def test_a_pattern_of_names_goes_past_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "s_01.h5").write_text("mine")
    messages = [m for name in "ab" for m in whole_scan(patterns_of(20), name=name)]
    summary = write(tmp_path / "s_{n:02d}.h5", messages)
    assert [path.name for path in summary.files] == ["s_00.h5", "s_02.h5"]
    assert (tmp_path / "s_01.h5").read_text() == "mine"


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    path.write_text("mine")
    with pytest.raises(FileError, match="exists"):
        Recorder(path)
    assert path.read_text() == "mine"
    write(path, whole_scan(patterns_of(20)), overwrite=True)
    with open_scan(path) as scan:
        assert scan.n_frames == 20


@pytest.mark.parametrize("name", ["gone/scan.h5", "", "scan_{x}.h5", "scan_{n.h5"])
def test_a_place_where_no_file_can_be(tmp_path: Path, name: str) -> None:
    with pytest.raises(FileError):
        Recorder(tmp_path / name)


def test_a_folder_that_takes_no_files_is_told_before_the_scan() -> None:
    with pytest.raises(FileError, match="/proc cannot be written to"):
        Recorder("/proc/scan.h5")


def test_a_missing_package_is_told_before_the_scan(tmp_path: Path) -> None:
    program = (
        "import sys\nsys.modules['zarr'] = None\n"
        "from prenet4d_server.recording.recorder import Recorder\n"
        f"Recorder({str(tmp_path / 'scan.zarr')!r})"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert "the package 'zarr' is missing: pip install 'prenet4d[zarr]'." in run.stderr


# --- when things go wrong ------------------------------------------------------------------------


def reason_of(path: Path) -> str:
    with h5py.File(path) as file:
        attributes = file["prenet4d"].attrs
        assert attributes["complete"] == (not attributes["reason"])
        return str(attributes["reason"].decode())


def test_an_aborted_acquisition_says_so(tmp_path: Path) -> None:
    messages = [start(), batch([0], patterns_of(1)), end(1, aborted=True, reason="beam lost")]
    summary = write(tmp_path / "scan.h5", messages)
    assert not summary.complete
    why = "the acquisition was aborted: beam lost"
    assert reason_of(tmp_path / "scan.h5") == summary.reason == why


def test_an_end_that_knows_of_more_patterns_than_came(tmp_path: Path) -> None:
    summary = write(tmp_path / "scan.h5", [start(), batch([0], patterns_of(1)), end(4)])
    assert not summary.complete
    assert reason_of(tmp_path / "scan.h5") == "3 of its 4 patterns are not here"


def test_a_new_acquisition_ends_one_that_did_not_end(tmp_path: Path) -> None:
    messages = [start(), batch([0], patterns_of(1)), *whole_scan(patterns_of(20), name="b")]
    messages.append(batch([5], patterns_of(1)))
    summary = write(tmp_path / "scan.h5", messages)
    assert "another acquisition began" in reason_of(summary.files[0])
    assert reason_of(summary.files[1]) == ""
    assert (summary.finished, summary.patterns, summary.refused) == (2, 21, 1)


def test_what_has_no_place_is_counted_and_costs_nothing_else(tmp_path: Path) -> None:
    patterns = patterns_of(2)
    messages = [
        start(),
        batch([19, 20], patterns),
        batch([-1, 0], patterns),
        batch([1, 2], np.zeros((2, H, W + 1), np.float32)),
        telemetry([18, 21]),
    ]
    summary = write(tmp_path / "scan.h5", messages)
    assert (summary.patterns, summary.refused) == (2, 5)
    with h5py.File(tmp_path / "scan.h5") as file:
        flat = data_of(file)[:].reshape(20, H, W)
        np.testing.assert_array_equal(flat[[19, 0]], np.nan_to_num(patterns))
        assert file["prenet4d/dose"][3, 3] == 18


def test_registered_in_the_middle_of_an_acquisition(tmp_path: Path) -> None:
    messages = [telemetry([7]), batch([7], patterns_of(1)), end(8)]
    summary = write(tmp_path / "scan.h5", messages)
    assert summary.patterns == 1
    assert reason_of(tmp_path / "scan.h5") == "7 of its 8 patterns are not here"


def test_missed_messages_are_told(tmp_path: Path) -> None:
    late = batch([1], patterns_of(1))
    messages = [start(), Message(late.header, late.arrays, gap=3), end(1)]
    summary = write(tmp_path / "scan.h5", messages)
    assert (summary.missed, summary.complete) == (3, False)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([1 << 40] * 5)
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1 << 40, 0, next(free, 1 << 20)))
    with pytest.raises(FileError, match=r"only 1 MB left.*scan\.h5 is closed"):
        write(tmp_path / "scan.h5", whole_scan(patterns_of(20)))
    assert "only 1 MB left" in reason_of(tmp_path / "scan.h5")
    with h5py.File(tmp_path / "scan.h5") as file:
        received = file["prenet4d/received"][:].ravel()
        assert received[:3].all()
        assert not received.all()


def test_a_disk_without_room_is_told_before_the_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(1 << 40, 0, 100 << 20))
    with pytest.raises(FileError, match=r"only 105 MB left.* Nothing was recorded\. Make room"):
        Recorder(tmp_path / "scan.h5")


@pytest.mark.parametrize("suffix", ["h5", "zarr"])
def test_a_recording_that_is_removed_meanwhile_is_told(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan.{suffix}"
    with Recorder(path) as recorder:
        recorder.write(start())
        recorder.flush()
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        recorder.write(batch([0], patterns_of(1)))
        with pytest.raises(OSError, match="was removed while it was being made"):
            recorder.flush()


def test_a_file_that_is_renamed_meanwhile_takes_the_rest(tmp_path: Path) -> None:
    with Recorder(tmp_path / "scan.h5") as recorder:
        recorder.write(start())
        (tmp_path / "scan.h5").rename(tmp_path / "good.h5")
        recorder.write(batch([0], patterns_of(1)))
        recorder.flush()
    with h5py.File(tmp_path / "good.h5") as file:
        assert file["prenet4d/received"][:].sum() == 1


def test_room_that_is_there_and_not_enough_is_told_with_what_is_to_come(tmp_path: Path) -> None:
    want = want_of_room(tmp_path, None, 1 << 40, 1 << 20)
    assert want is not None
    assert want.kept == "1 MB are kept free beside the 1099512 MB to come"


FILLER = """
import os, sys
from pathlib import Path
import numpy as np
from prenet4d_server.errors import FileError
from prenet4d_server.recording.recorder import Recorder
from tests.server.recording.test_recorder import batch, start, telemetry
disk = Path(sys.argv[1])
recorder = Recorder(disk / "scan.h5", compression="none")
recorder.write(start())
recorder.write(batch([0, 1, 2], np.full((3, 16, 20), 3, np.float32)))
recorder.write(telemetry([0, 1, 2]))
with (disk / "another").open("wb", buffering=0) as other:
    try:
        while other.write(bytes(1 << 16)):
            pass
    except OSError:
        pass
try:
    recorder.write(batch([3], np.full((1, 16, 20), 3, np.float32)))
except FileError as error:
    print(error)
import h5py
with h5py.File(disk / "scan.h5") as file:
    patterns = file["Experiments/corrected/data"][:].reshape(20, -1)
    assert (patterns[:3] == 3).all() and file["prenet4d/received"][:].sum() == 3
print("read")
"""
MOUNT = 'mount -t tmpfs -o size=384m none "$0" && exec "$@"'


def test_a_disk_that_another_program_fills_to_the_last_byte(tmp_path: Path) -> None:
    alone = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", MOUNT, str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], check=False).returncode:
        pytest.skip("no small disk can be made here")
    filled = subprocess.run(
        [*alone, sys.executable, "-c", FILLER, str(tmp_path)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    said, read = filled.stdout.splitlines()
    assert "is closed and holds what came before" in said
    assert read == "read"


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from prenet4d_server.errors import FileError
from prenet4d_server.recording.recorder import Recorder
from tests.server.recording.test_recorder import H, W, batch, start, telemetry
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
scan = (200, 200)
written = 0
try:
    with Recorder(Path(sys.argv[1]), compression="none") as recorder:
        recorder.write(start(scan=scan))
        for first in range(0, 40_000, 1000):
            indices = list(range(first, first + 1000))
            recorder.write(batch(indices, np.full((1000, H, W), 3, np.float32), scan=scan))
            recorder.write(telemetry(indices, scan=scan))
            written += 1000
except FileError as error:
    print(error)
print(written)
"""


def recorded_under_a_limit(path: Path, limit: int) -> tuple[str, int]:
    """What is said where no file may have more than ``limit`` bytes, and how much was written."""
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), str(limit)],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert run.stderr == ""
    said, written = run.stdout.splitlines()
    return said, int(written)


def test_a_limit_on_the_size_of_files_ends_a_recording_that_stays_readable(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    said, written = recorded_under_a_limit(path, 72 << 20)
    assert said.startswith("Recording was stopped: a file may have 75 MB here, of which ")
    assert "34 MB are kept for closing it" in said
    assert "is closed and holds what came before. Raise the limit (ulimit -f" in said
    assert 0 < written < 40_000
    assert "a file may have 75 MB here" in reason_of(path)
    with h5py.File(path) as file:
        assert file["prenet4d/received"][:].sum() == written
        assert (data_of(file)[:].reshape(40_000, -1)[:written] == 3).all()


def test_a_limit_that_leaves_room_for_nothing_is_told_before_a_file_is_begun(
    tmp_path: Path,
) -> None:
    said, written = recorded_under_a_limit(tmp_path / "scan.h5", 10_000_000)
    assert "a file may have 10 MB here, of which 0 MB are used" in said
    assert "Nothing was recorded." in said
    assert (written, list(tmp_path.iterdir())) == (0, [])


# --- other processes -----------------------------------------------------------------------------

READER = """
import sys, time, h5py, hdf5plugin, numpy as np
def look():
    with h5py.File(sys.argv[1], "r", swmr=True) as file:
        received = file["prenet4d/received"][:].ravel()
        patterns = file["Experiments/corrected/data"][:].reshape(len(received), -1)
        assert (patterns[received] == 3).all() and not patterns[~received].any()
        return int(received.sum())
while look() < int(sys.argv[2]):
    time.sleep(0.01)
print("seen", flush=True)
"""


@pytest.mark.parametrize("scan", [SCAN, None])
def test_another_process_reads_while_it_is_written(tmp_path: Path, scan: Any) -> None:
    path = tmp_path / "scan.h5"
    with Recorder(path) as recorder:
        recorder.write(start(scan=scan))
        for i in range(3):
            recorder.write(batch([i], np.full((1, H, W), 3, np.float32), scan=scan))
            recorder.flush()
            reader = [sys.executable, "-c", READER, str(path), str(i + 1)]
            assert subprocess.run(reader, capture_output=True, check=True).stdout == b"seen\n"


KILLED = """
import os, signal, sys
import numpy as np
from tests.server.recording.test_recorder import H, W, batch, start
from prenet4d_server.recording.recorder import Recorder
recorder = Recorder(sys.argv[1], compression="bslz4")
recorder.write(start())
recorder.write(batch([0, 1, 2], np.full((3, H, W), 3, np.float32)))
recorder.flush()
recorder.write(batch([3], np.full((1, H, W), 3, np.float32)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_recorder_leaves_what_was_flushed(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    root = Path(__file__).parents[3]
    killed = subprocess.run([sys.executable, "-c", KILLED, path], cwd=root, check=False)
    assert killed.returncode < 0
    # HDF5 takes it to be still written: as such, and only so, it opens.
    with pytest.raises(OSError, match="h5clear"):
        h5py.File(path)
    with h5py.File(path, swmr=True) as file:
        received = file["prenet4d/received"][:].ravel()
        assert received[:3].all()
        assert (data_of(file)[0, :3] == 3).all()
        assert not file["prenet4d"].attrs["complete"]
        assert b"has not closed" in file["prenet4d"].attrs["reason"]
    with open_scan(path) as scan:
        assert (scan.read(0, 3) == 3).all()


# --- from a service ------------------------------------------------------------------------------


class Service(threading.Thread):
    """The service's side of a lossless connection, over a real socket.

    Sends ``messages`` as far as there is credit, then does what ``afterwards`` says: ``goodbye``,
    ``silence``, or ``wait`` with a beating heart until the receiver leaves.
    """

    def __init__(self, messages: list[Message], afterwards: str = "wait") -> None:
        super().__init__(daemon=True)
        self.messages = messages
        self.afterwards = afterwards
        self.receiver_left = False
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.address = f"tcp://127.0.0.1:{port}"
        self.start()

    def run(self) -> None:
        heartbeat_s = 5.0 if self.afterwards == "silence" else TIMEOUT_S
        waiting, credit = list(self.messages), 0
        while True:
            came = self.socket.poll(200)
            if came:
                identity, *parts = self.socket.recv_multipart()
                header: Any = decode(parts).header
                credit += getattr(header, "credit", 0)
                if header.type == "register":
                    self.say(identity, Registered(heartbeat_s=heartbeat_s))
                elif header.type == "goodbye":
                    self.receiver_left = True
                    break
            while waiting and credit:
                message = waiting.pop(0)
                credit -= 1
                self.say(identity, message.header, message.arrays)
            if not waiting and self.afterwards == "silence":
                break
            if not waiting and self.afterwards == "goodbye":
                self.say(identity, Goodbye(reason="the service is stopped"))
                break
            if not came and self.afterwards == "wait":
                self.say(identity, Heartbeat())
        self.socket.close(linger=5000)
        self.context.term()

    def say(self, identity: bytes, header: Header, arrays: Any = None) -> None:
        self.socket.send_multipart([identity, *encode(header, arrays)])


def record_from(service: Service, path: Path, **options: Any) -> Summary:
    recorder = Recorder(path)
    receiver = LosslessReceiver(
        service.address, name="recorder", topics=recorder.topics, credit=3, timeout=TIMEOUT_S
    )
    with receiver, recorder:
        summary = record(receiver, recorder, options.pop("stop", threading.Event()), **options)
    service.join(TIMEOUT_S)
    assert not service.is_alive()
    return summary


def test_recording_from_a_service(tmp_path: Path) -> None:
    patterns = patterns_of(20)
    service = Service(list(whole_scan(patterns)))
    seen: list[int] = []
    summary = record_from(
        service,
        tmp_path / "scan.h5",
        acquisitions=1,
        on_progress=lambda summary: seen.append(summary.patterns),
    )
    assert summary == Summary(files=[tmp_path / "scan.h5"], finished=1, patterns=20)
    assert (seen[0], seen[-1]) == (0, 20)
    with open_scan(tmp_path / "scan.h5") as scan:
        np.testing.assert_array_equal(scan.read(0, 20), np.nan_to_num(patterns))
    assert service.receiver_left


def test_stopping_a_recording_closes_its_file(tmp_path: Path) -> None:
    service = Service(list(whole_scan(patterns_of(20)))[:5])
    stop = threading.Event()

    def stop_after_two(summary: Summary) -> None:
        if summary.patterns == 6:
            stop.set()

    summary = record_from(service, tmp_path / "scan.h5", stop=stop, on_progress=stop_after_two)
    assert (summary.patterns, summary.complete) == (6, False)
    assert "stopped" in reason_of(tmp_path / "scan.h5")
    assert service.receiver_left


@pytest.mark.parametrize(
    ("afterwards", "why"), [("goodbye", "the service is stopped"), ("silence", "silent")]
)
def test_a_service_that_goes_away_leaves_a_closed_file(
    tmp_path: Path, afterwards: str, why: str
) -> None:
    service = Service(list(whole_scan(patterns_of(20)))[:5], afterwards)
    summary = record_from(service, tmp_path / "scan.h5")
    assert (summary.patterns, summary.complete) == (6, False)
    assert why in summary.reason
    assert why in summary.lost
    assert why in reason_of(tmp_path / "scan.h5")
    with open_scan(tmp_path / "scan.h5") as scan:
        assert scan.n_frames == 20


@pytest.mark.parametrize("afterwards", ["goodbye", "silence"])
def test_a_service_that_goes_away_between_scans_makes_none_incomplete(
    tmp_path: Path, afterwards: str
) -> None:
    service = Service(list(whole_scan(patterns_of(20))), afterwards)
    summary = record_from(service, tmp_path / "scan.h5")
    assert (summary.patterns, summary.complete, summary.reason) == (20, True, "")
    assert summary.lost
    with h5py.File(tmp_path / "scan.h5") as file:
        assert file["prenet4d"].attrs["complete"]


def described(data: Any) -> str:
    """What a file says of a dataset, its units included."""
    return f"{data.attrs.get('units', '')}; {data.attrs['description']}"


def test_a_file_says_what_its_numbers_mean(tmp_path: Path) -> None:
    write(tmp_path / "scan.h5", whole_scan(patterns_of(20)), content=("corrected", "aligned"))
    with h5py.File(tmp_path / "scan.h5") as file:
        ours = file["prenet4d"]
        said = {name: described(ours[name]) for name in ours if name != "acquisition"}
        patterns = [described(signal["data"]) for signal in file["Experiments"].values()]
    assert "pixel centers at integers" in said["center"]
    assert "reference center minus the center in use" in said["shift"]
    assert "electrons" in said["dose"]
    assert "2 saturated" in said["flags"]
    assert "theta" in said["batches"]
    assert ["denoised" in each for each in patterns] == [False, True]


def test_what_ended_a_recording_is_told_beside_what_made_it_incomplete(tmp_path: Path) -> None:
    messages = list(whole_scan(patterns_of(20)))
    restarted = [start("b"), end(0, "b")]
    service = Service([*messages[:5], *restarted], "goodbye")
    summary = record_from(service, tmp_path / "scan.h5")
    assert "another acquisition began" in summary.reason
    assert "the service is stopped" in summary.lost


# --- other programs ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("scan", [SCAN, None])
def test_hyperspy_opens_a_recording(tmp_path: Path, scan: Any) -> None:
    hyperspy = pytest.importorskip("hyperspy.api", reason="HyperSpy is not installed here")
    patterns = patterns_of(20)
    write(tmp_path / "scan.hspy", whole_scan(patterns, scan=scan))
    signal = hyperspy.load(tmp_path / "scan.hspy")
    (tmp_path / "scan.hspy").rename(tmp_path / "scan.h5")
    assert hyperspy.load(tmp_path / "scan.h5", file_format="hspy").data.shape == signal.data.shape
    np.testing.assert_array_equal(signal.data.reshape(20, H, W), np.nan_to_num(patterns))
    names = [axis.name for axis in signal.axes_manager.navigation_axes]
    assert names == (["x", "y"] if scan else ["frame"])


@pytest.mark.filterwarnings("default")
def test_libertem_opens_a_recording(tmp_path: Path) -> None:
    libertem = pytest.importorskip("libertem.api", reason="LiberTEM is not installed here")
    write(tmp_path / "scan.h5", whole_scan(patterns_of(20)))
    with libertem.Context.make_with("inline") as context:
        found = context.load(
            "hdf5", path=str(tmp_path / "scan.h5"), ds_path="/Experiments/corrected/data"
        )
        assert tuple(found.shape) == (*SCAN, H, W)


@pytest.mark.filterwarnings("default")
def test_py4dstem_opens_a_recording(tmp_path: Path) -> None:
    py4dstem = pytest.importorskip("py4DSTEM", reason="py4DSTEM is not installed here")
    patterns = patterns_of(20)
    write(tmp_path / "scan.h5", whole_scan(patterns))
    cube = py4dstem.read(tmp_path / "scan.h5")
    np.testing.assert_array_equal(cube.data.reshape(20, H, W), np.nan_to_num(patterns))
