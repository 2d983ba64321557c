"""What a directory of weights holds, told from configuration and headers before any library reads a tensor.

Libraries read what they know and pass over the rest: a quantised weight without its scale, a file that the index forgot. So
what is not plain floating-point weights in safetensors, each once, is refused here by name.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mteo_deploy.errors import InputError

PLAIN = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
"""Types whose every value is a number by itself: none needs a scale that lies elsewhere."""
INTEGER = ("BOOL", "U8", "I8", "I16", "I32", "I64")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "U8": 1, "I8": 1}
BYTES |= {"I16": 2, "I32": 4, "I64": 8}
HEADER = 100_000_000
"""Most bytes of a header, as safetensors itself has it."""
PRECISIONS = ("fp16", "bf16", "fp32")
"""Variants that are the same weights in another type; ``non_ema`` and others are other weights."""
OTHERS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack", ".h5", ".onnx", ".safetensors")
SCALES = re.compile(
    r"(^|[._])(scale_weight|weight_scale(_inv|_2)?|scale_inputs?|input_scales?|scaled_fp8|comfy_quant|weight_format|scales?|qweight|"
    r"qzeros|g_idx|SCB|CB|absmax|quant_map|nested_absmax|nested_quant_map|quant_state|bitsandbytes__\w+|_data|_scale|_qtype|"
    r"weight_packed|weight_zero_point|zero_points?|weight_shape|weight_global_scale|wscales|wzeros|wtscale|smooth|smooth_factor)$"
)
"""Ends of names beside a quantised weight: of fp8 files, bitsandbytes, GPTQ, AWQ, quanto, compressed-tensors, SVDQuant."""
SIDE_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quanto_qmap.json", "quantization_map.json")
UNQUANTISE = (
    "export takes unquantised weights: load it where it was made, `model.dequantize()`, `model.save_pretrained(DIR)`, or take "
    "the repository it was quantised from (--precision quantises at export)"
)


@dataclass(frozen=True)
class Stored:
    """A tensor as a file has it: its type in safetensors' words, and its shape."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        return self.dtype in PLAIN


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one network.

    Attributes:
        directory: that has them, with the network's ``config.json``.
        files: in the order they are read.
        tensors: by name.
        variant: of the files' names, e.g. ``fp16``; None for names without one.
        is_sharded: whether an index names the files.
    """

    directory: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]
    variant: str | None = None
    is_sharded: bool = False

    def to_json(self) -> dict[str, Any]:
        """How many tensors are stored in each type, in which variant and in how many files."""
        types = Counter(stored.dtype for stored in self.tensors.values())
        return {"types": dict(sorted(types.items())), "variant": self.variant, "files": len(self.files)}


def some(names: Iterable[str]) -> str:
    """The first three names and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "") or "nothing"


def read_checkpoint(directory: Path, stem: str, what: str) -> Checkpoint:
    """The weights ``stem.safetensors``, or the shards that its index names, of a directory; where there are none, those of the
    one variant in another precision.

    Args:
        stem: ``diffusion_pytorch_model`` or ``model``.
        what: they are for, the class of the network.

    Raises:
        InputError: for weights that are quantised, of an unknown type, missing, twice there, cut, or not in safetensors.
    """
    refuse_quantised(directory, what)
    variant = None if _present(directory, stem, None) else _only_variant(directory, stem, what)
    names, index = _names(stem, variant), directory / _names(stem, variant)[1]
    is_file = os.path.lexists(directory / names[0])
    is_sharded = os.path.lexists(index) and not (stem == "model" and is_file)  # transformers reads the file first
    tensors = _shards(index, what) if is_sharded else _tensors(directory / names[0], what)
    files = sorted({stored.file for stored in tensors.values()})
    if not tensors:
        raise InputError(f"expected {what} weights as safetensors in {directory}; {names[0]} has no tensors; fetch it again")
    _refuse_types(tensors, what)
    return Checkpoint(directory, tuple(files), tensors, variant, is_sharded)


