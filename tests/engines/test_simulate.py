"""The simulator's truth is exact, its counts are Poisson, and a seed fixes everything."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from prenet4d_engines import simulate
from prenet4d_engines.errors import SimulationError
from prenet4d_engines.simulate import (
    HELD_OUT,
    KINDS,
    TRAINING,
    Detector,
    Drift,
    Optics,
    Pattern,
    distortion,
    draw_detector,
    draw_difficult,
    draw_dose,
    draw_pattern,
    draw_scan,
    expose,
    filled,
    ideal_detector,
    relatives,
    render,
    simulate_scan,
    speckled,
)
from prenet4d_engines.simulate.content import (
    crystal_disks,
    direct_disk,
    grain_disks,
    kikuchi_bands,
    precessed,
    tilt_matrix,
)
from prenet4d_engines.simulate.pattern import (
    EDGE,
    EPSILON,
    FLAT,
    RADIUS,
    ROCK,
    S0,
    SX,
    SY,
    X,
    Y,
)
from prenet4d_engines.simulate.scattering import (
    extinction_distance,
    reflections,
    scattering_factor,
    wavelength,
)

_NO_BLOBS = np.zeros((0, 4))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _moments(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and central second moments in (y, x)."""
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    weight = image.astype(np.float64) / image.sum(dtype=np.float64)
    points = np.stack([y, x]).reshape(2, -1).astype(np.float64)
    mean = points @ weight.ravel()
    away = points - mean[:, None]
    return mean, (away * weight.ravel()) @ away.T


def _vacuum(radius: float, edge: float, center: tuple[float, float], **kwargs: object) -> Pattern:
    optics = Optics(0.5, 200e3, 50.0, radius, edge)
    return replace(Pattern("vacuum", center, disks=direct_disk(optics)), **kwargs)


@pytest.mark.parametrize("radius", [1.5, 4.0, 17.3])
@pytest.mark.parametrize("ellipticity", [(1.0, 0.0), (1.06, 0.4), (1.12, 2.5)])
def test_a_rendered_disk_lies_where_it_says_and_is_as_elliptical_as_it_says(
    radius: float, ellipticity: tuple[float, float]
) -> None:
    rng = np.random.default_rng(1)
    for _ in range(4):
        center = (63.5 + rng.uniform(-8, 8), 60 + rng.uniform(-8, 8))
        image = render([_vacuum(radius, 0.5, center, ellipticity=ellipticity)], (128, 128))[0]
        mean, spread = _moments(image.numpy())
        assert np.abs(mean - center).max() < 0.005
        # a disk of isotropic spread s becomes s D D^T
        matrix = distortion(ellipticity)
        expected = matrix @ matrix.T
        scaled = spread / np.sqrt(np.linalg.det(spread))
        assert np.abs(scaled - expected).max() < 0.006


def test_distortion_follows_the_convention() -> None:
    ratio, theta = 1.1, 0.7
    matrix = distortion((ratio, theta))
    major = np.array([np.sin(theta), np.cos(theta)])  # (y, x): theta from +x toward +y
    np.testing.assert_allclose(matrix @ major, np.sqrt(ratio) * major)
    assert np.linalg.det(matrix) == pytest.approx(1.0)


def test_rings_are_elliptical_too() -> None:
    radial = np.exp(-0.5 * ((np.arange(1200) * 0.25 - 40) / 1.5) ** 2)
    pattern = Pattern("rings", (80.3, 77.9), (1.1, 0.3), radial=radial, radial_share=1.0)
    image = render([pattern], (160, 160))[0].numpy()
    mean, spread = _moments(image)
    assert np.abs(mean - (80.3, 77.9)).max() < 0.01
    matrix = distortion((1.1, 0.3))
    np.testing.assert_allclose(
        spread / np.sqrt(np.linalg.det(spread)), matrix @ matrix.T, atol=2e-3
    )


def test_a_crystal_shows_its_spacings() -> None:
    """Bragg's law: the strongest family of gold lies at 1/2.355 per Å."""
    gold = reflections(HELD_OUT["Au"])
    assert 1 / gold.length[0] == pytest.approx(4.0786 / np.sqrt(3), rel=1e-6)
    odd_even = gold.hkl % 2
    assert (odd_even == odd_even[:, :1]).all(), "fcc: unmixed indices only"


