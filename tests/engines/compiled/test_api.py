"""All that is used of TensorRT's API exists in TensorRT 10, in TensorRT 11 and in that for RTX."""

import ast
import inspect
import json
import re
from pathlib import Path

import pytest

from prenet4d_engines.backends import tensorrt
from prenet4d_engines.backends.tensorrt import api, flavors

DATA = json.loads(Path(__file__).with_name("api.json").read_text())
VERSIONS = [name for name in DATA if name != "origin"]
PROTOCOLS = {
    name: member
    for name, member in vars(api).items()
    if inspect.isclass(member) and getattr(member, "_is_protocol", False) and name != "Protocol"
}
ONLY_RTX = {
    "RtxRuntimeConfig",
    "RtxCudaEngine",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
}


def real_name(protocol):
    """The TensorRT class that a protocol stands for: the first word of its docstring."""
    return re.match(r"``(\w+)``", protocol.__doc__).group(1)


def members(protocol):
    """Names of the protocol's own members, and the parameters of its methods."""
    found = dict.fromkeys(protocol.__annotations__)
    for name, member in vars(protocol).items():
        if name.startswith("_"):
            continue
        if inspect.isfunction(member):
            found[name] = [each for each in inspect.signature(member).parameters if each != "self"]
        elif isinstance(member, property):
            found[name] = None
    return found


USED = [
    (real_name(protocol), name, parameters)
    for key, protocol in PROTOCOLS.items()
    if key not in ONLY_RTX and not key.endswith("Module")
    for name, parameters in members(protocol).items()
]


def fault(version, owner, name, parameters=None):
    """What is wrong with a use of the API; None if nothing is."""
    have = DATA[version].get(owner, {})
    if name not in have:
        return f"{owner}.{name} does not exist in TensorRT {version}"
    signature = have[name]
    if parameters is not None and signature.startswith("("):
        each = re.split(r", (?=\w+: )", signature[1 : signature.rindex(") ->")])
        expected = [parameter.partition(":")[0] for parameter in each if parameter]
        required = [parameter for parameter in each if parameter and " = " not in parameter]
        if parameters != expected[: len(parameters)] or len(parameters) < len(required):
            return f"{owner}.{name} is {signature} in TensorRT {version}, used with {parameters}"
    return None


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_used_exists(version):
    assert len(USED) > 35
    assert [found for use in USED if (found := fault(version, *use))] == []


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_assigned_can_be(version):
    assert DATA[version]["IBuilderConfig"]["progress_monitor"] == "property rw"


def test_the_check_bites():
    """The switches for half precision are gone in 11: whoever used them would be told."""
    assert fault("10.16.1", "BuilderFlag", "FP16") is None
    assert "does not exist" in fault("11.4.0", "BuilderFlag", "FP16")
    assert "used with" in fault("11.4.0", "OnnxParser", "parse", ["file"])
    assert "used with" in fault("11.4.0", "IExecutionContext", "set_tensor_address", ["name"])


def chains(tree):
    """Every a.b.c in a syntax tree that begins with the name ``module``."""
    for node in ast.walk(tree):
        names, inner = [], node
        while isinstance(inner, ast.Attribute):
            names.insert(0, inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id == "module" and len(names) > 1:
            yield names[:2]


def test_what_types_cannot_see_exists_too():
    """The two classes that are derived from are untyped; what is taken from them is found here."""
    folder = Path(tensorrt.__file__).parent
    used = {
        tuple(names)
        for path in folder.glob("*.py")
        for names in chains(ast.parse(path.read_text()))
        if not names[0].startswith("__") and not names[1].startswith("__")
    }
    assert ("ILogger", "ERROR") in used
    for version in VERSIONS:
        assert [each for each in used if fault(version, *each)] == []


def test_the_installed_tensorrt_has_it_all(toolkit):
    """The classes of the bindings that CI builds with, those that RTX has alone included."""
    missing = [
        f"{owner}.{name}"
        for owner, name, _ in USED
        if not hasattr(getattr(toolkit.module, owner), name)
    ]
    for key in ONLY_RTX:
        real = getattr(toolkit.module, real_name(PROTOCOLS[key]))
        missing += [f"{key}.{name}" for name in members(PROTOCOLS[key]) if not hasattr(real, name)]
    assert missing == []


def test_what_is_not_installed_is_told_with_the_way_to_get_it(monkeypatch):
    monkeypatch.setitem(flavors._MODULES, "tensorrt", ("no_such_tensorrt",))
    monkeypatch.setitem(flavors._MODULES, "tensorrt_rtx", ("no_such_tensorrt_rtx",))
    assert flavors.installed() == []
    with pytest.raises(flavors.BackendError, match=r"prenet4d\[gpu\].*pypi\.nvidia\.com") as none:
        flavors.load()
    assert "prenet4d[rtx]" in str(none.value)
    with pytest.raises(flavors.BackendError, match=r"for RTX is not installed.*prenet4d\[rtx\]"):
        flavors.load("tensorrt_rtx")


def test_a_folder_of_that_name_is_no_tensorrt(monkeypatch, tmp_path):
    (tmp_path / "tensorrt_folder").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(flavors._MODULES, "tensorrt", ("tensorrt_folder",))
    assert "tensorrt" not in flavors.installed()
