"""What the page's benchmark concludes from its figures, and one short run of it."""

from __future__ import annotations

import json
import math

import pytest

from prenet4d_server.bench.page import Report, Turn, run


def turn(rate: float, service: float = 3.0) -> Turn:
    return Turn(rate, {"service": service, "ingest": 0.5, "page": 0.2, "others": 0.0})


def report(*shares: float, noise: float = 0.0) -> Report:
    made = Report(10, {})
    for number, share in enumerate(shares):
        pace = 100 * (1 + noise * (-1) ** number)
        made.without.append((turn(pace), turn(0.8 * pace)))  # the machine slows down meanwhile
        made.with_pages.append((turn(0.9 * pace * share), turn(0.9 * pace * share)))
    return made


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [
        ((0.99, 0.985, 0.99, 0.98, 0.99), "met"),
        ((0.8, 0.81, 0.79, 0.8, 0.8), "missed"),
        ((0.8, 1.2, 0.9, 1.1, 0.95), "not decided by this run"),
        ((0.99,), "not decided by this run"),
    ],
)
def test_the_verdict_knows_how_much_the_rounds_scatter(
    shares: tuple[float, ...], verdict: str
) -> None:
    made = report(*shares, noise=0.2)
    assert made.ratios == pytest.approx(shares)
    assert made.verdict == verdict
    json.loads(made.to_json())


def test_one_round_tells_no_scatter() -> None:
    assert "99.0% in the only round (goal: at least 95%)" in report(0.99).conclusion
    assert "99.0% ± 0.0% (goal" in report(0.99, 0.99).conclusion


def test_what_a_frame_costs_is_told_apart_from_the_rate() -> None:
    made = report(0.5, 0.5)
    assert made.cost_ratio == pytest.approx(2.0, rel=0.05)  # as much time, half of the frames
    assert math.isclose(made.cores("page", pages=True), 0.2)


def test_it_runs() -> None:
    told: list[float] = []
    made = run(
        pages=2, seconds=3.0, rounds=1, frame_shape=(64, 64), backend="identity",
        say=lambda share, _: told.append(share),
    )  # fmt: skip
    assert told[-1] == 1
    ((first, second),) = made.with_pages
    assert first.frames_per_second > 0
    assert set(second.cores) == {"service", "ingest", "page", "detector", "visitors", "others"}
    assert second.cores["service"] > 0
    assert made.without[0][0].frames_per_second > 0  # however long the detector took to begin
    assert made.without[0][0].cores["visitors"] == 0
