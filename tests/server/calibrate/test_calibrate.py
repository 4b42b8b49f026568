"""A calibration from stored and from live patterns, and the picture that goes with it."""

import re
import sys

import h5py
import numpy as np
import pytest
from scipy.ndimage import map_coordinates

from prenet4d_client import ControlClient
from prenet4d_engines.backends import select
from prenet4d_engines.calibration import Calibration
from prenet4d_engines.calibration_file import read_calibration
from prenet4d_engines.errors import CalibrationError
from prenet4d_engines.geometry import Ellipticity
from prenet4d_server.calibrate.find import calibrate_file, calibrate_service
from prenet4d_server.calibrate.report import details, draw, headline, undistorted
from prenet4d_server.calibrate.unrolled import ring_radii
from prenet4d_server.cli import run
from prenet4d_server.files import open_scan
from prenet4d_server.service import Service

from ..live import TIMEOUT_S, listening, sender, settings, until
from .rings import SCAN, SHAPE, TRUE, rings


@pytest.fixture(scope="module")
def backend():
    return select("torch", precision="float32", threads=1)


@pytest.fixture(scope="module")
def patterns():
    return rings()


@pytest.fixture(scope="module")
def found(backend, patterns, tmp_path_factory):
    file = tmp_path_factory.mktemp("scan") / "gold.npy"
    np.save(file, patterns)
    with open_scan(file) as scan:
        return calibrate_file(scan, descan=True, backend=backend)


@pytest.fixture(scope="module")
def service():
    corrector = {
        "backend": "torch", "precision": "float32", "threads": 1,
        "ellipse_every": 16, "patterns_to_lock": 32,
    }  # fmt: skip
    with Service(settings(corrector=corrector)) as running:
        yield running


