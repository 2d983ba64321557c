"""The packaged backbones and embedding sets, and where they lie.

Any backbone's directory may hold embedding sets of its own, ``embeddings/<solver>-<steps>.safetensors``; the packaged ones do.
"""

from __future__ import annotations

from pathlib import Path

from mteo_deploy.errors import InputError
from mteo_deploy.solvers import canonical

MODEL = Path(__file__).parent / "mnist"
"""The backbone that verbs take where none is named."""


def backbones() -> dict[str, Path]:
    """Packaged backbones: the name that ``--model`` takes -> directory."""
    return {path.parent.name: path.parent for path in sorted(Path(__file__).parent.glob("*/model_index.json"))}


def embedding_sets(model: Path = MODEL) -> dict[str, Path]:
    """Embedding sets in a backbone's directory: ``<solver>-<steps>`` -> file."""
    return {path.stem: path for path in sorted((model / "embeddings").glob("*.safetensors")) if "." not in path.stem}


def embeddings(steps: int, solver: str = "euler", model: Path = MODEL) -> Path:
    """The set for a step count, of those in a backbone's directory.

    Raises:
        InputError: naming the sets that exist and how to make another.
    """
    sets, wanted = embedding_sets(model), f"{canonical(solver)}-{steps}"
    if steps < 1:
        raise InputError(f"expected --steps of 1 or more; found {steps}")
    if wanted not in sets:
        of = "" if model == MODEL else f"--model {model.name if model in backbones().values() else model} "
        raise InputError(
            f"expected an embedding set for --steps {steps} --solver {solver} in {model.name}; found "
            f"{', '.join(sets) or 'none'}; make one with: mteo-deploy distill {of}--steps {steps} --solver {solver} "
            "-o embeddings.safetensors"
        )
    return sets[wanted]
