"""Zarr stores as scans: the recorder's own and other people's, and replayed through the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prenet4d_server.errors import FileError
from prenet4d_server.files import open_scan
from prenet4d_server.processes import Child
from prenet4d_server.service import Service

from ..live import settings, until
from ..recording.test_recorder import SCAN, H, W, patterns_of, whole_scan, write
from .test_files import check, scan_of

zarr = pytest.importorskip("zarr", minversion="3", reason="zarr ≥ 3 is not installed here")


@pytest.mark.parametrize("scan", [SCAN, None])
def test_the_recorder_s_own(tmp_path: Path, scan: tuple[int, int] | None) -> None:
    patterns = patterns_of(20)
    path = tmp_path / "scan.zarr"
    write(path, whole_scan(patterns, scan=scan, detector="sim", metadata={"voltage_kV": 200}))
    truth = np.nan_to_num(patterns)
    check(path, truth.reshape(*SCAN, H, W) if scan else truth)
    with open_scan(path) as opened:
        assert opened.metadata["voltage_kV"] == 200
        assert opened.metadata["detector"] == "sim"
        # the mask is of the detector's pixels, which the correction has moved
        assert opened.pixel_mask is None


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("shape", [(4, 3, 8, 10), (12, 8, 10)])
def test_other_people_s(tmp_path: Path, version: Any, shape: tuple[int, ...]) -> None:
    truth = scan_of(shape)
    path = tmp_path / "scan.zarr"
    group = zarr.create_group(path, zarr_format=version)
    group.create_array("deep/inside", data=truth, chunks=(*[2] * (len(shape) - 2), 8, 10))
    group.create_array("virtual image", data=truth[..., 0, 0])
    check(path, truth)
    check(path, truth, dataset="deep/inside")


def test_an_array_without_a_group(tmp_path: Path) -> None:
    truth = scan_of((3, 4, 8, 10))
    zarr.create_array(tmp_path / "scan.zarr", data=truth, chunks=(1, 3, 8, 10))
    check(tmp_path / "scan.zarr", truth)
    with pytest.raises(FileError, match="leave the dataset out"):
        open_scan(tmp_path / "scan.zarr", dataset="scan")


def test_what_is_no_scan_or_more_than_one_is_refused_with_what_there_is(tmp_path: Path) -> None:
    group = zarr.create_group(tmp_path / "scan.zarr")
    with pytest.raises(FileError, match="it has none at all"):
        open_scan(tmp_path / "scan.zarr")
    for name in ("a", "b"):
        group.create_array(name, data=scan_of((2, 2, 8, 10)))
    with pytest.raises(FileError, match=r"a uint16 \(2, 2, 8, 10\), b .*Name one as the dataset"):
        open_scan(tmp_path / "scan.zarr")
    with pytest.raises(FileError, match="has no array 'c'; it has a, b"):
        open_scan(tmp_path / "scan.zarr", dataset="c")


def test_damage_is_told(tmp_path: Path) -> None:
    path = tmp_path / "scan.zarr"
    write(path, whole_scan(patterns_of(20)))
    shard = path / "corrected" / "c" / "0" / "0" / "0" / "0"
    content = bytearray(shard.read_bytes())
    content[-6] ^= 0xFF  # in its index
    shard.write_bytes(content)
    with open_scan(path) as scan, pytest.raises(FileError, match="damaged"):
        scan.read(0, 2)
    for content in ("{", "[]", '{"zarr_format": 3, "node_type": "array"}'):
        (path / "zarr.json").write_text(content)
        with pytest.raises(FileError, match="cannot be read as Zarr"):
            open_scan(path)


def test_a_number_beyond_64_bits_is_left_out_of_the_metadata(tmp_path: Path) -> None:
    array = zarr.create_array(tmp_path / "scan.zarr", data=scan_of((3, 8, 10)))
    array.attrs.update({"large": 10**30, "dwell_s": 0.5})
    with open_scan(tmp_path / "scan.zarr") as scan:
        assert "large" not in scan.metadata
        assert scan.metadata["dwell_s"] == 0.5


@pytest.mark.parametrize("name", ["scan.zarr", "scan.h5"])
def test_a_recording_is_replayed_through_the_service(tmp_path: Path, name: str) -> None:
    patterns = patterns_of(20)
    patterns[3, 2, 5] = -0.25  # as interpolation leaves it beside a bright pixel
    path = tmp_path / name
    write(path, whole_scan(patterns), fill="nan")
    source = {"kind": "replay", "path": path}
    with Service(settings(source=source)) as service:
        until(lambda: service.status().counters.received == 20)
        until(lambda: service.status().counters.in_flight == 0)
        counters = service.status().counters
    assert (counters.corrected, counters.rejected) == (20, 0)


def test_the_command_line_takes_a_store(tmp_path: Path) -> None:
    path = tmp_path / "scan.zarr"
    write(path, whole_scan(patterns_of(20)))
    free = [f'{name}.address = "tcp://127.0.0.1:*"' for name in ("stream", "lossless", "control")]
    config, log = tmp_path / "prenet4d.toml", tmp_path / "log"
    config.write_text("\n".join([*free, "http.enabled = false"]))
    command = ("serve", "--config", str(config), "--data", str(path), "--backend", "identity")
    with Child.command("service", *command, log=log) as service:

        def is_replayed() -> bool:
            service.check()
            return "The acquisition ended" in log.read_text()

        until(is_replayed)
