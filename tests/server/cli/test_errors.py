"""What goes wrong is one clear sentence on stderr and a non-zero exit, never a traceback."""

import math
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from prenet4d_server.cli import progress, run
from prenet4d_server.cli.arguments import (
    parse_address,
    parse_distortion,
    parse_grid,
    parse_server_key,
)
from prenet4d_server.processes import reserved_addresses

from ..live import TIMEOUT_S


@pytest.fixture
def free():
    """An address where nobody listens."""
    with reserved_addresses(1) as (address,):
        yield address


@pytest.fixture
def prenet4d(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prenet4d", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        status = run()
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--scan", "64"], "'64' is not rows x columns: write for example 64x64."),
        (["serve", "--scan", "1000000x1000000"], "1,000,000,000,000 frames, and at most"),
        (["serve", "--channel", "1"], "--channel says nothing to native, where frames come from"),
        (["serve", "--rate", "5"], "it goes with --source replay."),
        (["serve", "--source", "dectris2", "--data", __file__], "--data says nothing to dectris2"),
        (
            ["serve", "--data", __file__, "--connect", "tcp://a:1"],
            "says nothing to replay",
        ),
        (["simulate-detector", "native", "--compression", "lz4"], "--compression is for DECTRIS"),
        (["simulate-detector", "dectris2", "--frames-per-message", "2"], "is for native frames."),
        (["simulate-detector", "native", "--data", __file__, "--frame", "8x8"], "--frame is for"),
        (
            ["simulate-detector", "native", "--data", __file__, "--seed", "1"],
            "--seed does nothing",
        ),
        (["serve", "--scan", "0x4"], "'0x4' is not rows x columns"),
        (["serve", "--connect", "10.0.0.1:5560"], "write for example tcp://127.0.0.1:5560"),
        (["serve", "--source", "merlin"], "'merlin' is not one of"),
        (["serve", "--source", "replay"], "A replay needs a file: name it with --data, or"),
        (["demo", "--ellipticity", "1.03"], "write the ratio of the axes (1 to 2) and the angle"),
        (["demo", "--seed", "-1"], "should be greater than or equal to 0"),
        (["simulate-detector", "native", "--seed", "-1"], "should be greater than or equal to 0"),
        (["dashboard", "--connect", "host:5561"], "'host:5561' is no host: write its name or"),
        (["dashboard", "--connect", "tcp://foo"], "'tcp://foo' is no host: write its name or"),
        (["dashboard", "--stream", "tcp://a b:1"], "Cannot connect to 'tcp://a b:1'"),
        (["dashboard", "--server-key", 40 * '"'], "server_key must be the service's public CURVE"),
        (["dashboard", "--token", "x"], "has fewer than 8 characters and would be guessed"),
        (["demo", "--data", "nowhere.npy"], "'nowhere.npy' does not exist"),
        (["train", "everything"], "'everything' is not one of"),
        (["simulate-detector", "dectris"], "'kind': 'dectris' is not one of"),
        (["nonsense"], "No such command 'nonsense'"),
        (["status", "--timeout", "0.2"], "No service answered 'status'"),
        (["watch", "--once", "--timeout", "0.2"], "Nothing came from tcp://127.0.0.1:"),
        (["record", "no/such/folder/scan.h5"], "There is no folder no/such/folder."),
        (["record", "scan.png"], "'scan.png' is no name for a recording: let it end in .h5"),
        (["dashboard", "--listen", "tcp://127.0.0.1:80808"], "a port is a number from 1 to 65535"),
        (["serve", "--connect", "tcp://127.0.0.1:99999"], "a port is a number from 1 to 65535"),
        (["serve", "--connect", "tcp://127.0.0.1"], "'tcp://127.0.0.1' says no port"),
        (["freeze", "--control", "tcp://no.such.invalid:5563"], "knows no host 'no.such.invalid'"),
        (["replay", __file__, "--to", "tcp://no.such.invalid:1"], "or give the address in numbers"),
        (["calibrate", "a.npy", "-o", "no/such/a.toml"], "There is no folder no/such. Make it"),
        (["calibrate", "a.npy", "--report", "no/such/a.png"], "There is no folder no/such."),
        (["evaluate", "--json", "no/such/a.json"], "There is no folder no/such. Make it first."),
        (["evaluate", "--data", __file__, "--data", __file__], "files with the same name only one"),
        (["evaluate", "ellipse", "--data", __file__], "Only denoise and center are evaluated on"),
        (["simulate", "--multislice", "no/such/a.npz"], "There is no folder no/such. Make it"),
        (["bench", "traffic", "--json", "no/such/a.json"], "There is no folder no/such. Make it"),
        (["bench", "engines", "--plot", "a.txt"], "'a.txt' is no name for a picture: let it end"),
        (["calibrate", "a.npy", "--report", "a.txt"], "'a.txt' is no name for a picture"),
        (["simulate", "--gallery", "page"], "'page' is no name for a picture: let it end in .png"),
        (["bench", "latency", "--seconds", "inf"], "should be less than or equal to 86400"),
        (["bench", "engines", "--seconds", "inf"], "should be less than or equal to 86400"),
        (["bench", "page", "--seconds", "inf"], "should be less than or equal to 86400"),
        (["bench", "stream", "--seconds", "inf"], "should be less than or equal to 86400"),
        (["bench", "latency", "--max-delay-ms", "inf"], "should be less than or equal to 60000"),
        (["serve", "--source", "dectris2", "--gain", "inf"], "less than or equal to 1000000"),
        (["serve", "--data", __file__, "--rate", "inf"], "less than or equal to 1000000"),
        (["replay", __file__, "--gain", "inf"], "less than or equal to 1000000"),
        (["replay", __file__, "--rate", "inf"], "inf frames per second cannot be kept: give 0.001"),
        (["simulate-detector", "native", "--rate", "1e-99"], "1e-99 frames per second cannot be"),
        (["simulate-detector", "native", "--drift", "1e308"], "less than or equal to 8192"),
        (["demo", "--drift", "1e308"], "less than or equal to 8192"),
        (["demo", "--data", __file__, "--frame", "8x8"], "--frame is for simulated patterns"),
        (["demo", "--data", __file__, "--content", "cbed"], "--content is for simulated patterns"),
        (["train", "center", "--threads", "100000"], "should be less than or equal to 1024"),
        (["calibrate", "127.0.0.1:1"], "A service's address is tcp://127.0.0.1:1."),
        (["calibrate", "tcp://no.such.invalid:5563"], "knows no host 'no.such.invalid'"),
        (["calibrate", "http://127.0.0.1:5563"], "write for example tcp://127.0.0.1:5563"),
        (["calibrate", "tcp://a:1", "--gain", "2"], "--gain is for a file's patterns, not for"),
        (["calibrate", "tcp://a:1", "--scan", "2x2"], "--scan is for a file's patterns, not for"),
        (["calibrate", "ipc://a", "--patterns", "2"], "--patterns is for a file's patterns"),
        (["calibrate", "a.npy", "--timeout", "2"], "--timeout is for a service, not for a file."),
        (["calibrate", "a.npy", "--server-key", 40 * "a"], "--server-key is for a service, not"),
        (["simulate", "--gallery", "a.png", "--workers", "1"], "--workers is for --multislice"),
        (["simulate", "--multislice", "a.npz", "--frame", "8x8"], "--frame is for --gallery alone"),
        (["dashboard", "--listen", "ipc://x"], "Cannot listen on ipc://x (--listen): it is not"),
        (["bench", "latency", "--frame", "1x1"], "'1x1' is no detector's: each side must have 8"),
        (["bench", "traffic", "--shapes", "64x64,4x9000"], "'4x9000' is no detector's"),
        (["demo", "--out", "/dev/null/demo"], "prenet4d: /dev/null/demo: Not a directory."),
        (["freeze", "--client-key", "/"], "The key file / cannot be read: Is a directory."),
        (["config", "--check", "nowhere.toml"], "The configuration nowhere.toml cannot be read"),
    ],
)
def test_bad_use_gets_a_sentence(prenet4d, free, arguments, sentence):
    where = {"status": ["--control", free], "watch": ["--stream", free]}
    status, _, said = prenet4d(*arguments, *where.get(arguments[0], []))
    assert status != 0
    assert sentence in " ".join(said.split())
    assert "Traceback" not in said


