"""Every format from a real file of it, whole, half-written and damaged."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prenet4d_server.errors import FileError, HalfWrittenFile
from prenet4d_server.files import open_scan
from prenet4d_server.files.merlin import MibHeader
from prenet4d_server.simulators.base import FrameFeed

from ..no_locks import without_locks

Frames = npt.NDArray[Any]


def scan_of(shape: tuple[int, ...], dtype: str = "uint16") -> Frames:
    return np.random.default_rng(7).integers(0, 200, shape).astype(dtype)


def check(path: Path, truth: Frames, **options: Any) -> None:
    """The file reads as ``truth``, in one go, in blocks that cross scan lines, and in pieces."""
    frames = truth.reshape(-1, *truth.shape[-2:])
    with open_scan(path, **options) as scan:
        assert scan.frame_shape == truth.shape[-2:]
        assert scan.n_frames == len(frames)
        assert scan.scan_shape == (truth.shape[:2] if truth.ndim == 4 else None)
        for size in (None, 1, 5):
            read = np.concatenate(list(scan.blocks(size)))
            assert read.dtype == scan.dtype
            np.testing.assert_array_equal(read, frames)
        np.testing.assert_array_equal(scan.read(3, 3), frames[3:3])
        np.testing.assert_array_equal(scan.read(2, 4), frames[2:4])


# --- NumPy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 8, 10), (12, 8, 10)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_npy(tmp_path: Path, shape: tuple[int, ...], order: Any) -> None:
    truth = scan_of(shape)
    np.save(tmp_path / "scan.npy", np.asarray(truth, order=order))
    check(tmp_path / "scan.npy", truth)


def test_a_scan_file_feeds_a_simulated_detector(tmp_path: Path) -> None:
    truth = scan_of((12, 8, 10))
    np.save(tmp_path / "scan.npy", truth)
    with open_scan(tmp_path / "scan.npy") as scan:
        feed: FrameFeed = scan
        assert (feed.n_frames, feed.frame_shape) == (12, (8, 10))
        np.testing.assert_array_equal(np.concatenate(list(feed.blocks())), truth)


def test_a_single_image_is_a_scan_of_one_frame(tmp_path: Path) -> None:
    image = scan_of((16, 20), "float32")
    np.save(tmp_path / "image.npy", image)
    with open_scan(tmp_path / "image.npy") as scan:
        assert (scan.n_frames, scan.scan_shape) == (1, None)
        np.testing.assert_array_equal(scan.read(0, 1), image[None])


@pytest.mark.parametrize(
    ("stored", "handed_out"),
    [
        ("bool", "uint8"),
        ("uint8", "uint8"),
        (">u2", "uint16"),
        ("uint32", "uint32"),
        ("uint64", "float32"),
        ("int16", "float32"),
        (">i4", "float32"),
        ("int64", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        (">f8", "float32"),
    ],
)
def test_every_dtype_of_counts_becomes_one_of_the_wire(
    tmp_path: Path, stored: str, handed_out: str
) -> None:
    truth = scan_of((5, 8, 8), stored)
    if truth.dtype.kind in "if":
        truth[0, 0, 0] = -3
    np.save(tmp_path / "scan.npy", truth)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["frames"] = truth
    for name in ("scan.npy", "scan.h5"):
        with open_scan(tmp_path / name) as scan:
            assert scan.dtype == np.dtype(handed_out)
            assert scan.dtype.isnative
            np.testing.assert_array_equal(scan.read(0, 5), truth.astype(handed_out))


def write_frames(path: Path, frames: np.ndarray, **of_hdf5: Any) -> None:
    """Write frames as the suffix says; HDF5 with these options of the dataset."""
    if path.suffix == ".npy":
        np.save(path, frames)
    elif path.suffix == ".npz":
        np.savez(path, frames)
    else:
        with h5py.File(path, "w") as file:
            file.create_dataset("frames", data=frames, **of_hdf5)


@pytest.mark.parametrize("suffix", ["npy", "npz", "h5"])
def test_a_file_without_frames_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan.{suffix}"
    write_frames(path, np.zeros((0, 16, 16), np.uint16), maxshape=(None, 16, 16))
    with pytest.raises(FileError, match="holds no frames"):
        open_scan(path)


def test_values_that_are_no_counts_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", np.zeros((3, 8, 8), complex))
    with pytest.raises(FileError, match="complex128"):
        open_scan(tmp_path / "scan.npy")


@pytest.mark.parametrize("shape", [(5,), (2, 2, 2, 8, 8), (5, 4, 4), (5, 8, 9000), (0, 8, 8)])
def test_shapes_that_are_no_scans_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.save(tmp_path / "scan.npy", np.zeros(shape, np.uint8))
    with pytest.raises(FileError, match=r"shape"):
        open_scan(tmp_path / "scan.npy")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz(tmp_path: Path, save: Any) -> None:
    truth = scan_of((4, 3, 8, 10))
    save(tmp_path / "scan.npz", scan=truth, centers=np.zeros((12, 2)), other=truth[0] + 1)
    check(tmp_path / "scan.npz", truth, dataset="scan")
    with pytest.raises(FileError, match=r"several.*scan uint16 .*other uint16.*as the dataset"):
        open_scan(tmp_path / "scan.npz")
    with pytest.raises(FileError, match="it has scan, centers, other"):
        open_scan(tmp_path / "scan.npz", dataset="scam")


def test_the_only_array_of_an_npz_needs_no_name(tmp_path: Path) -> None:
    truth = scan_of((12, 8, 10))
    np.savez_compressed(tmp_path / "scan.npz", truth, np.zeros(3))
    check(tmp_path / "scan.npz", truth)


def test_a_damaged_npz_is_told_when_the_damage_is_reached(tmp_path: Path) -> None:
    path = tmp_path / "scan.npz"
    np.savez_compressed(path, scan_of((40, 64, 64)))
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[0]
    raw = bytearray(path.read_bytes())
    middle = info.header_offset + info.compress_size // 2
    raw[middle : middle + 400] = bytes(400)
    path.write_bytes(raw)
    with open_scan(path) as scan, pytest.raises(FileError, match="Copy it again"):
        scan.read(0, 40)


@pytest.mark.parametrize("places", [(60, 80, 100), (30,)], ids=["data", "name"])
def test_an_npz_damaged_at_its_head(tmp_path: Path, places: tuple[int, ...]) -> None:
    path = tmp_path / "scan.npz"
    np.savez_compressed(path, scan_of((20, 32, 32)))
    raw = bytearray(path.read_bytes())
    for place in places:
        raw[place] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(FileError, match="Copy it again"):
        open_scan(path)


@pytest.mark.parametrize("suffix", ["npy", "mib"])
def test_a_dataset_cannot_be_named_where_there_is_one_array(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan.{suffix}"
    if suffix == "npy":
        np.save(path, scan_of((3, 16, 16)))
    else:
        write_mib(path, scan_of((3, 16, 16)), "U16")
    with pytest.raises(FileError, match="leave the dataset out"):
        open_scan(path, dataset="scan")


# --- half-written and missing --------------------------------------------------------------------


def test_a_truncated_npy_says_what_is_there_and_reads_it_when_asked(tmp_path: Path) -> None:
    truth = scan_of((4, 3, 8, 10))
    path = tmp_path / "scan.npy"
    np.save(path, truth)
    path.write_bytes(path.read_bytes()[: -2 * truth[0, 0].nbytes - 1])
    with pytest.raises(HalfWrittenFile, match="reads the 9 frames that are whole"):
        open_scan(path)
    with open_scan(path, partial=True, scan_shape=(4, 3)) as scan:
        assert (scan.n_frames, scan.scan_shape) == (9, (4, 3))
        np.testing.assert_array_equal(scan.read(0, 9), truth.reshape(12, 8, 10)[:9])


@pytest.mark.parametrize("suffix", ["npy", "npz", "h5"])
def test_a_file_cut_anywhere_is_told_as_such(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan.{suffix}"
    truth = scan_of((10, 16, 16))
    write_frames(path, truth, chunks=(1, 16, 16), compression="gzip")
    whole = path.read_bytes()
    for size in (0, 9, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(FileError, match="scan"):
            open_scan(path)


def test_what_is_not_there_or_not_a_scan(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="There is no file"):
        open_scan(tmp_path / "nothing.npy")
    with pytest.raises(FileError, match="is a folder"):
        open_scan(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="is a pipe, and a scan is read here and there"):
        open_scan(tmp_path / "pipe")
    (tmp_path / "notes.txt").write_text("what we did")
    with pytest.raises(FileError, match="not a file that can be read here"):
        open_scan(tmp_path / "notes.txt")


def test_the_scan_shape_must_hold_the_frames(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", scan_of((12, 8, 8)))
    with open_scan(tmp_path / "scan.npy", scan_shape=(3, 5)) as scan:
        assert scan.scan_shape == (3, 5)
    for shape in ((3, 3), (0, 12)):
        with pytest.raises(FileError, match="12 frames"):
            open_scan(tmp_path / "scan.npy", scan_shape=shape)


def test_another_scan_shape_must_keep_the_lines_that_a_file_has(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", scan_of((3, 4, 8, 8)))
    for shape in ((5, 4), (2, 6)):  # a scan that was stopped; as many positions
        with open_scan(tmp_path / "scan.npy", scan_shape=shape) as scan:
            assert scan.scan_shape == shape
    with pytest.raises(FileError, match="3 × 4, whose lines 3 × 5 would tear"):
        open_scan(tmp_path / "scan.npy", scan_shape=(3, 5))
    np.save(tmp_path / "line.npy", scan_of((1, 12, 8, 8)))
    with open_scan(tmp_path / "line.npy", scan_shape=(4, 4)) as scan:
        assert scan.scan_shape == (4, 4)


def test_frames_past_the_end_cannot_be_read(tmp_path: Path) -> None:
    np.save(tmp_path / "scan.npy", scan_of((12, 8, 8)))
    with open_scan(tmp_path / "scan.npy") as scan:
        for start, stop in ((10, 13), (-1, 2)):
            with pytest.raises(FileError, match="12 frames"):
                scan.read(start, stop)


# --- HDF5 ----------------------------------------------------------------------------------------


def test_a_lone_dataset_in_any_group(tmp_path: Path) -> None:
    truth = scan_of((4, 3, 8, 10))
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["a/b/frames"] = truth
        file["a/centers"] = np.zeros((4, 3, 2))
        file["a/mean"] = truth.mean((0, 1))
        file["a/stack"] = truth[0]
        file["a/again"] = file["a/b/frames"]
        file["a/round"] = file["a"]
        file["a/nowhere"] = h5py.SoftLink("/gone")
    check(tmp_path / "scan.h5", truth)


def test_several_datasets_are_listed_and_one_is_chosen(tmp_path: Path) -> None:
    truth = scan_of((4, 3, 8, 10))
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["raw"] = truth
        file["other"] = truth + 1
    with pytest.raises(FileError, match=r"/other uint16 \(4, .*, /raw uint16.*as the dataset"):
        open_scan(tmp_path / "scan.h5")
    check(tmp_path / "scan.h5", truth, dataset="raw")
    with pytest.raises(FileError, match="no dataset 'rare'; it has /other"):
        open_scan(tmp_path / "scan.h5", dataset="rare")


@pytest.mark.parametrize("name", ["entry", "kind", "nothing"])
def test_a_name_in_hdf5_that_is_no_dataset_is_refused(tmp_path: Path, name: str) -> None:
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["entry/data/frames"] = scan_of((4, 3, 8, 10))
        file["kind"] = np.dtype("uint16")
        file["nothing"] = h5py.Empty("float32")
    with pytest.raises(FileError, match=f"no dataset '{name}'; it has .*/entry/data/frames"):
        open_scan(tmp_path / "scan.h5", dataset=name)


def test_what_cannot_be_kept_of_hdf5_s_attributes_costs_nothing_else(tmp_path: Path) -> None:
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        data = file.create_dataset("frames", data=scan_of((4, 8, 10)))
        data.attrs["dwell_s"] = 0.5
        # Older programs' text, and HDF5's own times, which NumPy does not have.
        text = h5py.h5t.C_S1.copy()
        text.set_size(h5py.h5t.VARIABLE)
        micro = np.array(b"\xb5m", h5py.string_dtype("ascii"))
        h5py.h5a.create(data.id, b"units", text, scalar).write(micro)
        h5py.h5a.create(data.id, b"\xb5", h5py.h5t.STD_I32LE, scalar).write(np.array(3, "i4"))
        h5py.h5a.create(data.id, b"began", h5py.h5t.UNIX_D32LE, scalar)
        detector = file.create_group("entry/instrument/detector")
        h5py.h5d.create(detector.id, b"began", h5py.h5t.UNIX_D32LE, scalar)
    with open_scan(tmp_path / "scan.h5") as scan:
        assert scan.metadata == {"dataset": "/frames", "dwell_s": 0.5, "units": "?m", "\ufffd": 3}


def test_hdf5_without_a_scan(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["centers"] = np.zeros((4, 3, 2))
    with pytest.raises(FileError, match=r"no dataset of 3 or 4 axes.*centers float64 \(4, 3, 2\)"):
        open_scan(tmp_path / "scan.h5")


@pytest.mark.parametrize(
    ("path", "attributes"),
    [
        ("datacube_root/datacube", {"emd_group_type": "array", "python_class": "DataCube"}),
        ("4DSTEM_experiment/data/datacubes/datacube_0", {"emd_group_type": 1}),
        ("Experiments/__unnamed__", {"package": "hyperspy"}),
    ],
)
def test_the_layouts_of_py4dstem_and_hyperspy(
    tmp_path: Path, path: str, attributes: dict[str, Any]
) -> None:
    truth = scan_of((4, 3, 8, 10))
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        group = file.create_group(path)
        group.attrs.update(attributes)
        group.create_dataset("data", data=truth, chunks=(2, 2, 8, 10), compression="gzip")
        for axis in range(4):
            group[f"dim{axis}"] = np.arange(2)
            group.create_group(f"axis-{axis}").attrs["size"] = truth.shape[axis]
        tem = group.create_group("metadata/Acquisition_instrument/TEM")
        tem.attrs["beam_energy"] = 200.0
    check(tmp_path / "scan.h5", truth)
    check(tmp_path / "scan.h5", truth, dataset=path)
    with open_scan(tmp_path / "scan.h5") as scan:
        assert scan.metadata["beam_energy"] == 200.0


def dectris_master(folder: Path, truth: Frames, per_file: int) -> Path:
    for number, start in enumerate(range(0, len(truth), per_file), 1):
        with h5py.File(folder / f"series_data_{number:06d}.h5", "w") as file:
            file.create_dataset(
                "entry/data/data",
                data=truth[start : start + per_file],
                chunks=(1, *truth.shape[1:]),
                **hdf5plugin.Bitshuffle(cname="lz4"),
            )
    master = folder / "series_master.h5"
    with h5py.File(master, "w") as file:
        for link in range(1, number + 1):
            file[f"entry/data/data_{link:06d}"] = h5py.ExternalLink(
                f"series_data_{link:06d}.h5", "entry/data/data"
            )
        file.attrs["default"] = "entry"
        file["entry"].attrs["default"] = "data"
        file["entry/data"].attrs["signal"] = "data_000001"
        detector = file.create_group("entry/instrument/detector")
        mask = np.zeros(truth.shape[1:], np.uint32)
        mask[2, 3] = 1
        mask[5] = 8
        detector["detectorSpecific/pixel_mask"] = mask
        detector["count_time"] = 0.001
        detector["description"] = b"Dectris ARINA Si"
    return master


def test_a_dectris_master_file(tmp_path: Path) -> None:
    truth = scan_of((11, 8, 10), "uint32")
    master = dectris_master(tmp_path, truth, per_file=4)
    check(master, truth)
    with open_scan(master, scan_shape=(3, 4)) as scan:
        assert scan.pixel_mask is not None
        assert np.argwhere(~scan.pixel_mask).tolist() == [[2, 3], *([5, x] for x in range(10))]
        assert scan.metadata["count_time"] == 0.001
        assert scan.metadata["description"] == scan.metadata["detector"] == "Dectris ARINA Si"


def test_a_dectris_master_file_with_a_part_missing(tmp_path: Path) -> None:
    truth = scan_of((11, 8, 10))
    master = dectris_master(tmp_path, truth, per_file=4)
    (tmp_path / "series_data_000003.h5").unlink()
    with pytest.raises(HalfWrittenFile, match=r"series_data_000003\.h5, which is missing"):
        open_scan(master)
    with open_scan(master, partial=True) as scan:
        np.testing.assert_array_equal(scan.read(0, scan.n_frames), truth[:8])


WRITER = """
import sys, h5py
with h5py.File(sys.argv[1], "r+", libver=("v110", "v110")) as file:
    data = file["frames"]
    for step in sys.stdin:
        if step.strip() == "swmr":
            file.swmr_mode = True
        else:
            data.resize(len(data) + 1, axis=0)
            data[-1] = data[0]
            data.flush()
        print("done", flush=True)
