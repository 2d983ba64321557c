"""Share: every large tensor once in one weight file, found by content, whatever it is called in each graph."""

from __future__ import annotations

import hashlib
from pathlib import Path

import onnx_ir as ir

from mteo_deploy.exporters.constants import SHAPES

THRESHOLD = 64  # bytes; scalars and shapes stay inside the graph, where engines look for them
ALIGNMENT = 64  # bytes: a cache line, enough for engines that map the file and use tensors in place


class WeightFile:
    """An append-only file of tensors, keyed by the hash of their bytes and type."""

    def __init__(self, path: Path, parent: WeightFile | None = None) -> None:
        self.path, self.parent = path, parent
        self.places: dict[str, tuple[str, int, int]] = {}
        self._digests: dict[int, tuple[ir.TensorProtocol, str]] = parent._digests if parent else {}
        path.touch()

    def digest(self, tensor: ir.TensorProtocol) -> str:
        """SHA-256 of a tensor's type and bytes, computed once for each object: the graphs of a bundle have theirs in common."""
        if id(tensor) not in self._digests:
            found = hashlib.sha256(f"{tensor.dtype}".encode())
            found.update(tensor.tobytes())
            self._digests[id(tensor)] = tensor, found.hexdigest()  # with the object, or another could take its id
        return self._digests[id(tensor)][1]

    def place(self, tensor: ir.TensorProtocol) -> tuple[str, int, int]:
        """``(file name, offset, length)`` of the tensor's bytes, written if no file of the chain holds them yet."""
        digest = self.digest(tensor)
        if self.parent is not None and digest in self.parent.places:
            return self.parent.places[digest]
        if digest not in self.places:
            with self.path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGNMENT))
                self.places[digest] = (self.path.name, file.tell(), tensor.nbytes)
                file.write(tensor.tobytes())
        return self.places[digest]


def content_hash(model: ir.Model, weights: WeightFile) -> str:
    """SHA-256 over nodes, inputs, outputs and the digest of every initialiser: what an engine is built from."""
    graph, digest = model.graph, hashlib.sha256()
    for value in [*graph.inputs, *graph.outputs]:
        digest.update(f"{value.name} {value.dtype} {value.shape}".encode())
    for node in graph:
        digest.update(ir.to_proto(node).SerializeToString(deterministic=True))
    for name, value in sorted(graph.initializers.items()):
        if value.const_value is not None:
            digest.update(f"{name} {value.const_value.shape} {weights.digest(value.const_value)}".encode())
    return digest.hexdigest()


class Share(ir.passes.InPlacePass):
    """Replace large initialisers by references into a weight file beside the graph."""

    def __init__(self, weights: WeightFile) -> None:
        super().__init__()
        self.weights = weights

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        modified = False
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < THRESHOLD:
                continue
            if tensor.dtype in SHAPES:
                continue
            location, offset, length = self.weights.place(tensor)
            value.const_value = ir.ExternalTensor(
                location,
                offset,
                length,
                tensor.dtype,
                shape=ir.Shape(tensor.shape),
                name=value.name or "",
                base_dir=self.weights.path.parent,
            )
            modified = True
        return ir.passes.PassResult(model, modified=modified)
