"""The engine protocol: what a backend must do, and nothing about how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.device import Values

PRECISIONS = ("fp32", "bf16")
"""What ``--precision`` takes. An engine that is given fp32 may not compute in less."""


class Session(Protocol):
    """One graph opened in an engine."""

    def run(self, feeds: Values) -> list[Any]:
        """Run the graph; outputs in the graph's order, in memory that the next run leaves alone.

        numpy arrays in, numpy arrays out. A session with a ``device`` takes the device's arrays too, and gives such arrays
        where at least one input is one (:mod:`mteo_deploy.engines.device`).

        Raises:
            EngineError: for inputs that the graph does not take, or lacks; for a session that was closed.
        """

    def save(self, directory: Path, graph: str) -> None:
        """Leave what opens this graph faster next time; nothing, where an engine has no such thing."""

    def close(self) -> None:
        """Free what the session holds; closing it again does nothing."""


@dataclass(frozen=True)
class Layer:
    """One layer as the engine runs it, which may be several nodes of the graph in one.

    Attributes:
        kind: the engine's name for what it does, e.g. ``Conv``.
        times: of every run, in milliseconds.
    """

    name: str
    kind: str
    times: list[float] = field(default_factory=list)


class ProfiledSession(Session, Protocol):
    """A session that tells the time of its layers."""

    def layers(self) -> list[Layer]:
        """Every layer that ran since the session was opened, in order; ends the profiling."""


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

    def profile(self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], batch: int) -> ProfiledSession:
        """Open one graph so that its layers are timed, for runs of ``batch`` images.

        Raises:
            EngineError: as :meth:`open`, and by an engine that does not tell.
        """


OpenGraph = Callable[[str], Session]
