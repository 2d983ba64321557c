"""Write the features of a classifier as an ONNX file, for `mteo-deploy evaluate --features`.

Any torch module does: what `evaluate` wants is one input, float32 images ``[n, channels, height, width]`` in [-1, 1], and
features ``[n, ...]`` as the first output. Here it is `train_classifier.py`'s last hidden layer.

    python examples/feature_network.py benchmarks/classifier.safetensors -o features.onnx
    mteo-deploy evaluate bundle --features features.onnx --data mnist_test.npz --num 2000 --seeds 0,1,2
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from train_classifier import SIZE, Classifier, load


class Features(torch.nn.Module):
    """Images ``[n, 1, 28, 28]`` in [-1, 1] to features ``[n, 128]``."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier.features(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("classifier", type=Path, help="file that train_classifier.py wrote")
    parser.add_argument("-o", "--output", type=Path, required=True, help="ONNX file to write")
    args = parser.parse_args()
    program = torch.onnx.export(
        Features(load(args.classifier)).eval(),
        (torch.zeros(2, 1, SIZE, SIZE),),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes={"images": {0: torch.export.Dim("n")}},
        dynamo=True,
        verbose=False,
    )
    assert program is not None
    program.save(args.output, external_data=False)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
