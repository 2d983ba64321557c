"""``mteo-deploy cache list`` and ``mteo-deploy cache clean``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mteo_deploy.commands.common import PATH, echo, emit, json_option, verb


@click.group()
def cache() -> None:
    """The built engines of a bundle."""


@cache.command("list")
@click.argument("bundle", type=PATH)
@json_option
@verb
def list_(bundle: Path, as_json: bool) -> None:
    """List the built engines of a bundle, and why one does not fit it any more.

    Example:  mteo-deploy cache list bundle
    """
    from mteo_deploy.bundle import Bundle
    from mteo_deploy.engines import cache as built

    _show_built(built.entries(Bundle.open(bundle)), as_json)


@cache.command()
@click.argument("bundle", type=PATH)
@click.option("--all", "everything", is_flag=True, help="Delete those that fit too.")
@json_option
@verb
def clean(bundle: Path, everything: bool, as_json: bool) -> None:
    """Delete the built engines that do not fit the bundle any more, and what interrupted builds left.

    Example:  mteo-deploy cache clean bundle
    """
    from mteo_deploy.bundle import Bundle
    from mteo_deploy.engines import cache as built
    from mteo_deploy.engines import store

    opened = Bundle.open(bundle)
    _show_built(built.clean(opened, everything), as_json, "deleted ")
    for entry in store.entries(opened) if not as_json else ():
        if entry.kind != "built":
            echo(f"kept {entry.path.name}: {entry.reason}")


def _show_built(entries: list[dict[str, Any]], as_json: bool, what: str = "") -> None:
    if as_json:
        emit(entries)
        return
    for entry in entries:
        echo(f"{what}{entry['name']}, {entry['bytes'] / 1e6:.2f} MB: {entry['reason'] or 'fits the bundle'}")
        if not what and entry.get("beside"):
            echo(f"  in it, and no file of the build: {', '.join(entry['beside'][:5])}")
    if not entries:
        echo("nothing" if what else "no built engines; mteo-deploy build makes one")
