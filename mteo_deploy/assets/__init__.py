"""The packaged backbone and embedding sets, and where they lie."""

from __future__ import annotations

from pathlib import Path

from mteo_deploy.errors import InputError
from mteo_deploy.solvers import canonical

MODEL = Path(__file__).parent / "mnist"


def embedding_sets() -> dict[str, Path]:
    """Packaged embedding sets: ``<solver>-<steps>`` -> file."""
    return {path.stem: path for path in sorted((MODEL / "embeddings").glob("*.safetensors")) if "." not in path.stem}


def embeddings(steps: int, solver: str = "euler") -> Path:
    """The packaged set for a step count.

    Raises:
        InputError: naming the sets that exist and how to make another.
    """
    sets, wanted = embedding_sets(), f"{canonical(solver)}-{steps}"
    if steps < 1:
        raise InputError(f"expected --steps of 1 or more; found {steps}")
    if wanted not in sets:
        raise InputError(
            f"no packaged embedding set for --steps {steps} --solver {solver}; there are: {', '.join(sets) or 'none'}; "
            f"make one with: mteo-deploy distill --steps {steps} --solver {solver} -o embeddings.safetensors"
        )
    return sets[wanted]
