"""Who may command over the control socket, where the configuration names operators."""

import pytest
import zmq
from typer.testing import CliRunner

from prenet4d_client import ControlClient
from prenet4d_client.errors import CommandRefused, InvalidUse
from prenet4d_server.cli import app
from prenet4d_server.errors import ConfigError
from prenet4d_server.service import Service
from prenet4d_server.sockets import generate_keys, load_keys

from ..live import TIMEOUT_S, frames, sender, settings, until

pytestmark = pytest.mark.skipif(not zmq.has("curve"), reason="this pyzmq was built without CURVE")


@pytest.fixture(scope="module")
def operator_file(tmp_path_factory):
    return generate_keys(tmp_path_factory.mktemp("operator"))[1]


@pytest.fixture(scope="module")
def operator(operator_file):
    public, secret = load_keys(operator_file)
    return public.decode(), secret.decode()


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    return generate_keys(tmp_path_factory.mktemp("keys"))[1]


@pytest.fixture(scope="module")
def server_key(key_file):
    return load_keys(key_file)[0]


@pytest.fixture(scope="module")
def service(operator, key_file, server_key):
    security = {"secret_key_file": key_file, "operator_keys": [operator[0]]}
    with (
        Service(settings(security=security)) as running,
        sender(running, server_key=server_key) as source,
    ):
        source.start(frame_shape=(16, 24), dtype="uint16", scan_shape=(2, 3))
        source.send(frames(2))
        until(lambda: running.status().counters.corrected == 2)
        yield running


def client(service, server_key, keys=None):
    return ControlClient(
        service.endpoints["control"], timeout=TIMEOUT_S, server_key=server_key, keys=keys
    )


def test_an_operator_may_ask_and_command(service, server_key, operator):
    with client(service, server_key, operator) as known:
        assert known.status()["ready"]
        known.recalibrate()


def test_others_may_ask_and_not_command(service, server_key):
    with (
        client(service, server_key) as nobody,
        client(service, server_key, zmq.curve_keypair()) as stranger,
    ):
        for asking in (nobody, stranger):
            assert asking.status()["ready"]
            assert asking.config()["security"]["operator_keys"]
            assert asking.save_calibration()["ratio"] == 1
            asking.snapshot()
            for command in ("freeze", "unfreeze", "recalibrate"):
                with pytest.raises(CommandRefused, match=f"Only operators may {command}"):
                    getattr(asking, command)()
            with pytest.raises(CommandRefused, match="Only operators may load_calibration"):
                asking.load_calibration({})


def test_the_command_line_shows_the_operators_key(service, server_key, operator_file, tmp_path):
    stranger = generate_keys(tmp_path)[1]
    options = ["--control", service.endpoints["control"], "--server-key", server_key.decode()]
    said = CliRunner().invoke(app, ["recalibrate", *options, "--client-key", str(operator_file)])
    assert said.exit_code == 0, said.output
    said = CliRunner().invoke(app, ["recalibrate", *options, "--client-key", str(stranger)])
    assert isinstance(said.exception, CommandRefused)
    said = CliRunner().invoke(app, ["recalibrate", *options, "--client-key", str(tmp_path)])
    assert said.exit_code == 2


def test_where_none_are_named_whoever_gets_in_may_command(key_file, server_key):
    secured = settings(security={"secret_key_file": key_file})
    with (
        Service(secured) as service,
        client(service, server_key) as anybody,
        pytest.raises(CommandRefused, match="No acquisition has begun"),
    ):
        anybody.freeze()


@pytest.mark.parametrize(
    ("with_server_key", "keys", "what"),
    [(False, ["x" * 40], "needs security.secret_key_file"), (True, ["short"], "'short' is no")],
)
def test_operators_that_cannot_be_told_apart_are_refused(key_file, with_server_key, keys, what):
    security = {"operator_keys": keys}
    if with_server_key:
        security["secret_key_file"] = key_file
    with pytest.raises(ConfigError, match=what):
        settings(security=security)


@pytest.mark.parametrize("keys", [("short", "shorter"), zmq.curve_keypair()])
def test_keys_that_cannot_serve_are_refused_by_the_client(keys, server_key):
    with pytest.raises(InvalidUse, match="keys"):
        ControlClient(keys=keys, server_key=server_key if len(keys[0]) < 40 else None)
