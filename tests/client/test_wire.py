"""The codec: everything valid comes back as it was, everything else is named for what it is."""

import copy
import pickle

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prenet4d_client import (
    MalformedMessage,
    MissingCodec,
    OversizeMessage,
    PayloadMismatch,
    ProtocolError,
    UnknownType,
    UnsupportedVersion,
    decode,
    encode,
)
from prenet4d_client.messages import MESSAGE_TYPES, ControlReply, Frames
from prenet4d_client.wire import MAX_HEADER_BYTES

from .examples import EXAMPLES

every_type = pytest.mark.parametrize("name", MESSAGE_TYPES)


@pytest.fixture
def lz4():
    return pytest.importorskip("lz4.block", reason="the extra lz4 is not installed")


def wire(name, **encoding):
    """The parts of an example, as they come from a socket."""
    return [bytes(part) for part in encode(*EXAMPLES[name], **encoding)]


def with_fields(parts, **fields):
    header = msgpack.unpackb(parts[1]) | fields
    return [parts[0], msgpack.packb(header), *parts[2:]]


def without_field(parts, field):
    header = msgpack.unpackb(parts[1])
    del header[field]
    return [parts[0], msgpack.packb(header), *parts[2:]]


def with_spec(parts, which, **fields):
    specs = msgpack.unpackb(parts[1])["arrays"]
    specs[which].update(fields)
    return with_fields(parts, arrays=specs)


def assert_same(message, header, arrays):
    assert message.header.model_dump(exclude={"arrays"}) == header.model_dump(exclude={"arrays"})
    assert list(message.arrays) == list(arrays)
    for name, array in arrays.items():
        assert message.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(message.arrays[name], array)


# --- what goes in comes out ----------------------------------------------------------------------


def test_the_examples_cover_every_type():
    assert set(EXAMPLES) == set(MESSAGE_TYPES)


@every_type
def test_roundtrip(name):
    assert_same(decode(wire(name)), *EXAMPLES[name])


@every_type
def test_roundtrip_lz4(name, lz4):
    assert_same(decode(wire(name, lz4=True)), *EXAMPLES[name])


@given(
    dtype=st.sampled_from(["uint8", "uint16", "uint32", "float32"]),
    shape=st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 20)),
    big_endian=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 99),
)
def test_frames_of_any_dtype_shape_and_layout_roundtrip(dtype, shape, big_endian, strided, seed):
    frames = np.random.default_rng(seed).integers(0, 256, shape).astype(dtype)
    sent = frames.astype(frames.dtype.newbyteorder(">")) if big_endian else frames
    if strided:
        sent = np.asfortranarray(sent)
    indices = np.arange(shape[0])
    parts = [bytes(part) for part in encode(Frames(), {"indices": indices, "frames": sent})]
    message = decode(parts)
    assert message.frames.dtype == dtype
    np.testing.assert_array_equal(message.frames, frames)


def test_arrays_share_the_memory_of_the_parts():
    frames = np.zeros((1, 8, 8), np.uint16)
    parts = encode(Frames(), {"indices": np.array([0]), "frames": frames})
    frames[0, 3, 4] = 7
    assert decode(parts).frames[0, 3, 4] == 7


def test_the_topic_is_the_type():
    assert wire("corrected")[0] == b"corrected"


@every_type
def test_unknown_fields_are_ignored(name):
    parts = with_fields(wire(name), of_a_later_release=[1, {"a": None}])
    assert_same(decode(parts), *EXAMPLES[name])
    if len(parts) > 2:
        assert_same(decode(with_spec(parts, 0, hint="of a later release")), *EXAMPLES[name])


def test_fields_and_arrays_are_attributes():
    message = decode(wire("telemetry"))
    assert message.ellipticity.ratio == 1.03
    assert message.tracked is message.arrays["tracked"]
    assert message.gap == 0
    assert {"tracked", "batch", "header"} <= set(dir(message))
    assert "telemetry 3" in repr(message)
    told = r"telemetry message has no field or array 'trakced'; it has .*\btracked\b.*\bdose\b"
    with pytest.raises(AttributeError, match=told):
        _ = message.trakced


def test_a_message_can_be_copied_and_pickled_by_its_owner():
    message = decode(wire("corrected"))
    for twin in (copy.deepcopy(message), pickle.loads(pickle.dumps(message))):  # noqa: S301
        assert_same(twin, message.header, message.arrays)


# --- what cannot be sent -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({}, "lacks its array 'indices'"),
        ({"indices": np.zeros(2, np.int64)}, "lacks its array 'frames'"),
        (
            {"indices": np.zeros(2, np.int64), "frames": np.zeros((3, 8, 8), np.uint8)},
            r"shape \(3, 8, 8\)",
        ),
        (
            {"indices": np.zeros(2, np.int64), "frames": np.zeros((8, 8), np.uint8)},
            r"must be \(n, h, w\)",
        ),
        (
            {"indices": np.zeros(1, np.int64), "frames": np.zeros((1, 8, 8), np.float64)},
            "must be uint8 or",
        ),
        (
            {"indices": np.zeros(1, np.int64), "frames": np.zeros((1, 8, 8), complex)},
            "dtype complex128, with no wire form",
        ),
        ({"indices": [0], "frames": np.zeros((1, 8, 8))}, "'indices' is a list, with no wire form"),
        (
            {
                "indices": np.zeros(1, np.int64),
                "frames": np.zeros((1, 8, 8), np.uint8),
                "x": np.zeros(1, np.uint8),
            },
            "no array named 'x'",
        ),
    ],
)
def test_arrays_that_do_not_belong_are_refused(arrays, what):
    with pytest.raises(PayloadMismatch, match=what):
        encode(Frames(), arrays)


