"""The corrector on a real GPU: streams, graphs, page-locked memory, and faults of its own."""

import warnings

import numpy as np
import pytest
import torch
from ringscan import BATCHES, CONFIG, SHAPE, parts, rings, together

from prenet4d_engines import Corrector, DetectorRadii
from prenet4d_engines.backends import TorchBackend
from prenet4d_engines.errors import BackendError
from prenet4d_engines.lanes import lanes_for
from prenet4d_engines.recovery import RecoveringCorrector
from prenet4d_engines.resample import sum_by_products, sum_one_by_one
from prenet4d_engines.stages import Station

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # NVIDIA's libraries have much to say
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


@pytest.fixture(scope="module")
def backend():
    """The networks on the GPU, in float32 so that results compare with the CPU's."""
    return TorchBackend("float32", device="cuda")


@pytest.fixture(scope="module")
def on_cpu():
    return TorchBackend("float32", device="cpu")


def overlapped(corrector, frames, sizes=BATCHES):
    batches = []
    for part in parts(sizes):
        batches += corrector.submit(frames[part], np.arange(90)[part])
    return batches + corrector.finish()


def assert_close(found, wanted):
    one, other = together(found), together(wanted)
    for name in ("indices", "dose", "flags"):
        np.testing.assert_allclose(one[name], other[name], rtol=1e-5, err_msg=name)
    for name in ("center", "tracked", "shift"):
        np.testing.assert_allclose(one[name], other[name], atol=0.01, err_msg=name)
    for name in ("corrected", "aligned"):
        # whether a pixel on the very edge has a source, rounding decides
        assert (np.isnan(one[name]) != np.isnan(other[name])).mean() < 1e-3, name
        difference = np.nanmean(np.abs(one[name] - other[name])) / np.nanmean(other[name])
        assert difference < 0.01, name
    for a, b in zip(found, wanted, strict=True):
        assert (a.state, a.patterns_averaged) == (b.state, b.patterns_averaged)
        np.testing.assert_allclose(a.ellipticity.vector, b.ellipticity.vector, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_overlapping_batches_equal_the_cpus(backend, on_cpu, dtype, masked, caplog):
    frames = np.minimum(rings(), 255).astype(dtype)
    mask = np.ones(SHAPE, bool)
    mask[20:22] = not masked
    common = {"config": CONFIG, "pixel_mask": mask, "gain": 2.0, "saturation_value": 200.0}
    found = overlapped(Corrector(SHAPE, stations=[Station(backend)], **common), frames)
    wanted = overlapped(Corrector(SHAPE, backend=on_cpu, **common), frames)
    assert_close(found, wanted)
    assert "Without a CUDA graph" not in caplog.text


def test_what_cannot_be_recorded_is_done_without_and_harms_nothing(caplog):
    lanes, before = lanes_for(torch.device("cuda")), torch.cuda.current_stream()
    x = torch.arange(4.0, device="cuda")
    torch.cuda.synchronize()
    again = lanes.record(lambda: x * x.sum().item())
    assert "Without a CUDA graph" in caplog.text
    assert lanes.fetch(again()).wait().tolist() == [0.0, 6.0, 12.0, 18.0]
    assert torch.cuda.current_stream() == before
    lanes.settle()  # where the allocator still waits for the recording's end, it fails here
    caplog.clear()
    again = lanes.record(lambda: 2 * x)
    assert lanes.fetch(again()).wait().tolist() == [0.0, 2.0, 4.0, 6.0]
    assert not caplog.text


def test_work_that_fails_while_it_is_recorded_is_told(caplog):
    lanes, calls = lanes_for(torch.device("cuda")), []
    x = torch.ones(4, device="cuda")
    torch.cuda.synchronize()

    def work():
        calls.append(0)
        if len(calls) == 3:
            raise RuntimeError("This engine cannot be part of a graph.")
        return 2 * x

    again = lanes.record(work)
    assert "This engine cannot be part of a graph." in caplog.text
    assert lanes.fetch(again()).wait().tolist() == [2.0] * 4
    caplog.clear()
    assert lanes.fetch(lanes.record(lambda: 3 * x)()).wait().tolist() == [3.0] * 4
    assert not caplog.text


def test_a_new_buffer_is_not_written_to_before_others_have_read_it():
    """What is sent to it does not wait for computing, but its memory may be needed there."""
    lanes, size = lanes_for(torch.device("cuda")), 1 << 26
    values = torch.full((size,), 7.0).pin_memory().numpy()
    lanes.settle()
    with lanes.computing():
        old, total = torch.ones(size, device="cuda"), torch.zeros(1, device="cuda")
        for _ in range(200):
            old.mul_(1.0)  # takes long enough
        total += old.sum(dtype=torch.float64)
        address = old.data_ptr()
        del old
    new = lanes.buffer((size,), torch.float32)
    assert new.data_ptr() == address
    lanes.send(values, new)
    assert lanes.fetch(total).wait().tolist() == [size]


def test_a_device_has_its_number(backend):
    """Which GPU is the current one may change before its queues are made."""
    assert backend.device.index == torch.cuda.current_device()


def test_graphs_outlive_changes_of_ellipse_reference_and_detectors(backend, on_cpu):
    frames, batches = rings(), []
    for corrector in (
        Corrector(SHAPE, config=CONFIG, stations=[Station(backend)]),
        Corrector(SHAPE, config=CONFIG, backend=on_cpu),
    ):
        found = overlapped(corrector, frames, (10,) * 5)
        corrector.set_reference_center((20.0, 30.0))
        corrector.set_detectors(DetectorRadii(5, 6, 12))
        for part in list(parts((10,) * 9))[5:]:
            found += corrector.submit(frames[part], np.arange(90)[part])
        batches.append(found + corrector.finish())
    assert_close(*batches)
    assert batches[0][-1].reference_center == (20.0, 30.0)


def test_nobody_waits_but_for_events(backend):
    """After the first batches, no call synchronises with the device, and no memory is taken."""
    frames, station = rings()[:16], Station(backend)
    corrector = Corrector(SHAPE, config=CONFIG, stations=[station])
    for number in range(8):
        corrector.submit(frames, 16 * number + np.arange(16))
    segments = torch.cuda.memory_stats()["segment.all.allocated"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of being a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(8, 20):
            corrector.submit(frames, 16 * number + np.arange(16))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    corrector.finish()
    assert torch.cuda.memory_stats()["segment.all.allocated"] == segments


def test_frames_come_from_memory_that_was_page_locked(backend, on_cpu):
    from prenet4d_engines.cuda import pin

    frames = rings()
    memory = np.zeros(frames.nbytes + 4096, np.uint8)
    undo = pin(memory)
    try:
        ring = memory[: frames.nbytes].view(np.uint16).reshape(frames.shape)
        ring[:] = frames
        assert torch.from_numpy(ring).is_pinned()
        found = overlapped(Corrector(SHAPE, config=CONFIG, stations=[Station(backend)]), ring)
    finally:
        undo()
    assert_close(found, overlapped(Corrector(SHAPE, config=CONFIG, backend=on_cpu), frames))


def test_more_memory_than_there_is_cannot_be_page_locked():
    from prenet4d_engines.cuda import pin

    memory = np.zeros(1 << 20, np.uint8)
    undo = pin(memory)
    with pytest.raises(BackendError, match="cannot be page-locked"):
        pin(memory)
    undo()
    assert torch.ones(2, device="cuda").sum().item() == 2  # it is not taken for this one's error


class Failing:
    """The GPU's backend, which fails once."""

    def __init__(self, backend, error, at):
        self._backend, self.error, self.at = backend, error, at
        self.name, self.description, self.device = "failing", "for tests", backend.device
        self.spread, self.center, self.ellipse = backend.spread, backend.center, backend.ellipse

    def denoise(self, x):
        self.at -= 1
        if self.at == 0:
            raise self.error
        return self._backend.denoise(x)


@pytest.mark.parametrize("at", [1, 5, 12])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), "corrector_rebuilt"),
        (torch.OutOfMemoryError("CUDA out of memory."), "smaller_batches"),
    ],
)
def test_faults_are_survived(backend, error, code, at):
    frames, told = rings(), []
    stations = [Station(Failing(backend, error, at))]
    corrector = RecoveringCorrector(
        lambda stations: Corrector(SHAPE, config=CONFIG, stations=stations),
        stations,
        tell=lambda *what: told.append(what[1]),
    )
    found = overlapped(corrector, frames)
    wanted = overlapped(Corrector(SHAPE, config=CONFIG, backend=backend), frames)
    assert told in ([code], ["corrector_rebuilt"], [])  # while it is captured, it runs without
    for name in ("indices", "dose", "flags"):
        np.testing.assert_allclose(together(found)[name], together(wanted)[name], rtol=1e-5)
    np.testing.assert_allclose(together(found)["tracked"], together(wanted)["tracked"], atol=0.01)


