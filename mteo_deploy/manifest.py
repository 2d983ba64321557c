"""The manifest as typed records, checked when a bundle is opened: types, ranges, and that its parts fit each other.

Since schema 2 a digest covers all of it: its numbers make the images as much as the weights do, and no file's hash sees them.
It is SHA-256 of the canonical JSON of everything else; the hashes of the files are in there, so it names the bundle. It is no
signature: who can write a bundle can write its digest. Fields that these records do not name are free; the digest covers them,
and nothing that samples reads them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from mteo_deploy.precision import NAMES
from mteo_deploy.reading import canonical, name_problem, strict_json

SCHEMA = 2
KIND = "mteo-deploy bundle"
MOST = 64 * 2**20
"""Bytes of a manifest."""
FILES, STEPS, IMAGES = 20_000, 10_000, 4096
"""Files of a bundle, steps of a plan and images of a stored reference, at most."""
ELEMENTS = 2**30
"""Numbers in one sample or in one value of a request input, at most."""
AXES = ("batch", "height", "width")
DTYPES = ("float16", "float32", "float64", "int32", "int64", "bool")

Sha = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Name = Annotated[str, Meta(min_length=1, max_length=500)]
Text = Annotated[str, Meta(max_length=10_000)]
Count = Annotated[int, Meta(ge=0, le=2**62)]
Size = Annotated[int, Meta(ge=1, le=2**20)]
Hex = Annotated[str, Meta(max_length=40)]
Ratio = Annotated[list[float], Meta(min_length=3, max_length=3)]


def _need(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _hex(*values: str) -> None:
    for value in values:
        try:
            number = float.fromhex(value)
        except (ValueError, OverflowError):
            raise ValueError(f"expected a hexadecimal float; found {value!r}") from None
        _need(math.isfinite(number), f"expected a finite number; found {value!r}")


class FileEntry(Struct, frozen=True):
    bytes: Annotated[int, Meta(ge=0, le=2**44)]
    sha256: Sha


class EvaluationEntry(Struct, frozen=True):
    """As :class:`mteo_deploy.plan.Evaluation`, every number as a hexadecimal float."""

    sigma: Hex
    timestep: Hex
    keep_state: Hex
    keep_output: Hex
    carry: Hex
    weights: Annotated[list[Hex], Meta(min_length=1, max_length=1000)]
    time_point: Annotated[int, Meta(ge=0, le=STEPS)] | None

    def __post_init__(self) -> None:
        _hex(self.sigma, self.timestep, self.keep_state, self.keep_output, self.carry, *self.weights)


class PlanEntry(Struct, frozen=True):
    """As :class:`mteo_deploy.plan.Plan`."""

    solver: Name
    schedule: Name
    prediction_type: Name
    steps: Annotated[int, Meta(ge=1, le=STEPS)]
    sigmas: Annotated[list[Hex], Meta(min_length=2, max_length=STEPS + 1)]
    initial_scale: Hex
    evaluations: Annotated[list[EvaluationEntry], Meta(min_length=1, max_length=8 * STEPS)]

    def __post_init__(self) -> None:
        _hex(self.initial_scale, *self.sigmas)
        _need(len(self.sigmas) == self.steps + 1, f"{len(self.sigmas)} sigmas for {self.steps} steps")
        for i, row in enumerate(self.evaluations):
            _need(len(row.weights) <= i + 1, f"evaluation {i} reaches {len(row.weights)} evaluations back; {i + 1} are there")
            _need(row.time_point is None or row.time_point <= self.steps, f"evaluation {i} reaches a time point after the last")

    @property
    def history(self) -> int:
        return max(len(row.weights) for row in self.evaluations) - 1


class GraphEntry(Struct, frozen=True):
    graph: Name
    inputs: Annotated[list[Name], Meta(min_length=1)]
    outputs: Annotated[list[Name], Meta(min_length=1)]

    def __post_init__(self) -> None:
        _need(
            self.graph.startswith("graphs/") and self.graph.endswith(".onnx"),
            f"expected graphs/NAME.onnx; found {self.graph!r}",
        )
        for what in (self.inputs, self.outputs):
            _need(len(set(what)) == len(what), "expected each input and output once")


class StepEntry(GraphEntry, frozen=True):
    requests: dict[Name, Name] = {}


class TableEntry(GraphEntry, frozen=True, kw_only=True):
    table: Name
    content: Sha
    requests: list[dict[Name, Name]] = []


class Realisations(Struct, frozen=True, forbid_unknown_fields=True):
    baked: Annotated[list[StepEntry], Meta(min_length=1)] | UnsetType = UNSET
    table: TableEntry | UnsetType = UNSET
    fused: GraphEntry | UnsetType = UNSET

    def __post_init__(self) -> None:
        _need(any(one is not UNSET for one in (self.baked, self.table, self.fused)), "expected one realisation or more")


class RequestEntry(Struct, frozen=True):
    """As :class:`mteo_deploy.requests.Request`."""

    name: Name
    dtype: str
    shape: Annotated[list[Size], Meta(max_length=6)]
    high: Annotated[int, Meta(ge=1, le=2**62)] | None
    default: float | None = None
    mask: bool = False
    none: Count | None = None

    def __post_init__(self) -> None:
        _need(self.dtype in DTYPES, f"expected a dtype out of {', '.join(DTYPES)}; found {self.dtype[:40]!r}")
        _need(math.prod(self.shape) <= ELEMENTS, f"expected {ELEMENTS:,} numbers at most; found shape {self.shape}")
        _need(not self.mask or len(self.shape) > 0, "expected a mask with a length")
        _need(self.none is None or (self.high is not None and self.none < self.high), "the label of no class is no class")


class Lora(Struct, frozen=True):
    file: Name
    scale: float


class Backbone(Struct, frozen=True):
    source: Text
    family: Name
    fingerprint: Name
    parameters: Count
    sample_shape: Annotated[list[Size], Meta(min_length=2, max_length=5)]
    size_multiple: Size | None = None
    prediction_type: Name = ""
    license: Text | None = None
    loras: list[Lora] = []

    def __post_init__(self) -> None:
        _need(
            math.prod(self.sample_shape) <= ELEMENTS, f"expected {ELEMENTS:,} numbers at most; found shape {self.sample_shape}"
        )


class AdapterCheck(Struct, frozen=True):
    """What ``export`` found when it compared the adapter with the network's own forward."""

    error: Annotated[float, Meta(ge=0)]
    times: Annotated[list[float], Meta(min_length=1, max_length=100)]
    tolerance: Annotated[float, Meta(gt=0, le=1)]

    def __post_init__(self) -> None:
        _need(all(map(math.isfinite, (self.error, *self.times))), "expected finite numbers of the adapter's comparison")


