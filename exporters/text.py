"""The text encoders of a pipeline directory, from token ids to the backbone's request inputs, and their tokenizers.

What each kind of pipeline does with them is a row of :data:`mteo_deploy.exporters.encoders.KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mteo_deploy.errors import InputError, border
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.checkpoint import read_checkpoint
from mteo_deploy.exporters.directory import PipelineDirectory, read_json
from mteo_deploy.exporters.encoders import KINDS, SEEING, Kind, clip, supported
from mteo_deploy.exporters.tokenizer import fit, load_tokenizer
from mteo_deploy.exporters.weights import SAVE_AGAIN, check_finite, check_loaded, check_report, check_tied
from mteo_deploy.prompts import Arrays, encode, request_inputs, tokenise
from mteo_deploy.text import read_text, text_lines

OTHER_HALVES = {
    "CLIPTextModel": ("vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
    "CLIPTextModelWithProjection": ("vision_model.", "visual_projection.", "logit_scale"),
    "Qwen2_5_VLForConditionalGeneration": ("lm_head.", "model.visual.", "visual."),
    "other": ("decoder.", "lm_head."),
}
"""Class -> beginnings of names that a larger model's weights have besides, or that are not used of it."""
AT_ONCE = 32
"""Prompts that are encoded together."""
VAE_SCALE = 8
"""Pixels to a latent where a pipeline has no VAE, as diffusers assumes."""


