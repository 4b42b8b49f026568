"""What the package shows to its users, and what it needs from them."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import prenet4d_client


def test_the_public_names():
    assert sorted(prenet4d_client.__all__) == [
        "CommandRefused",
        "ConnectionRefused",
        "ControlClient",
        "FrameFlag",
        "FrameSender",
        "InvalidUse",
        "LosslessReceiver",
        "MalformedMessage",
        "Message",
        "MissingCodec",
        "NoAnswer",
        "OversizeMessage",
        "PayloadMismatch",
        "Prenet4dError",
        "ProtocolError",
        "ScanMaps",
        "Subscriber",
        "UnknownType",
        "UnsupportedVersion",
        "__version__",
        "decode",
        "encode",
    ]
    assert all(hasattr(prenet4d_client, name) for name in prenet4d_client.__all__)
    assert prenet4d_client.__version__ == version("prenet4d")


@pytest.mark.parametrize(
    "name",
    [name for name in prenet4d_client.__all__ if isinstance(getattr(prenet4d_client, name), type)],
)
def test_every_error_is_of_one_tree(name):
    thing = getattr(prenet4d_client, name)
    if issubclass(thing, Exception):
        assert issubclass(thing, prenet4d_client.Prenet4dError)


def test_importing_it_loads_only_what_it_depends_on():
    code = "import json, sys, prenet4d_client; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.split(".")[0] for name in json.loads(run.stdout)}
    third_party = roots - set(sys.stdlib_module_names)
    heavy = {"torch", "scipy", "h5py", "matplotlib", "typer", "rich", "lz4", "cbor2"}
    assert not third_party & heavy
    assert {"numpy", "zmq", "msgpack", "pydantic"} <= third_party
    assert "prenet4d_server" not in roots
    assert "prenet4d_engines" not in roots
