"""Build the wheel, check its layout, and type-check what is inside it.

From the checkout's root mypy sees `exporters` and `engines` as packages of other names and checks the wrong thing, so it
runs on the unzipped wheel, and the number of files it checked is compared with the number of files there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
        mypy = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "mteo_deploy"]
        result = subprocess.run(mypy, cwd=out / "unzipped", capture_output=True, text=True, check=False)
        print(result.stdout, result.stderr, sep="")
        checked = re.search(r"(\d+) source files?", result.stdout)
        if result.returncode == 0 and (checked is None or int(checked[1]) != count):
            print(f"mypy checked {checked and checked[1]} files, expected {count}")
            return 1
        return result.returncode


if __name__ == "__main__":
    sys.exit(main())