class TextEncoder(torch.nn.Module):
    """Frozen text encoders of one kind of pipeline: token ids ``[batch, length]`` for each, and the masks of padding where the
    encoders see them, to ``encoder_hidden_states`` ``[batch, length, width]`` and pooled text ``[batch, width]``, if any.

    Args:
        kind: of pipeline.
        encoders: of ``transformers``, in the kind's order.
        tokenizers: for each, of ``tokenizers``; they are made to pad to its length.
        lengths: of each in tokens, without what a template adds.
        prompt: shape of the backbone's prompt, ``(tokens, width)``.
        scale: pixels to a latent, for backbones that are told sizes.
        zero_negative: no negative prompt means zeros, and not an empty one.
    """

    def __init__(
        self,
        kind: Kind,
        encoders: Sequence[Any],
        tokenizers: Sequence[Any],
        lengths: Sequence[int],
        prompt: tuple[int, ...],
        scale: int,
        zero_negative: bool,
    ) -> None:
        super().__init__()
        self.encoders = torch.nn.ModuleList(encoders).requires_grad_(False).eval()
        self.kind, self.tokenizers = kind, list(tokenizers)
        self.prompt, self.scale, self.zero_negative = prompt, scale, zero_negative
        self.templates = kind.templates(tokenizers[0])
        self.lengths = [length + max(one.skip for one in self.templates) for length in lengths]
        for tokenizer, length in zip(tokenizers, self.lengths, strict=True):
            fit(tokenizer, length, kind.padded_at_end)
        numbers = ["", *(f"_{i + 1}" for i in range(1, len(encoders)))]
        self.inputs = [f"{name}{i}" for name in ("input_ids", "attention_mask")[: 1 + kind.masked] for i in numbers]
        self.outputs = list(kind.outputs)

    def forward(self, ids: list[torch.Tensor], masks: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        hidden, *pooled = self.kind.join(self.encoders, ids, masks)
        if self.kind.filled:
            (tokens, width), (_, own_tokens, own_width) = self.prompt, hidden.shape
            hidden = torch.nn.functional.pad(hidden, (0, width - own_width, 0, tokens - own_tokens))
        return hidden, *pooled

    @torch.no_grad()
    def run(self, feeds: Arrays) -> dict[str, NDArray[np.float32]]:
        """Outputs by name of inputs by name, in torch."""
        given, count = [torch.from_numpy(feeds[name]) for name in self.inputs], len(self.encoders)
        return {name: values.numpy() for name, values in zip(self.outputs, self(given[:count], given[count:]), strict=True)}

    def tokenise(self, texts: Sequence[str]) -> Arrays:
        """The inputs that prompts give, by name, ``[count, length]`` each."""
        found = tokenise(self.to_json(), self.tokenizers, texts)
        return {name: found[name] for name in self.inputs}

    def encode(self, texts: Sequence[str], negative: bool = False) -> Arrays:
        """Request inputs of texts by name, ``[count, ...]``, in torch."""
        return encode(self.to_json(), self.tokenizers, self.run, texts, negative)

    def to_json(self) -> dict[str, Any]:
        """What a sampler has to know beside the graph."""
        return {
            "class": " + ".join(type(encoder).__name__ for encoder in self.encoders),
            "parameters": sum(p.numel() for p in self.parameters()),
            "inputs": self.inputs,
            "outputs": self.outputs,
            "tokenizers": self.tokenizer_files,
            "tokens": self.prompt[0],
            "templates": {name: one.to_json() for name, one in zip(("prompt", "negative"), self.templates, strict=True)},
            "mask": self.kind.mask,
            "scale": self.scale,
            "zero_negative": self.zero_negative,
        }

    @property
    def tokenizer_files(self) -> list[str]:
        return [f"tokenizers/tokenizer{f'_{i + 1}' if i else ''}.json" for i in range(len(self.tokenizers))]

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
    pipeline = adapter.pipeline
    listed = [] if pipeline is None else [name for name in pipeline.parts if name.startswith("text_encoder")]
    if pipeline is None or not listed:
        return None
    classes = pipeline.classes()
    found = {name: classes[name] for name in listed if name in classes}
    if not found:
        left = all(name in pipeline.leave_out for name in listed)
        return "left out with --leave-out" if left else f"{pipeline.path} has no directory {' or '.join(listed)}"
    kind = next((kind for kind in KINDS if kind.family == adapter.family and kind.encoders == found), None)
    if kind is None:
        named = ", ".join(f"{name}: {part}" for name, part in found.items())
        return f"text encoders {named} are not supported for {adapter.family}, which may have {supported(adapter.family)}"
    if kind.join is clip and pipeline.config("text_encoder").get("use_attention_mask"):
        return "a text encoder with use_attention_mask is not supported"
    if (missing := _package()) is not None:
        return missing
    made = _load(kind, adapter, pipeline, classes)
    _check(made, adapter)
    return made


def _load(kind: Kind, adapter: Adapter, pipeline: PipelineDirectory, classes: Mapping[str, str]) -> TextEncoder:
    prompt = next(request.shape for request in adapter.requests if request.name == kind.outputs[0])
    numbers = [name.removeprefix("text_encoder") for name in kind.encoders]
    lengths = kind.lengths(prompt[0], [pipeline.prompt_length(number) for number in numbers])
    if min(lengths) < 1:
        raise InputError(
            f"expected --tokens above the {prompt[0] - lengths[-1]} of the pipeline's CLIP encoders; found {prompt[0]}"
        )
    names = [f"tokenizer{number}" for number in numbers]
    tokenizers = [load_tokenizer(pipeline.path / name, classes.get(name, "AutoTokenizer")) for name in names]
    encoders = [_encoder(pipeline.path / name, part) for name, part in kind.encoders.items()]
    for name, encoder in zip(kind.encoders, encoders, strict=True):
        adapter.loras.fuse_text_encoder(name, encoder)
    zeros = kind.zeros and bool(pipeline.fields.get("force_zeros_for_empty_prompt", True))
    return TextEncoder(kind, encoders, tokenizers, lengths, prompt, _scale(pipeline), zeros)


def _package() -> str | None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return "transformers is not installed; run: pip install 'mteo-deploy[train]'"
    return None


def _encoder(directory: Path, cls: str) -> Any:
    """One encoder: of a model that sees and speaks, its reading half alone."""
    import transformers

    checkpoint = read_checkpoint(directory, "model", cls)
    config = read_json(directory / "config.json", f"the configuration of {cls}", SAVE_AGAIN)
    if (directory / "adapter_config.json").exists():  # which transformers would load beside the weights
        raise InputError(
            f"expected {cls} weights in {directory}; it has a PEFT adapter; `merge_and_unload()` and save it again"
        )
    if config.get("transformers_weights"):  # which transformers would load in their place
        raise InputError(
            f"expected {cls} weights in {directory} as model.safetensors; config.json names others in transformers_weights; "
            "take that out of it"
        )
    # torch.export cannot follow the fused attention of T5; without a soft cap both compute the same
    options: dict[str, Any] = {"attn_implementation": "eager"} if "T5" in cls else {}
    options |= {"use_safetensors": True, "dtype": torch.float32, "variant": checkpoint.variant, "local_files_only": True}
    with _quietly(), border(f"expected {cls} weights as safetensors in {directory}", SAVE_AGAIN):
        reported = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # the report names them, the error does not
        found, report = getattr(transformers, cls).from_pretrained(directory, **options, **reported)
    check_report(cls, directory, report, OTHER_HALVES.get(cls, OTHER_HALVES["other"]))
    check_loaded(cls, directory, found)
    used = found.model.language_model if cls in SEEING else found
    check_finite(cls, directory, used.named_parameters())
    check_tied(cls, checkpoint, {"shared.weight": "encoder.embed_tokens.weight"} if "T5" in cls else {})
    used.weights_report = checkpoint.to_json()
    return used


@contextmanager
def _quietly() -> Iterator[None]:
    """No progress bar of transformers, and no table of missing weights: they are an error here."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _scale(pipeline: PipelineDirectory) -> int:
    levels = pipeline.config("vae").get("block_out_channels") if (pipeline.path / "vae").is_dir() else None
    return 2 ** (len(levels) - 1) if levels else VAE_SCALE


def _check(encoder: TextEncoder, adapter: Adapter) -> None:
    """Refuse encoders whose outputs are not what the backbone takes."""
    leave_out = " ".join(f"--leave-out {name}" for name in encoder.kind.encoders)
    if len({n for n, cls in zip(encoder.lengths, encoder.kind.encoders.values(), strict=True) if cls.startswith("CLIP")}) > 1:
        raise InputError(
            f"expected CLIP text encoders of one length; found {encoder.lengths} tokens; correct model_max_length in the "
            f"tokenizers' tokenizer_config.json, or pass {leave_out} for a bundle without prompts"
        )
    shapes = {request.name: request.shape for request in adapter.requests}
    for name, values in encoder.encode([""]).items():
        if values.shape[1:] != shapes[name]:
            raise InputError(
                f"expected text encoders that give {name} of {list(shapes[name])}, as the backbone takes; found "
                f"{list(values.shape[1:])}; pass {leave_out} for a bundle without prompts"
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

    def encode_all(distinct: Sequence[str], negative: bool) -> Arrays:
        parts = [encoder.encode(distinct[i : i + AT_ONCE], negative) for i in range(0, len(distinct), AT_ONCE)]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    size = adapter.sample_shape[-2:]
    return request_inputs(encoder.to_json(), adapter.requests, encode_all, texts, None, len(texts), size)


def _lines(path: Path) -> list[str]:
    return text_lines(read_text(path, "a file of prompts, one a line,"))