def test_unknown_fault_is_named(prenet4d):
    status, _, said = prenet4d("simulate-detector", "native", "--scan", "2x2", "--fault", "fire")
    assert status == 1
    assert "There is no fault named 'fire'" in said


def test_broken_calibration_is_refused_before_anything_starts(prenet4d, tmp_path):
    file = tmp_path / "calibration.json"
    file.write_text('{"ratio": 0.5}')
    status, _, said = prenet4d("serve", "--calibration", file)
    assert status == 1
    assert "not a calibration that can be used" in said


def test_a_report_is_not_overwritten_unasked(prenet4d, tmp_path):
    report = tmp_path / "report.png"
    report.touch()
    status, _, said = prenet4d("calibrate", "a.npy", "-o", tmp_path / "a.toml", "--report", report)
    assert status == 1
    assert f"There is a file {report} already" in said


def test_a_dataset_of_a_file_that_has_none_is_refused(prenet4d, tmp_path):
    file = tmp_path / "frames.npy"
    np.save(file, np.ones((2, 16, 16), np.uint16))
    status, _, said = prenet4d("replay", file, "--dataset", "x")
    assert status == 1
    assert said.strip().endswith("holds one array, without a name: leave the dataset out.")


def test_file_without_frames_is_refused(prenet4d, tmp_path):
    file = tmp_path / "text.npy"
    file.write_text("not an array")
    status, _, said = prenet4d("replay", file)
    assert status == 1
    assert "is not a file that can be read here" in said


