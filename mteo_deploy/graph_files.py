"""What an ONNX file reaches, read before an engine reads it: external data, operators, inputs and outputs.

An ONNX file names the files that hold its tensors, and an engine opens them: by a path that may lead anywhere, or by a marker
that means an address in memory. So the protobuf is walked here, without the onnx package, through every place that can hold a
tensor or a node: initialisers, sparse ones, attributes, graphs inside attributes, functions and training information
(onnx.proto of ONNX 1.23). What this reader does not understand is refused, so that no other can understand it in another way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

MOST = 2**31 - 1
"""Bytes of a protobuf message at most, by its own rule."""
DEPTH = 16
"""Graphs inside attributes of nodes of graphs."""
FIELDS = 20_000_000
"""Of all messages in a file, one inside the other: a fused graph of 50 evaluations of Stable Diffusion has about 4 million."""
RANK = 32
DOMAINS = frozenset(("", "ai.onnx", "ai.onnx.ml", "com.microsoft"))
OUTSIDE = frozenset(("EPContext", "PythonOp", "PythonOpGrad", "ATen", "ATenGrad", "YieldOp", "OpaqueOp"))
"""Operators that read another file, or run what is not in the graph."""
BITS = {
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((7, 11, 13, 14), 64),
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
    15: 128,
}
"""Bits of an element, by ``TensorProto.DataType``."""

Field = tuple[int, int, int]
"""Of a length-delimited field: its number, where its bytes begin, and where they end."""


class GraphError(ValueError):
    """An ONNX file is not what may be given to an engine; the message continues ``FILE ...``."""


@dataclass(frozen=True)
class External:
    """Bytes of another file that a tensor is made of."""

    tensor: str
    location: str
    offset: int
    length: int


@dataclass
class Reached:
    """What was found in one ONNX file.

    Attributes:
        shapes: of inputs; None for an axis that has no fixed size. An input without a shape is not in here.
    """

    inputs: list[str] = field(default_factory=list)
    shapes: dict[str, list[int | None]] = field(default_factory=dict)
    outputs: list[str] = field(default_factory=list)
    external: list[External] = field(default_factory=list)

    def ends(self) -> dict[str, int]:
        """External file -> bytes that it must have."""
        found: dict[str, int] = {}
        for one in self.external:
            found[one.location] = max(found.get(one.location, 0), one.offset + one.length)
        return found


def reached(content: bytes) -> Reached:
    """Everything that a serialised ``ModelProto`` reaches.

    Raises:
        GraphError: for bytes that are no such message, and for one that reaches what no bundle's graph does.
    """
    if len(content) > MOST:
        raise GraphError(f"has {len(content):,} bytes; an ONNX file has {MOST:,} at most")
    reader = _Reader(content)
    try:
        reader.model()
    except (IndexError, UnicodeDecodeError):
        raise GraphError("is no ONNX file, or a damaged one") from None
    return reader.found


class _Reader:
    """Walks one message. Methods take the bounds of the message they are named after."""

    def __init__(self, content: bytes) -> None:
        self.content, self.found = content, Reached()
        self.domains: set[str] = set(DOMAINS)
        self.nodes: list[tuple[str, str]] = []
        self.left = FIELDS

    def model(self) -> None:
        graphs = 0
        for number, start, end in self.parts(0, len(self.content)):
            if number == 7:
                graphs += 1
                self.graph(start, end, 0)
            elif number == 20:
                for place, first, last in self.parts(start, end):
                    if place in (1, 2):
                        self.graph(first, last, 1)
            elif number == 25:
                self.function(start, end)
        if graphs != 1:
            raise GraphError(f"is no ONNX file with one graph (it has {graphs})")
        for domain, operator in self.nodes:
            if domain not in self.domains or operator in OUTSIDE:
                raise GraphError(
                    f"has the operator {operator[:80]!r} of the domain {domain[:80]!r}, which no bundle's graph has"
                )

    def graph(self, start: int, end: int, depth: int) -> None:
        if depth > DEPTH:
            raise GraphError(f"has graphs inside graphs, more than {DEPTH} deep")
        initialisers, inputs, outputs = set[str](), list[str](), list[str]()
        for number, first, last in self.parts(start, end):
            if number == 1:
                self.node(first, last, depth)
            elif number == 5:
                initialisers.add(self.tensor(first, last))
            elif number == 15:
                initialisers.add(self.sparse(first, last))
            elif number in (11, 12) and depth == 0:
                name = self.text_at(first, last, 1)
                (inputs if number == 11 else outputs).append(name)
                if number == 11:
                    self.shape(name, first, last)
        if depth == 0:
            self.found.inputs = [name for name in inputs if name not in initialisers]
            self.found.outputs = outputs

    def shape(self, name: str, start: int, end: int) -> None:
        """Note the shape of a ``ValueInfoProto``: in its type (2), of a tensor (1), its shape (2), the axes (1)."""
        places = [(start, end)]
        for number in (2, 1, 2):
            places = [(first, last) for bounds in places for place, first, last in self.parts(*bounds) if place == number]
        if len(places) > 1:
            raise GraphError(f"has an input {name[:80]!r} with two shapes")
        for bounds in places:
            axes = [(first, last) for place, first, last in self.parts(*bounds) if place == 1]
            self.found.shapes[name] = [self.axis(*one) for one in axes]

    def axis(self, start: int, end: int) -> int | None:
        values = [first for number, wire, first, _ in self.fields(start, end) if number == 1 and wire == 0]
        return values[-1] if values else None

    def node(self, start: int, end: int, depth: int) -> None:
        operator = domain = ""
        for number, first, last in self.parts(start, end):
            if number == 4:
                operator = self.text(first, last)
            elif number == 7:
                domain = self.text(first, last)
            elif number == 5:
                self.attribute(first, last, depth)
        self.nodes.append((domain, operator))

    def attribute(self, start: int, end: int, depth: int) -> None:
        whole = set[int]()
        for number, first, last in self.parts(start, end):
            if number in (5, 6, 22) and number in whole:
                raise GraphError("has an attribute with two values, which readers put together in their own ways")
            whole.add(number)
            if number in (5, 10):
                self.tensor(first, last)
            elif number in (6, 11):
                self.graph(first, last, depth + 1)
            elif number in (22, 23):
                self.sparse(first, last)

    def function(self, start: int, end: int) -> None:
        for number, first, last in self.parts(start, end):
            if number == 7:
                self.node(first, last, 1)
            elif number == 11:
                self.attribute(first, last, 1)
            elif number == 10:
                self.domains.add(self.text(first, last))

    def sparse(self, start: int, end: int) -> str:
        name, seen = "", set[int]()
        for number, first, last in self.parts(start, end):
            if number in (1, 2):
                if number in seen:
                    raise GraphError("has a sparse tensor with two values, which readers put together in their own ways")
                seen.add(number)
                found = self.tensor(first, last)
                name = found if number == 1 else name
        return name

    def tensor(self, start: int, end: int) -> str:
        """Note the external data of a tensor; its name."""
        dims: list[int] = []
        entries: dict[str, str] = {}
        kind = place = 0
        name = ""
        for number, wire, first, last in self.fields(start, end):
            if number == 1:
                dims += [first] if wire == 0 else self.packed(first, last)
            elif number == 2 and wire == 0:
                kind = first
            elif number == 14 and wire == 0:
                place = first
            elif number == 8 and wire == 2:
                name = self.text(first, last)
            elif number == 13 and wire == 2:
                key, value = self.text_at(first, last, 1), self.text_at(first, last, 2)
                if key in entries:
                    raise GraphError(f"has a tensor {name[:80]!r} with two values of {key[:40]!r}")
                entries[key] = value
        if len(dims) > RANK or any(d >= 2**63 for d in dims):
            raise GraphError(f"has a tensor {name[:80]!r} with a negative size, or more than {RANK} axes")
        if place or entries:
            self.found.external.append(_external(name, entries, dims, kind))
        return name

    def packed(self, start: int, end: int) -> list[int]:
        found: list[int] = []
        while start < end and len(found) <= RANK:
            value, start = self.varint(start, end)
            found.append(value)
        return found

    def text(self, start: int, end: int) -> str:
        return self.content[start:end].decode("utf-8")

    def text_at(self, start: int, end: int, place: int) -> str:
        """The one string of a message in the field ``place``."""
        found = [self.text(first, last) for number, first, last in self.parts(start, end) if number == place]
        if len(found) > 1:
            raise GraphError("has a name twice in one place")
        return found[0] if found else ""

    def parts(self, start: int, end: int) -> Iterator[Field]:
        """The length-delimited fields of a message."""
        for number, wire, first, last in self.fields(start, end):
            if wire == 2:
                yield number, first, last

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """``(number, wire type, first, last)``: a varint's value is ``first``; other values are ``content[first:last]``."""
        content = self.content
        while start < end:
            self.left -= 1
            if self.left < 0:
                raise GraphError(f"has more than {FIELDS:,} fields; expected a graph")
            tag = content[start]
            if tag < 0x80:
                start += 1
            else:
                tag, start = self.varint(start, end)
            number, wire = tag >> 3, tag & 7
            if wire == 2:
                size = content[start]
                if size < 0x80:
                    start += 1
                else:
                    size, start = self.varint(start, end)
                first, start = start, start + size
                if start > end or number == 0:
                    raise GraphError("is no ONNX file, or a damaged one")
                yield number, 2, first, start
            elif wire == 0:
                value, start = self.varint(start, end)
                yield number, 0, value, start
            elif wire in (1, 5):
                first, start = start, start + (8 if wire == 1 else 4)
                if start > end:
                    raise GraphError("is no ONNX file, or a damaged one")
                yield number, wire, first, start
            else:
                raise GraphError("is no ONNX file, or a damaged one")

    def varint(self, start: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while start < end and shift < 70:
            byte = self.content[start]
            start += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value & (2**64 - 1), start
            shift += 7
        raise GraphError("is no ONNX file, or a damaged one")


def _external(name: str, entries: dict[str, str], dims: list[int], kind: int) -> External:
    """The bytes that external data name, if they are those of the tensor's shape and type."""
    what = f"has a tensor {name[:80]!r} whose external data"
    if unknown := sorted(entries.keys() - {"location", "offset", "length", "checksum"}):
        raise GraphError(f"{what} have an entry {unknown[0][:40]!r}; expected location, offset and length")
    location = entries.get("location", "")
    if not location or location in (".", "..") or not location.isprintable() or set(location) & set("/\\*:"):
        raise GraphError(f"{what} lie in {location[:80]!r}; expected the name of a file beside it")
    bits = BITS.get(kind)
    if bits is None:
        raise GraphError(f"{what} are of the type {kind}, which has no fixed size")
    needed = -(-math.prod(dims) * bits // 8)
    offset, length = (_number(entries.get(key, default), what) for key, default in (("offset", "0"), ("length", str(needed))))
    if length != needed:
        raise GraphError(f"{what} have {length} bytes; expected {needed} by its shape")
    return External(name, location, offset, length)


def _number(text: str, what: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise GraphError(f"{what} have the number {text[:40]!r}; expected one of bytes")
    return int(text)
