"""The stream benchmark runs, loses nothing, and says in JSON on what machine it reached what."""

import json
import math
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from prenet4d_server.bench import peer, stream
from prenet4d_server.bench.stream import Options, Report, example_frames
from prenet4d_server.cli import app
from prenet4d_server.processes import ChildFailed
from prenet4d_server.sources.compression import decompress


def test_tiny_run_is_complete(tmp_path):
    file = tmp_path / "bench.json"
    result = CliRunner().invoke(
        app,
        [
            *("bench", "stream", "--frames", "256", "--seconds", "0.2", "--rounds", "1"),
            *("--soak", "256", "--frame", "64x64", "--batch", "8", "--json", str(file)),
        ],
        env={"PATH": ""},  # no LiberTEM-live to be found
    )
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text())
    assert set(report["medians"]) == {
        *(f"bare pyzmq, {some} a message" for some in ("one frame", "16 frames")),
        *(f"identity, native, {some} a message" for some in ("one frame", "16 frames")),
        "identity, DECTRIS V2",
        *("bare corrector", "full service"),
    }
    assert all(value > 0 for value in report["medians"].values())
    assert [set(goal) for goal in report["goals"]] == 4 * [{"name", "reached", "wanted", "met"}]
    assert 0 < report["latency_ms"]["p50"] <= report["latency_ms"]["p99"]
    assert set(report["memory_bytes"]["before"]) == {"service", "ingest"}
    assert report["machine"]["processor"]
    assert report["notes"] == [
        "LiberTEM-live is not installed here: name an interpreter that has it."
    ]


def test_a_stream_may_take_as_long_as_the_service_gets_on(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "_SILENCE_S", 12.0)
    options = Options(frame_shape=(32, 32))
    bench = stream._Bench(options, Report.begin(options), tmp_path)
    with bench._service("native", "identity") as service:
        # The last --rate counts: a stream that is not known to take so long.
        rate = bench._stream(service, "native", 600, "--rate", "40")
        assert 0 < rate < 1000  # what a service that was held up has to catch up comes faster
        # and one that stops in the middle is told of
        with pytest.raises(ChildFailed, match="has corrected nothing for 12 s"):
            bench._stream(service, "native", 64, "--rate", "0.01")


def test_what_was_measured_before_a_failure_is_kept(tmp_path):
    theirs = tmp_path / "python"
    theirs.write_text("#!/bin/sh\necho 1.0\n")  # says that it has LiberTEM-live, and has none
    theirs.chmod(0o755)
    file = tmp_path / "bench.json"
    result = CliRunner().invoke(
        app,
        [
            *("bench", "stream", "--frames", "64", "--seconds", "0.1", "--rounds", "1"),
            *("--soak", "64", "--frame", "32x32", "--batch", "8", "--json", str(file)),
            *("--peer-python", str(theirs)),
        ],
    )
    assert result.exit_code != 0
    report = json.loads(file.read_text())
    assert report["medians"]["full service"] > 0
    assert all(math.isfinite(goal["reached"]) for goal in report["goals"])


def test_goals_are_ratios_of_medians():
    report = Report({}, {"frame_shape": (256, 256)})
    report.rates = {
        "bare pyzmq, one frame a message": [100.0, 300.0, 200.0],
        "identity, native, one frame a message": [180.0],
        "bare pyzmq, 16 frames a message": [400.0],
        "identity, native, 16 frames a message": [300.0],
        "identity, DECTRIS V2": [30_000.0],
        "bare corrector": [100.0],
        "full service": [90.0],
    }
    reached = {goal.name: (goal.reached, goal.met) for goal in report.goals()}
    native = "identity on native frames ÷ bare pyzmq"
    assert reached[f"{native}, one frame a message"] == (0.9, True)
    assert reached[f"{native}, 16 frames a message"] == (0.75, False)
    assert reached["full service ÷ bare corrector"] == (0.9, False)
    assert reached["bare corrector, frames/s"] == (100.0, True)
    assert math.isnan(report.median("LiberTEM-live"))


def test_dump_holds_the_frames(tmp_path):
    frames = example_frames((64, 64), count=3)
    file = tmp_path / "frames.dump"
    peer.write_dump(file, frames, 5)
    data, messages, at = file.read_bytes(), [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<q", data, at)
        messages.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    assert json.loads(messages[1])["ntrigger"] == 5
    assert len(messages) == 2 + 4 * 5 + 1
    for index in range(5):
        header, shape, blob, _ = messages[2 + 4 * index : 6 + 4 * index]
        assert json.loads(header)["frame"] == index
        assert json.loads(shape)["size"] == len(blob)
        out = np.empty((64, 64), np.uint16)
        decompress(blob, "bslz4", out, 2)
        np.testing.assert_array_equal(out, frames[index % 3])


def test_an_interpreter_without_libertem_is_refused():
    with pytest.raises(peer.ChildFailed, match="has no LiberTEM-live"):
        peer.version(Path(sys.executable))


@pytest.mark.skipif(
    shutil.which(peer.SIMULATOR) is None,
    reason=f"needs LiberTEM-live beside us: {peer.SIMULATOR} is not on PATH",
)
def test_libertem_live_runs_on_its_own_simulator(tmp_path):
    python = peer.find_python(None)
    assert python is not None
    dump = tmp_path / "frames.dump"
    peer.write_dump(dump, example_frames((128, 128), count=8), 64)
    rates = peer.frames_per_second(python, dump, (8, 8), 128, 1, tmp_path)
    assert len(rates) == 1
    assert rates[0] > 0
