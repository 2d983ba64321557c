"""The engine protocol: what a backend must do, and nothing about how."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mteo_deploy.bundle import Bundle
from mteo_deploy.engines.device import Values
from mteo_deploy.progress import Reporter


class Session(Protocol):
    """One graph opened in an engine. Any number of threads may run it, and get what one thread would get."""

    def run(self, feeds: Values) -> list[Any]:
        """Run the graph; outputs in the graph's order, in memory that the next run leaves alone.

        numpy arrays in, numpy arrays out. A session with a ``device`` takes the device's arrays too, and gives such arrays
        where at least one input is one (:mod:`mteo_deploy.engines.device`).

        Raises:
            EngineError: for inputs that the graph does not take, or lacks; for a session that was closed, or that was opened by
                another process, which then forked.
        """

    def save(self, directory: Path, graph: str) -> None:
        """Leave what opens this graph faster next time; nothing, where an engine has no such thing."""

    def close(self) -> None:
        """Wait for the runs of other threads, then free what the session holds; closing it again does nothing."""


ON_OFF = ("off", "on")


@dataclass(frozen=True)
class Option:
    """A setting that belongs to one engine: ``--option NAME=VALUE``.

    Attributes:
        help: what it does, in one line.
        values: the words it takes, a range of integers, or :class:`~pathlib.Path` for the name of a file.
        default: what holds where it is not given; None: the engine's own choice.
        keyed: whether another value makes another built engine.
        needs: the option that must be on for this one to be given.
        excludes: options that must not be on where this one is, and why not.
    """

    help: str
    values: tuple[str, ...] | range | type[Path]
    default: str | int | None = None
    keyed: bool = True
    needs: str | None = None
    excludes: Mapping[str, str] = field(default_factory=dict)

    @property
    def takes(self) -> str:
        """What it takes, in words."""
        if isinstance(self.values, range):
            return f"{self.values.start} to {self.values.stop - 1}"
        return " or ".join(self.values) if isinstance(self.values, tuple) else "a file"

    def read(self, given: object) -> str | int | None:
        """The value that was meant, from the command line's text or from Python; None for what it does not take."""
        text = {True: "on", False: "off"}[given] if isinstance(given, bool) else str(given)
        if isinstance(self.values, range):
            return int(text) if text.isdecimal() and int(text) in self.values else None
        return text if text and (not isinstance(self.values, tuple) or text in self.values) else None


MMAP = Option("weights are bytes of the bundle's files, which must not be written to meanwhile; or memory", ON_OFF, "on")
"""Of the engines that map files."""


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
        precisions: out of :data:`mteo_deploy.precision.HINTS`, those it can compute in.
        engine_options: name -> option that this engine alone gives a meaning.
    """

    name: str
    extra: str
    precisions: tuple[str, ...]
    engine_options: Mapping[str, Option]

    def version(self) -> str:
        """Version of the engine's package.

        Raises:
            MissingPackageError: naming the extra to install.
        """

    def devices(self) -> list[str]:
        """Devices this engine can be asked for here, the fastest first."""

    def runs(self, device: str) -> tuple[str, ...]:
        """Out of :data:`mteo_deploy.precision.NAMES`, the precisions of graphs that it has every layer for on a device."""

    def machine(self, device: str, options: Mapping[str, Any]) -> str:
        """What a built engine must not be taken away from: the kind of machine it was compiled for, with these options."""

    def open(
        self,
        bundle: Bundle,
        graph: str,
        device: str,
        options: Mapping[str, Any],
        built: Path | None = None,
        report: Reporter | None = None,
    ) -> Session:
        """Open one graph of a bundle on a device.

        Args:
            options: ``precision``, ``threads``, ``batch`` (sizes to compile for, the first one above all), and
                ``engine_options``; all optional, and in the key of the built engine.
            built: directory of the built engine, with what :meth:`Session.save` left.
            report: what a build that takes long reports to; None where nothing is built, or nobody looks.

        Raises:
            EngineError: when the engine refuses the graph, or would run it on another device.
        """

    def profile(
        self, bundle: Bundle, graph: str, device: str, options: Mapping[str, Any], batch: int, built: Path | None = None
    ) -> ProfiledSession:
        """Open one graph so that its layers are timed, for runs of ``batch`` images; the rest as :meth:`open`.

        Raises:
            EngineError: as :meth:`open`, and by an engine that does not tell.
        """


OpenGraph = Callable[[str], Session]