def test_replay_without_a_service_says_so(prenet4d, free, tmp_path):
    file = tmp_path / "frames.npy"
    np.save(file, np.ones((2, 16, 16), np.uint16))
    status, _, said = prenet4d("replay", file, "--to", free, "--patience", "0.3")
    assert status == 1
    assert free in said


@pytest.mark.parametrize("kind", ["native", "dectris2"])
def test_nobody_is_left_in_doubt_about_what_is_waited_for(prenet4d, free, monkeypatch, kind):
    monkeypatch.setattr(progress, "SILENT_S", 0)
    few = ("--scan", "2x2", "--frame", "16x16", "--address", free, "--patience", "2")
    status, _, said = prenet4d("simulate-detector", kind, *few)
    assert status == 1
    assert "Waiting up to 2 s for a service that" in said
    assert said.count(free) == 2  # for whom, and in the end that nobody came


def _interruptible():
    """As in a terminal, though the tests may run in the background, where SIGINT is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("repeat", ["0", "1"])
def test_a_detector_can_be_stopped_before_anybody_comes(free, repeat):
    command = ["simulate-detector", "native", "--address", free, "--repeat", repeat]
    few = ["--scan", "2x2", "--frame", "16x16"]
    with subprocess.Popen(
        [sys.executable, "-m", "prenet4d_server", *command, *few],
        stderr=subprocess.PIPE, text=True, preexec_fn=_interruptible,
    ) as detector:  # fmt: skip
        assert "Waiting up to 30 s for a service" in detector.stderr.readline()
        detector.send_signal(signal.SIGINT)
        assert not detector.stderr.read().strip()
    assert detector.returncode == 130


_CTRL_C = """
import os, signal, time
class Pressed:
    def __set_name__(self, *_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(600)
class Loading:
    here = Pressed()
"""
"""Of which Python 3.11 makes a RuntimeError."""


@pytest.mark.parametrize("module", ["typer", "h5py"])
def test_ctrl_c_in_the_middle_of_an_import_ends_quietly(tmp_path, module):
    (tmp_path / f"{module}.py").write_text(_CTRL_C)
    done = subprocess.run(
        [sys.executable, "-m", "prenet4d_server", "replay", __file__],
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, preexec_fn=_interruptible,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in (130, -signal.SIGINT)  # either is 130 for a shell
    assert not done.stdout + done.stderr


def test_what_a_terminal_cannot_show_is_replaced():
    done = subprocess.run(
        [sys.executable, "-m", "prenet4d_server", "calibrate", "--help"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert "(.npy, HDF5, Zarr, .mib, ?)" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", ["record", "replay"])
def test_whoever_waits_for_a_service_can_be_stopped_at_once(free, tmp_path, command, number):
    frames = tmp_path / "frames.npy"
    np.save(frames, np.ones((2, 16, 16), np.uint16))
    arguments = {
        "record": [tmp_path / "scan.h5", "--lossless", free],
        "replay": [frames, "--to", free, "--patience", "inf"],
    }[command]
    with socket.create_server(("127.0.0.1", int(free.rpartition(":")[2])), reuse_port=False) as ear:
        ear.settimeout(TIMEOUT_S)
        process = subprocess.Popen(
            [sys.executable, "-m", "prenet4d_server", command, *map(str, arguments)],
            stderr=subprocess.PIPE, text=True, preexec_fn=_interruptible,
        )  # fmt: skip
        with process:
            ear.accept()[0].close()  # it waits now: somebody is there, and is no service
            time.sleep(0.5)
            process.send_signal(number)
            try:
                process.wait(8)  # by itself, it would give up after 10 s
            finally:
                process.kill()
    assert process.returncode in (130, -number)


def test_config_prints_what_it_accepts(prenet4d, tmp_path):
    status, printed, _ = prenet4d("config")
    assert status == 0
    file = tmp_path / "prenet4d.toml"
    file.write_text(printed)
    status, said, _ = prenet4d("config", "--check", file)
    assert status == 0
    assert "is good: frames from native" in said
    file.write_text("[security]\nsecret_key_file = 'none'\n")
    status, _, said = prenet4d("config", "--check", file)
    assert status == os.EX_CONFIG
    assert "The key file none cannot be read: No such file or directory." in said
    file.write_text("[source]\nknd = 'native'\n")
    status, _, said = prenet4d("config", "--check", file)
    assert status == os.EX_CONFIG
    assert "Did you mean 'kind'?" in said


def test_a_replay_is_checked_by_its_file_and_a_token_by_what_it_holds(prenet4d, tmp_path):
    file, token = tmp_path / "prenet4d.toml", tmp_path / "token"
    file.write_text(
        "[source]\nkind = 'replay'\npath = 'scan.h5'\naddress = 'tcp://127.0.0.1:9999'\n"
        f"[http]\noperator_token_file = '{token}'\n"
    )
    status, said, _ = prenet4d("config", "--check", file)
    assert status == 0
    assert said.endswith("is good: frames from replay at scan.h5.\n")
    assert not token.exists()
    token.write_text("short")
    status, _, said = prenet4d("config", "--check", file)
    assert status == os.EX_CONFIG
    assert f"{token} holds no operator's token" in said


def test_keygen_makes_keys_once(prenet4d, tmp_path):
    status, said, _ = prenet4d("keygen", tmp_path)
    assert status == 0
    public = next(line.split()[-1] for line in said.splitlines() if "Public" in line)
    assert len(parse_server_key(public)) == 40
    status, _, said = prenet4d("keygen", tmp_path)
    assert status == 1
    assert "exists already" in said


def test_calibration_file_is_never_overwritten_unasked(prenet4d, free, tmp_path):
    file = tmp_path / "today.json"
    status, _, said = prenet4d("calibration", "load", file, "--control", free)
    assert status == 1
    assert "today.json" in said


@given(st.integers(1, 10_000), st.integers(1, 10_000), st.sampled_from("xX×"))
def test_grids_read_as_they_are_written(rows, columns, cross):
    assert parse_grid(f"{rows}{cross}{columns}") == (rows, columns)


@given(st.text())
def test_anything_else_is_refused_with_an_example(text):
    for parse, example in ((parse_grid, "64x64"), (parse_distortion, "1.03,25")):
        refusal = ""
        try:
            understood = parse(text)
        except typer.BadParameter as error:
            refusal = str(error)
        else:
            assert len(understood) == 2
        assert not refusal or example in refusal


def test_ellipticity_is_told_in_degrees():
    distortion = parse_distortion("1.03,205")
    assert distortion.ratio == 1.03
    assert distortion.theta == pytest.approx(math.radians(25))
    with pytest.raises(typer.BadParameter):
        parse_distortion("0.97,25")


def test_addresses_need_a_transport():
    assert parse_address("ipc:///run/prenet4d") == "ipc:///run/prenet4d"
    with pytest.raises(typer.BadParameter, match=r"tcp://127.0.0.1:5560"):
        parse_address("localhost:5560")
