"""What a classical method is to the evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Generic, TypeVar

Run = TypeVar("Run", bound=Callable[..., object])


@dataclass(frozen=True)
class Method(Generic[Run]):
    """One classical method.

    Attributes:
        name: How tables and plots call it.
        source: Where the method comes from.
        run: The method; takes its input, then one of ``settings`` as further arguments.
        settings: Parameter sets to try; the best one on the truth is reported.
        needs: Import name of the package that it needs beyond scipy, if any.
        install: What to give to pip for it.
    """

    name: str
    source: str
    run: Run
    settings: tuple[tuple[float, ...], ...] = ((),)
    needs: str | None = None
    install: str = "prenet4d[bench]"

    @property
    def installed(self) -> bool:
        """Whether the package that the method needs is here."""
        return self.needs is None or find_spec(self.needs) is not None