@pytest.fixture
def prenet4d(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["prenet4d", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        status = run()
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def off(calibration):
    """Distance of the ellipticity from the true one, in its vector form."""
    return np.hypot(*np.subtract(calibration.ellipticity.vector, TRUE.vector))


class TestFromAFile:
    def test_the_distortion_is_found_with_its_sigma(self, found):
        calibration = found.calibration
        assert off(calibration) < 0.015
        assert 0 < calibration.ratio_sigma < 0.01
        assert calibration.patterns == SCAN[0] * SCAN[1]
        assert calibration.frame_shape == SHAPE
        assert "gold.npy" in calibration.how

    def test_so_is_the_descan(self, found):
        fit = found.calibration.descan
        assert fit.coefficients_y[1] == pytest.approx(2 * 5 / 6 / 2, abs=0.2)
        assert fit.coefficients_x[2] == pytest.approx(-1.5 * 7 / 8 / 2, abs=0.2)

    def test_some_of_the_patterns_are_enough(self, backend, patterns, tmp_path):
        with h5py.File(tmp_path / "gold.h5", "w") as file:
            file["data"] = patterns.reshape(-1, *SHAPE)
        told = []
        with open_scan(tmp_path / "gold.h5") as scan:
            few = calibrate_file(
                scan, most=20, backend=backend, tell=lambda share, _: told.append(share)
            )
        assert few.calibration.patterns == 20
        assert off(few.calibration) < 0.03
        assert few.calibration.descan is None
        assert told[-1] == 1

    def test_some_are_never_the_diagonal_of_the_scan(self, backend, tmp_path):
        np.save(tmp_path / "gold.npy", rings((26, 26)))
        with open_scan(tmp_path / "gold.npy") as scan:
            fit = calibrate_file(scan, most=26, descan=True, backend=backend).calibration.descan
        assert fit.coefficients_y[1] == pytest.approx(1, abs=0.2)
        assert fit.coefficients_x[2] == pytest.approx(-0.75, abs=0.2)

    def test_patterns_of_few_electrons_or_of_no_counts_are_remarked_on(
        self, backend, patterns, tmp_path
    ):
        shares = patterns / patterns.sum((-2, -1), keepdims=True, dtype=float)
        np.save(tmp_path / "shares.npy", 50 * shares)
        with open_scan(tmp_path / "shares.npy") as scan:
            assert (
                "in a pattern of shares.npy is 50 (the median)"
                in calibrate_file(scan, backend=backend).remark
            )

    @pytest.mark.parametrize(
        ("frames", "options", "why"),
        [
            (np.zeros((4, 32, 32), np.uint16), {}, "holds no counts"),
            (np.full((4, 32, 32), np.nan, np.float32), {}, "holds no counts"),
            (np.full((4, 32, 32), 2, np.uint16), {}, "shows a direct beam"),
            (rings((1, 3)), {"descan": True}, "of the 3 patterns .* too few show"),
            (rings((1, 3)).reshape(-1, *SHAPE), {"descan": True}, r"say it \(--scan 64x64\)"),
        ],
    )
    def test_patterns_that_do_not_say_are_refused(self, backend, tmp_path, frames, options, why):
        np.save(tmp_path / "frames.npy", frames)
        with (
            open_scan(tmp_path / "frames.npy") as scan,
            pytest.raises(CalibrationError, match=why),
        ):
            calibrate_file(scan, backend=backend, **options)


class TestValuesThatAreNoCounts:
    """Dark frames taken off, dead pixels, offsets: what cameras and programs leave in files."""

    def calibrated(self, frames, backend, tmp_path, mask=None):
        with h5py.File(tmp_path / "gold.h5", "w") as file:
            file["data"] = frames
            if mask is not None:
                file["entry/instrument/detector/pixel_mask"] = mask
        with open_scan(tmp_path / "gold.h5") as scan:
            return calibrate_file(scan, backend=backend)

    def test_counts_are_not_remarked_on(self, found):
        assert not found.remark

    def test_what_a_dark_frame_leaves_counts_as_zero_and_is_told(self, backend, patterns, tmp_path):
        frames = patterns[0] + np.random.default_rng(0).normal(0, 2, patterns[0].shape)
        frames[:, 3, 4] = np.nan
        found = self.calibrated(frames, backend, tmp_path)
        assert off(found.calibration) < 0.02
        assert f"{np.count_nonzero(~(frames >= 0)):,} of {frames.size:,} values" in found.remark
        assert "A service refuses such frames." in found.remark

    def test_a_detectors_bad_pixels_are_not_remarked_on(self, backend, patterns, tmp_path):
        frames, mask = patterns[0].astype(np.int32), np.zeros(SHAPE, np.uint32)
        frames[:, 3, 4], mask[3, 4] = -1, 1
        assert not self.calibrated(frames, backend, tmp_path, mask).remark

    @pytest.mark.parametrize("offset", [30, 5000])
    def test_an_offset_costs_nothing(self, backend, patterns, tmp_path, offset):
        raw = self.calibrated(patterns[0].astype(np.int32), backend, tmp_path)
        lower = self.calibrated(patterns[0].astype(np.int32) - offset, backend, tmp_path)
        assert np.median(patterns[0]) < 30
        assert lower.calibration.ratio == pytest.approx(raw.calibration.ratio, abs=1e-3)
        assert lower.calibration.ratio_sigma == pytest.approx(raw.calibration.ratio_sigma, rel=0.1)


def test_the_detector_that_a_file_names_is_kept(backend, patterns, tmp_path):
    with h5py.File(tmp_path / "gold_master.h5", "w") as file:
        file["entry/data/data_000001"] = patterns[0]
        file["entry/instrument/detector/description"] = b"Dectris ARINA Si"
    with open_scan(tmp_path / "gold_master.h5") as scan:
        calibration = calibrate_file(scan, backend=backend).calibration
    assert calibration.detector == "Dectris ARINA Si"


@pytest.mark.parametrize("corrected", [True, False])
def test_who_calibrates_from_corrected_patterns_is_warned(prenet4d, tmp_path, corrected):
    file = tmp_path / "scan.h5"
    with h5py.File(file, "w") as made:
        made["data"] = np.zeros((4, 32, 32), np.uint16)
        if corrected:
            made.create_group("prenet4d").attrs["format"] = "prenet4d recording"
    status, _, said = prenet4d("calibrate", file, "-o", tmp_path / "lens.toml")
    assert status == 1
    assert "holds no counts" in said
    assert ("Calibrate from the raw frames" in said) == corrected


class TestFromAService:
    def test_one_that_has_found_none_is_told_how_far_it_is(self, service):
        with (
            ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client,
            pytest.raises(CalibrationError, match=r"no acquisition has begun, with 0 of 32"),
        ):
            calibrate_service(client, timeout_s=0.01)

    def test_it_is_waited_for_and_taken(self, service, patterns, tmp_path, prenet4d):
        with ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client:
            with sender(service) as source:
                source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=SCAN)
                source.send(patterns.reshape(-1, *SHAPE))
                source.end()
            found = calibrate_service(client, timeout_s=60, descan=True)
            assert off(found.calibration) < 0.03
            assert found.calibration.descan.drift > 1
            assert found.mean.shape == SHAPE
            until(lambda: client.status()["acquisition"] is None)
        file = tmp_path / "live.json"
        status, said, error = prenet4d(
            "calibrate", service.endpoints["control"], "-o", file, "--report", tmp_path / "r.png"
        )
        assert status == 0, error
        assert "The calibration is in" in said
        assert off(read_calibration(file)) < 0.03
        assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")

    def test_a_calibration_kept_with_the_descan_can_be_used_again(
        self, service, tmp_path, prenet4d
    ):
        file, control = tmp_path / "today.toml", service.endpoints["control"]
        for arguments, says in (
            (("save", file, "--descan"), "The calibration is in"),
            (("load", file), "The service uses"),
        ):
            status, said, error = prenet4d("calibration", *arguments, "--control", control)
            assert status == 0, error
            assert says in said
        assert read_calibration(file).descan is not None

    def test_one_that_was_frozen_before_it_found_any_has_none_and_one_that_was_given_has(
        self, service, patterns
    ):
        with ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client:
            with sender(service) as source:
                source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=SCAN)
                until(lambda: client.status()["acquisition"] is not None)
                client.recalibrate()
                source.send(patterns[0])
                until(lambda: client.status()["patterns_averaged"] == SCAN[1])
                client.freeze()
                with pytest.raises(CalibrationError, match=r"was frozen before .* Unfreeze it"):
                    calibrate_service(client, timeout_s=10)
                source.end()
            until(lambda: client.status()["acquisition"] is None)
            given = Calibration(
                ratio=1.0, theta=0.0, reference_center=(47.5, 47.5), frame_shape=SHAPE
            )
            client.load_calibration(given.model_dump(mode="json"))
            assert calibrate_service(client, timeout_s=10).calibration == given
            client.unfreeze()


