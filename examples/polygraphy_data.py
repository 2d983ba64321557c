"""Torch's inputs and outputs of one evaluation, for Polygraphy: a second opinion on a bundle's graphs, from another tool.

    pip install polygraphy
    python examples/polygraphy_data.py bundle --evaluation 1 -o data
    polygraphy run bundle/graphs/step_01.onnx --onnxrt --load-inputs data/inputs.json --load-outputs data/torch.json

Leave ``--onnxrt`` out and put ``--trt`` in for TensorRT, where it is installed. The inputs are teacher-forced: the state and
the history that torch had, and what the prelude makes of the request.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from polygraphy.comparator import IterationResult, RunResults
from polygraphy.json import save_json

from mteo_deploy.bisection import as_written
from mteo_deploy.sampler import Sampler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--evaluation", type=int, default=0)
    parser.add_argument("-o", "--output", type=Path, default=Path("polygraphy"))
    args = parser.parse_args()
    sampler = Sampler.load(args.bundle, realisation="baked")
    recorded, _ = as_written(sampler, args.evaluation)
    step, reference = recorded[-1], sampler.bundle.reference()
    count = len(step.feeds["state"])
    outputs = {"next_state": reference["states"], "kept": reference["kept"]}
    names = sampler.bundle.step_graphs[args.evaluation]["outputs"]
    found = {name: outputs[name][args.evaluation][:count] for name in names}
    args.output.mkdir(parents=True, exist_ok=True)
    results = RunResults()
    results.add([IterationResult(outputs=found)], runner_name="torch")
    results.save(str(args.output / "torch.json"))
    save_json([step.feeds], str(args.output / "inputs.json"))
    print(f"{step.graph}: {', '.join(step.feeds)} -> {', '.join(found)}, {count} images, in {args.output}")


if __name__ == "__main__":
    main()
