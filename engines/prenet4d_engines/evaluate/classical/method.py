"""What a classical method is to the evaluation."""

from __future__ import annotations

import os
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
        variable: Environment variable that names another Python to run the method in, if it
            needs one.
    """

    name: str
    source: str
    run: Run
    settings: tuple[tuple[float, ...], ...] = ((),)
    needs: str | None = None
    install: str = "prenet4d[bench]"
    variable: str | None = None

    @property
    def installed(self) -> bool:
        """Whether what the method needs is here."""
        if self.variable is not None:
            return bool(os.environ.get(self.variable))
        return self.needs is None or find_spec(self.needs) is not None

    @property
    def missing(self) -> str:
        """A sentence on what to do where the method is not installed."""
        if self.variable is not None:
            return (
                f"{self.name}: set {self.variable} to the Python of an environment that has"
                f" {self.needs} ({self.install})"
            )
        return f"{self.name}: {self.needs} is not installed (pip install '{self.install}')"
