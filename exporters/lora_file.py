"""A file of LoRA weights, before any loader sees it: pairs of matrices for named layers, in float32, scaled as trained.

Loaders pass over what they do not know (DoRA's magnitudes, LyCORIS' formats) and mix up ``alpha`` where layers differ in it. So
other formats are refused here by name, and ``alpha / rank`` is multiplied into the matrices.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mteo_deploy.errors import InputError, border
from mteo_deploy.exporters.checkpoint import PLAIN, read_header, some

METADATA = "lora_adapter_metadata"
"""Key of a file's header under which diffusers keeps PEFT's configuration."""
FIRST = re.compile(r"(lora_down|lora_A|lora\w*\.down)(?=\.)")
SECOND = re.compile(r"(lora_up|lora_B|lora\w*\.up)(?=\.)")
FORMATS = {
    "DoRA": r"dora_scale|lora_magnitude_vector",
    "LoKr": r"lokr_",
    "LoHa": r"hada_",
    "OFT": r"b?oft_",
    "LoCon with a middle matrix": r"lora_mid",
    "whole differences of weights": r"\.(diff|diff_b|w_norm|b_norm|set_weight)$",
    "textual inversion": r"^(emb_params|string_to_param)",
    "an IP-Adapter": r"^(ip_adapter|image_proj)",
}
"""Other formats that lie in the same kind of file -> what their names have in them."""
MERGE = "merge it into the backbone with the tool that made it and `save_pretrained` that, or leave --lora out"


def read_lora(file: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    """Matrices by their stored names, in float32, ``alpha / rank`` multiplied into the second; PEFT's configuration, if any.

    An ``alpha`` that was there has the value of the rank, which is a factor of one to whoever reads it.

    Raises:
        InputError: for a file that is not safetensors or has no tensors, other formats, NaN, and matrices that are no pair.
    """
    place = f"expected LoRA weights in {file}"
    try:
        header = read_header(file)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{place}; {getattr(error, 'strerror', None) or error}; fetch it again") from None
    metadata = _metadata(header.pop("__metadata__", None), place)
    if not header:
        raise InputError(f"{place}; it has no tensors; fetch it again, or leave --lora out")
    _refuse_others(header, place)
    if (file.parent / "adapter_config.json").exists():
        raise InputError(
            f"{place} as a pipeline's `save_lora_weights` writes them; PEFT's have their alpha in another file; {MERGE}"
        )
    with border(place, "fetch it again"):
        state = {name: value.float() for name, value in load_file(file).items()}
    broken = [name for name, value in state.items() if not bool(value.isfinite().all())]
    if broken:
        raise InputError(f"{place} that are finite; {some(broken)} are not; take an earlier checkpoint of the training")
    if metadata is not None and any(name.endswith(".alpha") for name in state):
        raise InputError(f"{place} with one alpha for a layer; it has tensors and metadata of them; save it again with one")
    _scale(state, place)
    return state, metadata


def _metadata(described: Any, place: str) -> dict[str, Any] | None:
    text = described.get(METADATA) if isinstance(described, dict) else None
    try:
        found = None if text is None else json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{place}; its metadata cannot be read ({error}); save it again") from None
    if found is not None and not isinstance(found, dict):
        raise InputError(f"{place}; its metadata is no object of JSON; save it again")
    return found


def _refuse_others(header: Mapping[str, Any], place: str) -> None:
    for name, entry in sorted(header.items()):
        kind = next((kind for kind, pattern in FORMATS.items() if re.search(pattern, name)), None)
        if kind is not None:
            raise InputError(f"{place}, pairs of matrices; {name} is of {kind}, which is not read; {MERGE}")
        half = name.endswith((".weight", ".bias")) and (FIRST.search(name) or SECOND.search(name))
        if not half and not name.endswith(".alpha"):
            raise InputError(f"{place}, pairs of matrices; {name} is none; {MERGE}")
        if entry["dtype"] not in PLAIN:
            raise InputError(f"{place} in floating point; {name} is of type {entry['dtype']}; {MERGE}")


def _scale(state: dict[str, torch.Tensor], place: str) -> None:
    """Multiply each layer's alpha over its rank into its second matrix, and its bias."""
    left = set(state)
    for name in [name for name in state if name.endswith(".weight") and FIRST.search(name)]:
        match = FIRST.search(name)
        assert match is not None
        half = match[0].replace("down", "up").replace("_A", "_B")
        second = name[: match.start()] + half + name[match.end() :]
        first, other = state[name], state.get(second)
        if other is None or first.ndim < 2 or other.ndim < 2 or first.shape[0] != other.shape[1]:
            found = "no other half" if other is None else f"{list(first.shape)} and {list(other.shape)}"
            raise InputError(f"{place}, pairs of matrices of one rank; {name} has {found}; fetch it again")
        alpha = f"{name[: match.start()].rstrip('._')}.alpha"
        bias = f"{second.removesuffix('.weight')}.bias"
        left -= {name, second, bias, alpha}
        if alpha not in state:
            continue
        if state[alpha].numel() != 1:
            raise InputError(f"{place}; {alpha} is {list(state[alpha].shape)} and no single number; fetch it again")
        for part in {second, bias} & state.keys():
            state[part] = state[part] * (state[alpha] / first.shape[0])
        state[alpha] = torch.tensor(float(first.shape[0]))
    if left:
        raise InputError(f"{place}, pairs of matrices; {some(left)} belong to none; fetch it again")
