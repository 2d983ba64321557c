"""``mteo-deploy push`` and ``mteo-deploy pull``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mteo_deploy.commands.common import PATH, echo, emit, json_option, verb
from mteo_deploy.text import command


@click.command()
@click.argument("bundle", type=PATH)
@click.argument("repository", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option("--revision", help="Branch [default: the repository's own].")
@json_option
@verb
def push(bundle: Path, repository: str, as_json: bool, **options: Any) -> None:
    """Upload a bundle to the Hugging Face Hub, with a model card; built engines stay here.

    Example:  mteo-deploy push bundle my-org/mnist-4-steps
    """
    from mteo_deploy.hub import push as run

    address = run(bundle, repository, **options)
    emit({"repository": repository, "address": address}) if as_json else echo(f"pushed {bundle} to {address}")


@click.command()
@click.argument("repository", metavar="ORG/NAME")
@click.option("-o", "--output", type=PATH, default=Path("bundle"), show_default=True, help="Bundle directory to write.")
@click.option("--revision", help="Branch, tag or commit [default: the repository's own].")
@json_option
@verb
def pull(repository: str, output: Path, revision: str | None, as_json: bool) -> None:
    """Download a bundle from the Hugging Face Hub and check every hash.

    Example:  mteo-deploy pull my-org/mnist-4-steps -o bundle && mteo-deploy build bundle
    """
    from mteo_deploy.hub import pull as run

    bundle = run(repository, output, revision=revision)
    size = sum(entry["bytes"] for entry in bundle.manifest["files"].values())
    if as_json:
        emit({"bundle": str(output), "repository": repository, "bytes": size})
        return
    echo(f"{output}: {len(bundle.plan.evaluations)} evaluations, {size / 1e6:.2f} MB, all hashes right")
    echo(f"next: {command('mteo-deploy', 'build', output)}")
