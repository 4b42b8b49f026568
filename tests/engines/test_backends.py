"""Backends run the networks; a faster arithmetic must agree with float32."""

import copy
import threading

import numpy as np
import pytest
import torch

from prenet4d_engines import weights
from prenet4d_engines.backends import TorchBackend, parity, select
from prenet4d_engines.corrector import Corrector
from prenet4d_engines.errors import BackendError, EngineError
from prenet4d_engines.models import center, denoiser, ellipse, refine
from prenet4d_engines.models.bins import Bins
from prenet4d_engines.models.inversion import inversion


@pytest.fixture(scope="module")
def reference() -> TorchBackend:
    return TorchBackend("float32", device="cpu")


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    frames = parity.patterns()
    mask = torch.ones(128, 128, dtype=torch.bool)
    bins = Bins.of(frames, mask)
    guess = inversion(bins, torch.full((8, 2), 64.0))
    return {
        "denoise": denoiser.stabilise(frames, mask)[0],
        "center": center.prepare(bins),
        "refine": refine.prepare(bins, guess, torch.ones(8, 2)),
        "ellipse": ellipse.prepare(frames.mean(0), torch.ones(128, 128)),
    }


@pytest.mark.parametrize("name", weights.NAMES)
def test_float32_is_the_shipped_network(name, reference, inputs):
    """Folded batch norms and another memory format change no figure."""
    x = inputs[name]
    with torch.inference_mode():
        expected = weights.load(name)(x)
        found = getattr(reference, name)(x)
    assert found.dtype == torch.float32
    scale = float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=1e-4 * max(scale, 1), rtol=1e-4)


@pytest.mark.parametrize("name", weights.NAMES)
def test_what_auto_chose_is_within_the_bounds(name, reference):
    chosen = select("auto")
    deviation = parity.measure(
        name, getattr(chosen, name), getattr(reference, name), device=chosen.device
    )
    assert deviation.within(parity.TORCH), deviation.told(parity.TORCH)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("denoise", lambda y: y + 0.2),
        ("denoise", lambda y: y * torch.nan),
        ("center", lambda y: y.roll(1, 2)),
        ("center", lambda y: y * torch.nan),
        ("center", torch.zeros_like),
        ("refine", lambda y: y.roll(1, 1)),
        ("refine", lambda y: y + 0.05),
        ("refine", lambda y: y * torch.nan),
        ("ellipse", lambda y: y.roll(1, 3)),
        ("ellipse", lambda y: y * 1.05),
        ("ellipse", lambda y: y * torch.nan),
    ],
)
def test_a_network_that_computes_wrongly_is_caught(name, wrong, reference):
    right = getattr(reference, name)
    assert parity.measure(name, right, right).within(parity.ENGINE)
    deviation = parity.measure(name, lambda x: wrong(right(x)), right)
    assert not deviation.within(parity.TORCH), deviation.told(parity.TORCH)


def test_one_wrong_pattern_among_many_is_caught(reference):
    """A wrong kernel may spoil the end of a batch only; the worst pattern counts, not the mean."""

    def spoilt(x):
        y = reference.denoise(x)
        y[-1] += 60.0
        return y

    deviation = parity.measure("denoise", spoilt, reference.denoise)
    assert deviation.physical > parity.TORCH.physical["denoise"]


def test_bfloat16_runs_everywhere_and_stays_near(reference, inputs):
    backend = TorchBackend("bfloat16", device="cpu")
    assert (
        "denoiser in bfloat16, center in bfloat16, its refinement in bfloat16"
        in backend.description
    )
    with torch.inference_mode():
        found = backend.denoise(inputs["denoise"])
    assert found.dtype == torch.float32
    assert parity.measure("denoise", backend.denoise, reference.denoise).physical < 0.02


def test_it_says_what_it_is_and_why():
    backend = select("torch", precision="float32")
    assert backend.name == "torch"
    assert "float32 (as asked)" in backend.description
    assert backend.description.endswith(".")
    assert "\n" not in backend.description


def test_each_thread_gets_frames_of_its_own():
    backend = select("torch", precision="float32", threads=3)
    assert "with 3 threads" in backend.description
    for n in (0, 1, 2, 3, 7, 32):
        met = threading.Barrier(min(n, 3) or 1)

        def work(part, met=met):
            met.wait(20)  # they work at the same time
            assert torch.is_inference_mode_enabled()
            return list(range(part.start, part.stop))

        done = backend.spread(work, n)
        assert len(done) <= 3
        assert [frame for part in done for frame in part] == list(range(n))


def test_what_does_not_run_here_is_refused():
    with pytest.raises(BackendError, match="no backend 'abacus'"):
        select("abacus")  # type: ignore[arg-type]
    with pytest.raises(BackendError, match="float16 needs"):
        TorchBackend("float16", device="cpu")
    assert issubclass(BackendError, EngineError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(BackendError, match="no NVIDIA GPU"):
        TorchBackend(device="cuda")


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
def test_the_gpu_agrees_with_the_cpu(reference):
    frames = np.random.default_rng(0).poisson(2, (4, 128, 128)).astype(np.uint16)
    on_gpu = Corrector((128, 128), backend=TorchBackend(device="cuda"))
    on_cpu = Corrector((128, 128), backend=copy.copy(reference))
    found, wanted = (c.process(frames, np.arange(4)) for c in (on_gpu, on_cpu))
    np.testing.assert_allclose(found.tracked, wanted.tracked, atol=0.05)
    np.testing.assert_allclose(found.corrected, wanted.corrected, rtol=0.02, atol=0.02)
