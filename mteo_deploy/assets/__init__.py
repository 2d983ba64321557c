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


def embeddings(steps: int, solver: str | None = None, model: Path = MODEL) -> Path:
    """The set for a step count, of those in a backbone's directory.

    Args:
        solver: None for the one there is; Euler's, where there are several.

    Raises:
        InputError: naming the sets that exist and how to make another.
    """
    if steps < 1:
        raise InputError(f"expected --steps of 1 or more; found {steps}")
    sets = embedding_sets(model)
    wanted = [f"{canonical(solver or 'euler')}-{steps}"]
    if solver is None:
        wanted += [name for name in sets if name.endswith(f"-{steps}")]
    found = next((sets[name] for name in wanted if name in sets), None)
    if found is None:
        of = "" if model == MODEL else f"--model {model.name if model in backbones().values() else model} "
        asked = f"--steps {steps}" + ("" if solver is None else f" --solver {solver}")
        raise InputError(
            f"expected an embedding set for {asked} in {model.name}; found {', '.join(sets) or 'none'}; make one with: "
            f"mteo-deploy distill {of}{asked} -o embeddings.safetensors"
        )
    return found
