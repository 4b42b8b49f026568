"""How much memory there is: the machine's, or what a container's limit leaves of it."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from prenet4d_server import memory
from prenet4d_server.errors import ServiceError
from prenet4d_server.ingest.ring import RingReader


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The kernel's figures of a container: 100 MiB, 70 taken, 30 of them by a cache."""
    (tmp_path / "memory.max").write_text(f"{100 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{70 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {30 << 20}\nslab 2\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    return tmp_path


def test_a_containers_limit_counts_and_its_cache_is_free(container: Path) -> None:
    assert memory.available() == (60 << 20, 100 << 20)
    RingReader(40 << 20).close()
    with pytest.raises(ServiceError, match="60 MiB of memory are free"):
        RingReader(50 << 20)


def test_without_a_limit_it_is_the_machines(container: Path) -> None:
    total = psutil.virtual_memory().total
    (container / "memory.max").write_text("max\n")
    assert memory.available()[1] == total
    (container / "memory.max").unlink()
    assert memory.available()[1] == total
