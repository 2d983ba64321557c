"""Transformers of diffusers, as small as they come."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AuraFlowTransformer2DModel,
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
)


def flux(**options: Any) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 6, 6),
        **options,
    )


def sd3(**options: Any) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=32,
        pooled_projection_dim=10,
        pos_embed_max_size=8,
        **options,
    )


def pixart(**options: Any) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        cross_attention_dim=24,
        caption_channels=10,
        **options,
    )


def qwen(**options: Any) -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=10,
        axes_dims_rope=(4, 4, 4),
        **options,
    )


def auraflow() -> AuraFlowTransformer2DModel:
    return AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=10,
        caption_projection_dim=24,
        pos_embed_max_size=16,
    )


def lumina(prompt: int = 12, **options: Any) -> Lumina2Transformer2DModel:
    """``prompt``: one more than its longest prompt."""
    return Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=8,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(prompt, 8, 8),
        cap_feat_dim=10,
        **options,
    )


def cogvideox(tokens: int = 6, **options: Any) -> CogVideoXTransformer3DModel:
    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=12,
        text_embed_dim=10,
        num_layers=1,
        sample_width=8,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=tokens,
        **options,
    )


def sana(**options: Any) -> SanaTransformer2DModel:
    return SanaTransformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=12,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=10,
        **options,
    )