def refuse_quantised(directory: Path, what: str) -> None:
    """Refuse a network whose configuration, or a file beside it, says that its weights are quantised.

    Raises:
        InputError: that names the method.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        config = {}  # of which the loader says what is wrong
    config = config if isinstance(config, dict) else {}
    text = config.get("text_config")
    places = (config, text if isinstance(text, dict) else {})
    stated = (place.get(key) for place in places for key in ("quantization_config", "compression_config"))
    methods = [_method(one) for one in stated if one] + [name for name in SIDE_FILES if (directory / name).exists()]
    if methods:
        raise InputError(f"expected {what} weights in floating point; {directory} is quantised ({methods[0]}); {UNQUANTISE}")


def _method(config: Any) -> str:
    if not isinstance(config, dict):
        return "quantization_config"
    method = str(config.get("quant_method") or config.get("quant_type") or config.get("format") or "of no named method")
    bits = next((name for name in ("load_in_4bit", "load_in_8bit") if config.get(name) or config.get(f"_{name}")), None)
    kind = config.get("bnb_4bit_quant_type") if bits == "load_in_4bit" else None
    bits = f"{config['bits']} bits" if "bits" in config else bits
    kind = kind or config.get("weights_dtype") or config.get("quant_type") or bits
    return f"{method}, {kind}" if kind and kind != method else method


def _names(stem: str, variant: str | None) -> tuple[str, str]:
    """Of the file and of the index."""
    middle = f".{variant}" if variant else ""
    return f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json"


def _present(directory: Path, stem: str, variant: str | None) -> bool:
    return any(os.path.lexists(directory / name) for name in _names(stem, variant))  # a link to nothing is not passed over


def _only_variant(directory: Path, stem: str, what: str) -> str:
    """The one variant in another precision that is there.

    Raises:
        InputError: where there is none, or more; it names the weights that are there and how they become what is read.
    """
    found = [name for name in PRECISIONS if _present(directory, stem, name)]
    if len(found) == 1:
        return found[0]
    there = sorted(path.name for path in directory.glob("*") if path.suffix in OTHERS) if directory.is_dir() else []
    cure = f"load it in its own library and `save_pretrained({str(directory)!r})`, which writes safetensors"
    if any(name.endswith(".gguf") for name in there):
        cure = (
            "GGUF is quantised: take the repository it was made from, or `from_single_file`, `dequantize()`, `save_pretrained`"
        )
    elif len(found) > 1:
        cure = f"keep one of the variants, or name one of them {stem}.safetensors"
    elif any(name.endswith(".safetensors") for name in there):
        cure = f"load it with `variant=` or `from_single_file` in diffusers and `save_pretrained`; {stem}.safetensors is read"
    raise InputError(f"expected {what} weights as safetensors in {directory}; found {some(there)}; {cure}")


def _shards(index: Path, what: str) -> dict[str, Stored]:
    """Tensors of all the files that an index names; each in the file that it says, and none besides."""
    place = f"expected {what} weights as safetensors in {index.parent}; {index.name}"
    try:
        read = json.loads(index.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
        names = {str(name): str(file) for name, file in read["weight_map"].items()}
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{place} cannot be read ({type(error).__name__}: {error}); fetch it again") from None
    if not isinstance(read.get("metadata"), dict):
        raise InputError(f'{place} has no metadata, which diffusers reads; add "metadata": {{}} to it')
    outside = [file for file in names.values() if Path(file).name != file or "\\" in file or "\0" in file]
    if outside:
        raise InputError(f"{place} names {some(set(outside))}, outside the directory; fetch it again")
    absent = {file for file in names.values() if not (index.parent / file).is_file()}
    if absent:
        raise InputError(f"{place} names {some(absent)}, not there; fetch the repository again, whole")
    found: dict[str, Stored] = {}
    for file in sorted(set(names.values())):
        tensors = _tensors(index.parent / file, what)
        if twice := found.keys() & tensors.keys():
            raise InputError(f"{place}: {some(twice)} lie in two files, {file} is one; save it again with save_pretrained")
        found.update(tensors)
    wrong = {name for name in names.keys() | found.keys() if name not in found or found[name].file.name != names.get(name)}
    if wrong:
        raise InputError(f"{place} and its files differ in {some(wrong)}; fetch the repository again, whole")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, none of whose keys is there twice.

    Raises:
        ValueError: for one that is.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{some({name for name in names if names.count(name) > 1})} twice in it")
    return found


def _tensors(file: Path, what: str) -> dict[str, Stored]:
    """The tensors of a file by name, by its header, which is checked against its length.

    Raises:
        InputError: for a file that is no whole safetensors file.
    """
    place = f"expected {what} weights as safetensors in {file.parent}; {file.name}"
    try:
        header = read_header(file)
    except OSError as error:
        raise InputError(f"{place} cannot be read ({error.strerror or error}); fetch it again") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: {error}; fetch it again") from None
    described = header.pop("__metadata__", None)
    quantised = {key for key in described or {} if "quant" in key.lower()}
    if quantised:
        raise InputError(f"{place} is quantised, by its metadata ({some(quantised)}); {UNQUANTISE}")
    return {name: Stored(file, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def read_header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: name -> ``dtype``, ``shape``, ``data_offsets``; ``__metadata__``.

    Raises:
        OSError: for a file that cannot be read.
        ValueError: for one that is cut, is of another format, or whose tensors do not fill it one after the other.
    """
    if not file.is_file():
        raise FileNotFoundError(2, "found no regular file")
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if (start + stream.read(32)).startswith(b"version https://git-lfs"):
            raise ValueError("a pointer of git-lfs in place of the file (`git lfs pull` brings it)")
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else None
        if length is None or length > min(HEADER, size - 8):
            raise ValueError(f"no whole safetensors file ({size} bytes, header of {length})")
        stream.seek(8)
        header = json.loads(stream.read(length), object_pairs_hook=_once)
    if not isinstance(header, dict):
        raise ValueError("no safetensors file (its header is another JSON value)")
    _check_offsets({name: entry for name, entry in header.items() if name != "__metadata__"}, size - 8 - length)
    return header