def test_a_memory_that_is_too_small_is_noticed(backend):
    """A real lack of memory: this process may use hardly any."""
    frames, told = np.tile(rings(), (4, 1, 1))[:256], []
    torch.cuda.empty_cache()
    used = torch.cuda.memory_reserved() / torch.cuda.get_device_properties(0).total_memory
    corrector = RecoveringCorrector(
        lambda stations: Corrector(SHAPE, config=CONFIG, stations=stations),
        [Station(backend)],
        tell=lambda *what: told.append(what[1]),
    )
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, used + (200 << 20) / total))
    try:
        batch = corrector.process(frames, np.arange(256))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "smaller_batches" in told
    assert len(batch.corrected) == 256


def test_both_ways_to_add_up_recentered_images_agree():
    random = torch.Generator().manual_seed(0)
    images = torch.rand(8, 64, 72, generator=random)
    shifts = 12 * torch.rand(8, 2, generator=random, dtype=torch.float64) - 6
    found = sum_by_products(images.cuda(), shifts.cuda(), None, None).cpu()
    torch.testing.assert_close(
        found, sum_one_by_one(images, shifts, None, None), atol=1e-4, rtol=1e-4
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here")
def test_several_gpus_take_turns(backend, on_cpu):
    frames = rings()
    stations = [Station(backend), Station(TorchBackend("float32", device="cuda:1"))]
    found = overlapped(Corrector(SHAPE, config=CONFIG, stations=stations), frames)
    assert_close(found, overlapped(Corrector(SHAPE, config=CONFIG, backend=on_cpu), frames))
