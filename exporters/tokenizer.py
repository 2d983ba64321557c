"""A pipeline's tokenizers for the ``tokenizers`` package, whatever they are stored as."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mteo_deploy.errors import InputError, border

FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
"""One of these makes a directory a tokenizer's."""
CONFIG = 1 << 20
"""Bytes: larger JSON files are vocabularies, and no configuration."""


def load_tokenizer(directory: Path, cls: str) -> Any:
    """A tokenizer of ``tokenizers`` that cuts nothing, and pads texts of different lengths on the side that it is stored with.

    Args:
        cls: its class in ``transformers``, as the pipeline's index names it. Byte pairs (``vocab.json`` and ``merges.txt``) and
            sentencepiece models are converted.

    Raises:
        InputError: for a directory without a tokenizer, or one that transformers cannot read.
    """
    import tokenizers
    import transformers

    if not any((directory / name).is_file() for name in FILES):
        raise InputError(
            f"expected a tokenizer (tokenizer.json, vocab.json and merges.txt, or a sentencepiece model) in {directory}; found "
            "none"
        )
    with border(f"expected a {cls} in {directory}", "a sentencepiece model needs: pip install 'mteo-deploy[train]'"):
        _check_no_code(directory)
        loaded = getattr(transformers, cls, transformers.AutoTokenizer).from_pretrained(directory, trust_remote_code=False)
        made = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    if loaded.pad_token is None:
        raise InputError(f"expected a tokenizer with a padding token in {directory}; name one in its tokenizer_config.json")
    made.no_truncation()
    made.enable_padding(direction=loaded.padding_side, pad_id=loaded.pad_token_id, pad_token=loaded.pad_token)
    return made


def _check_no_code(directory: Path) -> None:
    """Refuse a tokenizer that wants code of its own to run.

    Raises:
        InputError: where a configuration there names some.
    """
    for path in sorted(directory.glob("*.json")):
        if path.stat().st_size < CONFIG and '"auto_map"' in path.read_text(encoding="utf-8", errors="replace"):
            raise InputError(
                f"expected a tokenizer that is data in {directory}; found code of its own (auto_map in {path.name}), which is "
                "never run; save it again with a tokenizer class of transformers"
            )


def fit(tokenizer: Any, length: int, at_end: bool) -> None:
    """Make a tokenizer cut and pad to ``length`` tokens, ``at_end`` or on the side that it is stored with."""
    own = tokenizer.padding
    side = "right" if at_end else own["direction"]
    tokenizer.enable_truncation(max_length=length)
    tokenizer.enable_padding(direction=side, length=length, pad_id=own["pad_id"], pad_token=own["pad_token"])