def test_scattering_has_the_published_values() -> None:
    assert wavelength(200e3) == pytest.approx(0.025079, rel=1e-4)
    # extinction distance of Al 111 at 100 kV: 556 Å (Hirsch et al., Electron Microscopy of Thin
    # Crystals, table of extinction distances)
    found = reflections(TRAINING["Al"])
    xi = extinction_distance(found.amplitude[:1], found.volume, 100e3)[0]
    assert xi == pytest.approx(556, rel=0.03)
    factors = scattering_factor("Au", np.linspace(0, 2.5, 50))
    assert (np.diff(factors) < 0).all()


def test_disks_are_bright_where_bragg_law_holds() -> None:
    # On a zone axis the incident beam meets Bragg's law for g at -g/2: in the disk of g that is
    # the side toward the direct beam. (Multislice says the same.)
    optics = Optics(0.5, 200e3, 100.0, 20.0, 0.5)
    disks = crystal_disks(
        np.random.default_rng(0),
        TRAINING["Al"],
        optics,
        np.eye(3),
        thickness=300.0,
        frame_size=200.0,
        rocking=True,
    )
    reflections_only = disks[np.hypot(disks[:, Y], disks[:, X]) > 0]
    assert len(reflections_only) > 4
    inward = -(reflections_only[:, [Y, X]])
    slope = reflections_only[:, [SY, SX]]
    # moving inward brings the excitation error nearer to zero
    assert ((slope * inward).sum(1) * reflections_only[:, S0] < 0).all()


def test_no_reflection_takes_more_from_the_direct_beam_than_there_is() -> None:
    rng, faint = np.random.default_rng(3), 0
    for _ in range(40):
        disks = draw_pattern(rng, (128, 128), kind="cbed").disks
        taken = disks[np.hypot(disks[:, Y], disks[:, X]) == 0, ROCK]
        faint += disks[0, FLAT] < 0.6
        assert taken.min() >= -0.9 * disks[0, FLAT]
        curves = disks[np.hypot(disks[:, Y], disks[:, X]) == 0][1:, [S0, SX, SY]]
        assert len(np.unique(curves, axis=0)) == len(curves)  # each reflection takes once
    assert faint > 5


def test_fringes_finer_than_a_pixel_are_not_seen() -> None:
    disk = np.zeros((1, 10))
    disk[0, [ROCK, RADIUS, EDGE, EPSILON, SX]] = 1.0, 25.0, 0.5, 0.5, 1.03  # a fringe a pixel
    image = render([Pattern("cbed", (32.0, 32.0), (1.0, 0.0), disk)], (65, 65))[0].numpy()
    x = np.arange(4, 18)
    mean = image[32, 32 + x] * ((1.03 * x) ** 2 + 0.5**2)  # without the fringes' envelope
    np.testing.assert_allclose(mean, mean.mean(), rtol=0.1)


def test_spotty_rings_are_as_bright_as_those_of_a_powder() -> None:
    rng = np.random.default_rng(0)
    material = TRAINING["Al"]
    optics = Optics(scale=1.0, volts=2e5, pixels_per_inverse_angstrom=100.0, radius=2.0, edge=0.5)
    found = reflections(material)
    spots = np.concatenate([grain_disks(rng, material, optics, 256.0) for _ in range(300)])
    at = np.hypot(spots[:, Y], spots[:, X]) / 100.0
    rings = np.unique(np.round(found.length, 4))[:4]
    seen = np.array([spots[np.abs(at - ring) < 1e-3, FLAT].sum() for ring in rings])
    power = [
        (found.amplitude**2 * np.exp(-0.6 * found.length**2) / found.length)[
            np.abs(found.length - ring) < 1e-3
        ].sum()
        for ring in rings
    ]
    np.testing.assert_allclose(seen / seen[0], np.array(power) / power[0], rtol=0.25)


def test_bad_pixels_are_filled_from_those_around_them() -> None:
    y, x = np.mgrid[:32, :32]
    frame = 100.0 + x
    valid = np.ones((32, 32), np.bool_)
    valid[10, 12] = valid[20:24] = False
    valid[(y - 8) ** 2 + (x - 24) ** 2 < 36] = False
    broken = np.where(valid, frame, 1e9)
    np.testing.assert_allclose(filled(broken, valid), frame, rtol=0.08)
    assert not filled(broken, np.zeros((32, 32), np.bool_)).any()


