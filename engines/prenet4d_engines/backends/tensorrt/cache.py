"""Plans on disk: only those made here, for what is here, are ever loaded.

A plan is executable code. So each lies beside a document (JSON) that says what it was made from and
where, its SHA-256, and how far its answers were from float32; a seal (HMAC-SHA-256) under a secret
of this cache proves that the document was written here. Files appear whole or not at all, and the
document, which names its plan, comes last: readers need no lock.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from prenet4d_engines.backends.parity import Deviation
from prenet4d_engines.backends.tensorrt.flavors import Flavor, Gpu
from prenet4d_engines.errors import BackendError
from prenet4d_engines.weights import Name
from prenet4d_engines.whole_file import write_whole

_SECRET: Final = "secret"
_LOCK: Final = "lock"
_KEY: Final = 32 * "[0-9a-f]"
"""How our files' names begin: whoever names a folder of other things as the cache loses none."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Recipe(_Document):
    """All that an engine depends on; its hash names the engine's files."""

    network: Name
    input_shape: tuple[int, int, int]
    """(C, H, W) of one item."""
    graph_sha256: str
    flavor: Flavor
    version: str
    gpu: str
    capability: str
    batch: int
    """Items that it takes at a time."""

    @property
    def key(self) -> str:
        """Hash of everything above."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:32]


class Sidecar(_Document):
    """What is known about a plan."""

    format: Literal[1] = 1
    recipe: Recipe
    source_sha256: str
    """Of the weights and the code that the graph was exported from (``export.source_sha256``)."""
    plan: str
    """The plan's file name."""
    plan_sha256: str
    plan_bytes: int
    frame_shape: tuple[int, int]
    """Of the patterns that it was compared on."""
    flop: int
    """Per item."""
    activation_bytes: int
    """Per item, at the least."""
    parity: Deviation | None
    """How far the engine is from float32; ``None``: there was no GPU to run it on."""
    built: datetime
    seconds: float
    seal: str = ""

    def sealed(self, secret: bytes) -> Sidecar:
        """Return the document with its seal."""
        return self.model_copy(update={"seal": self._seal(secret)})

    def is_sealed(self, secret: bytes) -> bool:
        """Say whether it was sealed with this secret and not altered since."""
        return hmac.compare_digest(self.seal, self._seal(secret))

    def _seal(self, secret: bytes) -> str:
        return hmac.new(
            secret, self.model_dump_json(exclude={"seal"}).encode(), "sha256"
        ).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A document in the cache, and what is to be said of it.

    Attributes:
        path: The document's file.
        sidecar: What it says; ``None`` if it cannot be read or was not written here.
        fault: Why its plan is never loaded; ``None`` if nothing is wrong with the files.
    """

    path: Path
    sidecar: Sidecar | None
    fault: str | None


class EngineCache:
    """The folder with the plans of this machine.

    Args:
        folder: Where; unset: ``prenet4d/engines`` in the user's cache folder.

    Raises:
        BackendError: others than the user may write there, or there is no such folder.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder or default_folder()
        if self.folder.exists() and os.name == "posix" and self.folder.stat().st_mode & 0o022:
            raise BackendError(
                f"Others may write to {self.folder}, and engines are executable code: "
                f"chmod go-w {self.folder}"
            )

    def entries(self) -> list[Entry]:
        """Return all documents, each checked: what it says, its seal, its plan's SHA-256."""
        if not self.folder.is_dir():
            return []
        return [self._checked(path) for path in sorted(self.folder.glob(f"{_KEY}.json"))]

    def find(self, recipe: Recipe) -> Sidecar | None:
        """Return the document of a recipe's plan if both are whole, else ``None``."""
        entry = self._checked(self.folder / f"{recipe.key}.json")
        return entry.sidecar if entry.fault is None else None

    def usable(self, flavor: Flavor, version: str, gpu: Gpu, source_sha256: str) -> list[Sidecar]:
        """Return what may be loaded here and now.

        That is: made with this version of TensorRT for this GPU, from the sources that are
        installed, compared with float32, and whole.
        """
        sidecars = [entry.sidecar for entry in self.entries() if entry.fault is None]
        return [
            sidecar
            for sidecar in sidecars
            if sidecar is not None and misfit(sidecar, flavor, version, gpu, source_sha256) is None
        ]

    def load(self, sidecar: Sidecar) -> bytes:
        """Return a plan, read once and checked as read.

        Raises:
            BackendError: the plan is missing, or not the one that the document describes.
        """
        fault, data = self._plan(sidecar)
        if fault is not None:
            raise BackendError(f"The engine {sidecar.plan} is refused: {fault}. Build it again.")
        return data

    def store(self, sidecar: Sidecar, plan: bytes) -> Sidecar:
        """Write a plan and its document, sealed, while `building`; return the document."""
        sidecar = sidecar.sealed(self._secret_made())
        write_whole(self.folder / sidecar.plan, plan)
        document = sidecar.model_dump_json(indent=2) + "\n"
        write_whole(self.folder / f"{sidecar.recipe.key}.json", document.encode())
        return sidecar

    def timing(self, flavor: Flavor, version: str, gpu: Gpu) -> bytes:
        """Return the timing cache for a version of TensorRT on a GPU; empty if there is none."""
        secret = self._secret()
        try:
            blob = self._timing_path(flavor, version, gpu).read_bytes()
        except FileNotFoundError:
            return b""
        seal, data = blob[:32], blob[32:]
        whole = secret is not None and hmac.compare_digest(
            seal, hmac.digest(secret, data, "sha256")
        )
        return data if whole else b""

    def store_timing(self, flavor: Flavor, version: str, gpu: Gpu, data: bytes) -> None:
        """Keep a timing cache for the next build, while `building`."""
        seal = hmac.digest(self._secret_made(), data, "sha256")
        write_whole(self._timing_path(flavor, version, gpu), seal + data)

    def remove(self, entries: list[Entry]) -> int:
        """Remove documents and every plan that none names any more; return the bytes freed."""
        freed = sum(_remove(entry.path) for entry in entries)
        named = {entry.sidecar.plan for entry in self.entries() if entry.sidecar is not None}
        unnamed = [path for path in self.folder.glob(f"{_KEY}*.plan") if path.name not in named]
        return freed + sum(_remove(path) for path in unnamed)

    def remove_timings(self) -> int:
        """Remove the timing caches; return the bytes freed."""
        return sum(_remove(path) for path in self.folder.glob("timing-*.cache"))

    @contextmanager
    def building(self, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Let one process at a time change this cache; others wait here.

        Args:
            on_wait: Called once if there is somebody to wait for.

        Raises:
            OSError: the folder cannot be written to.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if on_wait is not None:
                on_wait()
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _checked(self, path: Path) -> Entry:
        try:
            sidecar = Sidecar.model_validate_json(path.read_bytes())
        except OSError as error:
            return Entry(path, None, f"its document cannot be read ({error.strerror})")
        except ValidationError:
            return Entry(path, None, "its document is damaged, or of another version of prenet4d")
        secret = self._secret()
        if secret is None or not sidecar.is_sealed(secret):
            return Entry(path, None, "it was not made here, or its document was altered")
        if path.name != f"{sidecar.recipe.key}.json":
            return Entry(path, None, "its document was renamed")
        return Entry(path, sidecar, self._plan(sidecar)[0])

    def _plan(self, sidecar: Sidecar) -> tuple[str | None, bytes]:
        """Return what is wrong with a plan, and its bytes."""
        if Path(sidecar.plan).name != sidecar.plan:
            return "its document points elsewhere", b""
        try:
            data = (self.folder / sidecar.plan).read_bytes()
        except OSError as error:
            return f"its plan cannot be read ({error.strerror})", b""
        if hashlib.sha256(data).hexdigest() != sidecar.plan_sha256:
            return "its plan was altered", b""
        return None, data

    def _secret(self) -> bytes | None:
        try:
            return (self.folder / _SECRET).read_bytes()
        except FileNotFoundError:
            return None

    def _secret_made(self) -> bytes:
        """Return this cache's secret, made first where there is none; call it while building."""
        if self._secret() is None:
            write_whole(self.folder / _SECRET, secrets.token_bytes(32), private=True)
        return (self.folder / _SECRET).read_bytes()

    def _timing_path(self, flavor: Flavor, version: str, gpu: Gpu) -> Path:
        where = f"{flavor} {version} {gpu.name} {gpu.capability}"
        return self.folder / f"timing-{hashlib.sha256(where.encode()).hexdigest()[:16]}.cache"


def default_folder() -> Path:
    """Return where engines lie unless a folder is given.

    Raises:
        BackendError: the user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "prenet4d" / "engines"
    except RuntimeError as error:
        raise BackendError(
            "There is no home folder to keep engines in: set XDG_CACHE_HOME, or corrector.engines "
            "and --cache."
        ) from error


def misfit(
    sidecar: Sidecar, flavor: Flavor, version: str, gpu: Gpu, source_sha256: str
) -> str | None:
    """Say why a whole plan does not fit what is here and now; ``None`` if it does."""
    recipe = sidecar.recipe
    if (recipe.flavor, recipe.version) != (flavor, version):
        return f"made with {recipe.flavor} {recipe.version}"
    if (recipe.gpu, recipe.capability) != (gpu.name, gpu.capability):
        return f"made for {'no GPU' if recipe.gpu == 'none' else recipe.gpu}"
    if sidecar.source_sha256 != source_sha256:
        return "made from other weights, networks or torch than are installed"
    if sidecar.parity is None:
        return "never compared with float32: there was no GPU to run it on"
    return None


def now() -> datetime:
    """Return the time of a build."""
    return datetime.now(UTC)


def _remove(path: Path) -> int:
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size
