"""``mteo-deploy doctor``."""

from __future__ import annotations

import click

from mteo_deploy.commands.common import echo, emit, json_option, verb


@click.command()
@json_option
@verb
def doctor(as_json: bool) -> None:
    """Which engines are here, what they can do, and how to install the others.

    Example:  mteo-deploy doctor
    """
    from mteo_deploy.engines import doctor as run
    from mteo_deploy.processors import fewer_processors, in_words

    found = run()
    if as_json:
        emit(found)
        return
    if fewer_processors() is not None:
        echo(f"this process may use {in_words()}, and engines on the cpu run as many threads")
    for entry in found:
        if "problem" in entry:
            echo(f"{entry['engine']}: {entry['problem']}")
            continue
        echo(f"{entry['engine']} {entry['version']}: {', '.join(entry['precisions'])}")
        for device in entry["devices"]:
            echo(f"  {device}: {entry['machine'][device]}; runs graphs in {', '.join(entry['graphs'][device])}")
        if "usage_events" in entry:
            echo(f"  its usage events: {entry['usage_events']} (MTEO_TELEMETRY=1 leaves them to the engine)")
        for name, option in entry["options"].items():
            default = "the engine's choice" if option["default"] is None else option["default"]
            echo(f"  --option {name}={option['takes']} [default: {default}]: {option['help']}")
