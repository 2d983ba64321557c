"""The engine protocol: what a backend must do, and nothing about how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle

PRECISIONS = ("fp32", "bf16")
"""What ``--precision`` takes. An engine that is given fp32 may not compute in less."""


class Session(Protocol):
    """One graph opened in an engine."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[np.float32]]:
        """Run the graph; outputs in the graph's order, in memory that the next run leaves alone.

        Raises:
            EngineError: for inputs that the graph does not take, or lacks.
        """

    def save(self, directory: Path, graph: str) -> None:
        """Leave what opens this graph faster next time; nothing, where an engine has no such thing."""


class Backend(Protocol):
    """One engine.

    Attributes:
        name: what ``--engine`` takes.
        extra: what ``pip install 'mteo-deploy[extra]'`` installs it.
        precisions: out of :data:`PRECISIONS`, those it can compute in.
    """

    name: str
    extra: str
    precisions: tuple[str, ...]

    def version(self) -> str:
        """Version of the engine's package.

        Raises:
            MissingPackageError: naming the extra to install.
        """

    def devices(self) -> list[str]:
        """Devices this engine can be asked for here, the fastest first."""

    def machine(self, device: str) -> str:
        """What a built engine must not be taken away from: the kind of machine it was compiled for."""

    def open(self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], built: Path | None = None) -> Session:
        """Open one graph of a bundle on a device.

        Args:
            options: ``precision``, ``threads``, ``batch`` (sizes to compile for); all optional, and all in the key of the
                built engine.
            built: directory of the built engine, with what :meth:`Session.save` left.

        Raises:
            EngineError: when the engine refuses the graph, or would run it on another device.
        """


OpenGraph = Callable[[str], Session]
