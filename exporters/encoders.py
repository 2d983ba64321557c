"""Which text encoders a pipeline has, and what it makes of their outputs: a row of :data:`KINDS` for each kind of pipeline.

Every row is what diffusers' pipeline does in ``encode_prompt``: which hidden states, with or without the mask of the padding,
and with which text around the prompt. Instructions that a pipeline puts before a prompt are read from its class in diffusers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mteo_deploy.prompts import Template

SEEING = ("Qwen2_5_VLForConditionalGeneration",)
"""Encoders that take images too: their language model alone is used."""
Tensors = Sequence[torch.Tensor]
Outputs = tuple[torch.Tensor, ...]


def clip(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    return (encoders[0](ids[0]).last_hidden_state,)


def _clip_pair(encoders: Any, ids: Tensors, masks: Tensors) -> list[Any]:
    return [encoder(one, output_hidden_states=True) for encoder, one in zip(encoders, ids, strict=False)]


def _sdxl(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    found = _clip_pair(encoders, ids, masks)
    return torch.cat([one.hidden_states[-2] for one in found], dim=-1), found[-1].text_embeds


def _sd3(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    """CLIP's states side by side, as wide as T5's with zeros, and T5's behind them; both projections side by side."""
    found = _clip_pair(encoders[:2], ids[:2], masks)
    clip, t5 = torch.cat([one.hidden_states[-2] for one in found], dim=-1), encoders[2](ids[2])[0]
    clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    return torch.cat([clip, t5], dim=1), torch.cat([one.text_embeds for one in found], dim=-1)


