"""What is missing or broken is told in one sentence that says what to do."""

import sys

import pytest
import torch

from prenet4d_engines.backends.tensorrt import flavors
from prenet4d_engines.errors import BackendError


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("__version__ = '9.3.0'", r"TensorRT 9\.3\.0 is too old, 10\.0 is the oldest.*pip install"),
        ("raise OSError('libnvinfer.so.10 is missing')", r"does not load \(libnvinfer.*install it"),
        ("import no_such_part", r"does not load \(No module named 'no_such_part'\)"),
    ],
)
def test_a_tensorrt_that_cannot_be_used(monkeypatch, tmp_path, text, sentence):
    (tmp_path / "tensorrt_of_a_test.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(flavors._MODULES, "tensorrt", ("tensorrt_of_a_test",))
    monkeypatch.delitem(sys.modules, "tensorrt_of_a_test", raising=False)
    with pytest.raises(BackendError, match=sentence) as told:
        flavors.load("tensorrt")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update "
            "your GPU driver by downloading and installing a new\nversion from the URL: …",
            "No NVIDIA GPU can be used: The NVIDIA driver on your system is too old (found "
            "version 11040).",
        ),
        (
            "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU.",
            "No NVIDIA GPU can be used: Found no NVIDIA driver on your system.",
        ),
        (None, "No NVIDIA GPU can be used: the driver shows none."),
    ],
)
def test_a_torch_with_cuda_that_finds_no_gpu(monkeypatch, said, sentence):
    """As torch with CUDA behaves on a machine whose driver is old or missing."""

    def init():
        if said is not None:
            raise RuntimeError(said)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert flavors.cuda_fault() == sentence
    assert flavors.gpu() == flavors.NO_GPU


def test_a_torch_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert flavors.cuda_fault().endswith("was built without CUDA, so no NVIDIA GPU can be used.")


def test_a_gpu_that_tensorrt_for_rtx_does_not_know(toolkit):
    said = flavors.unsuited(toolkit, flavors.Gpu("NVIDIA H100", "9.0"))
    assert said.startswith("TensorRT for RTX 1.")
    assert "does not know the NVIDIA H100 (compute capability 9.0)" in said
    assert "prenet4d[gpu]" in said
    assert flavors.unsuited(toolkit, flavors.Gpu("NVIDIA RTX 4090", "8.9")) is None
    assert flavors.unsuited(toolkit, flavors.NO_GPU) is None
    ordinary = flavors.Toolkit("tensorrt", toolkit.module)
    assert flavors.unsuited(ordinary, flavors.Gpu("NVIDIA H100", "9.0")) is None
