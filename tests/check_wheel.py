"""Build the wheel, check its layout, and type-check what is inside it.

From the checkout's root mypy sees `exporters` and `engines` as packages of other names and checks the wrong thing, so it
runs on the unzipped wheel, and the number of files it checked is compared with the number of files there.

TensorRT has no types. Where its bindings are installed, stubs are made of them, so that every call of ours is checked
against the real signatures; that they are seen is shown by calls spoiled on purpose.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SPOILED = {
    "engines/tensorrt_build.py": {
        "config.builder_optimization_level = ": "config.builder_optimisation_level = ",
        "config.set_timing_cache(timing, False)": "config.set_timing_cache(timing)",
        "profile.set_shape(tensor.name, least, usual, most)": "profile.set_shape(tensor, least, usual, most)",
        "trt.BuilderFlag.TF32": "trt.BuilderFlag.FP16",
        "def step_complete(self, phase_name: str, step: int)": "def step_complete(self, phase_name: str)",
    },
    "engines/tensorrt.py": {
        "refitter.get_missing_weights()": "refitter.get_missing_weight()",
        "budget_v2 < engine.streamable_weights_size": "budget_v2 < engine.streamable_weights_size()",
        ".LayerInformationFormat.JSON": ".LayerInformationFormat.TEXT",
        "trt.OnnxParserRefitter(refitter, logger)": "trt.OnnxParserRefitter(logger, refitter)",
    },
}
"""Calls of TensorRT -> calls that it does not take: each must be an error of its own."""


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = out.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(out / "unzipped")
        top = sorted(p.name for p in (out / "unzipped").iterdir() if not p.name.endswith(".dist-info"))
        if top != ["mteo_deploy"]:
            print(f"the wheel installs {top}, expected only mteo_deploy")
            return 1
        package = out / "unzipped" / "mteo_deploy"
        missing = [
            name
            for name in (
                "cli.py",
                "exporters/export.py",
                "exporters/tensorrt-onnx-ops.json",
                "engines/build.py",
                "assets/mnist",
                "assets/mnist-dit",
            )
            if not (package / name).exists()
        ]
        if missing:
            print(f"the wheel lacks {missing}")
            return 1
        count = len(list(package.rglob("*.py")))
        sources = [p for name in ("mteo_deploy", "exporters", "engines") for p in (ROOT / name).rglob("*.py")]
        if count != len(sources) + 1:
            print(f"the wheel holds {count} Python files, the checkout {len(sources) + 1}")
            return 1
        stubs = tensorrt_stubs(out)
        result = mypy(out, stubs)
        print(result.stdout, result.stderr, sep="")
        checked = re.search(r"(\d+) source files?", result.stdout)
        if result.returncode == 0 and (checked is None or int(checked[1]) != count):
            print(f"mypy checked {checked and checked[1]} files, expected {count}")
            return 1
        return result.returncode or (1 if stubs and not stubs_are_seen(out, package, stubs) else 0)


def mypy(out: Path, stubs: Path | None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "mteo_deploy"]
    environment = {**os.environ, "MYPYPATH": str(stubs)} if stubs else None
    return subprocess.run(command, cwd=out / "unzipped", capture_output=True, text=True, check=False, env=environment)


def tensorrt_stubs(out: Path) -> Path | None:
    """Make them; None, with the reason printed, where they cannot be made."""
    missing = [name for name in ("tensorrt_bindings", "pybind11_stubgen") if importlib.util.find_spec(name) is None]
    missing += [] if shutil.which("gcc") else ["gcc"]
    if missing:
        print(f"calls of TensorRT are not type-checked here: no {', '.join(missing)}")
        return None
    subprocess.run([sys.executable, str(ROOT / "tests" / "tensorrt_stubs.py"), str(out / "stubs")], check=True)
    return out / "stubs"


def stubs_are_seen(out: Path, package: Path, stubs: Path) -> bool:
    """Spoil calls of TensorRT and see that mypy names every line."""
    wanted = set()
    for name, changes in SPOILED.items():
        lines = (package / name).read_text(encoding="utf-8").splitlines()
        for good, bad in changes.items():
            (number,) = (i for i, line in enumerate(lines) if good in line)
            lines[number] = lines[number].replace(good, bad)
            wanted.add(f"mteo_deploy/{name}:{number + 1}")
        (package / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    named = set(re.findall(r"^(\S+:\d+): error", mypy(out, stubs).stdout, re.MULTILINE))
    print(
        f"calls of TensorRT, checked against the real bindings; of {len(wanted)} spoiled ones {len(wanted & named)} were found"
    )
    if wanted - named:
        print(f"not found: {', '.join(sorted(wanted - named))}")
    return wanted <= named


if __name__ == "__main__":
    sys.exit(main())