@pytest.mark.parametrize("value", [object(), np.zeros(3), 2**70, {1, 2}, "\ud800"])
def test_a_result_that_has_no_wire_form_is_refused(value):
    with pytest.raises(MalformedMessage, match="control_reply message cannot be sent"):
        encode(ControlReply(ok=True, result={"value": value}))


def test_a_pydantic_model_within_a_result_is_sent_as_a_map():
    inner = EXAMPLES["mean"][0].ellipticity
    reply = decode([bytes(p) for p in encode(ControlReply(ok=True, result={"ellipticity": inner}))])
    assert reply.result == {"ellipticity": inner.model_dump()}


# --- what must not be believed -------------------------------------------------------------------

ARRAY_BYTES = {"frames": 8 * 9 * 2 * 3, "mean": 8 * 9 * 4}


@pytest.mark.parametrize(
    ("parts", "error", "what"),
    [
        ([], MalformedMessage, "at least 2 parts"),
        ([b"frames"], MalformedMessage, "this one has 1"),
        ([b"", b""], MalformedMessage, "not a msgpack map"),
        ([b"frames", b"\xc1"], MalformedMessage, r"not a msgpack map: \w"),
        ([b"", *wire("event")], MalformedMessage, r"not a msgpack map: .*[^.]\.$"),
        ([b"frames", b"\x91" * 5000], MalformedMessage, "not a msgpack map"),
        ([b"frames", msgpack.packb([1, 2])], MalformedMessage, "does not say so"),
        ([b"frames", msgpack.packb({"type": "frames"})], MalformedMessage, "does not say so"),
        ([b'{"htype":"dheader-1.0"}', b"{}"], MalformedMessage, "not a msgpack map"),
        (with_fields(wire("event"), version=2), UnsupportedVersion, "version 2; this package"),
        (with_fields(wire("event"), version=True), UnsupportedVersion, "version True"),
        (with_fields(wire("event"), version=None), UnsupportedVersion, "version None"),
        (without_field(wire("event"), "version"), UnsupportedVersion, "version None"),
        (without_field(wire("event"), "type"), MalformedMessage, "lacks its type"),
        (with_fields(wire("event"), type="evnt"), UnknownType, "no message type 'evnt'"),
        (with_fields(wire("event"), type=["x"]), UnknownType, "no message type"),
        ([b"frames", *wire("event")[1:]], MalformedMessage, "topic b'frames' does not match"),
        (without_field(wire("event"), "code"), MalformedMessage, "wrong code: Field required"),
        (with_fields(wire("event"), level="loud"), MalformedMessage, "wrong level"),
        (with_fields(wire("event"), sequence=-1), MalformedMessage, "wrong sequence"),
        (with_fields(wire("event"), details={"a": [1]}), MalformedMessage, r"wrong details\.a"),
        (with_fields(wire("acquisition_start"), frame_shape=[8]), MalformedMessage, "frame_shape"),
        (with_fields(wire("acquisition_start"), dtype="int64"), MalformedMessage, "wrong dtype"),
        (with_fields(wire("registered"), heartbeat_s=0), MalformedMessage, "heartbeat_s"),
        (with_spec(wire("mean"), 0, dtype="object"), MalformedMessage, r"wrong arrays\.0\.dtype"),
        (with_spec(wire("mean"), 0, shape=[-8, -9]), MalformedMessage, r"arrays\.0\.shape"),
        (with_spec(wire("mean"), 0, encoding="zstd"), MalformedMessage, "encoding"),
        (with_spec(wire("mean"), 0, dtype="float64"), PayloadMismatch, "must be float32"),
        (with_spec(wire("mean"), 0, shape=[8, 10]), PayloadMismatch, "320 bytes; 288 came"),
        (with_spec(wire("mean"), 0, shape=[72]), PayloadMismatch, r"must be \(h, w\)"),
        (with_spec(wire("mean"), 0, name="maen"), PayloadMismatch, "lacks its array 'mean'"),
        (with_spec(wire("mean"), 0, shape=[2**40, 2**40]), OversizeMessage, "at most"),
        (with_spec(wire("mean"), 0, shape=[0, 2**63]), PayloadMismatch, "bytes"),
        ([*wire("mean")[:2], b""], PayloadMismatch, "288 bytes; 0 came"),
        ([*wire("mean")[:2], wire("mean")[2][:-1]], PayloadMismatch, "287 came"),
        (wire("mean")[:2], PayloadMismatch, "announces 1 arrays; 0 parts"),
        ([*wire("mean"), b""], PayloadMismatch, "announces 1 arrays; 2 parts"),
        (with_fields(wire("frames"), arrays=[]), PayloadMismatch, "lacks its array"),
        (
            [*wire("acquisition_start")[:2], b"\x02" * 72],
            PayloadMismatch,
            "bool is 0 or 1",
        ),
        ([b"event", b"\xdf" + bytes(1 << 20)], OversizeMessage, "header has 1048577 bytes"),
    ],
)
def test_a_bad_message_is_named_for_what_is_wrong(parts, error, what):
    with pytest.raises(error, match=what) as caught:
        decode(parts)
    assert type(caught.value) is error


