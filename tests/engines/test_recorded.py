"""Nothing that is recorded in a CUDA graph waits for the device or takes anything from the host.

Found without a GPU, on torch's device *meta*, which computes shapes alone: values that it does not
have cannot be waited for, and a tensor of the CPU's is out of place wherever it turns up.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prenet4d_engines.backends import TorchBackend
from prenet4d_engines.geometry import Ellipticity
from prenet4d_engines.lanes import CpuLanes
from prenet4d_engines.stages import Camera, Station

WAITS = (
    # torch reads a value back for these, also where it is on the device
    *("aten.masked_fill.Tensor", "aten.masked_fill_.Tensor", "aten._linalg_check_errors.default"),
    # how much they make depends on values
    *("aten._unique2.default", "aten.unique_consecutive.default", "aten.unique_dim.default"),
    *("aten.masked_select.default", "aten.repeat_interleave.Tensor", "aten.bincount.default"),
)
COPIES = ("tensor", "as_tensor", "asarray", "new_tensor", "scalar_tensor", "from_numpy")
"""Make a tensor on the host first."""


class OnTheHost(Exception):
    """What a GPU would have to wait for."""


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) in WAITS:
            raise OnTheHost(f"{func} waits for the device")
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, made)):
            if isinstance(each, Tensor) and each.device.type != "meta":
                raise OnTheHost(f"{func} with a tensor of the host's")
        return made


class Calls(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in COPIES:
            raise OnTheHost(f"{name} copies from the host")
        if name == "__setitem__":
            into, where, value = args
            # a number in a slice is filled in, but in a single element it is copied there
            if not isinstance(value, Tensor) and into[where].dim() == 0:
                raise OnTheHost("one element takes a number from the host")
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[None]:
    # in inference mode, operations that are made of others would not show them
    with torch.inference_mode(False), torch.no_grad(), Calls(), Operations():
        yield


class WatchedLanes(CpuLanes):
    """A device without values; everything is watched that is recorded for it."""

    def __init__(self) -> None:
        self.device = torch.device("meta")
        self.recorded = 0

    def buffer(self, shape, dtype):
        return torch.empty(tuple(shape), dtype=dtype, device=self.device)

    def send(self, values, into):
        return into

    put = send

    def record(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.recorded += 1
        with watched():
            made = work()
        return lambda: made


class WatchedNetworks(TorchBackend):
    def spread(self, work: Callable[[slice], Any], n: int) -> list[Any]:
        return [work(slice(0, n))]


@pytest.fixture(scope="module")
def networks():
    return WatchedNetworks("bfloat16", threads=1, device="meta")


def masked(shape: tuple[int, int]) -> bytes:
    mask = np.ones(shape, bool)
    mask[3] = False
    return mask.tobytes()


@pytest.mark.parametrize(
    "camera",
    [
        Camera((256, 256), None, 1.0, None),
        Camera((128, 192), masked((128, 192)), 2.5, 4000.0),
        Camera((515, 257), None, 1.0, 100.0),
        Camera((8, 9), masked((8, 9)), 1.0, None),
    ],
    ids=lambda camera: "x".join(map(str, camera.frame_shape)),
)
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_every_stage_can_be_recorded(networks, camera, dtype):
    lanes = WatchedLanes()
    slot = Station(networks, lanes).take(camera, np.dtype(dtype), 4)
    slot.look(np.zeros((4, *camera.frame_shape), dtype))
    slot.place(np.zeros((4, 2)), np.ones(4, bool), (1.0, 2.0), Ellipticity(1.03, 0.5))
    slot.average()
    slot.straighten(4, np.zeros(0, np.float32))
    assert lanes.recorded == 3


def test_the_reading_of_the_ellipse_can_be_recorded(networks):
    lanes = WatchedLanes()
    mean = torch.empty((256, 256), device="meta")
    Station(networks, lanes).reader((256, 256)).ask(mean, (127.5, 127.5))
    assert lanes.recorded == 1


@pytest.mark.parametrize(
    "offence",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: float(x.sum()),
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(x[0].long()),
        lambda x: x.masked_fill(x > 0, x.max()),
        lambda x: torch.linalg.inv(x),
        lambda x: x * torch.arange(4),
        lambda x: x + torch.ones(()),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device),
        lambda x: x + torch.as_tensor(np.ones(4), device=x.device),
        lambda x: x + torch.from_numpy(np.ones(4, np.float32)),
        lambda x: x + x.new_tensor([1.0, 2.0, 3.0, 4.0]),
        lambda x: x[0].__setitem__(-1, 1.0),
        lambda x: x.__setitem__((0, 1), 1.0),
        lambda x: x.__setitem__(0, torch.ones(4)),
    ],
)
def test_what_cannot_be_recorded_is_noticed(offence):
    x = torch.ones((4, 4), device="meta")
    with pytest.raises((OnTheHost, RuntimeError, TypeError)), watched():
        offence(x)


def test_what_can_be_recorded_passes():
    x = torch.ones((4, 4), device="meta")
    with watched():
        x[:1] = x[1:, -1:] = 2.0
        x[0] = x[1]
        made = torch.where(x > 0, x, 0.0).masked_fill(x > 3, 1.0)
        made[torch.arange(4, device=x.device), x.argmax(0)].clamp_(min=0.5)