def _sd3_without_t5(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    found = _clip_pair(encoders, ids, masks)
    return torch.cat([one.hidden_states[-2] for one in found], dim=-1), torch.cat([one.text_embeds for one in found], dim=-1)


def _flux(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    return encoders[1](ids[1])[0], encoders[0](ids[0]).pooler_output


def _t5(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    return (encoders[0](ids[0])[0],)


def _t5_masked(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    return (encoders[0](ids[0], attention_mask=masks[0])[0],)


def _t5_zeroed(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    return (encoders[0](ids[0], attention_mask=masks[0])[0] * masks[0].unsqueeze(-1),)


def _gemma_before_last(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    found = encoders[0](ids[0], attention_mask=masks[0], output_hidden_states=True, use_cache=False)
    return (found.hidden_states[-2],)


def _gemma(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    return (encoders[0](ids[0], attention_mask=masks[0], use_cache=False).last_hidden_state,)


def _qwen(encoders: Any, ids: Tensors, masks: Tensors) -> Outputs:
    found = encoders[0](input_ids=ids[0], attention_mask=masks[0], use_cache=False).last_hidden_state
    return (found * masks[0].unsqueeze(-1),)


Templates = tuple[Template, Template]
"""Of a prompt and of a negative one."""


def _plain(tokenizer: Any) -> Templates:
    return Template(), Template()


def _lowered(tokenizer: Any) -> Templates:
    return Template(lower=True), Template(lower=True)


def _instructed(tokenizer: Any) -> Templates:
    """Lumina 2: an instruction before the prompt, and none before a negative one."""
    from diffusers import Lumina2Pipeline

    pipeline = Lumina2Pipeline(None, None, None, None, None)
    return Template(before=f"{pipeline.system_prompt} <Prompt Start> "), Template()


def _enhanced(tokenizer: Any) -> Templates:
    """Sana: a long instruction, of whose tokens the first and the last alone are kept; none before a negative prompt."""
    from diffusers import SanaPipeline

    lines = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
    before = "\n".join(lines)
    skip = len(tokenizer.encode(before).ids) - 2
    return Template(before, lower=True, first=1, skip=skip), Template(lower=True, first=1)


def _chat(tokenizer: Any) -> Templates:
    """Qwen-Image: a conversation, whose beginning is dropped."""
    from diffusers import QwenImagePipeline

    pipeline = QwenImagePipeline(None, None, None, None, None)
    before, after = pipeline.prompt_template_encode.split("{}")
    found = Template(before, after, skip=int(pipeline.prompt_template_encode_start_idx))
    return found, found


@dataclass(frozen=True)
class Kind:
    """How a pipeline makes request inputs of prompts.

    Attributes:
        family: of the backbone.
        encoders: part of the pipeline -> class in ``transformers``, in order.
        join: encoders, token ids and masks of each, to ``outputs``.
        outputs: request inputs; the first has a row for each token.
        mask: the request input that tells tokens (1) from padding (0), where there is one.
        masked: the encoders see the masks.
        templates: from the tokenizer, what is put around a prompt, and what is kept of it.
        padded_at_end: whatever the tokenizer is stored with.
        behind: a prompt is the tokens of CLIP, and the last encoder's behind them.
        filled: the first output is as large as the backbone takes it by zeros behind it.
        zeros: no negative prompt means zeros, unless the pipeline's index says otherwise.
    """

    family: str
    encoders: Mapping[str, str]
    join: Callable[[Any, Tensors, Tensors], Outputs]
    outputs: tuple[str, ...] = ("encoder_hidden_states",)
    mask: str | None = None
    masked: bool = False
    templates: Callable[[Any], Templates] = _plain
    padded_at_end: bool = False
    behind: bool = False
    filled: bool = False
    zeros: bool = False

    def lengths(self, tokens: int, own: Sequence[int]) -> list[int]:
        """Tokens of each encoder, where a prompt of the backbone has so many; without what a template adds.

        Args:
            own: what each takes, if it is one of CLIP's.
        """
        others = tokens - own[0] if self.behind else tokens
        return [length if cls.startswith("CLIP") else others for cls, length in zip(self.encoders.values(), own, strict=True)]


T5 = {"text_encoder": "T5EncoderModel"}
MASK = "encoder_attention_mask"
PAIR = {"text_encoder": "CLIPTextModelWithProjection", "text_encoder_2": "CLIPTextModelWithProjection"}
POOLED = ("encoder_hidden_states", "pooled_projections")

KINDS = (
    Kind("UNet2DConditionModel", {"text_encoder": "CLIPTextModel"}, clip),
    Kind(
        "UNet2DConditionModel",
        {"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
        _sdxl,
        ("encoder_hidden_states", "text_embeds"),
        zeros=True,
    ),
    Kind("PixArtTransformer2DModel", T5, _t5_masked, mask=MASK, masked=True, templates=_lowered),
    Kind("SD3Transformer2DModel", {**PAIR, "text_encoder_3": "T5EncoderModel"}, _sd3, POOLED, behind=True),
    Kind("SD3Transformer2DModel", PAIR, _sd3_without_t5, POOLED, filled=True),
    Kind("FluxTransformer2DModel", {"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"}, _flux, POOLED),
    Kind("CogVideoXTransformer3DModel", T5, _t5),
    Kind("AuraFlowTransformer2DModel", {"text_encoder": "UMT5EncoderModel"}, _t5_zeroed, masked=True),
    Kind(
        "Lumina2Transformer2DModel",
        {"text_encoder": "Gemma2Model"},
        _gemma_before_last,
        mask=MASK,
        masked=True,
        templates=_instructed,
        padded_at_end=True,
    ),
    Kind(
        "SanaTransformer2DModel",
        {"text_encoder": "Gemma2Model"},
        _gemma,
        mask=MASK,
        masked=True,
        templates=_enhanced,
        padded_at_end=True,
    ),
    Kind(
        "QwenImageTransformer2DModel",
        {"text_encoder": "Qwen2_5_VLForConditionalGeneration"},
        _qwen,
        mask="encoder_hidden_states_mask",
        masked=True,
        templates=_chat,
        padded_at_end=True,
    ),
)


def supported(family: str) -> str:
    """In words, which encoders a family's prompts may have."""
    found = [" and ".join(f"{name}: {cls}" for name, cls in kind.encoders.items()) for kind in KINDS if kind.family == family]
    return ", or ".join(found) or "none"