def _check_offsets(entries: dict[str, Any], size: int) -> None:
    begins = 0
    try:
        for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            begin, end = entry["data_offsets"]
            shape, width = entry["shape"], BYTES.get(entry["dtype"])
            whole = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
            if not whole or begin != begins or (width is not None and end - begin != width * math.prod(shape)):
                raise ValueError(f"no whole safetensors file ({name} is not where its header says)")
            begins = end
    except (KeyError, TypeError) as error:
        raise ValueError(f"no safetensors file (its header has no {error})") from None
    if begins != size:
        raise ValueError(f"no whole safetensors file ({size:,} bytes of tensors, {begins:,} in its header)")


def _refuse_types(tensors: Mapping[str, Stored], what: str) -> None:
    """Refuse types of which no float32 weight can be made: packed ones, complex ones, integers for weights."""
    where = next(iter(tensors.values())).file.parent
    scaled = [name for name in tensors if SCALES.search(name)]
    small = [name for name, stored in tensors.items() if stored.dtype.startswith(("F8", "I8", "U8", "F4", "F6"))]
    if scaled and small:
        raise InputError(
            f"expected {what} weights in floating point; {where} is quantised: {some(small)} are of type "
            f"{tensors[sorted(small)[0]].dtype} beside scales {some(scaled)}; {UNQUANTISE}"
        )
    for name, stored in sorted(tensors.items()):
        if stored.dtype not in (*PLAIN, *INTEGER) or (not stored.is_floating and name.endswith((".weight", ".bias"))):
            raise InputError(
                f"expected {what} weights in floating point; {name} in {stored.file} is of type {stored.dtype}; {UNQUANTISE}"
            )