class Guidance(Struct, frozen=True):
    scale: float | None = None
    null_class: Count | None = None


class Recipe(Struct, frozen=True):
    precision: str = "fp32"
    keep: list[Text] = []

    def __post_init__(self) -> None:
        _need(self.precision in NAMES, f"expected a precision out of {', '.join(NAMES)}; found {self.precision[:40]!r}")


class Training(Struct, frozen=True):
    """Of what a training reports, what is read again."""

    guidance: Guidance | None = None
    recipe: Recipe | None = None
    plain_plan: PlanEntry | None = None
    merged: Annotated[list[Merged], Meta(min_length=1)] | UnsetType = UNSET
    parameters: Count | UnsetType = UNSET
    seconds: float | UnsetType = UNSET


class Merged(Struct, frozen=True):
    weight: float
    sha256: Sha
    training: dict[str, Any]


class SetHeader(Struct, frozen=True):
    """Metadata of an embedding set's own file (:mod:`mteo_deploy.embeddings`)."""

    version: Annotated[int, Meta(ge=1)]
    backbone: Name
    training: Training
    plan: PlanEntry
    checksum: Sha | None = None


class Embeddings(Struct, frozen=True):
    file: Name
    sha256: Sha
    parameters: Count
    sites: dict[Name, Size]
    training: Training


class Template(Struct, frozen=True):
    before: Text = ""
    after: Text = ""
    lower: bool = False
    first: Annotated[int, Meta(ge=0, le=2**16)] = 0
    skip: Annotated[int, Meta(ge=0, le=2**16)] = 0


class Templates(Struct, frozen=True):
    prompt: Template
    negative: Template


class TextEncoder(GraphEntry, frozen=True, kw_only=True):
    class_: Text = msgspec.field(name="class")
    parameters: Count
    tokenizers: Annotated[list[Name], Meta(min_length=1, max_length=8)]
    tokens: Annotated[int, Meta(ge=1, le=2**16)]
    templates: Templates
    mask: Name | None
    scale: Annotated[int, Meta(ge=1, le=4096)]
    zero_negative: bool


class Decoder(GraphEntry, frozen=True, kw_only=True):
    class_: Text = msgspec.field(name="class")
    parameters: Count
    channels: Annotated[int, Meta(ge=1, le=256)]
    scale: Annotated[int, Meta(ge=1, le=256)]
    open: bool = False
    tile: Annotated[int, Meta(ge=4, le=2**16, multiple_of=4)] | None = None


