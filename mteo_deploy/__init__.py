"""Few-step diffusion, shipped: learn per-step, per-layer time embeddings, bake them into ONNX graphs, run and verify.

The public names load on first use, so that ``import mteo_deploy`` costs little and the sampling side never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mteo_deploy.telemetry import switch_off

__version__ = "0.1.0"

switch_off()  # read by ONNX Runtime when it is imported, whoever does that

# In a checkout `exporters/`, `engines/` and `cli.py` stand beside this package, in a wheel inside it: same import names.
if not (Path(__file__).parent / "exporters").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

_PUBLIC = {
    "distill": "mteo_deploy.distillation",
    "export": "mteo_deploy.exporters.export",
    "build": "mteo_deploy.engines.build",
    "Sampler": "mteo_deploy.sampler",
    "SampleRequest": "mteo_deploy.sample_request",
    "verify": "mteo_deploy.verification",
    "verify_engines": "mteo_deploy.comparison",
    "Budgets": "mteo_deploy.gates",
    "profile": "mteo_deploy.profiling",
    "bench": "mteo_deploy.benchmarking",
    "evaluate": "mteo_deploy.evaluation",
    "inspect": "mteo_deploy.inspection",
    "Bundle": "mteo_deploy.bundle",
    "EmbeddingSet": "mteo_deploy.embeddings",
    "merge": "mteo_deploy.embeddings",
    "Plan": "mteo_deploy.plan",
    "compile_plan": "mteo_deploy.plan",
    "MteoError": "mteo_deploy.errors",
}

__all__ = [
    "Budgets",
    "Bundle",
    "EmbeddingSet",
    "MteoError",
    "Plan",
    "SampleRequest",
    "Sampler",
    "__version__",
    "bench",
    "build",
    "compile_plan",
    "distill",
    "evaluate",
    "export",
    "inspect",
    "merge",
    "profile",
    "verify",
    "verify_engines",
]

if TYPE_CHECKING:
    from mteo_deploy.benchmarking import bench
    from mteo_deploy.bundle import Bundle
    from mteo_deploy.comparison import verify_engines
    from mteo_deploy.distillation import distill
    from mteo_deploy.embeddings import EmbeddingSet, merge
    from mteo_deploy.engines.build import build
    from mteo_deploy.errors import MteoError
    from mteo_deploy.evaluation import evaluate
    from mteo_deploy.exporters.export import export
    from mteo_deploy.gates import Budgets
    from mteo_deploy.inspection import inspect
    from mteo_deploy.plan import Plan, compile_plan
    from mteo_deploy.profiling import profile
    from mteo_deploy.sample_request import SampleRequest
    from mteo_deploy.sampler import Sampler
    from mteo_deploy.verification import verify


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'mteo_deploy' has no attribute {name!r}")
    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value
