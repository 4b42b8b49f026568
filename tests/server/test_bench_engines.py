"""The benchmarks of the devices measure what they say, and write it down."""

import gzip
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from prenet4d_engines import weights
from prenet4d_engines.backends import TorchBackend
from prenet4d_server.bench import engines, latency, profile, traffic


@pytest.fixture(scope="module")
def backend():
    return TorchBackend("float32", threads=1, device="cpu")


def test_every_stage_is_measured_beside_its_floor(backend, tmp_path):
    said = []
    report = engines.run(
        [("torch-cpu", backend)],
        shapes=[(32, 48)],
        batches=(1, 3),
        seconds=0.2,
        say=lambda share, what: said.append((share, what)),
    )
    cells = report.of("torch-cpu", (32, 48))
    assert set(cells) == set(engines.STAGES) - {"copy in", "copy out"}  # a CPU copies neither
    for stage, by_batch in cells.items():
        assert set(by_batch) == {1, 3}
        for cell in by_batch.values():
            assert cell.us_per_frame > 0
            assert (cell.floor_us is None) == (stage == "track")
    assert said[0] == (0.0, "torch-cpu, 32 × 48, 1 frames")
    written = json.loads(report.to_json())
    assert len(written["cells"]) == 2 * len(cells)
    assert written["devices"]["torch-cpu"]["description"] == backend.description
    assert written["peaks"]["torch-cpu"]["flops"] > 0
    assert written["machine"]["torch"]
    report.plot(tmp_path / "rates.png")
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


def test_costs_are_those_of_the_convolutions():
    x = torch.zeros(1, 4, 64, 64)
    flop, moved = engines.network_cost("denoise", x)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        weights.load("denoise")(x)
    assert flop == counter.get_flop_counts()["Global"][torch.ops.aten.convolution]
    assert engines.network_cost("denoise", torch.zeros(1, 4, 128, 128)) == (4 * flop, 4 * moved)


def moved(work):
    with torch.no_grad(), traffic.Moved() as counter:
        work(torch.empty(100, 8), torch.empty(100, 1))
    return counter.bytes


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (lambda a, b: a + 1, 6400),
        (lambda a, b: a + b, 6800),
        (lambda a, b: a + b.expand(100, 8), 6800),  # what is repeated is read once
        (lambda a, b: a.mul_(b), 6800),
        (lambda a, b: a[:50] * 2, 3200),
        (lambda a, b: a.copy_(b), 3600),  # what was there is not read
        (lambda a, b: a.zero_(), 3200),
        (lambda a, b: a.half(), 4800),
        (lambda a, b: a.t().reshape(-1).view(80, 10), 6400),
        (lambda a, b: a.view(800).unflatten(0, (20, 40)), 0),
        (lambda a, b: torch.empty_like(a), 0),
        (lambda a, b: a[torch.arange(10)], 80 + 80 + 320 + 320),  # numbers written, read; rows
    ],
)
def test_operations_move_their_tensors_once(work, expected):
    assert moved(work) == expected


def test_the_traffic_of_a_frame_is_counted_part_by_part():
    small, large = traffic.count((128, 128)), traffic.count((256, 256))
    assert tuple(small) == traffic.PARTS
    parts = list(small)[: traffic.PARTS.index("look")]
    for counted in (small, large):
        inside = sum(counted[part] for part in parts)
        assert inside < counted["look"] < 1.1 * inside
    # binned to the same size, frames cost the search for their centers the same
    assert small["symmetry"] == large["symmetry"]
    for part in ("denoiser: before", "denoiser: after", "straighten"):
        assert large[part] == pytest.approx(4 * small[part], rel=0.01)


def test_a_trace_can_be_opened(backend, tmp_path):
    table = profile.write_trace(tmp_path / "trace.json.gz", backend, (32, 32), 2, 2)
    assert "aten::" in table
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])


def test_latency_is_that_of_the_stream_under_way():
    report = latency.run(
        backend="identity",
        frame_shape=(16, 16),
        batch=16,
        max_delay_ms=5.0,
        seconds=0.5,  # or one that was held up would make the rest take minutes
        loads=(0.5,),
        say=lambda share, what: None,
    )
    (half,) = report.loads
    assert "identity" in report.engine
    assert half.sent == pytest.approx(report.full_rate / 2)
    assert 0 < half.p50 <= half.p99 <= half.worst_p99
    assert json.loads(report.to_json())["loads"][0]["load"] == 0.5
