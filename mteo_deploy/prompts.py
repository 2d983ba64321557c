"""Prompts to request inputs: token ids by the ``tokenizers`` package, and what text encoders make of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mteo_deploy.bundle import Bundle
from mteo_deploy.errors import BundleError, InputError, MissingPackageError, border
from mteo_deploy.requests import NEGATIVE, Request
from mteo_deploy.text import check_prompt

Texts = str | Sequence[str]
Arrays = dict[str, NDArray[Any]]
Encode = Callable[[Sequence[str], bool], Arrays]
"""Texts, and whether they are negative ones, to request inputs by name, ``[count, ...]`` each."""
SIZES = ("time_ids", "resolution", "aspect_ratio")
"""Request inputs that tell a backbone the size of the image."""


@dataclass(frozen=True)
class Template:
    """What a pipeline puts around a prompt, and which of the tokens it keeps.

    Attributes:
        before, after: the prompt.
        lower: the prompt is put in small letters, without space around it.
        first: tokens that are kept at the beginning.
        skip: tokens behind them that are not.
    """

    before: str = ""
    after: str = ""
    lower: bool = False
    first: int = 0
    skip: int = 0

    def around(self, text: str) -> str:
        return self.before + (text.lower().strip() if self.lower else text) + self.after

    def keep(self, values: NDArray[Any], tokens: int) -> NDArray[Any]:
        """Of ``[count, length, ...]`` the ``tokens`` that are kept; all of them where there are no others."""
        behind = self.first + self.skip
        return np.concatenate([values[:, : self.first], values[:, behind : self.skip + tokens]], axis=1)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def template_of(entry: Mapping[str, Any], negative: bool) -> Template:
    """The template of prompts or of negative ones, as a text encoder's entry has it."""
    return Template(**entry["templates"]["negative" if negative else "prompt"])


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
    with border(f"{bundle.path}: expected tokenizers that the package tokenizers reads", "export again", BundleError):
        return [Tokenizer.from_file(str(bundle.file(name))) for name in bundle.text_encoder["tokenizers"]]


def tokenise(entry: Mapping[str, Any], tokenizers: Sequence[Any], texts: Sequence[str], negative: bool = False) -> Arrays:
    """``input_ids`` and ``attention_mask``, with ``_2``, ``_3`` for further tokenizers: ``[count, length]``, padded; warns of
    texts that were cut.

    Args:
        entry: of the text encoder, as the manifest has it.
        negative: texts are negative prompts.
    """
    template = template_of(entry, negative)
    around = [template.around(check_prompt(text)) for text in texts]
    with border("the tokenizer does not take the prompts", "look at the tokenizer of the pipeline that was exported"):
        found = [tokenizer.encode_batch(around) for tokenizer in tokenizers]
    for text, length in _cut(found, texts, template.skip + entry["tokens"]).items():
        warnings.warn(f"the prompt {text[:40]!r}... is longer than {length} tokens; its end is left out", stacklevel=2)
    tokens: Arrays = {}
    for i, encodings in enumerate(found):
        number = f"_{i + 1}" if i else ""
        tokens[f"input_ids{number}"] = np.array([one.ids for one in encodings], dtype=np.int64)
        tokens[f"attention_mask{number}"] = np.array([one.attention_mask for one in encodings], dtype=np.int64)
    return tokens


def _cut(found: Sequence[Sequence[Any]], texts: Sequence[str], most: int) -> dict[str, int]:
    """Text -> how much of it is taken, for those that are longer."""
    pairs = [(text, one) for encodings in found for text, one in zip(texts, encodings, strict=True)]
    return {text: min(len(one.ids), most) for text, one in pairs if one.overflowing or sum(one.attention_mask) > most}


def encode(
    entry: Mapping[str, Any],
    tokenizers: Sequence[Any],
    run: Callable[[Arrays], Arrays],
    texts: Sequence[str],
    negative: bool = False,
) -> Arrays:
    """Request inputs of texts by name, ``[count, ...]`` each.

    Args:
        entry: of the text encoder, as the manifest has it.
        run: the text encoder, from its inputs to its outputs by name.
        negative: texts are negative prompts.
    """
    tokens, template = tokenise(entry, tokenizers, texts, negative), template_of(entry, negative)
    found = run({name: tokens[name] for name in entry["inputs"]})
    rows = {entry["outputs"][0]: found[entry["outputs"][0]]}
    rows |= {entry["mask"]: tokens["attention_mask"]} if entry["mask"] else {}
    return {**found, **{name: template.keep(values, entry["tokens"]) for name, values in rows.items()}}


def request_inputs(
    entry: Mapping[str, Any],
    requests: Sequence[Request],
    encode: Encode,
    prompt: Texts,
    negative: Texts | None,
    count: int,
    size: Sequence[int],
) -> Arrays:
    """Request inputs of prompts by name, one row for all images or one for each.

    Args:
        entry: of the text encoder, as the manifest has it.
        requests: that the backbone takes.
        prompt, negative: one for all images, or one for each; without a negative one, guidance gets the empty prompt, or zeros
            where the pipeline says so (SDXL).
        count: of images.
        size: height and width of the states, from which the image's follow where the backbone is told them.

    Raises:
        InputError: for another number of prompts, or a negative one without guidance.
    """
    names = {request.name for request in requests}
    found = _rows(encode, _texts("--prompt", prompt, count), False)
    guided = [name for name in found if NEGATIVE + name in names]
    if negative is not None and not guided:
        raise InputError("expected --negative-prompt with guidance; found none; export with --guidance-scale SCALE")
    if guided and negative is None and entry["zero_negative"]:
        found |= {NEGATIVE + name: np.zeros_like(found[name][:1]) for name in guided}
    elif guided:
        rows = _rows(encode, _texts("--negative-prompt", negative or "", count), True)
        found |= {NEGATIVE + name: rows[name] for name in guided}
    return {**found, **{name: values for name, values in _sizes(*(n * entry["scale"] for n in size)).items() if name in names}}


def _sizes(height: int, width: int) -> Arrays:
    """:data:`SIZES` of an image of this size, in pixels: SDXL's say that it was never larger, and that nothing was cut off."""
    values = ([height, width, 0, 0, height, width], [height, width], [height / width])
    return {name: np.array([one], dtype=np.float32) for name, one in zip(SIZES, values, strict=True)}


def check_texts(prompt: Texts, negative: Texts | None, count: int) -> None:
    """Refuse another number of prompts than one for all of ``count`` images, or one for each.

    Raises:
        InputError: which names the option.
    """
    _texts("--prompt", prompt, count)
    _texts("--negative-prompt", negative or "", count)


def _texts(option: str, given: Texts, count: int) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    if len(texts) not in (1, count):
        raise InputError(f"expected one {option} for all images or one for each of {count}; found {len(texts)}")
    return texts


def _rows(encode: Encode, texts: Sequence[str], negative: bool) -> Arrays:
    """Each text's values, encoded once."""
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    rows = [places[text] for text in texts]
    return {name: values[rows] for name, values in encode(list(places), negative).items()}