def test_kikuchi_bands_move_with_the_crystal_and_leave_the_electrons_alone() -> None:
    optics = Optics(0.5, 200e3, 100.0, 4.0, 0.5)
    straight = kikuchi_bands(TRAINING["Si"], optics, np.eye(3), 128.0)
    assert np.abs(straight[straight[:, 3] < 60, 2]).max() < 1e-6
    tilted = kikuchi_bands(TRAINING["Si"], optics, tilt_matrix(0.3, 0.0), 128.0)
    # The zone axis moves by the tilt: 0.3 degrees are sin(0.3) / lambda in 1/Å.
    moved = np.sin(np.radians(0.3)) / wavelength(200e3) * 100
    assert np.abs(tilted[:, 2]).max() == pytest.approx(moved, rel=0.05)

    radial = np.exp(-np.arange(800) * 0.25 / 30)
    plain = _vacuum(4, 0.5, (60.2, 66.7), radial=radial, radial_share=0.6)
    lined = replace(plain, bands=straight)
    without, with_bands = render([plain, lined], (128, 128)).numpy()
    assert with_bands.sum() == pytest.approx(1.0, abs=1e-4)
    assert (with_bands >= 0).all()
    assert np.abs(with_bands / without - 1).max() > 0.1


def test_the_table_of_crystals_is_broad_and_makes_sense() -> None:
    assert len(TRAINING) + len(HELD_OUT) >= 60
    for material in (*TRAINING.values(), *HELD_OUT.values()):
        places = np.array([site[1:] for site in material.sites])
        apart = places[:, None] - places[None]
        apart -= np.round(apart)
        distance = np.linalg.norm(apart @ material.cell(), axis=-1)
        distance[np.diag_indices(len(places))] = np.inf
        assert distance.min() > 1.4, material.name  # C-C in graphite is 1.42 Å
        per_atom = abs(np.linalg.det(material.cell())) / len(places)
        assert 5 < per_atom < 40, material.name


def test_training_and_evaluation_share_no_material() -> None:
    assert not set(TRAINING) & set(HELD_OUT)
    assert len(TRAINING) >= 16
    assert len(HELD_OUT) >= 5
    for material in (TRAINING | HELD_OUT).values():
        assert len(reflections(material).length) > 50


