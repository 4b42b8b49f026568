"""DECTRIS Stream V1 over a real socket, in bytes written from its description."""

from __future__ import annotations

import json

import lz4.block
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prenet4d_server.errors import (
    BadMessage,
    BadStart,
    CorruptFrame,
    NoPixelMask,
    SequenceError,
    WrongFrame,
)
from prenet4d_server.sources.base import AcquisitionEnd, AcquisitionStart, Fault
from prenet4d_server.sources.dectris_v1 import DectrisV1Source

from .detector import blocks_of, bslz4, of, poll_to_end, push_socket, read

SHAPE = (24, 40)


def frame(number: int, dtype: str = "uint16", shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(number).poisson(3 + number, shape).astype(dtype)


def js(**fields) -> bytes:
    return json.dumps(fields).encode()


def table(htype: str, values: np.ndarray) -> list[bytes]:
    shape = list(values.shape[::-1])
    return [js(htype=htype, shape=shape, type=values.dtype.name), values.tobytes()]


CONFIG = {
    "beam_center_x": 19.5,
    "bit_depth_image": 16,
    "count_time": 0.00095,
    "countrate_correction_count_cutoff": 60000,
    "description": "DECTRIS ELA",
    "frame_time": 0.001,
    "nimages": 2,
    "ntrigger": 3,
    "detector_translation": [0, 0, 1],
    "x_pixels_in_detector": SHAPE[1],
    "y_pixels_in_detector": SHAPE[0],
}
BITS = np.zeros(SHAPE, np.uint32)
BITS[2, 33], BITS[21, 4] = 1, 32


def header(detail: str = "basic", series: int = 5, **changes) -> list[bytes]:
    parts = [js(htype="dheader-1.0", header_detail=detail, series=series)]
    if detail != "none":
        parts.append(js(**{**CONFIG, **changes}))
    if detail == "all":
        parts += table("dflatfield-1.0", np.ones(SHAPE, np.float32))
        parts += table("dpixelmask-1.0", BITS)
        parts += table("dcountrate_table-1.0", np.ones((2, 9), np.float32))
    return parts


def image(
    number: int,
    pixels: np.ndarray,
    encoding: str = "bs16-lz4<",
    series: int = 5,
    **changes,
) -> list[bytes]:
    raw = pixels.astype(pixels.dtype.newbyteorder(encoding[-1]))
    if encoding.startswith("bs"):
        blob = bslz4(raw)
    elif encoding.startswith("lz4"):
        blob = lz4.block.compress(raw.tobytes(), store_size=False)
    else:
        blob = raw.tobytes()
    described = {
        "htype": "dimage_d-1.0",
        "shape": [pixels.shape[1], pixels.shape[0]],
        "type": pixels.dtype.name,
        "encoding": encoding,
        "size": len(blob),
        **changes,
    }
    return [
        js(
            htype="dimage-1.0", series=series, frame=number, hash="fc67f000d08fe6b380ea9434b8362d22"
        ),
        js(**described),
        blob,
        js(htype="dconfig-1.0", start_time=834759834259, stop_time=834760834280, real_time=1000),
    ]


def end(series: int = 5) -> bytes:
    return js(htype="dseries_end-1.0", series=series)


@pytest.fixture
def detector():
    with push_socket() as socket:
        yield socket


@pytest.fixture
def source(detector):
    with DectrisV1Source(detector.address, scan_shape=(2, 3), gain=2.0) as source:
        yield source


@pytest.mark.parametrize("appendix", [[], [b"whatever the user has set"]], ids=["", "appendix"])
@pytest.mark.parametrize("detail", ["basic", "all"])
def test_a_header_that_tells_the_configuration(detector, source, detail, appendix):
    detector.send(*header(detail), *appendix)
    for number in range(6):
        detector.send(*image(number, frame(number)), *appendix)
    detector.send(end())
    series = read(poll_to_end(source))
    said = series.start
    assert (said.series, said.frame_shape, said.dtype) == ("5", SHAPE, np.uint16)
    assert (said.scan_shape, said.expected_frames, said.gain) == ((2, 3), 6, 2.0)
    assert (said.saturation_value, said.detector) == (60000, "DECTRIS ELA")
    assert said.metadata["frame_time"] == 0.001
    assert "detector_translation" not in said.metadata
    if detail == "all":
        np.testing.assert_array_equal(said.pixel_mask, BITS == 0)
    else:
        assert said.pixel_mask is None
    for number in range(6):
        np.testing.assert_array_equal(series.frames[number], frame(number))
    assert not series.faults


@pytest.mark.parametrize("appendix", [[], [b"{}"]], ids=["", "appendix"])
def test_a_header_that_tells_nothing_waits_for_the_first_image(detector, source, appendix):
    detector.send(*header("none"), *appendix)
    detector.send(*image(0, frame(0, "uint32"), "bs32-lz4<"))
    detector.send(end())
    series = read(poll_to_end(source))
    assert series.order == ["AcquisitionStart", "EncodedBlock", "AcquisitionEnd"]
    assert (series.start.frame_shape, series.start.dtype) == (SHAPE, np.uint32)
    assert series.start.expected_frames is None
    np.testing.assert_array_equal(series.frames[0], frame(0, "uint32"))


@pytest.mark.parametrize("detail", ["none", "basic", "all"])
def test_header_parts_that_come_one_by_one(detector, source, detail):
    for part in header(detail):
        detector.send(part)
    detector.send(*image(0, frame(0)))
    detector.send(end())
    series = read(poll_to_end(source))
    assert series.order == ["AcquisitionStart", "EncodedBlock", "AcquisitionEnd"]
    assert not series.faults
    assert (series.start.pixel_mask is not None) == (detail == "all")
    np.testing.assert_array_equal(series.frames[0], frame(0))


def test_a_header_that_is_never_completed_does_with_the_first_image(detector, source):
    detector.send(header("basic")[0])
    detector.send(*image(0, frame(0)))
    detector.send(end())
    series = read(poll_to_end(source))
    assert series.start.frame_shape == SHAPE
    np.testing.assert_array_equal(series.frames[0], frame(0))


def test_a_series_without_configuration_and_without_images(detector, source):
    detector.send(*header("none", series=5))
    detector.send(end(series=5))
    detector.send(*header("basic", series=6))
    detector.send(end(series=6))
    events = poll_to_end(source)
    assert isinstance(of(Fault, events)[0].error, SequenceError)
    assert [event.series for event in of(AcquisitionStart, events)] == ["6"]


@pytest.mark.parametrize(("detail", "told"), [("all", []), ("basic", [NoPixelMask])])
def test_pixels_that_the_detector_masks_without_saying_which_are_told_of(
    detector, source, detail, told
):
    detector.send(*header(detail, pixel_mask_applied=True))
    detector.send(end())
    assert [type(fault.error) for fault in of(Fault, poll_to_end(source))] == told


@pytest.mark.parametrize(
    ("dtype", "encoding"),
    [
        ("uint8", "bs8-lz4<"),
        ("uint16", "bs16-lz4<"),
        ("uint32", "bs32-lz4<"),
        ("uint8", "lz4<"),
        ("uint16", "lz4<"),
        ("uint32", "lz4<"),
        ("uint8", "<"),
        ("uint16", "<"),
        ("uint32", "<"),
        ("uint16", "lz4>"),
        ("uint32", ">"),
    ],
)
def test_every_encoding(detector, source, dtype, encoding):
    detector.send(*header(bit_depth_image=8 * np.dtype(dtype).itemsize))
    detector.send(*image(0, frame(0, dtype), encoding))
    detector.send(end())
    series = read(poll_to_end(source))
    assert not series.failures
    assert series.frames[0].dtype == series.start.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(series.frames[0], frame(0, dtype))


def _broken_images() -> dict[str, list[bytes]]:
    whole = image(1, frame(1))
    return {
        "two parts": whole[:2],
        "no header": [b"\xff", *whole[1:]],
        "no number": [js(htype="dimage-1.0", series=5), *whole[1:]],
        "no series": [js(htype="dimage-1.0", frame=1), *whole[1:]],
        "negative number": [js(htype="dimage-1.0", frame=-1, series=5), *whole[1:]],
        "description is no JSON": [whole[0], b"{", *whole[2:]],
        "description is a list": [whole[0], b"[1]", *whole[2:]],
        "no shape": image(1, frame(1), shape=None),
        "shape of text": image(1, frame(1), shape=["40", "24"]),
        "three sides": image(1, frame(1), shape=[40, 24, 1]),
        "other shape": image(1, frame(1), shape=[24, 40]),
        "signed": image(1, frame(1), type="int16"),
        "type of no kind": image(1, frame(1), type=["uint16"]),
        "other type": image(1, frame(1), type="uint32"),
        "unknown encoding": [
            whole[0],
            js(shape=[40, 24], type="uint16", encoding="bs16-zstd<"),
            *whole[2:],
        ],
        "cut short": [*whole[:2], whole[2][:50], whole[3]],
        "all-zero header": [*whole[:2], b"\0" * 12, whole[3]],
        "empty": [*whole[:2], b"", whole[3]],
    }


@pytest.mark.parametrize("broken", _broken_images())
def test_a_broken_image_costs_one_frame_and_nothing_else(detector, source, broken):
    detector.send(*header())
    detector.send(*image(0, frame(0)))
    detector.send(*_broken_images()[broken])
    detector.send(*image(2, frame(2)))
    detector.send(end())
    series = read(poll_to_end(source))
    assert sorted(series.frames) == [0, 2]
    lost = [fault.error for fault in series.faults] + list(series.failures.values())
    assert len(lost) == 1
    assert [fault.frames for fault in series.faults] == [1] * len(series.faults)


@pytest.mark.parametrize(
    "parts",
    [
        [b""],
        [b"\xff"],
        [b"[]"],
        [b"[" * 100_000],
        [b"{}"],
        [js(htype="dheader-2.0", series=1)],
        [js(htype=["dimage-1.0"])],
        [js(htype="dheader-1.0", header_detail="none")],
        [js(htype="dseries_end-1.0")],
        [b"\xff", b"\xff"],
        [js(htype="dheader-1.0", header_detail="basic", series=1), b"no JSON"],
    ],
)
def test_messages_of_no_such_protocol(detector, source, parts):
    detector.send(*parts)
    detector.send(end(series=9))
    events = poll_to_end(source)
    assert isinstance(of(Fault, events)[0].error, BadMessage)
    assert of(Fault, events)[0].frames == 0
    assert [event.series for event in of(AcquisitionEnd, events)] == ["9"]


@pytest.mark.parametrize(
    "changes",
    [
        {"bit_depth_image": 12},
        {"bit_depth_image": 16.0},
        {"x_pixels_in_detector": 1},
        {"y_pixels_in_detector": "24"},
    ],
)
def test_an_impossible_start_is_refused(detector, source, changes):
    detector.send(*header(**changes))
    detector.send(end())
    events = poll_to_end(source)
    assert isinstance(of(Fault, events)[0].error, BadStart)
    assert not of(AcquisitionStart, events)


def test_fields_that_no_receiver_could_take_are_left_out_or_mended(detector, source):
    odd = {"description": "\ud800", "nimages": 1 << 62, "ntrigger": 9, "huge": 1 << 70}
    detector.send(*header(**odd))
    detector.send(end())
    said = of(AcquisitionStart, poll_to_end(source))[0]
    assert said.detector == "?"
    assert said.expected_frames is None
    assert "huge" not in said.metadata


def test_an_incomplete_header_that_is_wrong_costs_no_image(detector, source):
    detector.send(js(htype="dheader-1.0", header_detail="all", series=5))
    detector.send(js(bit_depth_image=12))
    detector.send(*image(0, frame(0)))
    detector.send(end())
    events = poll_to_end(source)
    assert isinstance(of(Fault, events)[0].error, BadStart)
    assert [block.indices.tolist() for block in blocks_of(events)] == [[0]]


def test_an_image_of_the_wrong_type_is_told_apart_from_a_corrupt_one(detector, source):
    detector.send(*header())
    detector.send(*image(0, frame(0, "uint8"), "bs8-lz4<"))
    detector.send(*image(1, frame(1))[:2], b"\xff" * 300, b"{}")
    detector.send(end())
    failures = read(poll_to_end(source)).failures
    assert isinstance(failures[0], WrongFrame)
    assert isinstance(failures[1], CorruptFrame)


@given(data=st.data())
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damaged_messages_lose_nothing_else(detector, source, data):
    message = data.draw(
        st.sampled_from([header("all"), header("none"), image(1, frame(1)), [end()]])
    )
    parts = [bytearray(part) for part in message]
    for part in parts:
        for place in data.draw(st.lists(st.integers(0, len(part) - 1), max_size=3)):
            part[place] = data.draw(st.integers(0, 255))
    some = data.draw(st.permutations(parts) | st.just(parts[: data.draw(st.integers(1, 9))]))
    detector.send(*map(bytes, some))
    detector.send(*header(series=99))
    detector.send(*image(0, frame(0), series=99))
    detector.send(end(series=99))
    events: list = []
    while not any(event.series == "99" for event in of(AcquisitionEnd, events)):
        events += source.poll(5)
    good = AcquisitionStart("99", SHAPE, np.dtype("uint16"))
    for block in blocks_of(events):
        if block.series == "99":
            assert block.indices.tolist() == [0]
            np.testing.assert_array_equal(read([block], good).frames[0], frame(0))
        else:
            read([block], good)
