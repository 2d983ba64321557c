"""Precisions by name: what a bundle's graphs are written in, what an engine may compute in, and both together.

A graph's types are its own: an engine that takes them as they are (TensorRT) has no other precision. ``build --precision`` is
a hint to an engine that computes in less than the types say (OpenVINO). A built engine is called by both: ``int8+bf16`` is a
graph with int8 layers whose other layers may compute in bf16.
"""

from __future__ import annotations

NAMES = ("fp32", "fp16", "bf16", "int8", "fp8", "int4")
"""What ``export --precision`` takes, the finest first."""
HINTS = ("fp32", "bf16")
"""What ``build --precision`` takes. An engine that is given fp32 may not compute in less than the graph's types."""


def label(graphs: str, hint: str) -> str:
    """One name for graphs of a precision in an engine that may compute in another: ``int8`` and ``bf16`` are ``int8+bf16``."""
    if hint in ("fp32", graphs):
        return graphs
    return hint if graphs == "fp32" else f"{graphs}+{hint}"


def parts(name: str) -> list[str]:
    """The precisions that a label is made of."""
    return name.split("+")


def rank(name: str) -> tuple[int, int]:
    """Labels in order: the finest first."""
    return max(NAMES.index(part) for part in parts(name)), len(parts(name))


LABELS = tuple(sorted({label(graphs, hint) for graphs in NAMES for hint in HINTS}, key=rank))
"""Every label, the finest first."""
