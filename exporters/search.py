"""Search: which layers stay in float32, at which evaluations, so that the images' error meets a limit.

Every layer at every evaluation has an error that it alone makes (``exporters/sensitivity.py``) and a gain: the time that an
engine saves by it (``exporters/timing.py``), or its share of the operations where no engine was asked. Those with the most
squared error for their gain go to float32 first, as the greedy rule for a knapsack has it; how many must go is found by
halving, since each one that goes makes the error smaller but for chance. The error is that of whole trajectories, measured
each time, never a sum of the layers' own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.sensitivity import Sensitivity

On = list[set[str]]
"""By evaluation: the layers that are quantised."""


def order(found: Sensitivity) -> list[tuple[str, int]]:
    """Every group of layers at every evaluation, the one with the most squared error for its gain first."""
    gain = {name: found.gain(name) for name in found.groups}
    pairs = [(name, i) for name, errors in found.errors.items() for i in range(len(errors))]
    return sorted(pairs, key=lambda pair: found.errors[pair[0]][pair[1]] ** 2 / max(gain[pair[0]], 1e-6), reverse=True)


def search(found: Sensitivity, off: Collection[str], limit: float, error: Callable[[Sequence[Collection[str]]], float]) -> On:
    """The layers to quantise, by evaluation.

    Args:
        off: layers that are in float32 in any case.
        limit: on the images' error.
        error: of the images, with these layers quantised, by evaluation.

    Raises:
        InputError: where nothing could be quantised within the limit.
    """
    ordered = order(found)

    def on(count: int) -> On:
        gone = set(ordered[:count])
        evaluations = len(next(iter(found.errors.values()), []))
        groups = [[name for name in found.groups if (name, i) not in gone] for i in range(evaluations)]
        return [{layer for name in names for layer in found.groups[name] if layer not in off} for names in groups]

    low, high = 0, len(ordered)  # with all of them in float32 there is no error
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if error(on(middle)) <= limit else (middle + 1, high)
    chosen = on(high)
    if not any(chosen):
        raise InputError(
            f"expected a --max-error that some quantised layer meets; found {limit:g}; allow more, or leave out --precision"
        )
    return chosen
