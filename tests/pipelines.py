"""Small random parts of a text-to-image pipeline beside the UNet of ``test_unet2d_condition``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from helpers import edit_json
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

WORDS = ("a", "the", "photograph", "of", "an", "astronaut", "riding", "horse", "two", "cats", "castle")
START, END = "<|startoftext|>", "<|endoftext|>"


def random_vae(**options: Any) -> AutoencoderKL:
    """Two levels: images are twice as high and wide as latents."""
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        **{"latent_channels": 2, "scaling_factor": 0.5, "shift_factor": 0.1, **options},
    )


def add_part(pipeline: Path, name: str, part: Any, library: str = "diffusers") -> None:
    """Save a part of a pipeline and name it in the index."""
    part.save_pretrained(pipeline / name)
    edit_json(pipeline / "model_index.json", lambda index: index.update({name: [library, type(part).__name__]}))


def vocabulary() -> tuple[dict[str, int], list[str]]:
    """Byte pairs as CLIP has them: every byte, inside a word and at its end; the words above, letter by letter."""
    letters = sorted(ByteLevel.alphabet())
    tokens, merges = [*letters, *(f"{letter}</w>" for letter in letters)], []
    for word in WORDS:
        made, *others = [*word[:-1], f"{word[-1]}</w>"]
        for other in others:
            if made + other not in tokens:
                tokens.append(made + other)
                merges.append(f"{made} {other}")
            made += other
    return {token: i for i, token in enumerate([*tokens, START, END])}, merges


def add_tokenizer(pipeline: Path, name: str, pad: str = END) -> None:
    """A slow tokenizer, as Stable Diffusion's repositories have it: no ``tokenizer.json``."""
    directory, (tokens, merges) = pipeline / name, vocabulary()
    directory.mkdir()
    (directory / "vocab.json").write_text(json.dumps(tokens))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **special}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    edit_json(pipeline / "model_index.json", lambda index: index.update({name: ["transformers", "CLIPTokenizer"]}))


def add_text(pipeline: Path, xl: bool = False) -> None:
    """CLIP text encoders and tokenizers: one of width 12, or SDXL's two of 4 and 8, the second projected to 16."""
    torch.manual_seed(2)
    size = len(vocabulary()[0])

    def config(width: int) -> CLIPTextConfig:
        ids = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": 16}
        return CLIPTextConfig(hidden_size=width, intermediate_size=2 * width, **ids, **heads)

    add_part(pipeline, "text_encoder", CLIPTextModel(config(4 if xl else 12)), "transformers")
    add_tokenizer(pipeline, "tokenizer")
    if xl:
        add_part(pipeline, "text_encoder_2", CLIPTextModelWithProjection(config(8)), "transformers")
        add_tokenizer(pipeline, "tokenizer_2", pad="!")