def test_an_array_named_twice_is_refused():
    parts = wire("mean")
    specs = msgpack.unpackb(parts[1])["arrays"]
    with pytest.raises(PayloadMismatch, match="names an array twice"):
        decode([*with_fields(parts, arrays=specs * 2), parts[2]])


@pytest.mark.parametrize("name", ["frames", "mean"])
def test_a_message_larger_than_allowed_is_refused(name):
    parts = wire(name)
    size = sum(map(len, parts))
    assert decode(parts, max_bytes=size).header.type == name
    with pytest.raises(OversizeMessage, match=f"has {size} bytes; at most {size - 1}"):
        decode(parts, max_bytes=size - 1)


def test_a_header_that_no_receiver_would_accept_is_not_made():
    empty = len(encode(ControlReply(ok=True, result={"text": "x" * (1 << 16)}))[1]) - (1 << 16)
    longest = "x" * (MAX_HEADER_BYTES - empty)
    assert decode(encode(ControlReply(ok=True, result={"text": longest}))).result["text"] == longest
    with pytest.raises(OversizeMessage, match="of this control_reply message has 1048577 bytes"):
        encode(ControlReply(ok=True, result={"text": longest + "x"}))


def test_an_lz4_bomb_is_refused_before_it_is_opened(lz4):
    bomb = lz4.compress(bytes(1 << 26), store_size=False)
    parts = with_spec([*wire("mean")[:2], bomb], 0, encoding="lz4", shape=[1 << 12, 1 << 12])
    assert decode(parts).mean.shape == (1 << 12, 1 << 12)
    with pytest.raises(OversizeMessage, match="arrays need 67108864 bytes"):
        decode(parts, max_bytes=1 << 25)


def test_an_lz4_block_too_short_for_what_it_announces_is_refused(lz4):
    parts = with_spec(wire("mean", lz4=True), 0, shape=[1 << 13, 1 << 13])
    with pytest.raises(PayloadMismatch, match="bytes of LZ4 cannot hold them"):
        decode(parts)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b + b"\x00", lambda b: b"\xff" * 40]
)
def test_a_corrupt_lz4_block_is_refused(lz4, damage):
    *head, block = wire("mean", lz4=True)
    with pytest.raises(PayloadMismatch, match="mean"):
        decode([*head, damage(block)])


def test_a_missing_codec_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lz4.block", None)
    with pytest.raises(MissingCodec, match="pip install lz4"):
        encode(*EXAMPLES["mean"], lz4=True)
    with pytest.raises(MissingCodec, match="pip install"):
        decode(with_spec(wire("mean"), 0, encoding="lz4"))


# --- wild input: only ProtocolErrors come out ----------------------------------------------------


def only_protocol_errors(parts):
    try:
        message = decode(parts, max_bytes=1 << 22)
    except ProtocolError:
        return
    assert message.header.type in MESSAGE_TYPES


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_random_bytes(parts):
    only_protocol_errors(parts)


names = st.sampled_from(list(MESSAGE_TYPES))


@given(names, st.data())
@settings(max_examples=300)
def test_flipped_and_cut_bytes(name, data):
    parts = wire(name)
    which = data.draw(st.integers(0, len(parts) - 1))
    part = bytearray(parts[which])
    for _ in range(data.draw(st.integers(0, 3))):
        part[data.draw(st.integers(0, len(part) - 1))] = data.draw(st.integers(0, 255))
    parts[which] = bytes(part[: data.draw(st.integers(0, len(part)))])
    only_protocol_errors(parts)


wild = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=4)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@given(names, st.data(), wild)
@settings(max_examples=300)
def test_any_value_in_any_field(name, data, value):
    parts = wire(name)
    header = msgpack.unpackb(parts[1])
    field = data.draw(st.sampled_from(list(header)))
    only_protocol_errors(with_fields(parts, **{field: value}))


@given(st.sampled_from([n for n, (_, arrays) in EXAMPLES.items() if arrays]), st.data())
@settings(max_examples=200)
def test_any_value_in_an_array_description(name, data):
    parts = wire(name)
    field = data.draw(st.sampled_from(["name", "dtype", "shape", "encoding"]))
    value = data.draw(wild | st.lists(st.integers(0, 2**64 - 1), max_size=4) | st.just("lz4"))
    only_protocol_errors(with_spec(parts, 0, **{field: value}))


@given(names, names, st.integers(0, 4))
def test_parts_of_different_messages_mixed(one, other, cut):
    only_protocol_errors(wire(one)[:cut] + wire(other)[cut:])