class Reference(Struct, frozen=True):
    file: Name
    seed: int
    count: Annotated[int, Meta(ge=1, le=IMAGES)]
    plan: PlanEntry
    prompts: list[Text] = []

    def __post_init__(self) -> None:
        _need(0 <= self.seed < 2**64, f"expected a seed in [0, 2**64); found {self.seed}")


class GraphSize(Struct, frozen=True):
    nodes: Count
    parameters: Count
    bytes: Count


class PassEntry(Struct, frozen=True):
    name: Name
    modified: bool
    before: GraphSize
    after: GraphSize
    error: float | None = None


class Work(Struct, frozen=True):
    flops: float = 0
    weight_bytes: float = 0
    activation_bytes: float = 0
    unknown: Text = ""


class CompiledGraph(Struct, frozen=True):
    graph: Name
    passes: list[PassEntry]
    removed_weights: list[Text]
    tensorrt: list[Text] = []
    tensorrt_unchecked: list[Text] = []
    work: Work | None = None


class Site(Struct, frozen=True):
    site: Name
    constants: dict[str, dict[str, Text]]


class KindOfLayer(Struct, frozen=True):
    name: Text
    layers: list[Text]
    ratio: Ratio


class Lowered(Struct, frozen=True):
    name: Text = ""
    layers: dict[Text, Text] | UnsetType = UNSET
    float32: dict[Text, Count] | UnsetType = UNSET
    kinds: list[KindOfLayer] = []


class Candidate(Struct, frozen=True):
    precision: Text
    hint: Text
    engine: Text | None = None
    error: float | None = None
    ratio: Ratio | None = None
    refused: Text | None = None

    def __post_init__(self) -> None:
        measured = self.error is not None and self.ratio is not None and self.engine is not None
        _need(measured or self.refused is not None, "a candidate was neither measured nor refused")


class Auto(Struct, frozen=True):
    chosen: Count
    max_error: float
    tried: Annotated[list[Candidate], Meta(min_length=1)]


class Compiler(Struct, frozen=True):
    time_conditioned: GraphSize
    graphs: Annotated[list[CompiledGraph], Meta(min_length=1)]
    sites: list[Site]
    precision: Lowered | UnsetType = UNSET
    auto: Auto | UnsetType = UNSET


