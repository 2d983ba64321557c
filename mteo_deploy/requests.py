"""Request inputs: what is given once per request, beside the noise, such as a class label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.arrays import npz
from mteo_deploy.errors import BundleError, InputError

Arrays = Mapping[str, NDArray[Any]]
GUIDANCE_SCALE, NEGATIVE = "guidance_scale", "negative_"
"""Request inputs of classifier-free guidance: its scale, and how what its negative branch gets begins."""


@dataclass(frozen=True)
class Request:
    """One request input of a backbone.

    Attributes:
        name: as the network calls it, e.g. ``class_labels``.
        dtype: numpy name of its element type.
        shape: of one image's value; the graph's input is ``[batch, *shape]``.
        high: for integers, one more than the largest value; what it may be otherwise is not known here, so a backbone learns
            from values that its user has.
        default: what it is, everywhere in ``shape``, where nobody gives it; None where it must be given.
        mask: it says which tokens of a prompt are there, 1 for each of them and then 0 for the padding; other integers are
            classes.
        none: of classes, the label of no class, which random values leave out; None where there is none or nobody knows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    high: int | None = None
    default: float | None = None
    mask: bool = False
    none: int | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Request:
        """Inverse of :meth:`to_json`.

        Raises:
            BundleError: when a field is missing or of another type.
        """
        try:
            high = None if data["high"] is None else int(data["high"])
            default = None if data.get("default") is None else float(data["default"])
            shape, mask = tuple(int(d) for d in data["shape"]), bool(data.get("mask", False))
            none = None if data.get("none") is None else int(data["none"])
            return cls(str(data["name"]), str(np.dtype(data["dtype"])), shape, high, default, mask, none)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BundleError(f"expected a request input with name, dtype, shape and high ({error!r}); export again") from None

    def draw(self, count: int, seed: int) -> NDArray[Any]:
        """Values ``[count, *shape]``: the default, else random: prompts of 1 token or more, classes, or standard normal."""
        if self.default is not None:
            return np.full((count, *self.shape), self.default, self.dtype)
        generator = np.random.default_rng([seed, *self.name.encode()])
        if self.mask:
            lengths = generator.integers(1, self.shape[-1] + 1, size=(count, *self.shape[:-1], 1))
            return (np.arange(self.shape[-1]) < lengths).astype(self.dtype)
        if self.high is not None:
            found = generator.integers(self.high - (self.none is not None), size=(count, *self.shape))
            return (found if self.none is None else found + (found >= self.none)).astype(self.dtype)
        return generator.standard_normal((count, *self.shape)).astype(self.dtype)

    def take(self, values: Any, count: int) -> NDArray[Any]:
        """``values``, one for all images or one for each, as ``[count, *shape]``: a view, which repeats the one for all.

        Raises:
            InputError: for another number of values, another shape, or an integer out of range.
        """
        found = np.asarray(values)
        found = found.reshape(1, *found.shape) if found.shape == self.shape else found
        if found.shape[1:] != self.shape or len(found) not in (1, count):
            wanted = f"1 or {count} values" + (f" of shape {list(self.shape)}" if self.shape else "")
            raise InputError(f"expected {wanted} for {self.name}; found shape {list(found.shape)}")
        integers = self.high is not None
        if integers and (found.dtype.kind not in "iu" or found.min() < 0 or found.max() >= (self.high or 0)):
            raise InputError(f"expected {self.name} as integers in [0, {self.high}); found {np.unique(found)[:8].tolist()}")
        if found.dtype.kind not in "biuf" or not np.isfinite(found).all():
            raise InputError(f"expected {self.name} as finite numbers; found {found.dtype} with others")
        with np.errstate(over="ignore", invalid="ignore"):
            taken = np.ascontiguousarray(found, self.dtype)
        if not np.isfinite(taken).all() or (taken.dtype.kind in "iu" and (taken != found).any()):
            raise InputError(f"expected {self.name} as numbers that {self.dtype} holds; found others")
        return np.broadcast_to(taken, (count, *self.shape))


def read(path: Path) -> dict[str, NDArray[Any]]:
    """Arrays of an npz file by name: values of request inputs, one or many of each.

    Raises:
        InputError: for a file that is no npz of plain arrays.
    """
    with npz(path, "an npz file of request inputs", "write one with numpy.savez") as arrays:
        return {name: arrays[name] for name in arrays.files}


def draw_all(
    requests: Sequence[Request], count: int, seed: int, given: Mapping[str, NDArray[Any]] | None = None
) -> dict[str, NDArray[Any]]:
    """Request inputs for ``count`` images: rows of ``given``, the same row of every array, else random values.

    Args:
        given: name -> ``[rows, *shape]``, or one row of what is the same for all.

    Raises:
        InputError: when ``given`` lacks one or has another, or their rows differ in number or do not fit.
    """
    return draw_parts(requests, count, seed, given)(slice(None))


def draw_parts(
    requests: Sequence[Request], count: int, seed: int, given: Mapping[str, NDArray[Any]] | None = None
) -> Callable[[slice], dict[str, NDArray[Any]]]:
    """:func:`draw_all`, of which some images' rows are copied when they are asked for."""
    if given is None:
        drawn = {request.name: request.draw(count, seed) for request in requests}
        return lambda images: {name: values[images] for name, values in drawn.items()}
    rows = {len(values) if np.ndim(values) else 0 for values in given.values()}
    most = max(rows, default=1)
    if not rows <= {1, most} or 0 in rows:
        raise InputError(f"expected as many values of each request input, or 1; found {sorted(rows)}")
    whole = take_all(requests, given, most)
    chosen = np.random.default_rng(seed).integers(most, size=count)
    return lambda images: {name: values[chosen[images]] for name, values in whole.items()}


def take_all(requests: Sequence[Request], given: Mapping[str, Any], count: int) -> dict[str, NDArray[Any]]:
    """Every request input's values for ``count`` images.

    Args:
        given: name -> value; what has a default may be left out.

    Raises:
        InputError: when one is missing, unknown, or does not fit.
    """
    names = [request.name for request in requests]
    given = {r.name: r.default for r in requests if r.default is not None} | {n: v for n, v in given.items() if v is not None}
    unknown = sorted(set(given) - set(names))
    missing = [name for name in names if name not in given]
    if unknown or missing:
        takes = ", ".join(names) or "no request inputs"
        wrong = ", ".join([*(f"{name} missing" for name in missing), *(f"{name} too many" for name in unknown)])
        way_out = "; export with --guidance-scale for guidance" if GUIDANCE_SCALE in unknown else ""
        raise InputError(f"expected a value for each of: {takes}; found {wrong}{way_out}")
    return {request.name: request.take(_filled(request, given[request.name]), count) for request in requests}


def _filled(request: Request, value: Any) -> Any:
    """One number stands for a whole value where the default does."""
    return np.full(request.shape, value) if request.default is not None and np.ndim(value) == 0 else value
