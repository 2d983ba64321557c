"""Options of engines: what was given, held against what the engines that are tried declare."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mteo_deploy.engines import BACKENDS, backend
from mteo_deploy.engines.base import Backend, Option
from mteo_deploy.errors import InputError


def read(targets: Sequence[Backend], given: Mapping[str, object]) -> dict[str, str | int]:
    """Values by name; every engine tried must have every option.

    Args:
        given: name -> value, as text or as Python has it (True is ``on``).

    Raises:
        InputError: for a name or a value that an engine tried does not take.
    """
    values = [{name: _read(target, targets, name, v) for name, v in given.items()} for target in targets]
    for target, found in zip(targets, values, strict=True):
        _agree(target, found)
    return values[0]


def of(declared: Mapping[str, Option], options: Mapping[str, Any]) -> dict[str, Any]:
    """All options of an engine: those given in the options of a build, and the defaults of the others."""
    return {name: option.default for name, option in declared.items()} | options.get("engine_options", {})


def keyed(backend: Backend, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a build less those whose value makes no other built engine."""
    own = {name: v for name, v in options.get("engine_options", {}).items() if backend.engine_options[name].keyed}
    others = {name: value for name, value in options.items() if name != "engine_options"}
    return others | ({"engine_options": own} if own else {})


def described(backend: Backend) -> dict[str, dict[str, Any]]:
    """For ``doctor``: name -> what it takes, its default, and what it does."""
    return {
        name: {"takes": option.takes, "default": option.default, "help": option.help}
        for name, option in backend.engine_options.items()
    }


def _agree(target: Backend, found: Mapping[str, str | int]) -> None:
    """Refuse options that go with another one only, or not with it."""
    for name, value in found.items():
        option = target.engine_options[name]
        if option.needs and found.get(option.needs) != "on":
            raise InputError(f"expected --option {option.needs}=on with --option {name}; found it off")
        for other, why in option.excludes.items():
            if value == "on" and found.get(other) == "on":
                raise InputError(f"expected one of --option {name}=on and --option {other}=on; found both: {why}")


def _read(target: Backend, targets: Sequence[Backend], name: str, value: object) -> str | int:
    option = target.engine_options.get(name)
    if option is None:
        having = [one.name for one in map(backend, BACKENDS) if name in one.engine_options]
        if len(targets) > 1 and having:
            tried = ", ".join(one.name for one in targets)
            raise InputError(
                f"expected options that all engines tried have ({tried}); found {name}, which {target.name} has not; run "
                f"again with --engine {' or '.join(having)}"
            )
        where = f", an option of {' and '.join(having)}" if having else ""
        names = ", ".join(target.engine_options) or "none"
        raise InputError(f"expected --option out of those of {target.name} ({names}); found {name!r}{where}")
    found = option.read(value)
    if found is None:
        raise InputError(f"expected --option {name}={option.takes} for {target.name}; found {value!r}")
    return found