class TestStartingFromOne:
    """The service begins on a calibration that was made before."""

    CENTER = (44.0, 50.5)

    def first(self, found, patterns, **corrector):
        """The first batch's telemetry, the maps at the end, and all that was told."""
        calibration = found.calibration.model_copy(update={"reference_center": self.CENTER})
        options = {"backend": "torch", "precision": "float32", "threads": 1} | corrector
        with (
            Service(settings(corrector=options, batch={"size": 16}), calibration) as service,
            listening(service) as listener,
            sender(service) as source,
        ):
            source.start(frame_shape=SHAPE, dtype="uint16", scan_shape=SCAN)
            source.send(patterns.reshape(-1, *SHAPE))
            source.end()
            listener.wait_for("acquisition_end")
            listener.wait_for_event("acquisition_ended")
            with ControlClient(service.endpoints["control"], timeout=TIMEOUT_S) as client:
                return listener.of("telemetry")[0], client.maps(), listener

    def test_it_is_locked_at_once_and_centers_where_the_calibration_says(self, found, patterns):
        telemetry, (maps, arrays), listener = self.first(found, patterns)
        assert telemetry.state == "locked"
        assert telemetry.ellipticity.ratio == pytest.approx(found.calibration.ratio)
        assert telemetry.reference_center == self.CENTER
        assert maps.frames == SCAN[0] * SCAN[1]
        values = dict(zip(maps.names, arrays, strict=True))
        np.testing.assert_allclose(values["sum"], patterns.sum((2, 3)), rtol=0.05)
        np.testing.assert_allclose(values["com_y"], 0, atol=1.0)
        drift = 47.5 + 2 * np.arange(SCAN[0]) / SCAN[0] - 1
        np.testing.assert_allclose(values["center_y"].mean(axis=1), drift, atol=0.25)
        assert maps.detectors.bright_field_radius == pytest.approx(1.1 * 3.5 + 1, abs=0.6)
        assert maps.descan.coefficients_y[1] == pytest.approx(5 / 6, abs=0.2)
        told = listener.wait_for_event("descan")
        assert "px over the scan" in told.message
        assert told.details["drift"] > 1

    def test_the_configurations_reference_center_stands(self, found, patterns):
        telemetry, _, _ = self.first(found, patterns, reference_center=(47.0, 48.0))
        assert telemetry.state == "locked"
        assert telemetry.reference_center == (47.0, 48.0)


