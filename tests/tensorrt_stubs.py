"""Type stubs of the real TensorRT bindings, made by pybind11-stubgen, and what has to be mended in them for mypy.

python tests/tensorrt_stubs.py DIRECTORY      # leaves tensorrt.pyi there
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from test_tensorrt_bindings import bindings

GIVEN_BACK = ("phase_start", "step_complete", "report_layer_time")
"""Methods that TensorRT calls: what comes in are plain numbers, where calls of ours may pass anything that makes one."""

IN_PYTHON = """
__version__: str
def nptype(trt_type: DataType) -> type[numpy.generic]: ...
"""
"""What stands in the ``__init__.py`` of the bindings, not in the extension module."""


def main(directory: Path) -> None:
    sys.modules["tensorrt"] = bindings()
    from pybind11_stubgen import main as stubgen

    stubgen(["tensorrt", "-o", str(directory), "--ignore-all-errors"])
    path = directory / "tensorrt.pyi"
    path.write_text(mended(path.read_text(encoding="utf-8")), encoding="utf-8")


def mended(text: str) -> str:
    """Valid Python, and what pybind11 does beside a signature: sequences become Dims, and buffers are buffers."""
    lines = [line for line in text.splitlines() if line != "bool: DataType"]  # or no signature had a bool
    while (bad := _first_error(lines)) is not None:  # an argument called `in`, a default before an argument without one
        fixed = re.sub(r"\(self.*\) ->", "(self, *args: typing.Any, **kwargs: typing.Any) ->", lines[bad])
        if fixed == lines[bad]:
            raise SystemExit(f"cannot mend the stub's line {bad + 1}: {fixed}")
        lines[bad] = fixed
    for i, line in enumerate(lines):
        if any(f"def {name}(" in line for name in GIVEN_BACK):
            lines[i] = line.replace("typing.SupportsInt", "int").replace("typing.SupportsFloat", "float")
        elif "def " in line:
            lines[i] = re.sub(r": Dims(?=[,)])", ": Dims | collections.abc.Sequence[int]", line)
    text = "\n".join(lines) + IN_PYTHON
    text = _with_method(text, "Dims", "def __iter__(self) -> collections.abc.Iterator[int]: ...")
    return _with_method(text, "IHostMemory", "def __buffer__(self, flags: int, /) -> memoryview: ...")


def _first_error(lines: list[str]) -> int | None:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError as error:
        return (error.lineno or 1) - 1
    return None


def _with_method(text: str, cls: str, method: str) -> str:
    found = re.subn(rf"^(class {cls}(\(.*\))?:)$", rf"\1\n    {method}", text, flags=re.MULTILINE)
    if found[1] != 1:
        raise SystemExit(f"expected one class {cls} in the stub; found {found[1]}")
    return found[0]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
