"""The choice among backends, and engines that run, where there is a GPU to run them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prenet4d_engines import weights
from prenet4d_engines.backends import TorchBackend, parity, select
from prenet4d_engines.backends.tensorrt import flavors
from prenet4d_engines.backends.tensorrt.backend import TensorRTBackend, split
from prenet4d_engines.backends.tensorrt.cache import EngineCache
from prenet4d_engines.backends.tensorrt.engine import Engine
from prenet4d_engines.backends.tensorrt.flavors import NO_GPU
from prenet4d_engines.backends.tensorrt.making import make, make_one
from prenet4d_engines.corrector import Corrector
from prenet4d_engines.errors import BackendError

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@given(st.integers(0, 5000), st.sets(st.integers(1, 512), min_size=1))
def test_every_item_goes_to_an_engine_that_takes_it(n, batches):
    batches = sorted(batches)
    parts = split(n, batches)
    assert sum(items for items, _ in parts) == n
    assert all(0 < items <= batches[index] for items, index in parts)
    assert all(items == batches[-1] for items, _ in parts[:-1])


@pytest.mark.parametrize(
    ("n", "parts"),
    [(1, [(1, 0)]), (5, [(5, 1)]), (16, [(16, 1)]), (40, [(16, 1), (16, 1), (8, 1)])],
)
def test_the_smallest_engine_that_takes_all_is_taken(n, parts):
    assert split(n, [1, 16]) == parts


@no_gpu
def test_without_a_gpu_auto_takes_torch_and_says_why(tmp_path):
    backend = select("auto", engines=tmp_path)
    assert isinstance(backend, TorchBackend)
    assert backend.description.startswith("PyTorch on the CPU")
    assert "TensorRT is not used: " in backend.description
    assert "NVIDIA GPU can be used" in backend.description
    with pytest.raises(BackendError, match="NVIDIA GPU"):
        select("tensorrt", engines=tmp_path)


@no_gpu
def test_without_a_gpu_no_engine_is_touched(graphs, toolkit, tmp_path):
    """A runtime asked to load a plan without CUDA may crash: it is not asked."""
    made = make_one(graphs["ellipse"], 1, (96, 120), toolkit, EngineCache(tmp_path / "engines"))
    plan = EngineCache(tmp_path / "engines").load(made.sidecar)
    with pytest.raises(BackendError, match="need an NVIDIA GPU"):
        Engine(toolkit, made.sidecar.recipe, plan, torch.device("cuda"))
    assert flavors.gpu() == NO_GPU
    assert not flavors.gpu()


def test_another_precision_keeps_auto_from_tensorrt():
    backend = select("auto", precision="float32")
    assert isinstance(backend, TorchBackend)
    assert "float32 (as asked)" in backend.description


gpu = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # NVIDIA's libraries have much to say
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
    pytest.mark.skipif(not flavors.installed(), reason="TensorRT is not installed"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Engines for 128 × 128, batches of 1 and 16, built on this GPU."""
    toolkit = flavors.load()
    why_not = flavors.unsuited(toolkit, flavors.gpu())
    if why_not is not None:
        pytest.skip(why_not)
    folder = tmp_path_factory.mktemp("engines")
    made = list(make((128, 128), toolkit, EngineCache(folder), batches=(1, 16)))
    return folder, made


