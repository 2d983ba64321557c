"""The engine protocol: what a backend must do, and nothing about how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle


class Session(Protocol):
    """One graph opened in an engine."""

    def run(self, feeds: Mapping[str, NDArray[np.float32]]) -> list[NDArray[np.float32]]:
        """Run the graph; outputs in the graph's order."""


class Backend(Protocol):
    """One engine. ``name`` is what ``--engine`` takes."""

    name: str

    def version(self) -> str:
        """Version of the engine's package.

        Raises:
            MissingPackageError: naming the extra to install.
        """

    def devices(self) -> list[str]:
        """Devices this engine can be asked for here."""

    def open(self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any]) -> Session:
        """Open one graph of a bundle on a device.

        Raises:
            EngineError: when the engine refuses the graph, or would run it on another device.
        """


OpenGraph = Callable[[str], Session]
