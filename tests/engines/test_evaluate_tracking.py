"""Wrong beams over scans: drawn near zone axes, counted for every estimate, judged."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from prenet4d_engines.evaluate import tracking
from prenet4d_engines.evaluate.classical.center import disk_correlation_center
from prenet4d_engines.evaluate.datasets import COMPUTED
from prenet4d_engines.evaluate.metrics import beam_limits, lengths
from prenet4d_engines.evaluate.report import Table
from prenet4d_engines.evaluate.run import Run
from prenet4d_engines.evaluate.scans import _direct_shares, dynamical_scan
from prenet4d_engines.evaluate.tracking import CLASSICAL, SINGLE, TRACKED, wrong_checks
from prenet4d_engines.simulate import HELD_OUT, Drift, Multislice
from prenet4d_engines.simulate.materials import TRAINING

Array = NDArray[np.float64]


def test_scans_near_zone_axes_are_of_materials_that_training_never_saw() -> None:
    materials = set(Multislice.load(COMPUTED).materials)
    assert materials <= set(HELD_OUT)
    assert not materials & set(TRAINING)


def test_scans_near_zone_axes_repeat_by_their_seed() -> None:
    one, radii = dynamical_scan((3, 8), (96, 96), dose=1e3, seed=0, number=0)
    again, _ = dynamical_scan((3, 8), (96, 96), dose=1e3, seed=0, number=0)
    more, of_more = dynamical_scan((3, 8), (96, 96), dose=1e5, seed=0, number=0)
    other, _ = dynamical_scan((3, 8), (96, 96), dose=1e3, seed=1, number=0)
    next_one, _ = dynamical_scan((3, 8), (96, 96), dose=1e3, seed=0, number=1)
    assert np.array_equal(one.frames(), again.frames())
    assert not np.array_equal(one.frames(), other.frames())
    assert not np.array_equal(one.frames(), next_one.frames())
    assert np.array_equal(one.centers, more.centers)
    assert np.array_equal(radii, of_more)
    assert radii.shape == (24,)
    assert len(set(radii[one.grains == one.grains[0]])) == 1


def test_scans_near_zone_axes_mislead_and_lead_to_where_the_truth_is() -> None:
    still = Drift(plane=0.0, walk=0.0, jump=0.0)
    scan, radii = dynamical_scan((16, 24), (96, 96), dose=1e6, seed=0, number=0, drift=still)
    firsts = [int(np.flatnonzero(scan.grains == grain)[0]) for grain in np.unique(scan.grains)]
    found = np.array(
        [disk_correlation_center(scan.expectation(i).astype(np.float64), radii[i]) for i in firsts]
    )
    errors = lengths(found - scan.centers[firsts])
    wrong = errors > beam_limits(radii[firsts], (96, 96))
    assert 1 <= wrong.sum() <= 3
    assert np.median(errors[~wrong]) < 0.5


def test_the_share_of_the_direct_beam_is_that_of_its_disk() -> None:
    side = 160
    y, x = np.mgrid[:side, :side] - side // 2
    direct, diffracted = np.hypot(y, x) <= 5, np.hypot(y - 30, x) <= 5
    roots = np.stack([np.sqrt(direct + 3.0 * diffracted), np.sqrt(direct * 1.0)])
    computed = Multislice(
        roots.astype(np.float16), np.full(2, 5.0, np.float32), ("Au", "Au"), np.ones(2, np.float32)
    )
    assert _direct_shares(computed) == pytest.approx([0.25, 1.0], rel=1e-3)


def made_run(doses: tuple[float, ...]) -> Run:
    return Run(
        networks=None,  # type: ignore[arg-type]  # the tables are made of errors given here
        patterns=6,
        doses=(),
        seed=0,
        sizes=(128,),
        scans=1,
        scan_doses=doses,
        scan_shape=(1, 4),
        on_progress=lambda share, what: None,
    )


def test_wrong_beams_are_counted_for_every_estimate() -> None:
    limits = np.array([3.0, 3.0, 8.0, 8.0])

    def followed(single: list[float], tracked: list[float]) -> tracking._Followed:
        errors = {SINGLE: np.array(single), TRACKED: np.array(tracked), CLASSICAL: np.full(4, 5.0)}
        return tracking._Followed(errors, limits, 0.68)

    low = [followed([0.1, 20, 20, 20], [0.1, 0.1, 0.1, 20]), followed([0, 0, 0, 0], [0, 0, 0, 0])]
    high = [followed([0.1, 0.1, 7, 9], [0.1, 4, 7, 9]), followed([0, 0, 0, 0], [0, 0, 0, 0])]
    table = tracking._wrong_beam_table(made_run((1e3, 1e4)), "slug", "title", [low, high])
    assert table.columns == ("10^3 e", "10^4 e")
    assert table.row(SINGLE) == (37.5, 12.5)
    assert table.row(TRACKED) == (12.5, 25.0)
    assert table.row(CLASSICAL) == (50.0, 50.0)


def test_a_track_must_remove_most_wrong_beams_where_there_are_any() -> None:
    table = Table(
        "tracking.wrong.dynamical",
        "wrong",
        "method",
        ("10^2 e", "10^3 e", "10^4 e", "10^5 e"),
        ((SINGLE, (10.0, 10.0, 0.0, 0.0)), (TRACKED, (1.0, 9.0, 0.0, 2.0))),
    )
    checks = list(wrong_checks(table))
    assert [check.passed for check in checks] == [True, False, True, False]
    assert "10^2 e" in checks[0].goal