"""


def test_an_hdf5_file_that_another_process_is_writing(tmp_path: Path) -> None:
    truth = scan_of((6, 8, 8))
    path = tmp_path / "scan.h5"
    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        file.create_dataset("frames", data=truth, maxshape=(None, 8, 8))
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as writer:

        def tell(step: bytes) -> None:
            assert writer.stdin is not None
            assert writer.stdout is not None
            writer.stdin.write(step + b"\n")
            writer.stdin.flush()
            assert writer.stdout.readline() == b"done\n"

        tell(b"grow")
        # The lock is its writer's, who lives.
        with pytest.raises(HalfWrittenFile, match=r"another program\. Wait until it is closed\.$"):
            open_scan(path)
        tell(b"swmr")
        check(path, np.concatenate((truth, truth[:1])))
        tell(b"grow")
        check(path, np.concatenate((truth, truth[:1], truth[:1])))
        writer.kill()


def test_hdf5_on_a_disk_that_has_no_locks(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "scan.h5", "w") as file:
        file["frames"] = scan_of((6, 8, 8))
    reads = "from prenet4d_server.files import open_scan; print(open_scan('scan.h5').n_frames)"
    assert without_locks(reads, tmp_path) == "6\n"


DIES = """
import os, sys, h5py
file = h5py.File(sys.argv[1], "w", libver="latest")
file["frames"] = [[[0] * 8] * 8] * 3
file.flush()
os._exit(0)
"""


def test_hdf5_that_its_writer_did_not_close_can_be_had_with_h5clear(tmp_path: Path) -> None:
    path = tmp_path / "scan.h5"
    subprocess.run([sys.executable, "-c", DIES, path], check=True)
    with pytest.raises(HalfWrittenFile, match=r"when that program died.*h5clear -s"):
        open_scan(path)


# --- Merlin --------------------------------------------------------------------------------------


def mib_header(
    sequence: int, shape: tuple[int, int], kind: str, *, chips: int = 1, bits: int = 12
) -> bytes:
    size, layout = (768, "2x2") if chips == 4 else (384, "1x1")
    text = (
        f"MQ1,{sequence:06d},{size:05d},{chips:02d},{shape[1]:04d},{shape[0]:04d},{kind},"
        f"{layout:>6},01,2024-05-06 07:08:09.000000,0.000500,0,0,0,1.200000E+1,5.110000E+2,"
        f"3RX,175,511,000,MQ1A,2024-05-06T07:08:09.000000Z,500000ns,{bits},"
    )
    return text.encode().ljust(size, b"\0")


def write_mib(path: Path, truth: Frames, kind: str) -> None:
    wire = {"U08": ">u1", "U16": ">u2", "U32": ">u4"}[kind]
    with path.open("wb") as file:
        for i, frame in enumerate(truth):
            file.write(mib_header(i + 1, frame.shape, kind) + frame.astype(wire).tobytes())


@pytest.mark.parametrize(("kind", "dtype"), [("U08", "u1"), ("U16", "u2"), ("U32", "u4")])
def test_mib(tmp_path: Path, kind: str, dtype: str) -> None:
    truth = scan_of((12, 16, 24), dtype)
    write_mib(tmp_path / "scan.mib", truth, kind)
    check(tmp_path / "scan.mib", truth)
    with open_scan(tmp_path / "scan.mib") as scan:
        assert scan.metadata["exposure_s"] == 0.0005
        assert scan.metadata["counter_depth_bits"] == 12


@pytest.mark.parametrize(
    ("lines", "shape"),
    [
        ("ScanX:\t4\r\nScanY:\t3", (3, 4)),
        ("Frames in Acquisition (Number):\t12\nFrames per Trigger (Number):\t6", (2, 6)),
        ("Frames in Acquisition (Number):\t40\nFrames per Trigger (Number):\t8", (5, 8)),
        ("Frames in Acquisition (Number):\t12\nFrames per Trigger (Number):\t1", None),
        ("ScanX:\t2\nScanY:\t2", None),
        ("ScanX:\t\nno tab in this line\nScanY:\tmany", None),
    ],
)
def test_the_hdr_beside_a_mib_tells_the_scan(tmp_path: Path, lines: str, shape: Any) -> None:
    write_mib(tmp_path / "scan.mib", scan_of((12, 16, 16)), "U16")
    (tmp_path / "scan.hdr").write_bytes(
        f"HDR,\t\r\nChip ID:\tµ\r\n{lines}\nEnd\t".encode("latin-1")
    )
    for name in ("scan.mib", "scan.hdr"):
        with open_scan(tmp_path / name) as scan:
            assert scan.scan_shape == shape
            assert scan.metadata["merlin: Chip ID"] == "µ"
    with open_scan(tmp_path / "scan.mib", scan_shape=(12, 1)) as scan:
        assert scan.scan_shape == (12, 1)


def raw_words(pixels: Frames, bits: int) -> bytes:
    """Pack a chip row by row, as its read-out does: the first pixel into a word's lowest bits."""
    width = {1: 1, 6: 8, 12: 16}[bits]
    words = []
    for group in pixels.reshape(-1, 64 // width).tolist():
        word = sum(value << (width * i) for i, value in enumerate(group))
        words.append(word.to_bytes(8, "big"))
    return b"".join(words)


@pytest.mark.parametrize("bits", [1, 6, 12])
@pytest.mark.parametrize("chips", [1, 4])
def test_raw_mib(tmp_path: Path, bits: int, chips: int) -> None:
    side, count = 64, 3
    rng = np.random.default_rng(bits)
    high = 1 << bits
    shape = (side, side) if chips == 1 else (2 * side, 2 * side)
    truth = rng.integers(0, high, (count, *shape)).astype("u2" if bits == 12 else "u1")
    with (tmp_path / "scan.mib").open("wb") as file:
        for i, frame in enumerate(truth):
            if chips == 1:
                lines = frame
            else:
                top, bottom = frame[:side], frame[side:][::-1, ::-1]
                # Standing on its head, the lower row's left chip is now on the right.
                fourth, third = bottom[:, :side], bottom[:, side:]
                first, second = top[:, :side], top[:, side:]
                lines = np.hstack((fourth, third, second, first))
            header = mib_header(i + 1, lines.shape, "R64", chips=chips, bits=bits)
            file.write(header + raw_words(lines, bits))
    with open_scan(tmp_path / "scan.mib") as scan:
        assert scan.dtype == truth.dtype
        np.testing.assert_array_equal(scan.read(0, count), truth)
        np.testing.assert_array_equal(scan.read(1, 2), truth[1:2])


@pytest.mark.parametrize(
    ("kind", "options", "what"),
    [
        ("R64", {"bits": 24}, "24-bit frames as U32"),
        ("R64", {"chips": 2}, "2 chips"),
        ("F32", {}, "type 'F32'"),
    ],
)
def test_mib_of_a_kind_that_cannot_be_read(
    tmp_path: Path, kind: str, options: dict[str, int], what: str
) -> None:
    header = mib_header(1, (64, 64), kind, **options)
    (tmp_path / "scan.mib").write_bytes(header + bytes(64 * 64 * 4))
    with pytest.raises(FileError, match=what):
        open_scan(tmp_path / "scan.mib")


def test_a_mib_that_ends_in_the_middle_of_a_frame(tmp_path: Path) -> None:
    truth = scan_of((5, 16, 16))
    path = tmp_path / "scan.mib"
    write_mib(path, truth, "U16")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(HalfWrittenFile, match="after 4 whole frames"):
        open_scan(path)
    with open_scan(path, partial=True) as scan:
        np.testing.assert_array_equal(scan.read(0, scan.n_frames), truth[:4])
    path.write_bytes(whole[:500])
    with pytest.raises(HalfWrittenFile, match="after 0 whole frames"):
        open_scan(path, partial=True)


def test_a_mib_whose_frames_lost_their_places(tmp_path: Path) -> None:
    path = tmp_path / "scan.mib"
    write_mib(path, scan_of((5, 16, 16)), "U16")
    raw = path.read_bytes()
    size = len(raw) // 5
    path.write_bytes(raw[: 2 * size] + raw[2 * size + 10 :] + bytes(10))
    with open_scan(path) as scan:
        assert len(scan.read(0, 2)) == 2
        with pytest.raises(FileError, match=r"Frame 2 .* does not begin with a header"):
            scan.read(1, 4)


@given(
    sequence=st.integers(0, 999_999),
    shape=st.tuples(st.integers(1, 9999), st.integers(1, 9999)),
    kind=st.sampled_from(["U08", "U16", "U32", "R64"]),
    chips=st.sampled_from([1, 4]),
    bits=st.sampled_from([1, 6, 12, 24]),
)
def test_mib_headers_read_as_they_were_written(
    sequence: int, shape: tuple[int, int], kind: str, chips: int, bits: int
) -> None:
    raw = mib_header(sequence, shape, kind, chips=chips, bits=bits)
    header = MibHeader.parse(raw + b"pixels,pixels", "scan.mib")
    assert (header.sequence, header.height, header.width) == (sequence, *shape)
    assert (header.kind, header.chips, header.bits) == (kind, chips, bits)
    assert header.header_bytes == len(raw)


@given(
    st.one_of(
        st.binary(max_size=500),
        st.lists(st.text(st.characters(codec="latin-1"), max_size=9), max_size=20).map(
            lambda fields: ",".join(["MQ1", *fields]).encode("latin-1")
        ),
        st.tuples(st.integers(0, 380), st.binary(min_size=1, max_size=4)).map(
            lambda cut: _patched(mib_header(1, (256, 256), "U16"), *cut)
        ),
    )
)
def test_wild_mib_headers_are_read_or_refused(raw: bytes) -> None:
    try:
        header = MibHeader.parse(raw, "scan.mib")
    except FileError:
        return
    assert raw.startswith(b"MQ1,")
    assert min(header.frame_shape) >= 0
    assert header.header_bytes > 0


def _patched(raw: bytes, where: int, patch: bytes) -> bytes:
    return raw[:where] + patch + raw[where + len(patch) :]
