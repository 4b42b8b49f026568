"""What version 1 once put on the wire is read for ever, to the same values."""

import json
from pathlib import Path

import msgpack
import numpy as np
import pytest

from prenet4d_client.messages import MESSAGE_TYPES
from prenet4d_client.wire import decode

V1 = Path(__file__).parent / "golden" / "v1"


def test_every_message_type_has_golden_bytes():
    assert {path.stem for path in V1.glob("*.json")} == set(MESSAGE_TYPES)


@pytest.mark.parametrize("name", MESSAGE_TYPES)
def test_who_has_the_text_alone_can_read_it(name):
    """As PROTOCOL.md tells it, with msgpack and numpy and nothing of ours."""
    kind, packed, *parts = msgpack.unpackb((V1 / f"{name}.bin").read_bytes())
    header = msgpack.unpackb(packed)
    meaning = json.loads((V1 / f"{name}.json").read_text(encoding="utf-8"))
    assert kind == name.encode()
    assert (header["protocol"], header["version"], header["type"]) == ("prenet4d", 1, name)
    assert {field: header[field] for field in meaning["header"]} == meaning["header"]
    assert [spec["name"] for spec in header["arrays"]] == list(meaning["arrays"])
    for spec, part in zip(header["arrays"], parts, strict=True):
        assert spec.get("encoding", "raw") == "raw"
        dtype = np.dtype(spec["dtype"]).newbyteorder("<")
        array = np.frombuffer(part, dtype).reshape(spec["shape"])
        golden = meaning["arrays"][spec["name"]]["values"]
        np.testing.assert_array_equal(array, np.array(golden, dtype))


@pytest.mark.parametrize("path", sorted(V1.glob("*.bin")), ids=lambda path: path.stem)
def test_golden_bytes_keep_their_meaning(path):
    if path.stem.endswith("-lz4"):
        pytest.importorskip("lz4.block", reason="the extra lz4 is not installed")
    meaning = json.loads(
        (V1 / f"{path.stem.removesuffix('-lz4')}.json").read_text(encoding="utf-8")
    )

    message = decode(msgpack.unpackb(path.read_bytes()))

    header = message.header.model_dump(mode="json", exclude={"arrays"})
    assert {name: header[name] for name in meaning["header"]} == meaning["header"]
    assert message.arrays.keys() == meaning["arrays"].keys()
    for name, array in message.arrays.items():
        golden = meaning["arrays"][name]
        assert array.dtype == golden["dtype"]
        np.testing.assert_array_equal(array, np.array(golden["values"], dtype=golden["dtype"]))