class Manifest(Struct, frozen=True):
    """All of a manifest that is read again; what schema 1 may lack has a default here."""

    schema: int
    versions: dict[str, Text]
    backbone: Backbone
    embeddings: Embeddings
    plan: PlanEntry
    precision: str
    batch: Annotated[int, Meta(ge=1, le=2**16)] | str
    realisations: Realisations
    conditioned: GraphEntry
    reference: Reference
    compiler: Compiler
    files: dict[str, FileEntry]
    kind: str = KIND
    batches: list[Annotated[int, Meta(ge=1, le=2**16)]] = []
    dynamic: list[str] = []
    requests: list[RequestEntry] = []
    prelude: GraphEntry | None = None
    decoder: Decoder | None = None
    text_encoder: TextEncoder | None = None
    left_out: dict[str, Text] = {}
    adapter: AdapterCheck | None = None
    export_seconds: float = 0.0
    digest: Sha | None = None

    def __post_init__(self) -> None:
        _need(self.kind == KIND, f"expected the kind {KIND!r}; found {self.kind[:40]!r}")
        _need("mteo-deploy" in self.versions, "expected the version of mteo-deploy in versions")
        _need(self.precision in NAMES, f"expected a precision out of {', '.join(NAMES)}; found {self.precision[:40]!r}")
        _need(isinstance(self.batch, int) or self.batch == "dynamic", "expected a batch of 1 or more, or 'dynamic'")
        _need(set(self.dynamic) <= set(AXES), f"expected dynamic axes out of {', '.join(AXES)}")
        names = [request.name for request in self.requests]
        _need(len(set(names)) == len(names), "expected each request input once")
        self._check_files()
        self._check_loop()
        self._check_parts()

    def _check_files(self) -> None:
        _need(len(self.files) <= FILES, f"expected {FILES:,} files at most; found {len(self.files):,}")
        folded: dict[str, str] = {}
        for name in self.files:
            if problem := name_problem(name):
                raise ValueError(f"the manifest names {name[:200]!r}, {problem}")
            _need(
                name not in ("manifest.json", "engines") and not name.startswith("engines/"), f"{name} is no file of an export"
            )
            other = folded.setdefault(name.lower(), name)
            _need(other == name, f"{name} and {other} are one file where capitals do not count")
        for used in self.used():
            _need(used in self.files, f"no hash covers {used}; export again")

    def used(self) -> list[str]:
        """Every file that is read again."""
        table = [] if isinstance(self.realisations.table, UnsetType) else [self.realisations.table.table]
        tokenizers = self.text_encoder.tokenizers if self.text_encoder else []
        graphs = [entry.graph for entry in self.graphs()]
        return [*graphs, *table, *tokenizers, self.reference.file]

    def graphs(self) -> list[GraphEntry]:
        """Every graph."""
        found: list[GraphEntry] = [] if isinstance(self.realisations.baked, UnsetType) else [*self.realisations.baked]
        for one in (self.realisations.table, self.realisations.fused):
            found += [] if isinstance(one, UnsetType) else [one]
        return [*found, self.conditioned, *(one for one in (self.prelude, self.decoder, self.text_encoder) if one)]

    def _check_loop(self) -> None:
        """That every input of a graph of the loop is there when it runs."""
        evaluations, given = len(self.plan.evaluations), {request.name for request in self.requests}
        prelude = given | set(self.prelude.outputs if self.prelude else ())
        if self.prelude:
            _known(self.prelude, given)
        _known(self.conditioned, given | {"state", "timestep"})
        baked, table, fused = self.realisations.baked, self.realisations.table, self.realisations.fused
        if not isinstance(baked, UnsetType):
            _need(len(baked) == evaluations, f"{len(baked)} step graphs for {evaluations} evaluations")
            for i, entry in enumerate(baked):
                history = {f"history_{lag}" for lag in range(1, min(i, self.plan.history) + 1)}
                _known(entry, given | {"state"} | history | entry.requests.keys())
                _sources(entry.graph, entry.requests, prelude)
        if not isinstance(table, UnsetType):
            _need(
                len(table.requests) in (0, evaluations), f"{len(table.requests)} rows of requests for {evaluations} evaluations"
            )
            hoisted = {name for row in table.requests for name in row}
            history = {f"history_{lag}" for lag in range(1, self.plan.history + 1)}
            _known(table, given | {"state", "evaluation", "table"} | history | hoisted)
            for row in table.requests:
                _sources(table.graph, row, prelude)
        if not isinstance(fused, UnsetType):
            _need(
                len(fused.outputs) == evaluations,
                f"{len(fused.outputs)} outputs of {fused.graph} for {evaluations} evaluations",
            )
            _known(fused, prelude | {"state"})

    def _check_parts(self) -> None:
        text, decoder = self.text_encoder, self.decoder
        if decoder:
            _need(
                decoder.inputs == ["latents"], f"expected the decoder's input latents; found {', '.join(decoder.inputs)[:200]}"
            )
        if text:
            counted = range(len(text.tokenizers))
            tokens = {f"{what}{f'_{i + 1}' if i else ''}" for what in ("input_ids", "attention_mask") for i in counted}
            _known(text, tokens)


def _known(entry: GraphEntry, sources: Iterable[str]) -> None:
    unknown = sorted(set(entry.inputs) - set(sources))
    _need(not unknown, f"nothing gives {entry.graph} its input {', '.join(unknown)[:200]}")


def _sources(graph: str, requests: Mapping[str, str], sources: Iterable[str]) -> None:
    unknown = sorted(set(requests.values()) - set(sources))
    _need(not unknown, f"nothing gives {graph} the value {', '.join(unknown)[:200]}")


def convert(data: Any, kind: Any) -> Any:
    """Plain data as one of the records.

    Raises:
        ValueError: naming the field that is missing, of another type or out of range, in one line.
    """
    try:
        return msgspec.convert(data, kind, strict=True)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split())[:400] or type(error).__name__) from None


def digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of everything in a manifest but its digest."""
    return hashlib.sha256(canonical({name: value for name, value in manifest.items() if name != "digest"})).hexdigest()


def read(text: bytes) -> dict[str, Any]:
    """A manifest's plain data, checked as :class:`Manifest`.

    Raises:
        NewerSchemaError: for a schema that this version does not know.
        ValueError: naming what is wrong, in one line.
    """
    data = strict_json(text)
    if not isinstance(data, dict) or "schema" not in data or "files" not in data:
        raise ValueError("expected an object with schema and files")
    schema = data["schema"]
    if not isinstance(schema, int) or isinstance(schema, bool) or not 1 <= schema <= SCHEMA:
        raise NewerSchemaError(f"expected bundle schema {SCHEMA} or older; found {str(schema)[:40]}; upgrade mteo-deploy")
    convert(data, Manifest)
    if schema >= 2:
        if lacking := [name for name in Manifest.__struct_fields__ if name not in data]:
            raise ValueError(f"it lacks {', '.join(lacking)}")
        if data["digest"] != digest(data):
            raise ValueError("it was altered: its digest is another one")
    return data


class NewerSchemaError(ValueError):
    """The message is whole."""
