"""Addresses to listen on: what is taken is refused, and what was left behind is not."""

import socket

import pytest
import zmq

from prenet4d_client import ControlClient
from prenet4d_server.errors import BindError
from prenet4d_server.processes import Child
from prenet4d_server.sockets import bind

from .live import TIMEOUT_S, until


@pytest.fixture
def context():
    with zmq.Context() as made:
        yield made


def test_a_path_is_not_taken_from_who_listens_there(context, tmp_path):
    address = f"ipc://{tmp_path}/control"
    with context.socket(zmq.PULL) as ours, context.socket(zmq.PULL) as other:
        bind(ours, address, "control.address")
        with pytest.raises(BindError, match=r"\(control.address\): another program listens there;"):
            bind(other, address, "control.address")
        with context.socket(zmq.PUSH) as sender:
            sender.connect(address)
            sender.send(b"frame")
            assert ours.poll(TIMEOUT_S * 1000)


def test_a_path_that_a_dead_program_left_behind_is_taken(context, tmp_path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "control"))
        dead.listen()
    with context.socket(zmq.PULL) as ours:
        bind(ours, f"ipc://{tmp_path}/control", "control.address")


def test_a_file_is_not_deleted_to_listen_in_its_place(context, tmp_path):
    (tmp_path / "scan.h5").write_text("patterns")
    with (
        context.socket(zmq.PULL) as ours,
        pytest.raises(BindError, match="there is a file of that name; choose another path"),
    ):
        bind(ours, f"ipc://{tmp_path}/scan.h5", "control.address")
    assert (tmp_path / "scan.h5").read_text() == "patterns"


def test_a_second_service_leaves_the_first_alone_and_nothing_stays(tmp_path):
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    names = ("source", "stream", "lossless", "control")
    file = tmp_path / "prenet4d.toml"
    file.write_text(
        "".join(f"[{name}]\naddress = 'ipc://{sockets / name}'\n" for name in names)
        + "[http]\nenabled = false\n[corrector]\nbackend = 'identity'\n"
    )
    command, first, second = ("serve", "--config", str(file)), tmp_path / "1", tmp_path / "2"
    with Child.command("service", *command, log=first) as service:
        until(lambda: "Ready." in first.read_text())
        with Child.command("second", *command, log=second) as other:
            other.process.wait(TIMEOUT_S)
        assert other.process.returncode == 1
        assert "another program listens there; stop it" in other.last_words()
        with ControlClient(f"ipc://{sockets}/control", timeout=TIMEOUT_S) as client:
            assert client.status()["ready"]
    assert service.process.returncode == 0
    assert not list(sockets.iterdir())
