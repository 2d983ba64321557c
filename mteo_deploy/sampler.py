"""The sampling loop: numpy and one engine package, nothing else.

Noise comes from a counter-based generator keyed by (seed, image index), so an image does not depend on the batch size
it was made with.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from mteo_deploy import latency
from mteo_deploy.bundle import Bundle
from mteo_deploy.decoding import decode_states, tile_of
from mteo_deploy.engines.base import OpenGraph, Session
from mteo_deploy.engines.batches import at_any_size
from mteo_deploy.engines.device import Device, Value, Values, device_of
from mteo_deploy.engines.turns import Turns
from mteo_deploy.errors import EngineError, InputError
from mteo_deploy.plan import Plan, run
from mteo_deploy.prompts import Texts, encode, open_tokenizers, request_inputs
from mteo_deploy.realisations import Loop, Prelude, Stepwise, open_loop
from mteo_deploy.requests import Arrays
from mteo_deploy.sample_request import SampleRequest, parts_of, together

if TYPE_CHECKING:
    from mteo_deploy.engines.cache import Built

Array = NDArray[np.float32]
PROMPTS_AT_ONCE = 16
"""Prompts that a text encoder is given in one call."""


def noise_for(shape: tuple[int, ...], seed: int, indices: Sequence[int]) -> Array:
    """Standard normal noise ``[len(indices), *shape]``; row ``k`` depends on ``(seed, indices[k])`` only.

    Philox4x64 (Salmon et al. 2011) with the seed and the index as its key.
    """
    if not 0 <= seed < 2**64:
        raise InputError(f"expected a seed in [0, 2**64); found {seed}")
    rows = [
        np.random.Generator(np.random.Philox(key=np.array([seed, i], dtype=np.uint64))).standard_normal(shape, dtype=np.float32)
        for i in indices
    ]
    return np.stack(rows)


def _states(prelude: Prelude, loop: Loop, feeds: Values) -> list[Value]:
    """One sampling, from the first state and the request inputs: the state after each evaluation."""
    requests = {name: value for name, value in feeds.items() if name != "state"}
    return loop.states(feeds["state"], prelude(requests))


def _image(prelude: Prelude, loop: Loop, feeds: Values) -> list[Value]:
    return _states(prelude, loop, feeds)[-1:]


def _closed(path: Path) -> EngineError:
    return EngineError(f"expected an open sampler; found one that was closed; run: Sampler.load({str(path)!r})")


class _Opened(NamedTuple):
    """What a sampler holds until it is closed."""

    loop: Loop
    prelude: Prelude
    device: Device
    states: Callable[[Arrays], list[Array]]
    image: Callable[[Arrays], list[Array]]
    open_graph: OpenGraph
    sessions: list[Session]


class Sampler:
    """A bundle opened in one engine. It holds the engine's sessions until it is closed, or nobody refers to it any more.

    Any number of threads may use it, and each gets the images that it would get alone. A process that forked, and one that is
    spawned, loads its own.

    >>> with Sampler.load("bundle") as sampler:     # doctest: +SKIP
    ...     images = sampler(num=4, seed=0)         # float32 [4, channels, height, width], nominally in [-1, 1]

    Attributes:
        decoding: seconds that decoding took of all calls until now, of all threads together.
    """

    def __init__(
        self,
        bundle: Bundle,
        open_graph: OpenGraph,
        realisation: str = "baked",
        tables: Bundle | None = None,
        built: Built | None = None,
    ) -> None:
        self.bundle, self.built = bundle, built
        self.plan = (tables or bundle).plan
        self._arguments = (bundle, open_graph, realisation, tables, built)
        batch, sessions = bundle.manifest["batch"], list[Session]()

        def opened(graph: str) -> Session:
            sessions.append(at_any_size(open_graph(graph), batch))
            return sessions[-1]

        self._others: dict[str, Session] = {}
        self.decoding, self._lock = 0.0, threading.RLock()
        loop, prelude = open_loop(realisation, bundle, opened, tables), Prelude(bundle, opened)
        device = device_of(sessions[0])
        states, image = (device.record(partial(function, prelude, loop)) for function in (_states, _image))
        everything = _Opened(loop, prelude, device, states, image, opened, sessions)
        self._opened: _Opened | None = everything
        self._turns = Turns(lambda: everything, refuse=partial(_closed, bundle.path))

    def __enter__(self) -> Sampler:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        """A sampler cannot be copied, nor sent to another process.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"expected the path of a bundle to send to another process; found an open sampler; run there: "
            f"Sampler.load({str(self.bundle.path)!r})"
        )

    def close(self) -> None:
        """Free the engine's sessions and what they hold; closing it again does nothing.

        Waits for loops that other threads are in; what these call next is refused. In a process that was forked from the one
        that opened the sampler it does nothing.

        Raises:
            EngineError: in the middle of a call of the same thread, as from the handler of a signal.
        """
        if not self._turns.close():
            return
        with self._lock:
            opened, self._others = self._opened, {}
            while opened and opened.sessions:
                opened.sessions[-1].close()
                opened.sessions.pop()
            self._opened = None

    @property
    def _now(self) -> _Opened:
        return self._turns.run(lambda opened: opened)

    @property
    def open_graph(self) -> OpenGraph:
        """Opens a graph of the bundle as its own ones; the session is closed with the sampler."""
        return self._now.open_graph

    @property
    def loop(self) -> Loop:
        """The realisation."""
        return self._now.loop

    @property
    def device(self) -> Device:
        """Where the arrays of its sessions lie."""
        return self._now.device

    @classmethod
    def load(
        cls,
        path: Path | str,
        *,
        engine: str = "auto",
        device: str | None = None,
        realisation: str | None = None,
        tables: Path | str | None = None,
    ) -> Sampler:
        """Open a bundle as ``build`` left it in the newest built engine.

        Args:
            engine: whose built engine to take; ``auto`` for any.
            device: on which device; None for any.
            realisation: ``baked``, ``table`` or ``fused``; None for what the built engine was built for.
            tables: another bundle of the same backbone, whose table and plan to use in this one's ``table`` engine: another
                embedding set or step count without another engine.

        Raises:
            BundleError: for a bundle that is not whole, or has no built engine that fits it as it is now.
            MissingPackageError: when the engine's package is not installed.
            EngineError: when the engine does not open the graphs on the device asked for.
        """
        from mteo_deploy.engines import cache

        bundle = Bundle.open(path)
        return cls.of(bundle, cache.find(bundle, engine, device), realisation, None if tables is None else Bundle.open(tables))

    @classmethod
    def of(cls, bundle: Bundle, built: Built, realisation: str | None = None, other: Bundle | None = None) -> Sampler:
        """Open a bundle in one of its built engines; arguments and errors as in :meth:`load`."""

        def open_graph(graph: str) -> Session:
            return built.backend.open(bundle, graph, built.device, built.options, built.directory)

        return cls(bundle, open_graph, realisation or ("table" if other else built.record["realisation"]), other, built)

    def reopen(self, around: Callable[[str, Session], Session] = lambda graph, session: session) -> Sampler:
        """A second sampler of the same kind, with engine sessions of its own.

        Args:
            around: from a graph's name and its session to the session to use.
        """
        bundle, open_graph, realisation, tables, built = self._arguments
        return Sampler(bundle, lambda graph: around(graph, open_graph(graph)), realisation, tables, built)

    def built_engine(self, what: str) -> Built:
        """The built engine it was opened from.

        Args:
            what: needs it, for the message.

        Raises:
            InputError: when it was opened from none.
        """
        if self.built is None:
            raise InputError(f"expected a built engine for {what}; found a sampler without one; use Sampler.load")
        return self.built

    @property
    def precision(self) -> str:
        """What the engine computes in: the graphs' types, and what it was built for, as :func:`mteo_deploy.precision.label`."""
        return self.built.precision if self.built else str(self.bundle.manifest["precision"])

    @property
    def hint(self) -> str:
        """What it was built to compute in where the graphs' types say no less: text encoder and decoder are float32."""
        return str(self.built.options.get("precision", "fp32")) if self.built else "fp32"

    @property
    def reference_plan(self) -> Plan:
        """The plan of the reference trajectory, to be run on the backbone with ordinary time conditioning."""
        return self.bundle.reference_plan

    def states(self, noise: Array, requests: Arrays | None = None) -> list[Array]:
        """Run the loop from standard normal noise: the state after each evaluation; the last one is the image.

        Raises:
            EngineError: for a sampler that was closed.
        """
        return self._turns.run(lambda opened: opened.states(self._feeds(noise, requests)))

    def image(self, noise: Array, requests: Arrays | None = None) -> Array:
        """Run the loop from standard normal noise: the last of :meth:`states`, which alone leaves the device."""
        return self._turns.run(lambda opened: opened.image(self._feeds(noise, requests)))[0]

    def _feeds(self, noise: Array, requests: Arrays | None) -> dict[str, NDArray[Any]]:
        return {"state": noise * np.float32(self.plan.initial_scale), **(requests or {})}

    def prepare(self, requests: Arrays) -> dict[str, Value]:
        """Run the prelude: request inputs and what depends on them alone, by name, on the device. Once per request."""
        return self._now.prelude({name: self.device.put(values) for name, values in requests.items()})

    def step(
        self, index: int, state: Value, history: Sequence[Value], request: Values | None = None
    ) -> tuple[Array, Array | None]:
        """Evaluation ``index`` alone: ``(next state, kept quantity or None)``; ``history`` is newest first.

        Args:
            request: what :meth:`prepare` made.

        Raises:
            EngineError: in the realisation ``fused``, which has no single evaluations; for a sampler that was closed.
        """
        if not isinstance(self.loop, Stepwise):
            raise EngineError("expected a realisation with single evaluations; fused has none; use baked or table")
        next_state, kept = self.loop.step(index, state, history, request or {})
        return np.asarray(next_state), None if kept is None else np.asarray(kept)

    def __call__(
        self,
        num: int = 1,
        seed: int = 0,
        batch: int = 16,
        progress: Callable[[int], None] | None = None,
        requests: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        latents: bool = False,
        prompt: Texts | None = None,
        negative_prompt: Texts | None = None,
        tile: int | None = None,
    ) -> Array:
        """Sample ``num`` images; image ``i`` depends on ``(seed, i)`` and its own request inputs only.

        Args:
            batch: images per engine call.
            progress: called with the number of images finished.
            requests: what the backbone wants beside the noise, e.g. ``{"class_labels": [3]}``: one value, or one
                per image.
            size: height and width of the state, where the bundle leaves them open; None for the backbone's own.
            latents: leave the last states as they are where the bundle could decode them.
            prompt, negative_prompt: for a bundle with a text encoder: one text for all images, or one for each. ``requests``
                then has what they do not make.
            tile: as :meth:`decode` takes it.

        Returns:
            float32 ``[num, channels, height, width]``, nominally in [-1, 1]; of videos ``[num, frames, channels, ...]``.

        Raises:
            InputError: for a count, seed, batch, size or request input out of range, or prompts that the bundle does not take.
            EngineError: for a sampler that was closed.
        """
        return self.together(SampleRequest(num, seed, batch, requests, size, latents, prompt, negative_prompt, tile), progress)

    def together(self, asked: SampleRequest, progress: Callable[[int], None] | None = None) -> Array:
        """What a call gives, of a request in one piece."""
        return together(asked, self.drawing(asked), progress)

    def batches(self, asked: SampleRequest) -> Iterator[Array]:
        """The images of a call, a batch at a time: what is in memory grows with the batch, not with the number of images.

        Raises:
            As a call.
        """
        draw = self.drawing(asked)
        return (draw(start) for start in asked.starts)

    def drawing(self, asked: SampleRequest) -> Callable[[int], Array]:
        """A function from the first image of a batch (one of ``asked.starts``) to the batch's images.

        Raises:
            As a call, before anything is drawn; the function raises EngineError for images that are not finite.
        """
        return self._drawing(asked, self.image)

    def decode(self, states: Array, tile: int | None = None) -> Array:
        """Images of the last states: decoded where the bundle has a decoder, else the states themselves.

        Args:
            tile: height and width of the tiles of latents that a larger image is decoded in, with less memory, to an image that
                is not quite the same. 0 for the whole image; None for what the bundle was exported with.

        Raises:
            InputError: for a tile that the decoder does not take.
            EngineError: for states that the decoder does not take, or of a sampler that was closed.
        """
        if self.bundle.decoder is None:
            return states
        return decode_states(self._other("decoder"), self.bundle.decoder, states, tile_of(self.bundle.decoder, tile))

    def conditioned(
        self,
        plan: Plan,
        num: int = 1,
        seed: int = 0,
        batch: int = 16,
        progress: Callable[[int], None] | None = None,
        requests: Mapping[str, Any] | None = None,
        size: tuple[int, int] | None = None,
        latents: bool = False,
    ) -> Array:
        """Sample with any plan on the same backbone with ordinary time conditioning, same noise, same engine."""

        def images(noise: Array, given: Arrays) -> Array:
            return self.conditioned_states(plan, noise, given)[-1]

        asked = SampleRequest(num, seed, batch, requests, size, latents, finite=False)
        return together(asked, self._drawing(asked, images), progress)

    def conditioned_states(self, plan: Plan, noise: Array, requests: Arrays | None = None) -> Sequence[Array]:
        session, given = self.conditioned_session, requests or {}

        def network(i: int, state: Array) -> Array:
            timestep = np.array([plan.evaluations[i].timestep], dtype=np.float32)
            return np.asarray(session.run({"state": state, "timestep": timestep, **given})[0])

        return run(plan, noise, network)

    def decoder_share(self, noise: Array, requests: Arrays, seconds: float) -> dict[str, float]:
        """What decoding takes of a whole sampling, as :func:`mteo_deploy.latency.share` gives it; empty without a decoder."""
        if self.bundle.decoder is None:
            return {}
        last = self.image(noise, requests)
        return latency.share(lambda: self.decode(last), lambda: self.image(noise, requests), seconds=seconds)

    @property
    def conditioned_session(self) -> Session:
        return self._other("conditioned")

    def _other(self, name: str) -> Session:
        """A graph beside the loop's, by its name in the manifest; opened when first asked for."""

        def found(opened: _Opened) -> Session:
            with self._lock:
                if name not in self._others:
                    self._others[name] = opened.open_graph(self.bundle.manifest[name]["graph"])
                return self._others[name]

        return self._turns.run(found)

    def encode(self, feeds: Mapping[str, NDArray[np.int64]]) -> dict[str, Array]:
        """Outputs by name of the bundle's text encoder, of its inputs by name, ``[count, length]`` each."""
        entry, parts = self.bundle.manifest["text_encoder"], []
        for start in range(0, len(feeds["input_ids"]), PROMPTS_AT_ONCE):
            part = {name: feeds[name][start : start + PROMPTS_AT_ONCE] for name in entry["inputs"]}
            parts.append(self._other("text_encoder").run(part))
        return {name: np.concatenate(values) for name, values in zip(entry["outputs"], zip(*parts, strict=True), strict=True)}

    def _prompted(self, asked: SampleRequest, prompt: Texts, negative: Texts | None, count: int) -> dict[str, Any]:
        tokenizers, bundle = open_tokenizers(self.bundle), self.bundle
        entry = bundle.manifest["text_encoder"]
        encoded = partial(encode, entry, tokenizers, self.encode)
        return request_inputs(entry, bundle.requests, encoded, prompt, negative, count, bundle.shape_at(asked.size)[-2:])

    def _drawing(self, asked: SampleRequest, states_from: Callable[[Array, Arrays], Array]) -> Callable[[int], Array]:
        asked.check()
        if asked.tile is not None and self.bundle.decoder is not None:
            tile_of(self.bundle.decoder, asked.tile)  # a clear error before the loop runs
        shape, part = self.bundle.shape_at(asked.size), parts_of(asked, self.bundle.requests, self._prompted)

        def draw(start: int) -> Array:
            rows = asked.rows(start)
            noise, given = noise_for(shape, asked.seed, rows), part(rows)
            states = states_from(noise, given)
            clock = time.perf_counter()
            images = states if asked.latents else self.decode(states, asked.tile)
            with self._lock:
                self.decoding += time.perf_counter() - clock
            if asked.finite and not np.isfinite(images).all():
                raise self._not_finite(asked, rows, noise, given, images)
            return images

        return draw

    def _not_finite(self, asked: SampleRequest, rows: range, noise: Array, given: Arrays, images: Array) -> EngineError:
        """The error for images that are not finite: which one, and where it began."""
        first = next(i for i, image in enumerate(images) if not np.isfinite(image).all())
        states = self.states(noise, given)
        bad = [i for i, state in enumerate(states) if not np.isfinite(state[first]).all()]
        began = f"evaluation {bad[0]}" if bad else "the decoder"
        return EngineError(
            f"expected finite images; image {rows[first]} of seed {asked.seed} has NaN or infinity from {began} on; "
            f"run: {shlex.join(['mteo-deploy', 'verify', str(self.bundle.path)])}"
        )
