"""The compiler's passes, one class per file, and the runner that checks before and after each."""

from mteo_deploy.exporters.passes.runner import PassReport, run_passes

__all__ = ["PassReport", "run_passes"]
