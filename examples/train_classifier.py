"""Train a small digit classifier and save it as one safetensors file; `benchmarks/quality.py` measures with it.

The Fréchet distance of natural images is taken on Inception features. Those say little about 28 x 28 digits and cost a
large download, so the features here are the last hidden layer of a network that knows digits. The price: figures can be
compared with each other where the classifier is the same file, and with no published number. Labels are not smoothed and
no image is mixed with another, so that a probability above 0.9 keeps its meaning.

    python examples/train_classifier.py mnist_train.npz mnist_test.npz -o classifier.safetensors
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from train_backbone import load_images

SIZE = 28
FEATURES = 128


class Classifier(torch.nn.Module):
    """Four convolutions and one hidden layer; float images ``[n, 1, 28, 28]`` in [-1, 1] to logits ``[n, classes]``.

    Args:
        channels: widths at full, half and quarter size.
        dropout: share of the features dropped in training.
    """

    def __init__(self, channels: tuple[int, int, int] = (16, 32, 64), classes: int = 10, dropout: float = 0.3) -> None:
        super().__init__()
        self.test_accuracy = float("nan")
        self.architecture = {"channels": list(channels), "classes": classes, "dropout": dropout}
        wide, middle, narrow = channels

        def convolution(inputs: int, outputs: int) -> list[torch.nn.Module]:
            return [
                torch.nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                torch.nn.BatchNorm2d(outputs),
                torch.nn.ReLU(inplace=True),
            ]

        self.body = torch.nn.Sequential(
            *convolution(1, wide),
            torch.nn.MaxPool2d(2),
            *convolution(wide, middle),
            *convolution(middle, middle),
            torch.nn.MaxPool2d(2),
            *convolution(middle, narrow),
            torch.nn.Flatten(),
            torch.nn.Linear(narrow * (SIZE // 4) ** 2, FEATURES, bias=False),
            torch.nn.BatchNorm1d(FEATURES),
            torch.nn.ReLU(inplace=True),
        )
        self.dropout = torch.nn.Dropout(dropout)
        self.head = torch.nn.Linear(FEATURES, classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Activations of the last hidden layer (not negative), ``[n, 1, 28, 28] -> [n, 128]``."""
        return self.body(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, ``[n, 1, 28, 28] -> [n, classes]``."""
        return self.head(self.dropout(self.features(x)))


def save(path: Path, model: Classifier, test_accuracy: float, **facts: object) -> None:
    """Write weights, architecture and test accuracy (a share in [0, 1]) to one safetensors file, atomically."""
    metadata = {"architecture": json.dumps(model.architecture), "test_accuracy": repr(test_accuracy)}
    metadata |= {name: str(value) for name, value in facts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, temporary, metadata=metadata)
    os.replace(temporary, path)


def load(path: Path | str) -> Classifier:
    """The classifier that :func:`save` wrote, ready to evaluate; ``test_accuracy`` is an attribute.

    Raises:
        SystemExit: when the file is missing or is not such a classifier.
    """
    hint = "make one with: python examples/train_classifier.py train.npz test.npz -o classifier.safetensors"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
        model = Classifier(**json.loads(metadata["architecture"]))
        model.load_state_dict(tensors)
        model.test_accuracy = float(metadata["test_accuracy"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SystemExit(f"{path}: expected a classifier's safetensors file; could not read it ({error}); {hint}") from None
    return model.eval().requires_grad_(False)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 ``[n, 1, 28, 28]`` to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def load_labelled(source: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images uint8 ``[n, 1, 28, 28]`` and labels int64 ``[n]`` of an npz with arrays ``images`` and ``labels``."""
    if not source.is_file():
        raise SystemExit(f"{source}: expected an npz with arrays images and labels; found no file")
    images = load_images(source, SIZE, 1)
    with np.load(source, allow_pickle=False) as arrays:
        labels = arrays["labels"] if "labels" in arrays else np.empty(0)
    if labels.shape != (len(images),) or labels.dtype != np.uint8:
        raise SystemExit(f"{source}: expected uint8 labels [{len(images)}]; found {labels.dtype} {list(labels.shape)}")
    return images, torch.from_numpy(labels.astype(np.int64))


def shift(images: torch.Tensor, reach: int, generator: torch.Generator) -> torch.Tensor:
    """Move every image ``[n, c, h, w]`` by its own whole pixels, up to ``reach`` each way; black comes in (-1)."""
    n, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (reach,) * 4, value=-1.0)
    down, right = torch.randint(2 * reach + 1, (2, n, 1), generator=generator)
    rows, columns = torch.arange(height) + down, torch.arange(width) + right
    moved = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


@torch.inference_mode()
def accuracy(model: Classifier, images: torch.Tensor, labels: torch.Tensor, batch: int = 1000) -> float:
    """Share of images uint8 ``[n, 1, 28, 28]`` whose most probable class is the label."""
    model.eval()
    pairs = zip(images.split(batch), labels.split(batch), strict=True)
    return sum(int((model(to_float(x)).argmax(1) == y).sum()) for x, y in pairs) / len(images)


def train(args: argparse.Namespace, images: torch.Tensor, labels: torch.Tensor, bar: Progress) -> Classifier:
    """Train with AdamW and one cycle of the learning rate (Smith & Topin 2018), ending near zero."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = Classifier(classes=int(labels.max()) + 1).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    iterations = args.epochs * (len(images) // args.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=iterations, pct_start=0.2)
    task, average = bar.add_task("training", total=iterations, loss="-"), None
    for _ in range(args.epochs):
        order = torch.randperm(len(images), generator=generator)[: len(images) // args.batch * args.batch]
        for chosen in order.split(args.batch):
            x = shift(to_float(images[chosen]), args.shift, generator)
            loss = torch.nn.functional.cross_entropy(model(x), labels[chosen])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            bar.update(task, advance=1, loss=f"{average:.4f}")
    return model.eval()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="npz with images uint8 [n, 28, 28] and labels uint8 [n]")
    parser.add_argument("test", type=Path, help="npz of the same form, used for the accuracy only")
    parser.add_argument("-o", "--output", type=Path, required=True, help="safetensors file to write")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=5e-3, help="highest learning rate of the cycle")
    parser.add_argument("--shift", type=int, default=2, help="random shift of the training images, in pixels")
    parser.add_argument("--limit", type=int, default=None, help="train on LIMIT images drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    args = parser.parse_args()
    if min(args.epochs, args.batch) < 1 or args.shift < 0:
        parser.error("expected --epochs and --batch of 1 or more and --shift of 0 or more")
    return args


def main() -> None:
    args = parse()
    if args.threads:
        torch.set_num_threads(args.threads)
    images, labels = load_labelled(args.train)
    if args.limit is not None:  # drawn at random, for data sets lie sorted by label
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.limit]
        images, labels = images[chosen], labels[chosen]
    test_images, test_labels = load_labelled(args.test)
    if len(images) < args.batch:
        raise SystemExit(f"expected at least one batch of {args.batch} training images; found {len(images)}; lower --batch")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"))
    clock = time.monotonic()
    with Progress(*columns, TimeRemainingColumn()) as bar:
        model = train(args, images, labels, bar)
    seconds = time.monotonic() - clock
    test_accuracy = accuracy(model, test_images, test_labels)
    save(args.output, model, test_accuracy, epochs=args.epochs, seed=args.seed, train_images=len(images))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{len(images)} images, {parameters} parameters, {args.epochs} epochs, {seconds:.0f} s")
    print(f"test accuracy {test_accuracy:.2%} on {len(test_images)} images; saved {args.output}")


if __name__ == "__main__":
    main()