class TestTheReport:
    def test_taking_the_ellipse_out_makes_circles(self, found):
        """On a ring's flank, intensity tells at once where it is not followed."""
        after = undistorted(found.mean, found.calibration)

        def unevenness(image, distortion):
            y, x = distortion.ring(found.calibration.reference_center, 27.5)
            on = map_coordinates(image, [y, x], order=1)
            return on.std() / on.mean()

        assert unevenness(found.mean, found.calibration.ellipticity) < 0.1
        assert unevenness(after, Ellipticity()) < 0.1
        assert unevenness(found.mean, Ellipticity()) > 0.2

    def test_the_numbers_are_told_with_their_sigmas(self, found):
        calibration = found.calibration
        assert f"ratio {calibration.ratio:.5f} ± {calibration.ratio_sigma:.5f}" in headline(
            calibration
        )
        told = " ".join(details(calibration))
        assert "48 patterns of 96 × 96 pixels" in told
        assert "Descan: the center drifts by" in told
        assert details(calibration.model_copy(update={"patterns": 1}))[0].startswith("1 pattern of")
        bare = calibration.model_copy(
            update={"ratio_sigma": None, "theta_sigma": None, "descan": None}
        )
        assert "±" not in headline(bare)
        assert "Descan" not in " ".join(details(bare))

    @pytest.mark.parametrize("name", ["report.png", "report.svg", "report.PDF"])
    def test_it_is_a_picture(self, found, tmp_path, name):
        draw(found, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 10_000

    def test_every_axis_says_its_unit(self, found, tmp_path):
        draw(found, tmp_path / "report.svg")
        texts = re.findall("<!-- (.*?) -->", (tmp_path / "report.svg").read_text())
        assert [texts.count(label) for label in ("x [px]", "y [px]", "radius [px]")] == [2, 2, 2]

    def test_patterns_without_rings_are_drawn_too(self, found, tmp_path):
        from dataclasses import replace

        flat = np.full(SHAPE, 3.0, np.float32)
        flat[:10] = np.nan
        draw(replace(found, mean=flat), tmp_path / "flat.png")
        flat[40:56, 40:56] = np.nan  # no pixel at a whole radius
        draw(replace(found, mean=flat), tmp_path / "hollow.png")
        corner = found.calibration.model_copy(update={"reference_center": (0.0, 1.0)})
        draw(replace(found, calibration=corner), tmp_path / "corner.png")

    def test_rings_are_found_on_a_background_below_zero(self):
        radius = np.arange(0, 60, 0.5)
        beam, ring = 1000 * (radius < 5), 50 * np.exp(-((radius - 30) ** 2) / 8)
        assert ring_radii(beam + ring - 2) == pytest.approx([30], abs=1)


class TestTheCommand:
    def test_a_file_becomes_a_calibration_and_a_picture(self, prenet4d, patterns, tmp_path):
        np.save(tmp_path / "gold.npy", patterns[:2])
        out, report = tmp_path / "gold 1.toml", tmp_path / "gold.png"
        status, said, error = prenet4d(
            "calibrate", tmp_path / "gold.npy", "-o", out, "--report", report, "--patterns", "16"
        )
        assert status == 0, error
        assert "Ellipticity: ratio 1.0" in said
        assert f"prenet4d serve --calibration '{out}'" in said
        assert read_calibration(out).patterns == 16
        assert report.exists()
        status, _, error = prenet4d("calibrate", tmp_path / "gold.npy", "-o", out)
        assert status == 1
        assert "already" in error

    def test_a_picture_that_cannot_be_written_does_not_cost_the_calibration(
        self, prenet4d, patterns, tmp_path
    ):
        np.save(tmp_path / "gold.npy", patterns[:2])
        out, report = tmp_path / "gold.toml", tmp_path / "gold.png"
        report.symlink_to("/dev/full")
        status, said, _ = prenet4d(
            *("calibrate", tmp_path / "gold.npy", "-o", out, "--patterns", "16"),
            *("--report", report, "--overwrite"),
        )
        assert status == 1
        assert "The calibration is in" in said
        assert read_calibration(out).patterns == 16

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (["nowhere.npy", "-o", "x.toml"], "There is no file nowhere.npy"),
            (["nowhere.npy", "-o", "x.h5"], "'x.h5' is neither"),
            (["tcp://127.0.0.1:9", "-o", "x.toml", "--timeout", "0.2"], "No service answered"),
        ],
    )
    def test_what_cannot_be_done_is_told_in_a_sentence(
        self, prenet4d, tmp_path, monkeypatch, arguments, why
    ):
        monkeypatch.chdir(tmp_path)
        status, _, error = prenet4d("calibrate", *arguments)
        assert status == 1
        assert why in error
        assert len(error.splitlines()) == 1
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("content", ["ratio = 1.0", "[source]\nkind = 'native'", "ratio = "])
    def test_the_service_does_not_start_on_what_is_no_calibration(
        self, prenet4d, tmp_path, content
    ):
        (tmp_path / "today.toml").write_text(content)
        status, _, error = prenet4d("serve", "--calibration", tmp_path / "today.toml")
        assert status == 1
        assert "today.toml" in error
        assert len(error.splitlines()) == 1
