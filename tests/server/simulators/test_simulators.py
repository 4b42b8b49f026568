"""Every simulated detector, attached to its source over a real socket."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from queue import Queue
from typing import Any

import numpy as np
import pytest

from prenet4d_client.errors import NoAnswer
from prenet4d_server.errors import BadMessage, BindError, ConfigError, CorruptFrame
from prenet4d_server.simulators import (
    FAULTS,
    ArrayFeed,
    simulate_dectris_v1,
    simulate_dectris_v2,
    simulate_native,
)
from prenet4d_server.sources.base import AcquisitionEnd, AcquisitionStart, Fault
from prenet4d_server.sources.dectris_v1 import DectrisV1Source
from prenet4d_server.sources.dectris_v2 import DectrisV2Source
from prenet4d_server.sources.native import NativeSource

from ..sources.detector import (
    WAIT_S,
    blocks_of,
    of,
    poll_to_end,
    poll_until,
    push_socket,
    read,
)

KINDS = ["native", "dectris1", "dectris2"]
SHAPE = (24, 40)


def feed(count: int = 12, dtype: str = "uint16", mask: np.ndarray | None = None) -> ArrayFeed:
    frames = np.random.default_rng(0).poisson(5, (count, *SHAPE)).astype(dtype)
    return ArrayFeed(frames, scan_shape=(3, 4), pixel_mask=mask)


@contextmanager
def attached(kind: str, seen: Any, channel: int | None = None, **options: Any) -> Iterator[Any]:
    """A source with its detector running beside it; the detector's own errors come out too."""
    stop, addresses, errors = threading.Event(), Queue[Any](), Queue[BaseException]()

    def simulate(address: str) -> None:
        function = {
            "native": simulate_native,
            "dectris1": simulate_dectris_v1,
            "dectris2": simulate_dectris_v2,
        }[kind]
        try:
            function(seen, address, stop=stop, on_ready=addresses.put, **options)
        except BaseException as error:  # noqa: BLE001  # handed to the test
            errors.put(error)
            addresses.put(None)

    if kind == "native":
        source: Any = NativeSource("tcp://127.0.0.1:*")
        thread = threading.Thread(target=simulate, args=[source.address])
        thread.start()
    else:
        thread = threading.Thread(target=simulate, args=["tcp://127.0.0.1:*"])
        thread.start()
        address = addresses.get(timeout=WAIT_S)
        if kind == "dectris1":
            source = DectrisV1Source(address)
        else:
            source = DectrisV2Source(address, channel=channel)
    try:
        with source:
            yield source
    finally:
        stop.set()
        thread.join(WAIT_S)
        assert not thread.is_alive()
        if not errors.empty():
            raise errors.get()


def every_frame_is_right(series: Any, seen: ArrayFeed) -> None:
    assert not series.failures
    assert not series.faults
    assert sorted(series.frames) == list(range(seen.n_frames))
    for number, pixels in enumerate(seen.frames):
        np.testing.assert_array_equal(series.frames[number], pixels)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, dtype) for kind in KINDS for dtype in ("uint8", "uint16", "uint32")),
        ("native", "float32"),
        ("dectris2", "float32"),
    ],
)
def test_what_the_detector_sees_arrives(kind, dtype):
    seen = feed(dtype=dtype)
    with attached(kind, seen) as source:
        series = read(poll_to_end(source))
    assert (series.start.frame_shape, series.start.dtype) == (SHAPE, np.dtype(dtype))
    assert series.start.expected_frames == 12
    every_frame_is_right(series, seen)


@pytest.mark.parametrize("compression", ["none", "lz4", "bslz4"])
@pytest.mark.parametrize("kind", ["dectris1", "dectris2"])
def test_every_compression(kind, compression):
    seen = feed()
    with attached(kind, seen, compression=compression) as source:
        every_frame_is_right(read(poll_to_end(source)), seen)


@pytest.mark.parametrize("detail", ["none", "basic", "all"])
def test_every_header_detail(detail):
    mask = np.ones(SHAPE, bool)
    mask[5, 30] = False
    seen = feed(mask=mask)
    with attached("dectris1", seen, header_detail=detail) as source:
        series = read(poll_to_end(source))
    every_frame_is_right(series, seen)
    if detail == "all":
        np.testing.assert_array_equal(series.start.pixel_mask, mask)
    else:
        assert series.start.pixel_mask is None


@pytest.mark.parametrize("kind", ["native", "dectris2"])
def test_the_pixel_mask_arrives(kind):
    mask = np.ones(SHAPE, bool)
    mask[5, 30] = False
    with attached(kind, feed(mask=mask)) as source:
        start = read(poll_to_end(source)).start
    np.testing.assert_array_equal(start.pixel_mask, mask)


