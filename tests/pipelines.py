"""Small random parts of a text-to-image pipeline beside its backbone, with tokenizers that know a few words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from diffusers import AutoencoderKL
from helpers import edit_json
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

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
    add_clip(pipeline, "", 4 if xl else 12, None)
    if xl:
        add_clip(pipeline, "_2", 8, 16, pad="!")


def add_clip(pipeline: Path, number: str, width: int, projected: int | None, pad: str = END) -> None:
    """One CLIP text encoder and its tokenizer; ``number`` is the end of their names."""
    size = len(vocabulary()[0])
    ids = {"vocab_size": size, "bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    options = {"num_hidden_layers": 2, "num_attention_heads": 2, "projection_dim": projected or width, **ids}
    config = CLIPTextConfig(hidden_size=width, intermediate_size=2 * width, **options)
    cls = CLIPTextModel if projected is None else CLIPTextModelWithProjection
    add_part(pipeline, f"text_encoder{number}", cls(config), "transformers")
    add_tokenizer(pipeline, f"tokenizer{number}", pad)


SENTENCES = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 20


def add_sentencepiece(pipeline: Path, name: str, cls: str, model: str, texts: list[str], config: dict[str, Any]) -> int:
    """A sentencepiece model and no ``tokenizer.json``, as PixArt's repositories have it; its number of tokens.

    Args:
        model: ``unigram`` with T5's special tokens, ``bpe`` with Gemma's.
        texts: to learn from.
    """
    directory = pipeline / name
    directory.mkdir()
    special: dict[str, Any] = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    if model == "bpe":
        special |= {
            "bos_id": 2,
            "unk_id": 3,
            "byte_fallback": True,
            "add_dummy_prefix": False,
            "normalization_rule_name": "identity",
        }
    file = directory / ("spiece" if model == "unigram" else "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(file),
        model_type=model,
        vocab_size=600,
        hard_vocab_limit=False,
        minloglevel=2,
        **special,
    )
    file.with_suffix(".vocab").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": cls, **config}))
    edit_json(pipeline / "model_index.json", lambda index: index.update({name: ["transformers", cls]}))
    return 800  # more than the model has, with the tokens that transformers adds


def add_t5(pipeline: Path, number: str = "", width: int = 12, multilingual: bool = False) -> None:
    """T5's encoder and a unigram tokenizer; UMT5's with byte pairs, as AuraFlow has it."""
    torch.manual_seed(3)
    config: Callable[..., Any] = UMT5Config if multilingual else T5Config
    encoder: Callable[..., Any] = UMT5EncoderModel if multilingual else T5EncoderModel
    if multilingual:
        size = add_sentencepiece(pipeline, f"tokenizer{number}", "LlamaTokenizer", "bpe", SENTENCES, {"pad_token": "<pad>"})
    else:
        size = add_sentencepiece(pipeline, f"tokenizer{number}", "T5Tokenizer", "unigram", SENTENCES, {})
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    add_part(pipeline, f"text_encoder{number}", encoder(config(vocab_size=size, **sizes)), "transformers")


def add_gemma(pipeline: Path, width: int, instruction: str) -> None:
    """Gemma-2 without its head, and a tokenizer that knows the instruction and pads at the beginning."""
    torch.manual_seed(4)
    texts = [*SENTENCES, *(line for line in instruction.split("\n") for _ in range(20))]
    size = add_sentencepiece(pipeline, "tokenizer", "GemmaTokenizer", "bpe", texts, {"padding_side": "left"})
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "query_pre_attn_scalar": 8}
    config = Gemma2Config(vocab_size=size, hidden_size=width, intermediate_size=24, num_hidden_layers=3, **heads)
    add_part(pipeline, "text_encoder", Gemma2Model(config), "transformers")


def add_qwen(pipeline: Path, width: int, template: str) -> None:
    """Qwen2.5-VL and byte pairs as ``tokenizer.json``."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Tokenizer

    torch.manual_seed(5)
    directory = pipeline / "tokenizer"
    directory.mkdir()
    trained = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trained.train_from_iterator([*SENTENCES, *[template] * 20], vocab_size=500, special_tokens=special, show_progress=False)
    trained.save_model(str(directory))
    loaded = Qwen2Tokenizer.from_pretrained(directory, extra_special_tokens=special[1:])
    loaded.save_pretrained(directory)
    edit_json(pipeline / "model_index.json", lambda index: index.update({"tokenizer": ["transformers", "Qwen2Tokenizer"]}))
    ids = {"vocab_size": len(loaded) + 1, "bos_token_id": 0, "eos_token_id": 0}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1}
    rope = {"rope_type": "default", "mrope_section": [1, 2, 2], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={"hidden_size": width, "intermediate_size": 24, "rope_parameters": rope, **heads, **ids},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": width},
    )
    add_part(pipeline, "text_encoder", Qwen2_5_VLForConditionalGeneration(config), "transformers")
