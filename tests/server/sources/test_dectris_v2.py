"""DECTRIS Stream V2 over a real socket, in bytes written from its description."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prenet4d_server.errors import (
    BadMessage,
    BadStart,
    ConfigError,
    CorruptFrame,
    IndexOutsideScan,
    NoPixelMask,
    SequenceError,
    WrongFrame,
)
from prenet4d_server.sources.base import AcquisitionEnd, AcquisitionStart, Fault
from prenet4d_server.sources.dectris_v2 import DectrisV2Source

from .detector import (
    Tag,
    blocks_of,
    bslz4,
    cbor,
    lz4_h5,
    of,
    poll_to_end,
    push_socket,
    read,
)

SHAPE = (24, 40)
TAGS = {
    ("uint8", "<"): 64,
    ("uint16", "<"): 69,
    ("uint16", ">"): 65,
    ("uint32", "<"): 70,
    ("uint32", ">"): 66,
    ("float32", "<"): 85,
    ("float32", ">"): 81,
}


def frame(number: int, dtype: str = "uint16", shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(number).poisson(3 + number, shape).astype(dtype)


def array(pixels: np.ndarray, order: str = "<", compression: str = "bslz4", columns=False) -> Tag:
    """A multi-dimensional typed array: [[h, w], the bytes in row- or column-major order]."""
    stored = np.ascontiguousarray(pixels.T if columns else pixels)
    raw = stored.astype(stored.dtype.newbyteorder(order))
    content = {
        "none": lambda: raw.tobytes(),
        "bslz4": lambda: Tag(56500, ["bslz4", raw.itemsize, bslz4(raw)]),
        "lz4": lambda: Tag(56500, ["lz4", 0, lz4_h5(raw)]),
    }[compression]()
    tag = TAGS[pixels.dtype.name, order]
    return Tag(1040 if columns else 40, [list(pixels.shape), Tag(tag, content)])


HUGE = Tag(2, b"\xff" * 4000)
"""A number of 9,600 digits, which Python refuses to write out."""


def _doubled(times: int) -> Tag:
    """A list that holds the same list twice, which holds the same list twice, …: a short message,
    and for ever to write out."""
    value = Tag(28, [])
    for depth in range(times, 0, -1):
        value = Tag(28, [value, Tag(29, depth)])
    return value


SHARED = _doubled(60)


def _array_of_elements(size) -> Tag:
    return Tag(40, [list(SHAPE), Tag(69, Tag(56500, ["bslz4", size, b"\0" * 99]))])


def start(series: int = 3, **changes) -> bytes:
    message = {
        "type": "start",
        "arm_date": Tag(0, "2026-11-01T12:00:00.5+01:00"),
        "beam_center_x": 19.5,
        "beam_center_y": 11.25,
        "channels": ["threshold_1", "threshold_2"],
        "count_time": 0.00095,
        "countrate_correction_lookup_table": Tag(70, b"\1\0\0\0\2\0\0\0"),
        "detector_description": "DECTRIS ARINA Si",
        "frame_time": 0.001,
        "goniometer": {"alpha": {"increment": 0.0, "start": 1.0}},
        "image_dtype": "uint16",
        "image_size_x": SHAPE[1],
        "image_size_y": SHAPE[0],
        "number_of_images": 4,
        "saturation_value": 65534,
        "series_id": series,
        "series_unique_id": f"01GRX-{series}",
        "threshold_energy": {"threshold_1": 4020.5, "threshold_2": 8000.0},
        "user_data": None,
        **changes,
    }
    return cbor({key: value for key, value in message.items() if value is not ...})


def image(number: int, data: dict[str, Tag], series: int = 3) -> bytes:
    return cbor(
        {
            "type": "image",
            "data": data,
            "image_id": number,
            "real_time": [47500, 50000000],
            "series_date": Tag(0, "2026-11-01T12:00:01Z"),
            "series_id": series,
            "series_unique_id": f"01GRX-{series}",
            "start_time": [50000, 50000000],
            "stop_time": [97500, 50000000],
            "user_data": {"anything": [1, 2.5, "x"]},
        }
    )


def end(series: int = 3) -> bytes:
    return cbor({"type": "end", "series_id": series, "series_unique_id": f"01GRX-{series}"})


@pytest.fixture
def detector():
    with push_socket() as socket:
        yield socket


@pytest.fixture
def source(detector):
    with DectrisV2Source(detector.address, scan_shape=(2, 2), gain=1.5) as source:
        yield source


def test_a_series_is_told_as_it_was_said(detector, source):
    detector.send(start())
    for number in range(4):
        detector.send(
            image(number, {"threshold_1": array(frame(number)), "threshold_2": array(frame(9))})
        )
    detector.send(end())
    series = read(poll_to_end(source))
    said = series.start
    assert said.series == "01GRX-3"
    assert said.frame_shape == SHAPE
    assert said.dtype == np.uint16
    assert said.scan_shape == (2, 2)
    assert said.expected_frames == 4
    assert said.pixel_mask is None
    assert said.saturation_value == 65534
    assert said.gain == 1.5
    assert said.detector == "DECTRIS ARINA Si"
    for number in range(4):
        np.testing.assert_array_equal(series.frames[number], frame(number))
    assert not series.faults
    assert not series.failures
    assert series.order[0] == "AcquisitionStart"
    assert series.order[-1] == "AcquisitionEnd"


def test_what_a_physicist_wants_later_is_in_the_metadata(detector, source):
    detector.send(start())
    detector.send(end())
    metadata = of(AcquisitionStart, poll_to_end(source))[0].metadata
    assert metadata["frame_time"] == 0.001
    assert metadata["count_time"] == 0.00095
    assert metadata["threshold_energy"] == 4020.5
    assert metadata["channel"] == "threshold_1"
    assert metadata["beam_center_y"] == 11.25
    assert metadata["arm_date"] == "2026-11-01T12:00:00.500000+01:00"
    assert all(isinstance(value, str | int | float | None) for value in metadata.values())


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("compression", ["none", "bslz4", "lz4"])
@pytest.mark.parametrize(("dtype", "order"), TAGS)
def test_every_kind_of_image(detector, source, dtype, order, compression, columns):
    pixels = frame(5, dtype)
    detector.send(start(image_dtype=dtype))
    detector.send(image(0, {"threshold_1": array(pixels, order, compression, columns)}))
    detector.send(end())
    series = read(poll_to_end(source))
    assert series.start.dtype == np.dtype(dtype)
    assert series.frames[0].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(series.frames[0], pixels)


@pytest.mark.parametrize(
    ("channel", "shown"), [(None, 1), (0, 1), (1, 2), ("threshold_1", 1), ("threshold_2", 2)]
)
def test_one_threshold_is_chosen_by_name_or_number(detector, channel, shown):
    with DectrisV2Source(detector.address, channel=channel) as source:
        detector.send(start())
        images = {f"threshold_{number}": array(frame(number)) for number in (1, 2)}
        detector.send(image(0, images))
        detector.send(end())
        series = read(poll_to_end(source))
    np.testing.assert_array_equal(series.frames[0], frame(shown))
    assert series.start.metadata["threshold_energy"] == {1: 4020.5, 2: 8000.0}[shown]


@pytest.mark.parametrize(("channel", "shown"), [(None, 1), (0, 1), (1, 2), ("threshold_2", 2)])
def test_a_number_counts_the_start_s_channels_whatever_an_image_s_order(detector, channel, shown):
    with DectrisV2Source(detector.address, channel=channel) as source:
        detector.send(start())
        both = {f"threshold_{number}": array(frame(number)) for number in (2, 1)}
        detector.send(image(0, both))
        other = f"threshold_{3 - shown}"
        detector.send(image(1, {other: both[other]}))
        detector.send(end())
        series = read(poll_to_end(source))
    assert series.start.metadata["channel"] == f"threshold_{shown}"
    np.testing.assert_array_equal(series.frames[0], frame(shown))
    assert sorted(series.frames) == [0]
    (lost,) = series.faults
    assert isinstance(lost.error, WrongFrame)
    assert f"no channel 'threshold_{shown}'; the detector sends {other}" in str(lost.error)


@pytest.mark.parametrize("channel", ["threshold_3", 2, -1])
def test_a_threshold_that_the_detector_does_not_have(detector, channel):
    with DectrisV2Source(detector.address, channel=channel) as source:
        detector.send(start())
        detector.send(image(0, {"threshold_1": array(frame(0))}))
        detector.send(end())
        events = poll_to_end(source)
    faults = of(Fault, events)
    assert [type(fault.error) for fault in faults] == [BadStart, WrongFrame]
    assert [fault.frames for fault in faults] == [0, 1]
    assert "threshold_1, threshold_2" in str(faults[0].error)


def test_the_pixel_mask_is_turned_round(detector, source):
    bits = np.zeros(SHAPE, np.uint32)
    bits[3, 30], bits[20, 5] = 1, 1 << 16
    masks = {"threshold_1": array(bits), "threshold_2": array(bits + 1)}
    detector.send(start(pixel_mask=masks))
    detector.send(end())
    mask = of(AcquisitionStart, poll_to_end(source))[0].pixel_mask
    np.testing.assert_array_equal(mask, bits == 0)


@pytest.mark.parametrize("sent", [True, False])
def test_pixels_that_the_detector_masks_without_saying_which_are_told_of(detector, source, sent):
    mask = {"pixel_mask": {"threshold_1": array(np.ones(SHAPE, np.uint32))}}
    detector.send(start(pixel_mask_enabled=True, **(mask if sent else {})))
    detector.send(end())
    told = [type(fault.error) for fault in of(Fault, poll_to_end(source))]
    assert told == ([] if sent else [NoPixelMask])


def test_a_pixel_mask_of_another_size_is_left_out_and_said(detector, source):
    detector.send(start(pixel_mask={"threshold_1": array(np.zeros((9, 9), np.uint32))}))
    detector.send(end())
    events = poll_to_end(source)
    assert of(AcquisitionStart, events)[0].pixel_mask is None
    assert "pixel mask" in str(of(Fault, events)[0].error)


def test_a_start_that_does_not_say_the_type_waits_for_the_first_image(detector, source):
    detector.send(start(image_dtype=...))
    detector.send(image(0, {"threshold_1": array(frame(0, "uint32"), ">")}))
    detector.send(end())
    series = read(poll_to_end(source))
    assert series.order == ["AcquisitionStart", "EncodedBlock", "AcquisitionEnd"]
    assert series.start.dtype == np.uint32
    assert series.start.dtype.isnative
    np.testing.assert_array_equal(series.frames[0], frame(0, "uint32"))


def test_a_series_that_never_said_what_its_images_are(detector, source):
    detector.send(start(series=3, image_dtype=...))
    detector.send(end(series=3))
    detector.send(start(series=4))
    detector.send(end(series=4))
    events = poll_to_end(source)
    assert isinstance(of(Fault, events)[0].error, SequenceError)
    assert [event.series for event in of(AcquisitionEnd, events)] == ["01GRX-4"]


@pytest.mark.parametrize(
    "pixels", [frame(1, "uint8"), frame(1, shape=(40, 24)), frame(1, shape=(24, 41))]
)
def test_an_image_of_another_shape_or_type_is_one_lost_frame(detector, source, pixels):
    detector.send(start())
    detector.send(image(0, {"threshold_1": array(frame(0))}))
    detector.send(image(1, {"threshold_1": array(pixels)}))
    detector.send(image(2, {"threshold_1": array(frame(2))}))
    detector.send(end())
    series = read(poll_to_end(source))
    assert sorted(series.frames) == [0, 2]
    assert isinstance(series.failures[1], WrongFrame)
    np.testing.assert_array_equal(series.frames[2], frame(2))


def _broken_images() -> dict[str, bytes]:
    whole = image(1, {"threshold_1": array(frame(1))})
    rows = list(SHAPE)
    return {
        "cut short": whole[: len(whole) // 2],
        "no data": cbor({"type": "image", "image_id": 1, "series_id": 3}),
        "no number": cbor({"type": "image", "series_id": 3, "data": {"threshold_1": 5}}),
        "no series": cbor(
            {"type": "image", "image_id": 1, "data": {"threshold_1": array(frame(1))}}
        ),
        "not an array": image(1, {"threshold_1": b"bytes"}),
        "no channel": image(1, {}),
        "three sides": image(1, {"threshold_1": Tag(40, [[1, *rows], Tag(69, b"")])}),
        "odd type": image(1, {"threshold_1": Tag(40, [rows, Tag(87, b"")])}),
        "odd tag": image(1, {"threshold_1": Tag(4711, [rows, Tag(69, b"")])}),
        "sides that are text": image(1, {"threshold_1": Tag(40, [["24", "40"], Tag(69, b"")])}),
        "negative side": image(1, {"threshold_1": Tag(40, [[-24, -40], Tag(69, b"")])}),
        "odd compression": image(
            1, {"threshold_1": Tag(40, [rows, Tag(69, Tag(56500, ["zstd", 2, b""]))])}
        ),
        "empty compression": image(1, {"threshold_1": Tag(40, [rows, Tag(69, Tag(56500, []))])}),
        "corrupt": image(
            1, {"threshold_1": Tag(40, [rows, Tag(69, Tag(56500, ["bslz4", 2, b"\xff" * 99]))])}
        ),
        "too few bytes": image(1, {"threshold_1": Tag(40, [rows, Tag(69, b"\0" * 1919)])}),
        "number of 9,600 digits": image(HUGE, {"threshold_1": array(frame(1))}),
        "shape of 9,600 digits": image(1, {"threshold_1": Tag(40, [[HUGE, 40], Tag(69, b"")])}),
        "element size of 9,600 digits": image(1, {"threshold_1": _array_of_elements(HUGE)}),
        "channels of 9,600 digits": image(1, {7: 0, "endless": SHARED} | {"threshold": HUGE}),
        "number below zero": image(-1, {"threshold_1": array(frame(1))}),
        "number beyond all": image(1 << 63, {"threshold_1": array(frame(1))}),
    }


@pytest.mark.parametrize("broken", _broken_images())
def test_a_broken_image_costs_one_frame_and_nothing_else(detector, source, broken):
    detector.send(start())
    detector.send(image(0, {"threshold_1": array(frame(0))}))
    detector.send(_broken_images()[broken])
    detector.send(image(2, {"threshold_1": array(frame(2))}))
    detector.send(end())
    series = read(poll_to_end(source))
    assert sorted(series.frames) == [0, 2]
    lost = [fault.error for fault in series.faults] + list(series.failures.values())
    assert len(lost) == 1
    assert isinstance(lost[0], CorruptFrame | WrongFrame | IndexOutsideScan)
    assert [fault.frames for fault in series.faults] == [1] * len(series.faults)


@pytest.mark.parametrize(
    "parts",
    [
        [b""],
        [b"\xff"],
        [b"\xd8\x1c"],
        [b"\x81" * 5000],
        [cbor(["start"])],
        [cbor({"type": "stop"})],
        [cbor({"type": ["start"]})],
        [cbor({"type": HUGE})],
        [cbor({"type": SHARED})],
        [cbor({"type": "end", "series_id": SHARED})],
        [cbor({"typ": "start"})],
        [b'{"htype": "dheader-1.0"}'],
        [b"\xa1\x64type\xc0\x61x"],
        [end(), end()],
    ],
)
def test_messages_of_no_such_protocol(detector, source, parts):
    detector.send(*parts)
    detector.send(end(series=9))
    events = poll_to_end(source)
    assert isinstance(of(Fault, events)[0].error, BadMessage)
    assert of(Fault, events)[0].frames == 0
    assert [event.series for event in of(AcquisitionEnd, events)] == ["01GRX-9"]


@pytest.mark.parametrize(
    "changes",
    [
        {"channels": ...},
        {"channels": []},
        {"channels": "threshold_1"},
        {"channels": [["threshold_1"]]},
        {"image_dtype": "int16"},
        {"image_dtype": ["uint16"]},
        {"image_dtype": HUGE},
        {"image_dtype": SHARED},
        {"image_size_x": HUGE},
        {"image_size_x": HUGE, "image_size_y": "24"},
        {"channels": [SHARED]},
        {"image_size_x": 4},
        {"image_size_x": 1 << 40},
        {"image_size_y": "24"},
        {"pixel_mask": {"threshold_1": b"no array"}},
    ],
)
def test_an_impossible_start_is_refused(detector, source, changes):
    detector.send(start(**changes))
    detector.send(end())
    events = poll_to_end(source)
    assert isinstance(of(Fault, events)[0].error, BadStart)
    assert not of(AcquisitionStart, events)


def test_fields_of_no_use_are_left_out(detector, source):
    useless = {"user_data": HUGE, "detector_description": SHARED}
    detector.send(start(number_of_images=0, saturation_value="many", **useless))
    detector.send(end())
    said = of(AcquisitionStart, poll_to_end(source))[0]
    assert said.expected_frames is None
    assert said.saturation_value is None
    assert "user_data" not in said.metadata


def test_a_detector_that_starts_anew_in_the_middle(detector, source):
    detector.send(start(series=3))
    detector.send(image(0, {"threshold_1": array(frame(0))}, series=3))
    detector.send(start(series=4))
    detector.send(image(0, {"threshold_1": array(frame(1))}, series=4))
    detector.send(end(series=4))
    events = poll_to_end(source)
    assert [start.series for start in of(AcquisitionStart, events)] == ["01GRX-3", "01GRX-4"]
    assert [block.series for block in blocks_of(events)] == ["01GRX-3", "01GRX-4"]


def test_a_first_image_that_cannot_be_what_the_start_left_unsaid_is_counted(detector, source):
    detector.send(start(image_dtype=..., image_size_x=...))
    detector.send(image(0, {"threshold_1": array(frame(0, shape=(24, 4)))}))
    detector.send(end())
    events = poll_to_end(source)
    assert isinstance(of(Fault, events)[0].error, BadStart)
    assert [block.indices.tolist() for block in blocks_of(events)] == [[0]]


def test_images_without_a_start_still_say_which_series_they_are_of(detector, source):
    detector.send(image(7, {"threshold_1": array(frame(0))}))
    detector.send(end())
    block = blocks_of(poll_to_end(source))[0]
    assert block.series == "01GRX-3"
    assert block.indices.tolist() == [7]


def test_parts_of_a_block_are_decoded_on_their_own(detector, source):
    detector.send(start())
    for number in range(20):
        detector.send(image(number, {"threshold_1": array(frame(number))}))
    detector.send(end())
    for block in blocks_of(poll_to_end(source)):
        count = len(block.indices)
        for first in range(0, count, 3):
            out = np.empty((min(3, count - first), *SHAPE), np.uint16)
            assert not block.read_into(first, out)
            for pixels, index in zip(out, block.indices[first:], strict=False):
                np.testing.assert_array_equal(pixels, frame(int(index)))


def test_a_message_beyond_the_limit_is_refused(detector):
    with DectrisV2Source(detector.address, max_bytes=2000) as source:
        detector.send(image(0, {"threshold_1": array(frame(0), compression="none")}))
        detector.send(b"\0" * 3000)
        detector.send(end())
        faults = of(Fault, poll_to_end(source))
    assert [type(fault.error) for fault in faults] == [CorruptFrame, BadMessage]
    assert [fault.frames for fault in faults] == [1, 0]
    assert "3000 bytes; at most 2000" in str(faults[1].error)


def test_no_detector_is_no_error():
    with DectrisV2Source("tcp://127.0.0.1:9") as source:
        assert source.poll(0.05) == []


@pytest.mark.parametrize("address", ["nonsense", "tcp://", "tcp://127.0.0.1", "xyz://a:1"])
def test_an_address_that_makes_no_sense(address):
    with pytest.raises(ConfigError, match="Cannot connect"):
        DectrisV2Source(address)


@given(data=st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_messages_lose_nothing_else(detector, source, data):
    message = data.draw(
        st.sampled_from(
            [
                start(pixel_mask={"threshold_1": array(np.ones(SHAPE, np.uint32))}),
                image(1, {"threshold_1": array(frame(1)), "threshold_2": array(frame(2))}),
                image(1, {"threshold_1": array(frame(1, "uint8"), compression="none")}),
                end(),
            ]
        )
    )
    damaged = bytearray(message)
    for place in data.draw(st.lists(st.integers(0, len(message) - 1), max_size=8)):
        damaged[place] = data.draw(st.integers(0, 255))
    detector.send(bytes(damaged[: data.draw(st.none() | st.integers(0, len(damaged)))]))
    detector.send(start(series=99))
    detector.send(image(0, {"threshold_1": array(frame(0))}, series=99))
    detector.send(end(series=99))
    events: list = []
    while not any(event.series == "01GRX-99" for event in of(AcquisitionEnd, events)):
        events += source.poll(5)
    good = AcquisitionStart("01GRX-99", SHAPE, np.dtype("uint16"))
    for block in blocks_of(events):
        if block.series == "01GRX-99":
            assert block.indices.tolist() == [0]
            np.testing.assert_array_equal(read([block], good).frames[0], frame(0))
        else:
            read([block], good)