def test_higher_thresholds_count_less():
    seen = feed()
    with attached("dectris2", seen, channel=1, channels=("low", "high")) as source:
        series = read(poll_to_end(source))
    np.testing.assert_array_equal(series.frames[3], seen.frames[3] // 2)
    assert series.start.metadata["channel"] == "high"


@pytest.mark.parametrize(("lz4", "size"), [(False, 5), (True, 1)])
def test_native_messages_of_many_frames_and_compressed_ones(lz4, size):
    seen = feed()
    with attached("native", seen, lz4=lz4, frames_per_message=size) as source:
        series = read(poll_to_end(source))
    every_frame_is_right(series, seen)
    assert series.start.scan_shape == (3, 4)


@pytest.mark.parametrize("kind", KINDS)
def test_series_are_repeated_under_names_of_their_own(kind):
    with attached(kind, feed(), repeat=3) as source:
        events = poll_to_end(source, ends=3)
    assert len({start.series for start in of(AcquisitionStart, events)}) == 3
    assert sum(len(block.indices) for block in blocks_of(events)) == 36


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_frames_can_be_shown_again_and_again(kind):
    seen = feed()
    with attached(kind, seen, cycle=5) as source:
        series = read(poll_to_end(source))
    assert sorted(series.frames) == list(range(12))
    for number in range(12):
        np.testing.assert_array_equal(series.frames[number], seen.frames[number % 5])


def test_messages_of_many_frames_that_are_shown_again_end_with_the_scan():
    seen = feed()
    with attached("native", seen, cycle=5, frames_per_message=5) as source:
        series = read(poll_to_end(source))
    assert sorted(series.frames) == list(range(12))
    np.testing.assert_array_equal(series.frames[11], seen.frames[1])


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_wrong_is_just_what_was_asked_for(kind):
    seen = feed(40)
    faults = ("drop", "duplicate", "corrupt", "garbage")
    with attached(kind, seen, faults=faults, fault_every=5) as source:
        events = poll_to_end(source)
    series = read(events)
    # Frames 4, 9, 14, … suffer in turn.
    indices = [index for block in blocks_of(events) for index in block.indices.tolist()]
    assert [number for number in range(40) if indices.count(number) == 2] == [9, 29]
    assert sorted(set(range(40)) - set(series.frames)) == [4, 14, 24, 34]
    corrupt = list(series.failures.values())
    corrupt += [fault.error for fault in series.faults if fault.frames]
    assert len(corrupt) == 2
    assert all(isinstance(error, CorruptFrame) for error in corrupt)
    garbage = [fault.error for fault in series.faults if not fault.frames]
    assert len(garbage) == 2
    assert all(isinstance(error, BadMessage) for error in garbage)
    for number, pixels in series.frames.items():
        np.testing.assert_array_equal(pixels, seen.frames[number])


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_that_restarts_in_the_middle(kind):
    with attached(kind, feed(), faults=("restart",)) as source:
        events = poll_to_end(source)
    first, second = of(AcquisitionStart, events)
    counts = {first.series: 0, second.series: 0}
    for block in blocks_of(events):
        counts[block.series] += len(block.indices)
    assert list(counts.values()) == [6, 12]
    assert [end.series for end in of(AcquisitionEnd, events)] == [second.series]


@pytest.mark.parametrize("kind", KINDS)
def test_a_detector_that_does_not_end(kind):
    with attached(kind, feed(), faults=("no_end",), repeat=2) as source:
        events = poll_until(
            source, lambda events: sum(len(block.indices) for block in blocks_of(events)) == 24
        )
        events += source.poll(0.1)
    assert not of(AcquisitionEnd, events)
    assert not of(Fault, events)


def test_faults_have_names():
    assert set(FAULTS) == {"drop", "duplicate", "corrupt", "garbage", "restart", "no_end"}
    with pytest.raises(ConfigError, match="no fault named 'fire'"):
        simulate_dectris_v2(feed(), "tcp://127.0.0.1:*", faults=("fire",))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_frames_do_not_come_faster_than_asked(kind):
    told: list[tuple[int, int]] = []
    begin = time.monotonic()
    with attached(
        kind, feed(60), rate=200, on_progress=lambda sent, total: told.append((sent, total))
    ) as source:
        poll_to_end(source)
    assert time.monotonic() - begin > 59 / 200
    assert told[-1] == (60, 60)
    assert told == sorted(told)


@pytest.mark.parametrize("simulate", [simulate_native, simulate_dectris_v1, simulate_dectris_v2])
def test_a_detector_that_nobody_listens_to_gives_up(simulate):
    address = "tcp://127.0.0.1:9" if simulate is simulate_native else "tcp://127.0.0.1:*"
    with pytest.raises(NoAnswer, match="Is the service running"):
        simulate(feed(), address, patience_s=0.1)


def test_a_detector_of_endless_patience_ends_when_all_is_sent():
    seen = feed()
    with attached("native", seen, patience_s=math.inf) as source:
        every_frame_is_right(read(poll_to_end(source)), seen)


@pytest.mark.parametrize("simulate", [simulate_dectris_v1, simulate_dectris_v2])
def test_a_port_in_use(simulate):
    with push_socket() as other, pytest.raises(BindError, match="another program uses the port"):
        simulate(feed(), other.address)


@pytest.mark.parametrize("kind", KINDS)
def test_an_endless_detector_can_be_stopped(kind):
    with attached(kind, feed(), repeat=0, rate=2000) as source:
        poll_to_end(source, ends=2)


@pytest.mark.parametrize(
    ("simulate", "options"),
    [
        (simulate_dectris_v1, {"compression": "zstd"}),
        (simulate_dectris_v2, {"compression": "zstd"}),
        (simulate_dectris_v1, {"header_detail": "some"}),
    ],
)
def test_choices_that_there_are_not(simulate, options):
    with pytest.raises(ConfigError, match="There is no"):
        simulate(feed(), "tcp://127.0.0.1:*", **options)


def test_stream_v1_has_no_float_images():
    with pytest.raises(ConfigError, match="no float32 images"):
        simulate_dectris_v1(feed(dtype="float32"), "tcp://127.0.0.1:*")
