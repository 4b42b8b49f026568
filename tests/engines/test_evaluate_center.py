"""When another beam is taken for the direct one: counted, kept out of the mean, and warned of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from prenet4d_engines.evaluate.center import (
    apart_from_wrong_beams,
    best_setting,
    common_ratio,
)
from prenet4d_engines.evaluate.claims import Claims, warning_table
from prenet4d_engines.evaluate.datasets import (
    PatternSet,
    _spacings,
    difficult_patterns,
    held_out_patterns,
)
from prenet4d_engines.evaluate.metrics import beam_limits, wrong_beams
from prenet4d_engines.evaluate.run import Run
from prenet4d_engines.simulate.content import direct_disk
from prenet4d_engines.simulate.pattern import Optics, Pattern, X, Y

Array = NDArray[np.float64]


def test_a_wrong_beam_is_one_outside_the_disk_or_nearer_to_another() -> None:
    small, alone, overlapping = 1.5, 10.0, 10.0
    radii = np.array([small, alone, overlapping])
    spacings = np.array([30.0, 30.0, 12.0])
    assert beam_limits(radii, (128, 160), spacings).tolist() == [3.0, 10.0, 6.0]
    assert beam_limits(radii, (256, 512), spacings).tolist() == [6.0, 10.0, 6.0]
    assert beam_limits(radii, (128, 128)).tolist() == [3.0, 10.0, 10.0]

    limits = np.array([3.0, 10.0])
    errors = np.array([[2.9, 9.9], [3.0, 25.0], [np.nan, np.inf]])
    assert wrong_beams(errors, limits).tolist() == [[False, False], [False, True], [True, True]]


def test_wrong_beams_are_counted_and_the_others_averaged() -> None:
    errors = np.array([0.3, 0.4, 25.0, 0.5, 30.0, 0.0, 0.0, 0.0])
    share, mean, rms = apart_from_wrong_beams(errors, np.full(8, 3.0))
    assert share == 25.0
    assert mean == pytest.approx(0.2)
    assert rms == pytest.approx(np.sqrt(0.5 / 6))
    assert apart_from_wrong_beams(errors + 50, np.full(8, 3.0)) == (100.0, None, None)


def test_a_setting_that_is_precise_but_mostly_wrong_is_not_the_best_one() -> None:
    limits = np.full(4, 3.0)
    precise_once, always_right, unsteady = [0.0, 40, 40, 40], [0.2, 0.2, 0.2, 0.2], [0.0, 0, 0, 40]
    settings = np.array([precise_once, always_right, unsteady])
    assert best_setting(settings, limits).tolist() == always_right
    assert best_setting(settings[::2], limits).tolist() == unsteady
    assert best_setting(np.full((2, 4), np.nan), limits).shape == (4,)


def test_precision_is_compared_where_both_are_right() -> None:
    limits = np.full(4, 3.0)
    ours = np.array([0.1, 0.1, 2.0, 50.0])
    rival = np.array([0.2, 0.2, 50.0, 0.0])
    assert common_ratio(ours, rival, limits) == pytest.approx(0.5)
    assert common_ratio(ours, rival + 50, limits) is None


def test_sets_know_the_nearest_reflection_of_each_pattern() -> None:
    beam = direct_disk(Optics(1.0, 2e5, 100.0, 9.0, 0.5))
    near, far = beam.copy(), beam.copy()
    near[:, [Y, X]] += (-6.0, 8.0)
    far[:, [Y, X]] += (20.0, 0.0)
    alone = Pattern("vacuum", (40.0, 40.0), disks=beam)
    crystal = Pattern("cbed", (40.0, 40.0), disks=np.concatenate([far, beam, near]))
    halo = Pattern("amorphous", (40.0, 40.0))
    assert _spacings([alone, crystal, halo]).tolist() == [np.inf, 10.0, np.inf]

    for patterns in (
        held_out_patterns("s", "s", (64, 64), ("cbed", "spots"), seed=0),
        difficult_patterns("d", "d", (64, 64), 4, seed=0),
    ):
        assert patterns.spacings is not None
        assert patterns.spacings.shape == patterns.limits.shape == patterns.radii.shape
        assert np.isfinite(patterns.spacings).any()
        assert (patterns.limits <= np.maximum(patterns.radii, 1.5)).all()


@pytest.fixture(scope="module")
def run_and_patterns() -> tuple[Run, PatternSet]:
    patterns = held_out_patterns("four", "four frames", (128, 128), ("vacuum",) * 4, seed=0)
    run = Run(
        networks=None,  # type: ignore[arg-type]  # the table is made of what was claimed
        patterns=4,
        doses=(1e3,),
        seed=0,
        sizes=(128,),
        scans=1,
        scan_doses=(),
        scan_shape=(4, 8),
        on_progress=lambda share, what: None,
    )
    return run, replace(patterns, radii=np.full(4, 5.0))


def test_wrong_beams_that_nothing_warned_of_are_told(
    run_and_patterns: tuple[Run, PatternSet],
) -> None:
    run, patterns = run_and_patterns
    claims = Claims(
        deviations=np.array([[0.1, 0.0], [20.0, 0.0], [0.0, 20.0], [20.0, 20.0]]),
        sigmas=np.array([[0.1, 0.1], [0.2, 0.2], [0.2, 4.0], [0.2, 0.2]]),
        beam=np.array([0.9, 0.9, 0.9, 0.1]),
    )
    table = warning_table(run, patterns, [claims])
    shares = [values[0] for _, values in table.rows]
    # all; usable; sigma below 1 px; both; how many claim both
    assert shares == pytest.approx([75.0, 200 / 3, 200 / 3, 50.0, 50.0])
    unsure = replace(claims, sigmas=np.full((4, 2), 5.0))
    assert [v[0] for _, v in warning_table(run, patterns, [unsure]).rows][2:] == [None, None, 0.0]
