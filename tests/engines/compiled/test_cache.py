"""A plan is executable code: only what was made here, for what is here, is ever loaded."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from prenet4d_engines.backends.parity import Deviation
from prenet4d_engines.backends.tensorrt.cache import EngineCache, Recipe, Sidecar, misfit, now
from prenet4d_engines.backends.tensorrt.flavors import Gpu
from prenet4d_engines.backends.tensorrt.making import make_one
from prenet4d_engines.errors import BackendError

no_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="TensorRT for RTX may not know the GPU that is here"
)
GPU = Gpu("NVIDIA Imaginary", "9.0")
PLAN = b"machine code"
HERE = ("tensorrt", "10.16.1", GPU, "source")


def document(**changes):
    recipe = Recipe(
        network="center",
        input_shape=(6, 128, 128),
        graph_sha256="graph",
        flavor="tensorrt",
        version="10.16.1",
        gpu=GPU.name,
        capability=GPU.capability,
        batch=16,
    ).model_copy(update={name: v for name, v in changes.items() if name in Recipe.model_fields})
    made = Sidecar(
        recipe=recipe,
        source_sha256="source",
        plan=f"{recipe.key}.plan",
        plan_sha256=hashlib.sha256(PLAN).hexdigest(),
        plan_bytes=len(PLAN),
        frame_shape=(128, 128),
        flop=1,
        activation_bytes=1,
        parity=Deviation("center", 0.001, 0.0002),
        built=now(),
        seconds=1.5,
    )
    return made.model_copy(
        update={name: v for name, v in changes.items() if name in Sidecar.model_fields}
    )


@pytest.fixture
def cache(tmp_path):
    return EngineCache(tmp_path / "engines")


def stored(cache, **changes):
    with cache.building():
        return cache.store(document(**changes), PLAN)


def fault(cache):
    (entry,) = cache.entries()
    return entry.fault


def test_what_was_made_here_is_loaded(cache):
    made = stored(cache)
    assert cache.find(made.recipe) == made
    assert cache.usable(*HERE) == [made]
    assert cache.load(made) == PLAN
    assert fault(cache) is None
    assert EngineCache(cache.folder).load(made) == PLAN


def test_an_empty_cache_is_no_error(cache):
    assert cache.entries() == []
    assert cache.usable(*HERE) == []
    assert cache.find(document().recipe) is None


def test_an_altered_plan_is_refused(cache):
    made = stored(cache)
    path = cache.folder / made.plan
    path.write_bytes(PLAN[:-1] + b"!")
    assert fault(cache) == "its plan was altered"
    assert cache.usable(*HERE) == []
    assert cache.find(made.recipe) is None
    with pytest.raises(BackendError, match="its plan was altered"):
        cache.load(made)
    path.unlink()
    with pytest.raises(BackendError, match="cannot be read"):
        cache.load(made)


@pytest.mark.parametrize(
    "change",
    [
        {"plan_sha256": "0" * 64},
        {"source_sha256": "other"},
        {"parity": {"network": "center", "physical": 0.0, "relative": 0.0}},
        {"seal": ""},
        {"seal": "0" * 64},
        {"plan": "../other.plan"},
    ],
)
def test_an_altered_document_is_refused(cache, change):
    stored(cache)
    (entry,) = cache.entries()
    entry.path.write_text(json.dumps(json.loads(entry.path.read_text()) | change))
    assert "not made here" in fault(cache)
    assert cache.usable(*HERE) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 2}', "\udcff"])
def test_what_is_no_document_is_refused(cache, text):
    stored(cache)
    (entry,) = cache.entries()
    entry.path.write_bytes(text.encode(errors="surrogateescape"))
    assert "damaged" in fault(cache)


def test_an_engine_from_another_machine_is_refused(cache, tmp_path):
    """The same GPU, the same versions, a whole plan and its own document: but not made here."""
    elsewhere = EngineCache(tmp_path / "elsewhere")
    made = stored(elsewhere)
    stored(cache, batch=1)
    for name in (made.plan, f"{made.recipe.key}.json"):
        (cache.folder / name).write_bytes((elsewhere.folder / name).read_bytes())
    assert [each.recipe.batch for each in cache.usable(*HERE)] == [1]
    assert cache.find(made.recipe) is None
    (cache.folder / "secret").unlink()
    assert cache.usable(*HERE) == []


def test_a_document_under_another_name_is_refused(cache):
    made = stored(cache)
    path = cache.folder / f"{made.recipe.key}.json"
    path.rename(cache.folder / f"{document(batch=1).recipe.key}.json")
    assert "renamed" in fault(cache)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"version": "10.13.0"}, "made with tensorrt 10.13.0"),
        ({"flavor": "tensorrt_rtx"}, "made with tensorrt_rtx"),
        ({"gpu": "NVIDIA Other"}, "made for NVIDIA Other"),
        ({"capability": "8.9"}, "made for NVIDIA Imaginary"),
        ({"gpu": "none", "capability": "none"}, "made for no GPU"),
        ({"source_sha256": "older"}, "made from other weights, networks or torch"),
        ({"parity": None}, "never compared with float32"),
    ],
)
def test_what_was_made_for_something_else_is_never_loaded(cache, change, why):
    made = stored(cache, **change)
    assert why in misfit(made, *HERE)
    assert cache.usable(*HERE) == []


def test_different_recipes_have_different_names():
    changes = [{}, {"batch": 1}, {"graph_sha256": "x"}, {"version": "11"}, {"gpu": "y"}]
    assert len({document(**change).recipe.key for change in changes}) == len(changes)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_a_folder_that_others_may_write_to_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(BackendError, match="chmod go-w"):
        EngineCache(tmp_path)


def test_the_folder_is_the_users_own(cache):
    stored(cache)
    if os.name == "posix":
        assert cache.folder.stat().st_mode & 0o777 == 0o700
        assert (cache.folder / "secret").stat().st_mode & 0o777 == 0o600


def test_removing_frees_plans_that_nothing_names(cache):
    kept, gone = stored(cache), stored(cache, batch=1)
    (cache.folder / f"{'0' * 32}-left.plan").write_bytes(b"from a build that was cut short")
    entries = [entry for entry in cache.entries() if entry.sidecar == gone]
    freed = cache.remove(entries)
    assert freed > len(PLAN)
    assert {path.name for path in cache.folder.glob("*.plan")} == {kept.plan}
    assert cache.usable(*HERE) == [kept]


def test_timing_caches_come_back_unless_they_were_altered(cache):
    where = ("tensorrt", "10.16.1", GPU)
    assert cache.timing(*where) == b""
    with cache.building():
        cache.store_timing(*where, b"timings")
    assert cache.timing(*where) == b"timings"
    assert cache.timing("tensorrt", "11.4.0", GPU) == b""
    (path,) = cache.folder.glob("timing-*")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    assert cache.timing(*where) == b""


def test_nothing_half_written_is_left(cache, monkeypatch):
    """A crash between writing and renaming: the old engine stays, whole."""
    made = stored(cache)

    def crash(*_):
        raise OSError(errno.EIO, "the power went")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="the power went"):
        stored(cache)
    assert cache.usable(*HERE) == [made]
    assert not [
        path for path in cache.folder.iterdir() if path.suffix not in (".json", ".plan", "")
    ]


SCRIPT = """
import sys
from pathlib import Path
from prenet4d_engines.backends.tensorrt import flavors
from prenet4d_engines.backends.tensorrt.cache import EngineCache
from prenet4d_engines.backends.tensorrt.making import make_one
from prenet4d_engines.export import Graph
graph = Graph("ellipse", (6, 256, 128), Path(sys.argv[1]).read_bytes())
toolkit, cache = flavors.load("tensorrt_rtx"), EngineCache(Path(sys.argv[2]))
made = make_one(graph, 1, (128, 128), toolkit, cache)
print("kept" if made.kept else "built")
"""


@no_gpu
def test_two_processes_that_build_at_once_do_each_others_work(graphs, toolkit, tmp_path):
    """One builds, the other waits for it and finds the engine made; both agree on what it is."""
    graph, folder = tmp_path / "graph.onnx", tmp_path / "engines"
    graph.write_bytes(graphs["ellipse"].model)
    command = [sys.executable, "-c", SCRIPT, str(graph), str(folder)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate()[0].strip() for process in both)
    assert said == ["built", "kept"]
    (entry,) = EngineCache(folder).entries()
    assert entry.fault is None
    assert entry.sidecar.recipe.graph_sha256 == graphs["ellipse"].sha256
    again = make_one(graphs["ellipse"], 1, (128, 128), toolkit, EngineCache(folder))
    assert again.kept


@no_gpu
def test_an_altered_engine_is_built_again(graphs, toolkit, tmp_path):
    cache = EngineCache(tmp_path / "engines")
    made = make_one(graphs["ellipse"], 1, (128, 128), toolkit, cache).sidecar
    assert made.flop > 1e8
    (cache.folder / made.plan).write_bytes(b"something else")
    again = make_one(graphs["ellipse"], 1, (128, 128), toolkit, cache)
    assert not again.kept
    assert len(cache.load(again.sidecar)) == again.sidecar.plan_bytes
    assert make_one(graphs["ellipse"], 1, (128, 128), toolkit, cache).kept


@no_gpu
def test_other_sources_with_the_same_graph_need_no_new_build(graphs, toolkit, tmp_path):
    cache = EngineCache(tmp_path / "engines")
    made = make_one(graphs["ellipse"], 1, (128, 128), toolkit, cache).sidecar
    with cache.building():
        cache.store(made.model_copy(update={"source_sha256": "older"}), cache.load(made))
    again = make_one(graphs["ellipse"], 1, (128, 128), toolkit, cache)
    assert again.kept
    assert again.sidecar.source_sha256 == made.source_sha256
