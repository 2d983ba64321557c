"""The commands: one group of the verbs in ``commands/``. Each is a thin layer over the public function of the same name.

Exit codes: 0 done, 1 ``verify`` found something wrong, 2 bad input or environment (one line on standard error), 3 an error of
ours (please report it), 130 interrupted, 141 the reader of our output is gone, 143 terminated.
"""

from __future__ import annotations

import os

import click

from mteo_deploy import __version__
from mteo_deploy.commands.bench import bench
from mteo_deploy.commands.build import build
from mteo_deploy.commands.cache import cache
from mteo_deploy.commands.common import set_debug
from mteo_deploy.commands.distill import distill
from mteo_deploy.commands.doctor import doctor
from mteo_deploy.commands.evaluate import evaluate
from mteo_deploy.commands.export import export
from mteo_deploy.commands.hub import pull, push
from mteo_deploy.commands.inspect import inspect
from mteo_deploy.commands.merge import merge
from mteo_deploy.commands.profile import profile
from mteo_deploy.commands.sample import sample
from mteo_deploy.commands.verify import verify
from mteo_deploy.processors import fewer_processors


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mteo-deploy")
@click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=set_debug,
    help="Show the traceback behind an error; or MTEO_DEBUG=1.",
)
def main() -> None:
    """Ship few-step diffusion models.

    \b
    distill    learn one time embedding per step and layer     (torch)
    merge      the weighted sum of embedding sets
    export     bake them into ONNX graphs: a bundle            (torch, onnx)
    build      make the bundle ready in an engine
    sample     draw images                                     (numpy + one engine)
    verify     check numbers and latency; a gate for CI
    profile    where the time goes, layer by layer
    bench      bundles, engines and precisions: error against time
    evaluate   quality of the images: Fréchet distance to real ones
    inspect    explain a bundle, an embedding set or a backbone
    push, pull a bundle to and from the Hugging Face Hub
    doctor     which engines are here, and how to install the others
    cache      list or clean the built engines of a bundle

    \b
    Example:  mteo-deploy export --steps 4 -o bundle && mteo-deploy build bundle
              mteo-deploy sample bundle --num 64 -o grid.png && mteo-deploy verify bundle
    """
    if (count := fewer_processors()) is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(count))  # torch, which no verb has imported yet, sees no quota


for verb in (distill, merge, export, build, sample, verify, profile, bench, evaluate, inspect, push, pull, doctor, cache):
    main.add_command(verb)


if __name__ == "__main__":
    main()