class TestOnAGpu:
    pytestmark = gpu

    def test_every_engine_was_compared_with_float32(self, built):
        _, made = built
        assert [(each.sidecar.recipe.network, each.sidecar.recipe.batch) for each in made] == [
            *(("denoise", 1), ("denoise", 16), ("center", 1), ("center", 16)),
            *(("refine", 1), ("refine", 16), ("ellipse", 1)),
        ]
        for each in made:
            assert each.sidecar.parity.within(parity.ENGINE)

    @pytest.mark.parametrize("name", weights.NAMES)
    def test_the_backend_agrees_with_float32(self, built, name):
        backend = select("tensorrt", engines=built[0])
        deviation = parity.measure(
            name, getattr(backend, name), weights.load(name), device=backend.device
        )
        assert deviation.within(parity.ENGINE), deviation.told(parity.ENGINE)

    @pytest.mark.parametrize("n", [0, 1, 3, 16, 40])
    def test_any_number_of_frames_in_any_mode(self, built, n):
        backend = select("tensorrt", engines=built[0])
        x = torch.randn(n, 4, 128, 128, generator=torch.Generator().manual_seed(n)).cuda()
        with torch.inference_mode():
            first = backend.denoise(x)
        again = backend.denoise(x)
        assert first.dtype == torch.float32
        assert first.shape == (n, 1, 128, 128)
        torch.testing.assert_close(first, again)
        if n:  # torch itself cannot run no frames at all
            reference = weights.load("denoise")(x.cpu()).detach()
            torch.testing.assert_close(first.cpu(), reference, atol=0.05, rtol=0.02)

    def test_a_call_does_not_change_the_answer_of_the_one_before(self, built):
        backend = select("tensorrt", engines=built[0])
        one, other = torch.randn(2, 16, 4, 128, 128).cuda().unbind(0)
        first = backend.denoise(one)
        kept = first.clone()
        backend.denoise(other)
        assert torch.equal(first, kept)

    def test_auto_takes_it_and_says_so(self, built):
        backend = select("auto", engines=built[0])
        assert backend.name == "tensorrt"
        assert torch.cuda.get_device_name() in backend.description

    def test_another_shape_runs_in_torch(self, built, caplog):
        backend = select("tensorrt", engines=built[0])
        assert backend.denoise(torch.zeros(2, 4, 64, 64).cuda()).shape == (2, 1, 64, 64)
        assert "There is no engine for denoise" in caplog.text

    def test_an_engine_that_does_not_start_gives_way_to_torch(self, built, monkeypatch, caplog):
        backend = select("tensorrt", engines=built[0])
        x = torch.randn(3, 4, 128, 128, generator=torch.Generator().manual_seed(0)).cuda()
        wanted = backend.denoise(x)

        def refuse(engine):
            raise engine._failed("it could not be started")

        monkeypatch.setattr(Engine, "_run", refuse)
        found = backend.denoise(x)
        assert "could not be started" in caplog.text
        assert "From now on torch runs it" in caplog.text
        torch.testing.assert_close(found, wanted, atol=0.05, rtol=0.02)

    def test_engines_become_part_of_the_correctors_graphs(self, built, caplog):
        frames = np.random.default_rng(0).poisson(2, (16, 128, 128)).astype(np.uint16)
        corrector = Corrector((128, 128), backend=select("tensorrt", engines=built[0]))
        for number in range(6):
            corrector.submit(frames, 16 * number + np.arange(16))
        assert len(corrector.finish()) == 2
        if flavors.load().flavor == "tensorrt":  # TensorRT for RTX records graphs itself
            assert "Without a CUDA graph" not in caplog.text

    def test_an_altered_engine_is_not_loaded(self, built, tmp_path):
        folder = tmp_path / "engines"
        for made in make((64, 64), flavors.load(), EngineCache(folder), batches=(1,)):
            (folder / made.sidecar.plan).write_bytes(b"something else")
        with pytest.raises(BackendError, match="There are no engines"):
            TensorRTBackend(cache=folder)

    def test_the_corrector_agrees_with_the_cpu(self, built):
        frames = np.random.default_rng(0).poisson(2, (20, 128, 128)).astype(np.uint16)
        on_gpu = Corrector((128, 128), backend=select("tensorrt", engines=built[0]))
        on_cpu = Corrector((128, 128), backend=TorchBackend("float32", device="cpu"))
        found, wanted = (c.process(frames, np.arange(20)) for c in (on_gpu, on_cpu))
        np.testing.assert_allclose(found.tracked, wanted.tracked, atol=0.05)
        np.testing.assert_allclose(found.corrected, wanted.corrected, rtol=0.02, atol=0.02)
