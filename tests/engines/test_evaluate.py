"""The evaluation: fair rivals, right figures, the same answer twice."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from scipy.stats import poisson

from prenet4d_engines.backends import TorchBackend
from prenet4d_engines.errors import EvaluationError, SimulationError
from prenet4d_engines.evaluate import Subject, evaluate, metrics, strain
from prenet4d_engines.evaluate.bound import (
    BOUND,
    bounding_errors,
    center_covariance,
    pixel_information,
)
from prenet4d_engines.evaluate.classical import (
    CENTER_METHODS,
    DENOISE_METHODS,
    ELLIPSE_METHODS,
    Method,
)
from prenet4d_engines.evaluate.classical.center import disk_correlation_center
from prenet4d_engines.evaluate.classical.denoise import anscombe, inverse_anscombe
from prenet4d_engines.evaluate.classical.py4dstem import PYTHON_VARIABLE
from prenet4d_engines.evaluate.datasets import (
    computed_patterns,
    difficult_patterns,
    held_out_patterns,
    measured_patterns,
    mixed_kinds,
    patterns_without_beam,
    wide_patterns,
)
from prenet4d_engines.evaluate.denoise import _at_dose
from prenet4d_engines.evaluate.ellipse import evaluate_ellipses
from prenet4d_engines.evaluate.hallucination import invented_peaks
from prenet4d_engines.evaluate.networks import Networks
from prenet4d_engines.evaluate.pictures import Denoised, draw_denoised
from prenet4d_engines.evaluate.report import (
    Check,
    Part,
    Report,
    Table,
    largest,
    most_of_the_best,
)
from prenet4d_engines.evaluate.run import Run, Stopwatch
from prenet4d_engines.evaluate.scan_denoise import PCA, principal_components
from prenet4d_engines.evaluate.tracking import (
    TRACKED,
    evaluate_tracking,
    paired_difference,
    plane_fit,
)
from prenet4d_engines.geometry import Ellipticity
from prenet4d_engines.simulate.content import direct_disk
from prenet4d_engines.simulate.detector import Detector, ideal_detector
from prenet4d_engines.simulate.materials import HELD_OUT, TRAINING
from prenet4d_engines.simulate.pattern import Optics, Pattern
from prenet4d_engines.simulate.render import render

Array = NDArray[np.float64]

SHAPE = (96, 112)
CENTER = (43.4, 60.7)
RADIUS = 9.0


def drawn(
    *, center: tuple[float, float] = CENTER, ellipticity: tuple[float, float] = (1.0, 0.0)
) -> Array:
    """A disk inside two rings on a smooth background, sum 1."""
    optics = Optics(1.0, 2e5, 100.0, RADIUS, 0.5)
    rho = np.arange(1000) * 0.25
    rings = np.exp(-0.5 * ((rho - 24) / 1.5) ** 2) + 0.5 * np.exp(-0.5 * ((rho - 34) / 2) ** 2)
    pattern = Pattern(
        "rings", center, ellipticity, direct_disk(optics), rings + np.exp(-rho / 20), 0.5
    )
    return render([pattern], SHAPE)[0].numpy().astype(np.float64)


@pytest.fixture(scope="module")
def counts() -> Array:
    rng = np.random.default_rng(3)
    return rng.poisson(drawn() * 1e6).astype(np.float64)


def each_setting(methods: tuple[Method[object], ...]) -> list[object]:  # type: ignore[type-var]
    return [
        pytest.param(method, setting, id=f"{method.name} {setting}")
        for method in methods
        for setting in method.settings
    ]


@pytest.fixture(scope="module")
def backend() -> Iterator[TorchBackend]:
    threads = torch.get_num_threads()
    yield TorchBackend("float32", threads=1)
    torch.set_num_threads(threads)


def run_of(backend: TorchBackend, doses: tuple[float, ...]) -> Run:
    return Run(
        networks=Networks(backend),
        patterns=6,
        doses=doses,
        seed=0,
        sizes=(64,),
        scans=1,
        scan_doses=doses,
        scan_shape=(4, 8),
        on_progress=lambda share, what: None,
    )


# ---- fair rivals -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", CENTER_METHODS, ids=lambda m: m.name)
def test_a_center_method_finds_an_easy_center(method, counts) -> None:
    found = np.array([method.run(counts, RADIUS, *setting) for setting in method.settings])
    best = np.hypot(*(found - CENTER).T).min()
    # The plain center of mass sees the frame cut the rings off-center: it is right only near it.
    assert best < (1.5 if method.name == "CoM" else 0.05)


@pytest.mark.parametrize("method", CENTER_METHODS, ids=lambda m: m.name)
def test_a_center_method_follows_a_shift_of_a_beam_in_vacuum(method) -> None:
    """No constant offset (half a pixel is the classical one), no mixed-up axes."""
    optics = Optics(1.0, 2e5, 100.0, RADIUS, 0.6)
    for center in ((30.25, 70.5), (52.0, 47.0), (47.5, 55.5)):
        frame = render([Pattern("vacuum", center, disks=direct_disk(optics))], SHAPE)[0].numpy()
        found = [method.run(1e8 * frame.astype(np.float64), RADIUS, *s) for s in method.settings]
        assert np.hypot(*(np.array(found) - center).T).min() < 0.01


@pytest.mark.parametrize("method", CENTER_METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("frame", [np.zeros(SHAPE), np.eye(*SHAPE), np.ones(SHAPE)])
def test_a_center_method_answers_within_the_frame_whatever_it_sees(method, frame) -> None:
    for setting in method.settings:
        cy, cx = method.run(frame, RADIUS, *setting)
        assert 0 <= cy <= SHAPE[0] - 1
        assert 0 <= cx <= SHAPE[1] - 1


@pytest.mark.parametrize("ratio_theta", [(1.0, 0.0), (1.03, 0.4), (1.08, 2.5)])
@pytest.mark.parametrize(
    "method", [m for m in ELLIPSE_METHODS if m.installed], ids=lambda m: m.name
)
def test_an_ellipse_fit_reads_a_drawn_distortion(method, ratio_theta) -> None:
    image = 1e6 * drawn(ellipticity=ratio_theta)
    truth = np.array(Ellipticity(*ratio_theta).vector)
    found = [method.run(image, np.ones(SHAPE), CENTER, RADIUS, *s) for s in method.settings]
    assert min(np.hypot(*(f - truth)) for f in found) < 0.002


@pytest.mark.parametrize(
    "method", [m for m in ELLIPSE_METHODS if m.installed], ids=lambda m: m.name
)
def test_an_ellipse_fit_of_nothing_is_a_number(method) -> None:
    whole, dead = np.ones(SHAPE), np.zeros(SHAPE)
    filled = 2.0 * max(SHAPE)  # a beam with nothing outside of it
    for image, weights, radius in (
        (dead, whole, RADIUS),
        (whole, whole, RADIUS),
        (whole, whole, filled),
        (dead, dead, RADIUS),
    ):
        for setting in method.settings:
            found = method.run(image, weights, CENTER, radius, *setting)
            assert np.isfinite(found).all()


@pytest.mark.parametrize("method", DENOISE_METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("dose", [1e3, 1e5])
def test_a_denoiser_denoises_and_keeps_the_counts(method, dose) -> None:
    if not method.installed:
        pytest.skip(method.missing)
    clean = dose * drawn()
    noisy = np.random.default_rng(1).poisson(clean).astype(np.float64)
    found = [method.run(noisy, *setting) for setting in method.settings]
    assert min(metrics.squared_error(f, clean) for f in found) < 0.5 * metrics.squared_error(
        noisy, clean
    )
    best = min(found, key=lambda f: metrics.squared_error(f, clean))
    assert best.shape == SHAPE
    assert abs(metrics.counts_error(best, noisy)) < 0.1


def test_filters_may_take_off_what_the_camera_reads_in_the_dark(backend) -> None:
    patterns = held_out_patterns("n", "n", (64, 64), ("cbed", "vacuum"), seed=0)
    camera = Detector(np.ones((64, 64), np.bool_), readout=0.5)
    patterns = replace(patterns, detectors=(camera,) * 2)
    exposure = patterns.expose(30.0)
    dim = exposure.clean < 1e-3
    assert exposure.frames[dim].mean() == pytest.approx(camera.dark, rel=0.05)

    run = run_of(backend, doses=(30.0,))
    errors = _at_dose(run, patterns, exposure, Stopwatch())["Gaussian"]["sqrt"].min(0)
    # The dark level alone would be worth its square root, everywhere.
    assert (errors < 0.2 * camera.dark).all()


def test_a_python_without_py4dstem_is_told_apart(monkeypatch, capfd) -> None:
    fits = [method for method in ELLIPSE_METHODS if method.needs == "py4DSTEM"]
    assert len(fits) == 2
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    assert not any(method.installed for method in fits)
    assert PYTHON_VARIABLE in fits[0].missing
    if find_spec("py4DSTEM") is None:
        monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
        with pytest.raises(EvaluationError, match="could not run py4DSTEM"):
            fits[0].run(1e5 * drawn(), np.ones(SHAPE), CENTER, RADIUS, 0)
        said = capfd.readouterr().err
        assert "py4DSTEM" in said
        assert "Traceback" not in said
        with pytest.raises(EvaluationError, match="could not run py4DSTEM"):
            evaluate(["strain", "ellipse"], quick=True, patterns=1_000_000)


def test_a_python_that_is_not_there_is_told_in_a_sentence(monkeypatch, tmp_path) -> None:
    (fit, _) = (method for method in ELLIPSE_METHODS if method.needs == "py4DSTEM")
    nowhere, folder = tmp_path / "python", tmp_path
    for python in (nowhere, folder):
        monkeypatch.setenv(PYTHON_VARIABLE, str(python))
        with pytest.raises(EvaluationError, match=rf"{python} .*cannot be started: .*\.$"):
            fit.run(1e5 * drawn(), np.ones(SHAPE), CENTER, RADIUS, 0)


def test_components_of_a_scan_hold_its_patterns_and_not_its_noise() -> None:
    rng = np.random.default_rng(0)
    one, two = drawn(), drawn(center=(50.0, 50.0))
    share = rng.uniform(0, 1, (100, 1, 1))
    clean = 1e4 * (share * one + (1 - share) * two)
    noisy = rng.poisson(clean).astype(np.float64)
    rank1, rank2 = principal_components(noisy, (1, 2), np.arange(100))
    error = metrics.squared_root_error(noisy, clean)
    assert metrics.squared_root_error(rank2, clean) < 0.1 * error
    assert metrics.squared_root_error(rank2, clean) < metrics.squared_root_error(rank1, clean)


def test_the_inverse_anscombe_transform_is_unbiased() -> None:
    rng = np.random.default_rng(2)
    for mean in (2.0, 5.0, 50.0, 5000.0):
        transformed = float(anscombe(rng.poisson(mean, 200_000).astype(np.float64)).mean())
        assert float(inverse_anscombe(np.array(transformed))) == pytest.approx(mean, rel=0.01)


# ---- figures -----------------------------------------------------------------------------------


def test_figures_of_merit_on_known_cases() -> None:
    truth = np.full((2, 2), 4.0)
    found = np.array([[9.0, 4.0], [4.0, 4.0]])
    assert metrics.squared_error(found, truth) == 25 / 4
    assert metrics.squared_root_error(found, truth) == 1 / 4
    assert metrics.counts_error(found, truth) == pytest.approx(5 / 16)
    valid = np.array([[False, True], [True, True]])
    assert metrics.squared_error(found, truth, valid) == 0
    assert metrics.squared_root_error(found, truth, valid) == 0
    assert metrics.counts_error(found, truth, valid) == 0

    centers = np.array([[3.0, 4.0], [0.0, 0.5]])
    assert metrics.lengths(centers).tolist() == [5.0, 0.5]
    sigma = np.array([[1.0, 4.5], [1.0, 1.0]])
    assert metrics.within_sigma(centers, sigma) == 0.75
    assert metrics.within_sigma(centers, sigma, 3.0) == 1.0


def test_a_calibrated_sigma_holds_68_percent() -> None:
    rng = np.random.default_rng(0)
    sigma = np.exp(rng.normal(0, 1, (40_000, 2)))
    assert metrics.within_sigma(rng.normal(0, sigma), sigma) == pytest.approx(0.683, abs=0.01)


def test_ellipse_figures_know_the_seam_of_the_angle() -> None:
    def vector(ratio: float, degrees: float) -> Array:
        return np.array(Ellipticity(ratio, np.radians(degrees)).vector)

    assert metrics.ratio_error(vector(1.05, 10), vector(1.05, 80)) == pytest.approx(0)
    assert metrics.ratio_error(vector(1.0506, 10), vector(1.04, 10)) == pytest.approx(1.0192, 1e-3)
    assert metrics.angle_error(vector(1.05, 179), vector(1.05, 2)) == pytest.approx(3)
    assert metrics.angle_error(vector(1.05, 0), vector(1.05, 90)) == pytest.approx(90)


# ---- sets --------------------------------------------------------------------------------------


def test_no_evaluation_material_is_a_training_material() -> None:
    assert set(HELD_OUT) & set(TRAINING) == set()


def test_a_set_is_the_same_for_a_seed_and_another_for_another() -> None:
    def make(seed: int) -> tuple[Array, Array]:
        patterns = held_out_patterns("s", "s", (64, 64), mixed_kinds(8), seed=seed)
        return patterns.centers, patterns.expose(1e3).frames.astype(np.float64)

    one, again, other = make(0), make(0), make(1)
    assert np.array_equal(one[0], again[0])
    assert np.array_equal(one[1], again[1])
    assert not np.array_equal(one[0], other[0])
    assert not np.array_equal(one[1], other[1])


def test_exposures_have_their_dose_and_differ_between_doses() -> None:
    patterns = held_out_patterns("s", "s", (64, 64), mixed_kinds(8), seed=0)
    low, high = patterns.expose(1e3), patterns.expose(1e5)
    assert low.frames.sum((1, 2)) == pytest.approx(1e3, rel=0.2)
    assert high.frames.sum((1, 2)) == pytest.approx(1e5, rel=0.02)
    assert high.clean.sum((1, 2)) == pytest.approx(1e5, rel=1e-3)
    assert not np.array_equal(np.sign(low.frames), np.sign(high.frames))


def test_faulty_cameras_mask_pixels_and_masked_pixels_read_zero() -> None:
    patterns = held_out_patterns("s", "s", (64, 64), mixed_kinds(24), seed=0, faulty=True)
    assert not patterns.masks.all()
    assert (patterns.expose(1e4).frames[~patterns.masks] == 0).all()


@pytest.mark.parametrize("n", [6, 7, 8, 24, 40, 96])
def test_mixed_kinds_hold_every_kind_but_blank(n: int) -> None:
    kinds = mixed_kinds(n)
    assert len(kinds) == n
    assert set(kinds) == {"cbed", "spots", "rings", "grains", "amorphous", "vacuum"}


# ---- report ------------------------------------------------------------------------------------


TABLE = Table(
    name="center.median.128",
    title="Center: median error, px",
    heading="method",
    columns=("10^3 e", "10^4 e"),
    rows=(("CoM", (2.0, 1.0)), ("prenet4d", (0.5, float("nan")))),
    doses=(1e3, 1e4),
)


def test_the_worst_share_of_the_best_rival() -> None:
    rows = (("ours", (1.0, 3.0, None)), ("a", (4.0, 12.0, 1.0)), ("b", (2.0, None, 1.0)))
    table = Table("t", "title", "method", ("x", "y", "z"), rows)
    assert most_of_the_best(table, "ours", ["a", "b"]) == 0.5
    assert most_of_the_best(table, "ours", ["a"]) == 0.25
    assert not Check("nothing to compare", most_of_the_best(table, "ours", []), 1.0).passed


def test_a_report_says_what_passed_and_writes_json(tmp_path) -> None:
    part = Part((TABLE,), (Check("below 1", 0.5, 1.0), Check("below 0.1", 0.5, 0.1)))
    report = Report({"center": part}, missing=("NLM: install x",))
    assert [check.passed for check in report.checks] == [True, False]
    assert not report.passed
    assert report.table("center.median.128").row("CoM") == (2.0, 1.0)
    with pytest.raises(KeyError):
        report.table("nothing")
    with pytest.raises(KeyError):
        TABLE.row("nobody")
    content = json.loads(report.to_json())
    assert content["passed"] is False
    assert content["missing"] == ["NLM: install x"]
    assert content["tables"][0]["rows"] == [["CoM", [2.0, 1.0]], ["prenet4d", [0.5, None]]]
    (picture,) = report.plots(tmp_path / "plots")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_figure_that_is_not_a_number_meets_no_goal() -> None:
    assert not Check("anything", float("nan"), 1.0).passed
    # One that is not a number stays in sight, in whichever column it stands.
    for figures in ((0.5, np.nan), (np.nan, 0.5)):
        assert np.isnan(largest(figures))
        table = Table("t", "title", "method", ("x", "y"), (("ours", figures), ("a", (4.0, 4.0))))
        assert np.isnan(most_of_the_best(table, "ours", ["a"]))
    assert largest((0.5, None, 0.2)) == 0.5
    assert np.isnan(largest((None,)))


def test_a_rival_whose_figure_is_not_a_number_is_not_the_best() -> None:
    rows = (("ours", (1.0, 1.0)), ("a", (np.nan, 2.0)), ("b", (4.0, np.nan)))
    table = Table("t", "title", "method", ("x", "y"), rows)
    assert most_of_the_best(table, "ours", ["a", "b"]) == 0.5
    assert most_of_the_best(table, "ours", ["b", "a"]) == 0.5
    assert np.isnan(most_of_the_best(replace(table, columns=("x",), rows=rows[:1]), "ours", []))


def test_tables_over_something_else_than_dose_are_not_plotted(tmp_path) -> None:
    report = Report({"center": Part((replace(TABLE, doses=()),))})
    assert report.plots(tmp_path) == []


def test_a_plot_leaves_out_what_is_not_known(tmp_path) -> None:
    empty = replace(TABLE, name="empty", rows=(("CoM", (None, None)), ("prenet4d", (None, None))))
    several = replace(TABLE, rows=tuple((f"prenet4d, {i}", (1.0, 0.5)) for i in range(3)))
    paths = Report({"center": Part((empty, several))}).plots(tmp_path)
    assert [path.name for path in paths] == ["center.median.128.png"]


def test_no_writing_is_cut_off_at_a_pictures_edge(tmp_path) -> None:
    long = replace(TABLE, title="Center, frames of many kinds, near zone axes: " + 9 * "longer, ")
    (plot,) = Report({"center": Part((long,))}).plots(tmp_path)
    frame = np.ones((64, 64), np.float32)
    title = "measured.a_file_with_a_name_that_says_all: measured, 10^4 e"
    draw_denoised([Denoised(title, frame, frame, frame)], tmp_path / "denoised.png")
    for path in (plot, tmp_path / "denoised.png"):
        page = imread(path)[..., :3]
        assert all((edge == 1).all() for edge in (page[0], page[-1], page[:, 0], page[:, -1]))


# ---- end to end --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("patterns", "why"),
    [
        (np.ones((2, 8, 200)), r"16 × 16 pixels at least; those of speck have 8 × 200\."),
        (np.ones((2, 32, 32), complex), r"speck is complex128 \(2, 32, 32\)\."),
    ],
)
def test_measured_patterns_that_cannot_serve_are_refused_by_name(backend, patterns, why) -> None:
    with pytest.raises(SimulationError, match=why):
        evaluate(["tracking", "center"], data={"speck": patterns}, backend=backend)


def figures(report: Report) -> list[tuple[str, object]]:
    """Everything but times."""
    return [(table.name, table.rows) for table in report.tables() if "time" not in table.name]


def test_a_tiny_evaluation_runs_and_repeats_by_its_seed(backend, tmp_path) -> None:
    told: list[float] = []

    def run(seed: int, *what: Subject) -> Report:
        return evaluate(
            what,
            quick=True,
            patterns=6,
            seed=seed,
            backend=backend,
            on_progress=lambda share, what: told.append(share),
        )

    one = run(0, "denoise", "center")
    assert told == sorted(told)
    assert told[-1] == 1.0
    again, other = run(0, "center"), run(1, "center")
    of_centers = [(name, rows) for name, rows in figures(one) if name.startswith("center")]
    assert of_centers == figures(again)
    assert of_centers != figures(other)

    assert set(one.parts) == {"denoise", "center"}
    for name in ("denoise.linear.128", "denoise.sqrt.128", "center.median.128", "center.mean.128"):
        table = one.table(name)
        assert table.columns == ("10^3 e", "10^4 e")
        assert all(value is not None and value > 0 for value in table.row("prenet4d"))
    for name in ("128", "faulty", "difficult", "wide", "speckle", "multislice"):
        shares = one.table(f"center.wrong.{name}")
        assert all(0 <= value <= 100 for _, values in shares.rows for value in values)
        labels = [label for label, _ in shares.rows]
        for rest in ("mean", "rms"):
            table = one.table(f"center.right.{rest}.{name}")
            assert [label for label, _ in table.rows] == [*labels, BOUND]
        compared = one.table(f"center.right.same.{name}").rows
        assert [label for label, _ in compared] == [method.name for method in CENTER_METHODS]
        assert one.table(f"center.warned.{name}").rows[0][1] == shares.row("prenet4d")
        bound = one.table(f"center.median.{name}").row(BOUND)
        assert 0 < bound[1] < bound[0]
    for method in (*CENTER_METHODS, *(m for m in DENOISE_METHODS if m.installed)):
        assert any(label == method.name for label, _ in one.table("center.time").rows) or any(
            label == method.name for label, _ in one.table("denoise.time").rows
        )
        assert one.sources[method.name]
    assert one.table("denoise.scan.sqrt.descan").row(PCA)[0] > 0
    assert len(one.table("center.radius.128").columns) == 4
    written = one.plots(tmp_path)
    assert tmp_path / "denoised.png" in written
    assert all(path.stat().st_size > 1000 for path in written)
    for method in DENOISE_METHODS:
        assert method.installed != any(method.name in missing for missing in one.missing)
    assert json.loads(one.to_json())["about"]["seed"] == 0
    sets = [table for table in one.parts["denoise"].tables if ".linear." in table.name]
    sets = [table for table in sets if ".scan." not in table.name]
    # Denoising: 2 measures of each set against filters and input, and of a moving scan against
    # PCA;
    # 2 about what it invents. Centers: mean, share of the best, bound, sigmas.
    assert len(one.checks) == 2 * 2 * len(sets) + 2 + 2 + 4
    for share in one.table("center.usable").rows:
        assert all(value is not None and 0 <= value <= 100 for value in share[1])
    claimed = one.table("center.calibration").row("claimed sigma, median")
    assert list(claimed) == sorted(claimed)


def test_an_invented_peak_is_counted_and_noise_is_not() -> None:
    rng = np.random.default_rng(0)
    truth = np.full((64, 64), 0.2)
    assert invented_peaks(rng.poisson(truth).astype(np.float64), truth) == 0
    found = truth.copy()
    found[20:23, 30:33] += 3.0
    found[45:47, 10:12] += 6.0
    assert invented_peaks(found, truth) == 2


def test_strain_is_found_and_its_noise_falls_with_dose() -> None:
    (crystal,) = strain._crystals("spots", 1, 0)
    known = np.array([[0.0, 0.0], [0.01, -0.005], [-0.02, 0.015]])
    fitted = [strain.fitted_strain(frame, crystal) for frame in crystal.strained(known)]
    assert np.abs(fitted - known).max() < 2e-3
    rng = np.random.default_rng(1)
    strains = rng.uniform(-0.02, 0.02, (12, 2))
    expected = crystal.strained(strains)
    low, high = (
        strain.strain_noise(rng.poisson(dose * expected) * 1.0, strains, crystal)
        for dose in (1e3, 1e6)
    )
    assert high < 0.5 * low


def test_reflections_that_nobody_saw_say_nothing_about_the_lattice() -> None:
    (crystal,) = strain._crystals("spots", 1, 0)
    frame = 1e6 * crystal.strained(np.array([[0.01, -0.01]]))[0]
    whole = strain.fitted_strain(frame, crystal)
    middle = crystal.places.mean(0)
    alone = np.argsort(np.linalg.norm(crystal.places - middle, axis=1))[-2:]  # the outermost
    for y, x in np.round(crystal.places[alone]).astype(int):
        frame[max(0, y - 8) : y + 9, x - 8 : x + 9] = 0.0
    assert strain.fitted_strain(frame, crystal) == pytest.approx(whole, abs=2e-3)


@pytest.mark.parametrize("kind", strain._KINDS)
def test_every_crystal_tells_its_strain_where_there_is_no_noise(kind) -> None:
    strains = np.random.default_rng(0).uniform(-0.02, 0.02, (40, 2))
    for crystal in strain._crystals(kind, 2, 0):
        expected = 1e6 * crystal.strained(strains)
        fitted = np.array([strain.fitted_strain(frame, crystal) for frame in expected])
        for true, found in zip(strains.T, fitted.T, strict=True):
            assert np.polyfit(true, found, 1)[0] == pytest.approx(1, abs=0.03)
        assert strain.strain_noise(expected, strains, crystal) < 0.05


def test_a_blur_that_hides_strain_does_not_pass_for_precise() -> None:
    (crystal,) = strain._crystals("spots", 1, 0)
    rng = np.random.default_rng(1)
    strains = rng.uniform(-0.02, 0.02, (12, 2))
    frames = rng.poisson(1e5 * crystal.strained(strains)).astype(np.float64)
    blurred = gaussian_filter(frames, (0, 12, 12))
    scatter = np.std([strain.fitted_strain(frame, crystal) for frame in blurred], axis=0).max()
    assert 100 * scatter < strain.strain_noise(blurred, strains, crystal)
    assert strain.strain_noise(frames, strains, crystal) < 0.5 * strain.strain_noise(
        blurred, strains, crystal
    )


def test_difficult_patterns_and_patterns_without_a_beam_are_drawn() -> None:
    patterns = difficult_patterns("d", "d", (64, 64), 12, seed=0)
    assert len(patterns) == 12
    assert any(d.transmission is not None for d in patterns.detectors)
    assert 0.4 < np.abs(patterns.centers / 63 - 0.5).max() < 0.7
    empty = patterns_without_beam((64, 64), 5, seed=0)
    assert empty.expose(1e3).frames.sum((1, 2)) == pytest.approx(1e3, rel=0.3)


def test_wide_beams_fill_much_of_the_frame_where_their_centers_say() -> None:
    patterns = wide_patterns("w", "w", (96, 128), 24, seed=0)
    assert 0.2 * 96 <= patterns.radii.min() < patterns.radii.max() <= 0.48 * 96
    y, x = np.mgrid[:96, :128]
    for shown, center, radius in zip(
        patterns.expected, patterns.centers, patterns.radii, strict=True
    ):
        away = np.hypot(y - center[0], x - center[1])
        # an ellipse of the largest ratio, 1.12, is at most 6 % off a circle
        outside = away > 1.07 * radius
        if outside.sum() > 500:
            assert shown[away < 0.93 * radius].mean() > 2 * shown[outside].mean()


def test_computed_patterns_lie_at_their_centers() -> None:
    patterns = computed_patterns("c", "c", (96, 96), 8, seed=0)
    frames = patterns.expose(1e6).frames.astype(np.float64)
    # The direct beam of a thin crystal is its strongest disk; thicker ones may be outshone.
    found = [disk_correlation_center(f, r) for f, r in zip(frames, patterns.radii, strict=True)]
    assert np.sort(metrics.lengths(patterns.deviations(np.array(found))))[2] < 1.0


def test_no_estimate_beats_the_bound_and_a_good_one_comes_near() -> None:
    patterns = held_out_patterns("v", "v", (64, 64), ("vacuum",) * 4, seed=0)
    dose = 1e4
    covariance = center_covariance(patterns, dose)
    assert center_covariance(patterns, 4 * dose) == pytest.approx(covariance / 4)
    # One who knows the pattern and its slopes: linear least squares, weighted by the variance.
    rng = np.random.default_rng(0)
    for i in range(len(patterns)):
        here = dose * patterns.expected[i].astype(np.float64)
        up, down, left, right = dose * patterns.moved[i].astype(np.float64)
        slopes = np.stack([down - up, right - left]).reshape(2, -1) / 0.2
        weights = slopes / here.ravel()
        counts = rng.poisson(here, (400, *here.shape)).reshape(400, -1)
        found = np.linalg.solve(weights @ slopes.T, weights @ (counts - here.ravel()).T)
        ratio = np.trace(np.cov(found)) / np.trace(covariance[i])
        assert 0.8 < ratio < 1.25
    with pytest.raises(ValueError, match="how its patterns move"):
        center_covariance(replace(patterns, moved=None), dose)


def test_single_electrons_that_stand_out_of_readout_noise_tell_as_much_as_without_it() -> None:
    patterns = held_out_patterns("v", "v", (64, 64), ("vacuum", "cbed"), seed=0)
    whole = np.ones((64, 64), np.bool_)
    noises = (0.0, 0.1, 0.4)
    silent, quiet, loud = (
        center_covariance(replace(patterns, detectors=(Detector(whole, readout=r),) * 2), 200.0)
        for r in noises
    )
    assert quiet == pytest.approx(silent, rel=0.01)
    assert (np.trace(loud, axis1=1, axis2=2) > 1.05 * np.trace(silent, axis1=1, axis2=2)).all()
    # Where electrons are many, what counts is the variance.
    many = np.array([30.0, 3000.0])
    assert pixel_information(many, 0.4, np.inf) == pytest.approx(1 / (many + 0.16), rel=1e-3)


@pytest.mark.parametrize("saturation", [1.0, 4.0, 64.0])
def test_a_reading_that_is_cut_off_tells_less_than_the_electrons_and_no_less_than_its_mean(
    saturation: float,
) -> None:
    for mean in (0.1, 3.0, 50.0, 64.0, 70.0):
        chance = poisson.pmf(np.arange(400), mean)
        reading = np.minimum(np.arange(400), saturation)
        slope = chance @ (reading * (np.arange(400) / mean - 1))
        spread = chance @ (reading - chance @ reading) ** 2
        least = slope**2 / max(spread, 1e-15)  # what an estimate by the mean reading makes of it
        (told,) = pixel_information(np.array([mean]), 0.0, saturation)
        assert least * (1 - 1e-6) - 1e-9 <= told <= 1 / mean * (1 + 1e-9)


def test_where_every_pixel_is_saturated_nobody_knows_the_center() -> None:
    patterns = held_out_patterns("v", "v", (64, 64), ("vacuum", "vacuum"), seed=0)
    cameras = (Detector(np.ones((64, 64), np.bool_), saturation=1.0), ideal_detector((64, 64)))
    blinded = replace(patterns, detectors=cameras)
    assert not np.isfinite(center_covariance(blinded, 1e9)[0]).any()
    errors = bounding_errors(blinded, 1e9).reshape(2, -1)
    assert np.isposinf(errors[0]).all()
    assert errors[1].max() < 0.01


def test_a_paired_difference_knows_its_own_uncertainty() -> None:
    rng = np.random.default_rng(0)
    shared = rng.normal(1.0, 0.5, 400)
    one = [shared + 0.1 + rng.normal(0, 0.1, 400)]
    difference, error = paired_difference(one, [shared], (20, 20))
    assert difference == pytest.approx(0.1, abs=4 * error)
    assert error == pytest.approx(0.1 / 20, rel=0.5)


def test_scans_are_evaluated(backend) -> None:
    run = run_of(backend, doses=(1e4,))
    tracking = evaluate_tracking(run)
    goals = [check.goal for check in tracking.checks]
    assert sum(goal.startswith("Tracked center, drift") for goal in goals) == 2
    names = [table.name for table in tracking.tables]
    for drift in ("plane", "drift", "dynamical"):
        assert f"tracking.mean.{drift}" in names
        assert f"tracking.wrong.{drift}" in names
    for table in tracking.tables:
        if table.doses:  # the first row of ours stands out in its plot
            assert next(row for row, _ in table.rows if row.startswith("prenet4d")) == TRACKED
    ellipses = evaluate_ellipses(run)
    table = ellipses.tables[0]
    assert table.name == "ellipse.ratio"
    assert ellipses.tables[2].name == "ellipse.ring"
    assert [label for label, _ in table.rows] == [
        *(method.name for method in ELLIPSE_METHODS if method.installed),
        "prenet4d",
        "prenet4d, its own centers",
    ]
    # The best classical fit must be right, or the comparison says nothing.
    rival = min(v for label, (v,) in table.rows if v is not None and "prenet4d" not in label)
    assert rival < 2.0


def test_measured_patterns_make_a_set_with_shifts_known_up_to_a_constant(backend) -> None:
    measured = np.stack([1e6 * drawn(), 1e6 * drawn(center=(50.0, 50.0))])
    patterns = measured_patterns(measured.astype(np.float32), 30, seed=0)
    assert patterns.groups is not None
    frames = patterns.expose(1e6).frames.astype(np.float64)
    found = [disk_correlation_center(frame, RADIUS) for frame in frames]
    # The second pattern lies 12 px from where a middle was assumed; only its constant is wrong.
    assert np.median(metrics.lengths(patterns.deviations(np.array(found)))) < 0.05

    # A file may be called as one of the other sets.
    data = {"128": measured}
    report = evaluate(("center",), quick=True, patterns=6, data=data, backend=backend)
    assert report.table("center.median.measured.128").row("disk correlation")[1] < 0.5
    names = [table.name for table in report.tables()]
    assert len(set(names)) == len(names)
    # Nobody is missed that these parts do not compare with.
    assert report.missing == ()
    assert set(report.sources) == {method.name for method in CENTER_METHODS}


def test_a_plane_fit_takes_out_noise_and_outliers() -> None:
    rng = np.random.default_rng(0)
    row, column = np.divmod(np.arange(600), 30)
    truth = np.stack([50 + 0.1 * row - 0.05 * column, 60 + 0.02 * column], 1)
    noisy = truth + rng.normal(0, 0.2, truth.shape)
    noisy[::25] += 30
    assert metrics.lengths(plane_fit(noisy, (20, 30)) - truth).max() < 0.1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"what": ("taste",)}, ValueError, "taste"),
        ({"what": ()}, ValueError, "strain; nothing was asked for."),
        ({"patterns": 3}, ValueError, "at least 6"),
        ({"data": {"line": np.zeros(5)}}, SimulationError, "(k, h, w)"),
        ({"data": {"void": np.zeros((3, 0, 0))}}, SimulationError, "(k, h, w)"),
        ({"data": {"dark": np.zeros((2, 32, 32))}}, SimulationError, "positive"),
    ],
)
def test_what_cannot_be_evaluated_is_said(arguments, error, words, backend) -> None:
    with pytest.raises(error, match=re.escape(words)):
        evaluate(**{"what": ("center",), "quick": True, "backend": backend, **arguments})
