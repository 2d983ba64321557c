"""The CLIP text encoders of a pipeline directory, from token ids to the backbone's request inputs, and their tokenizers.

Stable Diffusion 1 and 2 take the last hidden states of one ``CLIPTextModel``. SDXL takes the states before the last layer of a
``CLIPTextModel`` and a ``CLIPTextModelWithProjection``, side by side, and the second one's projection as pooled text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mteo_deploy.errors import InputError
from mteo_deploy.exporters.base import INDEX, Adapter, pipeline_parts
from mteo_deploy.prompts import request_inputs, tokenise
from mteo_deploy.requests import GUIDANCE_SCALE, NEGATIVE, Request

KINDS = {
    ("encoder_hidden_states",): {"text_encoder": "CLIPTextModel"},
    ("encoder_hidden_states", "text_embeds", "time_ids"): {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "CLIPTextModelWithProjection",
    },
}
"""A backbone's request inputs -> the encoders that make them, in order."""
AT_ONCE = 32
"""Prompts that are encoded together."""
VAE_SCALE = 8
"""Pixels to a latent where a pipeline has no VAE, as diffusers assumes."""


class TextEncoder(torch.nn.Module):
    """Frozen CLIP text encoders: token ids ``[batch, length]`` for each, to ``encoder_hidden_states``
    ``[batch, length, width]`` and, of two encoders, ``text_embeds`` ``[batch, width]``.

    Args:
        encoders: one or two, of ``transformers``.
        tokenizers: for each, of ``tokenizers``, padding to ``length``.
        scale: pixels to a latent, for the sizes that SDXL takes.
        zero_negative: no negative prompt means zeros, and not an empty one.
    """

    def __init__(
        self, encoders: Sequence[Any], tokenizers: Sequence[Any], length: int, scale: int, zero_negative: bool
    ) -> None:
        super().__init__()
        self.encoders = torch.nn.ModuleList(encoders).requires_grad_(False).eval()
        self.tokenizers, self.length = list(tokenizers), length
        self.scale, self.zero_negative = scale, zero_negative
        self.inputs = ["input_ids", "input_ids_2"][: len(encoders)]
        self.outputs = ["encoder_hidden_states", "text_embeds"][: len(encoders)]

    def forward(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        found = [encoder(one, output_hidden_states=True) for encoder, one in zip(self.encoders, ids, strict=True)]
        if len(found) == 1:
            return (found[0].last_hidden_state,)
        return torch.cat([one.hidden_states[-2] for one in found], dim=-1), found[-1].text_embeds

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Request inputs of texts by name, ``[count, ...]``, in torch."""
        ids = [torch.from_numpy(one) for one in tokenise(self.tokenizers, texts)]
        return {name: values.numpy() for name, values in zip(self.outputs, self(ids), strict=True)}

    def to_json(self) -> dict[str, Any]:
        """What a sampler has to know beside the graph."""
        return {
            "class": " + ".join(type(encoder).__name__ for encoder in self.encoders),
            "parameters": sum(p.numel() for p in self.parameters()),
            "tokenizers": self.tokenizer_files,
            "length": self.length,
            "scale": self.scale,
            "zero_negative": self.zero_negative,
        }

    @property
    def tokenizer_files(self) -> list[str]:
        return ["tokenizers/tokenizer.json", "tokenizers/tokenizer_2.json"][: len(self.inputs)]

    def save_tokenizers(self, directory: Path) -> None:
        (directory / "tokenizers").mkdir()
        for tokenizer, name in zip(self.tokenizers, self.tokenizer_files, strict=True):
            tokenizer.save(str(directory / name))


def load_text_encoder(adapter: Adapter) -> TextEncoder | str | None:
    """The text encoders of the pipeline that a backbone was loaded from, in float32.

    Returns:
        None for a pipeline without one; why not, for one whose prompts are not supported.

    Raises:
        InputError: for encoders or tokenizers that are there and do not fit.
    """
    parts = {} if adapter.pipeline is None else pipeline_parts(adapter.pipeline)
    found = {name: part for name, part in parts.items() if name.startswith("text_encoder")}
    own = tuple(r.name for r in adapter.requests if not r.name.startswith((NEGATIVE, GUIDANCE_SCALE)))
    if adapter.pipeline is None or not found:
        return None
    if found != KINDS.get(own):
        named = ", ".join(f"{name}: {part}" for name, part in found.items())
        return f"text encoders {named} are not supported for {adapter.family}, CLIP's of Stable Diffusion 1, 2 and SDXL are"
    if (missing := _package()) is not None:
        return missing
    length = int(adapter.requests[0].shape[0])
    names = [name.replace("text_encoder", "tokenizer") for name in found]
    tokenizers = [_tokenizer(adapter.pipeline / name, length) for name in names]
    encoders = [_encoder(adapter.pipeline / name, part) for name, part in found.items()]
    index = json.loads((adapter.pipeline / INDEX).read_text(encoding="utf-8"))
    zeros = len(found) > 1 and bool(index.get("force_zeros_for_empty_prompt", True))
    made = TextEncoder(encoders, tokenizers, length, _scale(adapter.pipeline), zeros)
    _check(made, adapter.requests)
    return made


def _package() -> str | None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return "transformers is not installed; run: pip install 'mteo-deploy[train]'"
    return None


def _encoder(directory: Path, cls: str) -> Any:
    import transformers
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return getattr(transformers, cls).from_pretrained(directory, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"expected {cls} weights as safetensors in {directory}; {str(error).splitlines()[0]}") from None
    finally:
        if bars:
            logging.enable_progress_bar()


def _tokenizer(directory: Path, length: int) -> Any:
    """A CLIP tokenizer that cuts and pads to ``length``; one of ``vocab.json`` and ``merges.txt`` is converted."""
    import tokenizers
    import transformers

    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"expected a tokenizer (tokenizer.json, or vocab.json and merges.txt) in {directory}; found none")
    try:
        loaded = transformers.CLIPTokenizerFast.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise InputError(f"expected a CLIP tokenizer in {directory}; {str(error).splitlines()[0]}") from None
    found = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    found.enable_truncation(max_length=length)
    found.enable_padding(length=length, pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
    return found


def _scale(pipeline: Path) -> int:
    config = pipeline / "vae" / "config.json"
    levels = json.loads(config.read_text(encoding="utf-8")).get("block_out_channels") if config.is_file() else None
    return 2 ** (len(levels) - 1) if levels else VAE_SCALE


def _check(encoder: TextEncoder, requests: Sequence[Request]) -> None:
    shapes = {request.name: request.shape for request in requests}
    for name, values in encoder.encode([""]).items():
        if values.shape[1:] != shapes[name]:
            raise InputError(
                f"expected text encoders that give {name} of {list(shapes[name])}, as the backbone takes; found "
                f"{list(values.shape[1:])}; take them out of model_index.json for a bundle without prompts"
            )


def prompt_requests(adapter: Adapter, prompts: Path | str | Sequence[str]) -> dict[str, NDArray[Any]]:
    """Request inputs to learn from, ``[prompts, ...]`` or of one row, by the pipeline's own text encoders in torch.

    Args:
        prompts: a file with one on each line, or the texts.

    Raises:
        InputError: for a backbone whose pipeline has no text encoder that is supported, or a file without prompts.
    """
    encoder = load_text_encoder(adapter)
    if not isinstance(encoder, TextEncoder):
        raise InputError(
            f"expected a pipeline with a text encoder for --prompts; found {adapter.source}: "
            f"{encoder or 'it has none'}; pass --requests FILE"
        )
    texts = _lines(Path(prompts)) if isinstance(prompts, (Path, str)) else list(prompts)
    if not texts:
        raise InputError("expected at least one prompt to learn from; found none; write one on each line of --prompts FILE")

    def encode(distinct: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        parts = [encoder.encode(distinct[i : i + AT_ONCE]) for i in range(0, len(distinct), AT_ONCE)]
        return {name: np.concatenate([part[name] for part in parts]) for name in encoder.outputs}

    size = adapter.sample_shape[-2:]
    return request_inputs(encoder.to_json(), adapter.requests, encode, texts, None, len(texts), size)


def _lines(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"expected a file of prompts, one a line, at {path}; {error}") from None
    return [line.strip() for line in lines if line.strip()]