@pytest.mark.parametrize("seed", range(4))
def test_invented_crystals_are_new_whole_and_none_that_is_held_out(seed: int) -> None:
    invented = relatives(np.random.default_rng(seed), 100)
    assert invented == relatives(np.random.default_rng(seed), 100)
    assert len(set(invented)) > 90
    held_out = [{site[0] for site in material.sites} for material in HELD_OUT.values()]
    for material in invented:
        parent = TRAINING[material.name]
        assert len(material.sites) == len(parent.sites)
        assert len({site[0] for site in material.sites}) == len({s[0] for s in parent.sites})
        assert {site[0] for site in material.sites} not in held_out
        volume = np.linalg.det(material.cell()) / np.linalg.det(parent.cell())
        assert 0.4 < volume < 2.2
    assert 30 < sum(m.angles == TRAINING[m.name].angles for m in invented) < 70
    for material in invented[:5]:
        assert len(reflections(material).length) > 50


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("shape", [(128, 128), (96, 200)])
def test_every_kind_renders_to_unit_intensity(kind: simulate.Kind, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    patterns = [draw_pattern(rng, shape, kind=kind) for _ in range(4)]
    images = render(patterns, shape)
    assert torch.isfinite(images).all()
    assert (images >= 0).all()
    torch.testing.assert_close(images.sum((1, 2)), torch.ones(4), atol=1e-4, rtol=0)
    for pattern in patterns:
        for value, side in zip(pattern.center, shape, strict=True):
            assert abs(value - (side - 1) / 2) <= 0.2 * side
        assert 1.0 <= pattern.ellipticity[0] <= 1.12


def test_a_disk_of_a_large_camera_is_drawn() -> None:
    # 4096 x 4096 pixels: disks have radii up to 960 px and soft edges
    center = (64.0, 64.0)
    seen, whole = render([_vacuum(960.0, 30.0, center), _vacuum(3000.0, 9.0, center)], (128, 128))
    assert float(seen.min() / seen.max()) > 0.99
    assert float(whole.min() / whole.max()) > 0.99


def test_electrons_are_shared_as_the_description_says() -> None:
    """Disks and the radial profile share one unit; the floor and blobs come on top of it."""
    radial = np.exp(-0.5 * ((np.arange(800) * 0.25 - 40) / 2) ** 2)
    blobs = np.array([[0.0, 0.0, 2.0, 0.5]])
    pattern = _vacuum(
        5.0, 0.4, (64.0, 64.0), radial=radial, radial_share=0.25, floor=0.1, blobs=blobs
    )
    image = render([pattern], (129, 129))[0].double()
    y, x = np.mgrid[:129, :129] - 64
    away = torch.from_numpy(np.hypot(y, x))
    floor = 0.1 / 1.6 / 129**2
    inner, ring = (float((image[a] - floor).sum()) for a in (away < 20, away > 20))
    assert inner == pytest.approx((0.75 + 0.5) / 1.6, rel=1e-3)
    assert ring == pytest.approx(0.25 / 1.6, rel=1e-3)


def test_a_pattern_does_not_depend_on_what_is_rendered_beside_it() -> None:
    rng = np.random.default_rng(4)
    patterns = [draw_pattern(rng, (96, 96)) for _ in range(6)]
    patterns[2] = speckled(rng, patterns[2])
    together = render(patterns, (96, 96))
    alone = torch.cat([render([p], (96, 96)) for p in patterns])
    torch.testing.assert_close(together, alone, atol=1e-7, rtol=1e-3)


def test_precession_is_the_mean_over_a_round_of_the_beam() -> None:
    rng = np.random.default_rng(0)
    s0, epsilon, swing = rng.normal(0, 5, 50), np.exp(rng.normal(0, 1, 50)), 10 * rng.random(50)
    angle = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    round_ = s0[:, None] + swing[:, None] * np.cos(angle)
    wanted = (epsilon[:, None] ** 2 / (round_**2 + epsilon[:, None] ** 2)).mean(1)
    np.testing.assert_allclose(precessed(s0, epsilon, swing), wanted, rtol=1e-6)


def test_a_precessing_beam_shows_more_reflections() -> None:
    silicon, optics = TRAINING["Si"], Optics(1.0, 2e5, 80.0, 2.0, 0.6)

    def disks(precession: float) -> np.ndarray:
        rng, tilted = np.random.default_rng(1), tilt_matrix(0.3, 1.0)
        return crystal_disks(
            rng, silicon, optics, tilted, thickness=400.0, frame_size=256.0, rocking=False,
            precession=precession,
        )  # fmt: skip

    still, moving = disks(0.0), disks(np.radians(1.0))
    assert len(moving) > 1.5 * len(still)
    assert np.hypot(moving[:, Y], moving[:, X]).max() > np.hypot(still[:, Y], still[:, X]).max()


def test_speckle_moves_and_is_distorted_with_its_pattern() -> None:
    rng = np.random.default_rng(6)
    optics = Optics(1.0, 2e5, 100.0, 6.0, 0.6)
    film = draw_pattern(rng, (128, 128), kind="amorphous", optics=optics, ellipticity=(1.1, 0.4))
    film = replace(speckled(rng, film).moved((60.0, 64.0)), speckled=(0.5, 1.0), blobs=_NO_BLOBS)
    here, there = render([film, film.moved((63.0, 62.0))], (128, 128)).double()
    here, there = here[10:110, 10:110], there[13:113, 8:108]  # the same part of the pattern
    torch.testing.assert_close(here / here.sum(), there / there.sum(), atol=1e-9, rtol=2e-3)


@pytest.mark.parametrize(("odd", "symmetric"), [(0.0, True), (1.0, False)])
def test_speckle_of_a_thin_film_obeys_friedel_s_law(odd: float, symmetric: bool) -> None:
    rng = np.random.default_rng(7)
    film = speckled(rng, draw_pattern(rng, (129, 129), kind="amorphous", center=(64.0, 64.0)))
    waves = film.speckle.copy()
    waves[:, 3] = odd * waves[:, 2]
    waves[::2, 3] *= -1
    film = replace(film, speckle=waves, speckled=(0.0, 1.0), blobs=_NO_BLOBS)
    image = render([film], (129, 129))[0]
    turned = image.flip((0, 1))
    apart = float((image - turned).abs().sum() / image.sum())
    assert (apart < 1e-3) is symmetric


def test_the_same_seed_gives_the_same_pattern() -> None:
    one, two = (draw_pattern(np.random.default_rng(5), (64, 64)) for _ in range(2))
    assert torch.equal(render([one], (64, 64)), render([two], (64, 64)))


def test_counts_are_poisson_at_the_dose_asked_for() -> None:
    expected = 0.1 + torch.rand(1, 64, 64)
    expected /= expected.sum()
    generator = torch.Generator().manual_seed(0)
    frames, rate = expose(expected.expand(300, -1, -1), 5e4, ideal_detector((64, 64)), generator)
    assert frames.sum((1, 2)).mean() == pytest.approx(5e4, rel=1e-3)
    ratio = frames.var(0) / frames.mean(0)
    assert ratio.mean() == pytest.approx(1.0, abs=0.02)
    torch.testing.assert_close(rate[0], expected[0] * 5e4)


def test_a_camera_does_what_it_says() -> None:
    valid = np.ones((32, 32), np.bool_)
    valid[3] = False
    camera = Detector(valid, saturation=20, hot=np.array([[10, 11, 15.0]]), readout=0.1)
    flat = torch.full((1, 32, 32), 1 / 1024)
    frames, _ = expose(flat, 1e4, camera, torch.Generator().manual_seed(1))
    assert (frames[0, 3] == 0).all()
    assert frames.max() == 20
    assert frames.min() >= 0
    assert frames[0, 10, 11] > frames[0].median()


def test_drawn_cameras_and_doses_stay_in_range() -> None:
    rng = np.random.default_rng(6)
    doses = [draw_dose(rng) for _ in range(200)]
    assert min(doses) >= 10**1.5
    assert max(doses) <= 1e6
    flawed = 0
    for _ in range(100):
        camera = draw_detector(rng, (64, 96), (30.0, 40.0))
        assert camera.valid.shape == (64, 96)
        assert camera.valid.mean() > 0.5
        flawed += not camera.valid.all()
    assert 10 < flawed < 90


def test_difficult_frames_hide_the_beam_and_say_where_it_is() -> None:
    rng = np.random.default_rng(8)
    shape = (96, 128)
    drawn = [draw_difficult(rng, shape) for _ in range(160)]
    assert 0 < sum(not pattern.has_beam for pattern, _ in drawn) < 40
    off = np.array([p.center for p, _ in drawn if p.has_beam]) / shape - 0.5
    assert 0.3 < np.abs(off).max() < 0.7  # some centers lie just outside
    widest = max(p.disks[0, RADIUS] for p, _ in drawn if len(p.disks))
    assert 0.4 < widest / min(shape) < 0.5
    stopped = [
        (pattern, camera)
        for pattern, camera in drawn
        if camera.transmission is not None and camera.transmission.min() < 0.2
    ]
    assert len(stopped) > 10
    covered = [
        c.transmission[tuple(np.clip(np.round(p.center).astype(int), 0, np.array(shape) - 1))]
        for p, c in stopped
    ]
    assert np.median(covered) < 0.1
    for pattern, camera in drawn:
        frames, rate = expose(render([pattern], shape), 1e4, replace(camera, hot=None))
        assert torch.isfinite(frames).all()
        assert float(rate.sum()) <= 1.001e4  # the dose is what reaches the camera


def test_a_difficult_frame_is_fixed_by_its_seed() -> None:
    (one, a), (two, b) = (draw_difficult(np.random.default_rng(9), (64, 64)) for _ in range(2))
    images = [
        expose(render([p], (64, 64)), 1e3, c, torch.Generator().manual_seed(0))[0]
        for p, c in ((one, a), (two, b))
    ]
    assert torch.equal(*images)


def _scan(**kwargs: object) -> simulate.Scan:
    settings: dict[str, object] = {"dose": 2e4, "ellipticity": (1.05, 1.0), "seed": 7, **kwargs}
    return simulate_scan((6, 8), (96, 96), **settings)  # type: ignore[arg-type]


def test_a_scans_vacuum_frames_lie_at_its_true_centers() -> None:
    scan = _scan(kind="vacuum", drift=Drift(plane=6, walk=2, jump=1), dose=1e6)
    centers = []
    for i in range(len(scan)):
        image = scan.expectation(i).astype(np.float64)
        mean, _ = _moments(np.where(image > 0.05 * image.max(), image, 0))
        centers.append(mean)
    assert scan.centers.shape == (48, 2)
    # a threshold makes a centroid coarse; its error against the truth must still be no drift
    assert np.abs(np.asarray(centers) - scan.centers).max() < 0.1
    assert np.ptp(scan.centers, axis=0).max() > 2


def test_shifting_moves_the_centroid_by_what_it_says() -> None:
    from prenet4d_engines.simulate.scan import _shifted

    disk = render([_vacuum(7.0, 0.6, (40.0, 40.0))], (80, 80))[0].numpy()
    for start in ((5.25, 6.5), (4.0, 7.99)):
        mean, _ = _moments(_shifted(disk, start, (70, 66)))
        assert np.abs(mean - (40 - start[0], 40 - start[1])).max() < 0.003


def test_a_scan_is_the_same_in_any_chunks_and_threads() -> None:
    scan = _scan()
    whole = scan.frames()
    assert whole.shape == (48, 96, 96)
    assert whole.dtype == np.uint16
    np.testing.assert_array_equal(np.concatenate(list(scan.chunks(7, threads=2))), whole)
    np.testing.assert_array_equal(_scan().frames(10, 12), whole[10:12])
    assert not np.array_equal(_scan(seed=8).frames(10, 12), whole[10:12])


@pytest.mark.parametrize("dose", [3e3, 1e5])
def test_frames_of_a_scan_count_what_is_expected(dose: float) -> None:
    """Both ways of counting, few electrons and many, give the expected counts."""
    scan = _scan(dose=dose, grains=1, drift=Drift(0, 0, 0))
    full = np.flatnonzero(scan.material_share == 1)
    assert len(full) > 20
    frames = np.stack([scan.frame(int(i)) for i in full]).astype(np.float64)
    rate = scan.expectation(int(full[0])).astype(np.float64)
    deviation = (frames.mean(0) - rate) / np.sqrt(rate / len(full) + 1e-9)
    bright = rate > 1
    assert abs(deviation[bright].mean()) < 0.3
    assert deviation[bright].std() == pytest.approx(1.0, abs=0.25)
    assert frames.sum((1, 2)).mean() == pytest.approx(dose, rel=0.03)


def test_counts_beyond_uint16_get_a_wider_type() -> None:
    assert _scan(dose=1e8).dtype == np.uint32


def test_counts_that_the_interpolation_lifts_beyond_uint16_do_not_wrap_around() -> None:
    # between sharp edges, cubic convolution swings beyond the brightest pixel
    measured = np.full((64, 64), 1e-4)
    measured[20:40, 20:40] = 1.0
    scan = draw_scan(measured, (3, 3), dose=62_500 * float(measured.sum()), drift=Drift(3, 1, 0.3))
    for i, frame in enumerate(scan.frames().astype(np.float64)):
        expected = scan.expectation(i).astype(np.float64)
        assert np.abs(frame - expected).max() < 10 * np.sqrt(expected.max())


def test_a_scan_drawn_from_measured_patterns_moves_and_stretches_them() -> None:
    measured = render([_vacuum(9.0, 1.0, (50.0, 47.0))], (96, 96)).numpy() * 1e6
    scan = draw_scan(
        measured,
        (4, 5),
        dose=1e6,
        ellipticity=(1.08, 0.6),
        drift=Drift(4, 1, 0.5),
        centers=[(50.0, 47.0)],
        seed=3,
    )
    matrix = distortion((1.08, 0.6))
    for i in (0, 7, 19):
        mean, spread = _moments(scan.expectation(i))
        assert np.abs(mean - scan.centers[i]).max() < 0.01
        np.testing.assert_allclose(
            spread / np.sqrt(np.linalg.det(spread)), matrix @ matrix.T, atol=5e-3
        )
    assert scan.frame(0).sum() == pytest.approx(1e6, rel=0.02)


def test_bad_pixels_of_a_scan_read_nothing() -> None:
    valid = np.ones((96, 96), np.bool_)
    valid[:, 40:44] = False
    scan = _scan(valid=valid, dose=1e6)
    assert scan.frame(3)[:, 40:44].sum() == 0
    assert scan.expectation(3)[:, 40:44].sum() > 0


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: simulate_scan((4, 4), (64, 64), material="unobtainium"),
        lambda: simulate_scan((4, 4), (64, 64), kind="cebd"),  # type: ignore[arg-type]
        lambda: simulate_scan((0, 4), (64, 64)),
        lambda: simulate_scan((4, 4), (64, 64), dose=float("nan")),
        lambda: simulate_scan((4, 4), (64, 64), dose=1e12),
        lambda: simulate_scan((4, 4), (64, 64), drift=Drift(plane=float("nan"))),
        lambda: simulate_scan((4, 4), (64, 64), drift=Drift(jump=-1.0)),
        lambda: simulate_scan((4, 4), (64, 64), ellipticity=(1e6, 0.0)),
        lambda: simulate_scan((4, 4), (64, 64), drift=Drift(plane=1e5)),
        lambda: draw_scan(np.ones((64, 64)), (4, 4), drift=Drift(plane=1e5)),
        lambda: simulate_scan((4, 4), (64, 64), center=(1e6, 5.0)),
        lambda: simulate_scan((4, 4), (64, 64), seed=-1),
        lambda: draw_pattern(np.random.default_rng(), (64, 64), kind="cebd"),  # type: ignore[arg-type]
        lambda: draw_pattern(np.random.default_rng(), (64, 64), center=(float("nan"), 3.0)),
        lambda: draw_pattern(np.random.default_rng(), (64, 64), ellipticity=(0.5, 0.0)),
        lambda: expose(torch.ones(1, 8, 8), float("inf"), ideal_detector((8, 8))),
        lambda: expose(torch.ones(1, 8, 8), 1e3, ideal_detector((8, 1))),
        lambda: simulate_scan((4, 4), (64, 64), grains=0),
        lambda: simulate_scan((4, 4), (64, 64), ellipticity=(0.9, 0.0)),
        lambda: simulate_scan((4, 4), (64, 64), ellipticity=(1.1, float("inf"))),
        lambda: simulate_scan((4, 4), (64, 64), center=(float("nan"), 5.0)),
        lambda: draw_scan(np.ones((64, 64)), (4, 4), ellipticity=(0.0, 0.0)),
        lambda: simulate_scan((4, 4), (64, 64), valid=np.ones((3, 3), np.bool_)),
        lambda: draw_scan(np.zeros((64, 64)), (4, 4)),
        lambda: draw_scan(np.full((64, 64), np.nan), (4, 4)),
        lambda: draw_scan(np.ones(64), (4, 4)),
        lambda: draw_scan(np.ones((2, 64, 64)), (4, 4), centers=[(1.0, 2.0)]),
        lambda: draw_scan(np.ones((64, 64)), (4, 4), centers=[(1.0, float("nan"))]),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_a_sentence(wrong: object) -> None:
    with pytest.raises(SimulationError, match=r"[a-z] .*\.$"):
        wrong()  # type: ignore[operator]


def test_the_readmes_example_runs() -> None:
    readme = Path(__file__).parents[2] / "engines" / "README.md"
    blocks = re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = (b for b in blocks if "draw_pattern" in b)
    names: dict[str, object] = {}
    exec(compile(block, str(readme), "exec"), names)
    frames = names["frames"]
    assert isinstance(frames, torch.Tensor)
    assert frames.shape == (1, 256, 256)


def test_cameras_of_few_pixels_are_drawn_too() -> None:
    for seed in range(40):
        camera = draw_detector(np.random.default_rng(seed), (16, 16))
        assert camera.valid.any()


def test_the_gallery_is_a_picture(tmp_path: Path) -> None:
    simulate.draw_gallery(tmp_path / "page.png", frame_shape=(48, 64), seed=1)
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")


def test_the_gallery_of_a_line_detector_fits_on_a_page(tmp_path: Path) -> None:
    told: list[float] = []
    for frame_shape in ((8, 4096), (1024, 8)):
        simulate.draw_gallery(
            tmp_path / "page.png", frame_shape=frame_shape, on_progress=told.append
        )
        assert max(imread(tmp_path / "page.png").shape) < 2000
        assert told[-1] == 1
