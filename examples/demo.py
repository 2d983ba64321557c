"""The main job on the packaged backbone: export, build, sample, verify at 3 and 4 evaluations, and a picture.

Columns are the same noise, rows from the top: plain solver at 3 evaluations, MTEO at 3, plain at 4, MTEO at 4, and the
reference trajectory. The plain solver and the reference run on the bundle's own time-conditioned graph, without torch.

    python examples/demo.py -o demo
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import mteo_deploy
from mteo_deploy import images
from mteo_deploy.page import page
from mteo_deploy.progress import reporter


def label(sheet: np.ndarray, names: list[str], row_height: int) -> np.ndarray:
    """Write a name before each row of a sheet ``[height, width, channels]``."""
    margin = 200
    canvas = Image.new("L", (sheet.shape[1] + margin, sheet.shape[0]), 255)
    canvas.paste(Image.fromarray(sheet[..., 0]), (margin, 0))
    for i, name in enumerate(names):
        ImageDraw.Draw(canvas).text((8, i * row_height + row_height // 2 - 8), name, fill=0, font_size=15)
    return np.asarray(canvas)[..., None]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("demo"))
    parser.add_argument("--columns", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows, names, reports = [], [], []
    draw = {"num": args.columns, "seed": args.seed, "batch": args.columns}
    for steps in (3, 4):
        directory = args.output / f"bundle-{steps}"
        bundle = mteo_deploy.export(directory, steps=steps)
        mteo_deploy.build(bundle)
        sampler = mteo_deploy.Sampler.load(directory)
        rows += [sampler.conditioned(bundle.plain_plan, **draw), sampler(**draw)]
        names += [f"plain solver, {steps} evaluations", f"MTEO, {steps} evaluations"]
        reports.append(mteo_deploy.verify(sampler, seconds=2))
    with reporter() as report:
        task = report.task("reference trajectory", args.columns)
        plan = sampler.reference_plan
        rows.append(sampler.conditioned(plan, **draw, progress=lambda n: report.advance(task, n)))
        names.append(f"reference, {len(plan.evaluations)} evaluations")
    sheet = images.grid(np.concatenate(rows), columns=args.columns).repeat(2, 0).repeat(2, 1)
    picture = args.output / "grid.png"
    images.write_png(label(sheet, names, 2 * (rows[0].shape[2] + 2)), picture)
    (args.output / "report.html").write_text(page(*reports, picture=picture, caption="; ".join(names)), encoding="utf-8")
    for one in reports:
        print(f"{one.bundle}: {'verified' if one.passed else 'NOT verified'}")
        print("\n".join(f"  {line}" for line in one.latency_lines()))
    print(f"picture {picture}\nreport  {args.output / 'report.html'}")
    return 0 if all(one.passed for one in reports) else 1


if __name__ == "__main__":
    sys.exit(main())
