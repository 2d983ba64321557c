"""Prompts to request inputs: token ids by the ``tokenizers`` package, and what text encoders make of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle
from mteo_deploy.errors import InputError, MissingPackageError
from mteo_deploy.requests import NEGATIVE, Request

Texts = str | Sequence[str]
Encode = Callable[[Sequence[str]], dict[str, NDArray[Any]]]
"""Texts to request inputs by name, ``[count, ...]`` each."""


def open_tokenizers(bundle: Bundle) -> list[Any]:
    """A bundle's tokenizers, one for each input of its text encoder.

    Raises:
        InputError: for a bundle without a text encoder, saying why where ``export`` left one out.
        MissingPackageError: when tokenizers is not installed.
    """
    if bundle.text_encoder is None:
        why = bundle.manifest.get("left_out", {}).get("text encoder", "its pipeline had no text encoder")
        raise InputError(
            f"expected a bundle with a text encoder for prompts; {bundle.path} has none: {why}; pass --requests FILE"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise MissingPackageError("prompts need the package tokenizers; run: pip install 'mteo-deploy[text]'") from None
    return [Tokenizer.from_file(str(bundle.file(name))) for name in bundle.text_encoder["tokenizers"]]


def tokenise(tokenizers: Sequence[Any], texts: Sequence[str]) -> list[NDArray[np.int64]]:
    """Token ids ``[count, length]`` of each tokenizer, padded; warns of texts that were cut."""
    found = [tokenizer.encode_batch(list(texts)) for tokenizer in tokenizers]
    cut = {text: len(one.ids) for encodings in found for text, one in zip(texts, encodings, strict=True) if one.overflowing}
    for text, length in cut.items():
        warnings.warn(f"the prompt {text[:40]!r}... is longer than {length} tokens; its end is left out", stacklevel=2)
    return [np.array([one.ids for one in encodings], dtype=np.int64) for encodings in found]


def request_inputs(
    entry: Mapping[str, Any],
    requests: Sequence[Request],
    encode: Encode,
    prompt: Texts,
    negative: Texts | None,
    count: int,
    size: Sequence[int],
) -> dict[str, NDArray[Any]]:
    """Request inputs of prompts by name, one row for all images or one for each.

    Args:
        entry: of the text encoder, as the manifest has it.
        requests: that the backbone takes.
        prompt, negative: one for all images, or one for each; without a negative one, guidance gets the empty prompt, or zeros
            where the pipeline says so (SDXL).
        count: of images.
        size: height and width of the states, from which SDXL's sizes follow: original and target size the image's own, not cut.

    Raises:
        InputError: for another number of prompts, or a negative one without guidance.
    """
    names = {request.name for request in requests}
    found = _rows(encode, _texts("--prompt", prompt, count))
    guided = [name for name in found if NEGATIVE + name in names]
    if negative is not None and not guided:
        raise InputError("expected --negative-prompt with guidance; found none; export with --guidance-scale SCALE")
    if guided and negative is None and entry["zero_negative"]:
        found |= {NEGATIVE + name: np.zeros_like(found[name][:1]) for name in guided}
    elif guided:
        rows = _rows(encode, _texts("--negative-prompt", negative or "", count))
        found |= {NEGATIVE + name: rows[name] for name in guided}
    if "time_ids" in names:
        height, width = (n * entry["scale"] for n in size)
        found["time_ids"] = np.array([[height, width, 0, 0, height, width]], dtype=np.float32)
    return found


def _texts(option: str, given: Texts, count: int) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    if len(texts) not in (1, count):
        raise InputError(f"expected one {option} for all images or one for each of {count}; found {len(texts)}")
    return texts


def _rows(encode: Encode, texts: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Each text's values, encoded once."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    rows = [places[text] for text in texts]
    return {name: values[rows] for name, values in encode(list(places)).items()}
