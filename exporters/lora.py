"""LoRA weights (Hu et al. 2021, arXiv 2106.09685), read by diffusers' own loaders and fused before anything is traced.

A fused network is an ordinary one: its fingerprint is that of the fused weights, and an embedding set belongs to it alone.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mteo_deploy.bundle import sha256_file
from mteo_deploy.errors import InputError, MissingPackageError, MteoError
from mteo_deploy.exporters.checkpoint import some
from mteo_deploy.exporters.lora_file import SECOND, read_lora


@dataclass(frozen=True)
class Lora:
    """A safetensors file of LoRA weights, and how much of it to add: 1 is as it was trained, 0 nothing."""

    file: Path
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Lora:
        """``PATH`` or ``PATH:SCALE``; of a directory its one safetensors file.

        Raises:
            InputError: for a path without such a file, or a scale that is no finite number.
        """
        path, _, tail = text.rpartition(":")
        try:
            file, scale = (Path(path), float(tail)) if path else (Path(text), 1.0)
        except ValueError:
            file, scale = Path(text), 1.0
        inside = sorted(file.glob("*.safetensors")) if file.is_dir() else [file]
        if len(inside) != 1 or not inside[0].is_file() or inside[0].suffix != ".safetensors":
            raise InputError(
                f"expected --lora PATH or PATH:SCALE of one safetensors file; found {text!r}; pickled files are not read"
            )
        if not math.isfinite(scale):
            raise InputError(f"expected a finite scale in --lora PATH:SCALE; found {text!r}")
        return cls(inside[0], scale)

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file.name, "sha256": sha256_file(self.file), "scale": self.scale}


@dataclass(frozen=True)
class Loras:
    """LoRA weights for a pipeline, in the order that they are fused.

    Attributes:
        pipeline: name of its class in diffusers, whose loader reads them.
    """

    pipeline: str = "none"
    files: tuple[Lora, ...] = ()

    def fuse_network(self, name: str, network: Any, encoders: Collection[str] | None = None) -> None:
        """Add them to a backbone, which is the part ``name`` of its pipeline.

        Args:
            encoders: names of the text encoders that the pipeline has; None: not known.

        Raises:
            InputError: for a file that does not fit, whole, or a pipeline that diffusers has no loader for.
            MissingPackageError: without peft.
        """
        for lora in self.files:
            state, metadata = self._read(lora, getattr(network, "config", None))
            self._refuse_other_parts(lora, name, state, encoders)
            wanted = _of(state, name)
            if not wanted:
                continue
            known = bool(_of(metadata or {}, name))
            before = {key: value.shape for key, value in network.state_dict().items()}
            with _fitting(lora, name):
                network.load_lora_adapter(state, prefix=name, metadata=metadata if known else None)
                _check_arrived(lora, name, network, wanted, unscaled=not known)
                network.fuse_lora(lora_scale=lora.scale, safe_fusing=True)
                network.unload_lora()
            if {key: value.shape for key, value in network.state_dict().items()} != before:
                raise InputError(f"expected LoRA weights that leave {name} its shapes; {lora.file} changes them; not supported")

    def fuse_text_encoder(self, name: str, encoder: Any) -> None:
        """Add what of them is for a text encoder, the part ``name`` of the pipeline, where the pipeline's loader reads any."""
        from diffusers.loaders.lora_base import fuse_text_encoder_lora
        from diffusers.utils import recurse_remove_peft_layers

        for lora in self.files:
            state, metadata = self._read(lora)
            wanted = _of(state, name)
            if not wanted:
                continue
            known = bool(_of(metadata or {}, name))
            with _fitting(lora, name):
                loader = self._class().load_lora_into_text_encoder
                loader(state, network_alphas=None, text_encoder=encoder, prefix=name, metadata=metadata if known else None)
                _check_arrived(lora, name, encoder, wanted, unscaled=not known)
                fuse_text_encoder_lora(encoder, lora.scale, safe_fusing=True)
                recurse_remove_peft_layers(encoder)
            encoder._hf_peft_config_loaded = False
            del encoder.peft_config

    def refuse_text(self, reason: str, left_out: Collection[str] = ()) -> None:
        """Refuse files with weights for text encoders where those do not go into the bundle.

        Args:
            left_out: parts that the user leaves out by name, with what is for them.

        Raises:
            InputError: that names them, and says ``reason``.
        """
        for lora in self.files:
            state, _ = self._read(lora)
            text = [key for key in state if key.startswith("text_encoder") and key.partition(".")[0] not in left_out]
            if text:
                raise InputError(
                    f"expected LoRA weights of the backbone alone in {lora.file}, since the bundle has no text encoder "
                    f"({reason}); found {some(text)}; leave those out of the file"
                )

    def to_json(self) -> list[dict[str, Any]]:
        return [lora.to_json() for lora in self.files]

    def _class(self) -> Any:
        try:
            import peft  # noqa: F401
        except ImportError:
            raise MissingPackageError("LoRA weights need the package peft; run: pip install 'mteo-deploy[train]'") from None
        import diffusers

        found = getattr(diffusers, self.pipeline, None)
        if not hasattr(found, "lora_state_dict"):
            raise InputError(
                f"expected a pipeline that diffusers loads LoRA weights for; found {self.pipeline}; leave --lora out"
            )
        return found

    def _refuse_other_parts(self, lora: Lora, name: str, state: dict[str, Any], encoders: Collection[str] | None) -> None:
        """Every layer is of the backbone or of a text encoder that is there, and that diffusers' loader reads."""
        text = [key for key in state if key.startswith("text_encoder")]
        if text and not hasattr(self._class(), "load_lora_into_text_encoder"):
            raise InputError(
                f"expected LoRA weights of {name} alone in {lora.file}, since diffusers has no loader for those of "
                f"{self.pipeline}'s text encoders; found {some(text)}"
            )
        others = [key for key in state if not key.startswith(f"{name}.") and key not in text]
        if others:
            raise InputError(f"expected LoRA weights of {name} in {lora.file}; found {some(others)}; pass one made for it")
        absent = [key for key in text if encoders is not None and key.partition(".")[0] not in encoders]
        if absent:
            raise InputError(
                f"expected LoRA weights of {name} and of text encoders that the pipeline has in {lora.file}; found "
                f"{some(absent)}; leave those out of the file"
            )

    def _read(self, lora: Lora, config: Any = None) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Weights with diffusers' names, ``<part>.<layer>...``, whatever the trainer called them, and PEFT's configuration."""
        raw, metadata = read_lora(lora.file)
        options: dict[str, Any] = {"return_alphas": True, "return_lora_metadata": True}
        if config is not None and "XL" in self.pipeline:  # as SDXL's own loader
            options["unet_config"] = config
        with _fitting(lora, self.pipeline):
            read = partial(self._class().lora_state_dict, **options)
            found, forgotten = read(dict(raw))[0], _forgotten(raw, read)
        if forgotten:
            raise InputError(
                f"expected LoRA weights for {self.pipeline} in {lora.file}, all of which diffusers' loader reads; it leaves "
                f"{some(forgotten)} out; pass one made for this backbone"
            )
        state = {key: value for key, value in found.items() if not key.endswith(".alpha")}
        return state, metadata


def _forgotten(raw: Mapping[str, torch.Tensor], read: Callable[[dict[str, torch.Tensor]], Any]) -> list[str]:
    """Layers that do something and that a loader leaves out: it gets every second matrix filled with a number of its own, and
    what it gives, renamed, split or joined, is looked through for them."""
    seconds = [name for name in raw if name.endswith(".weight") and SECOND.search(name)]
    numbers = {name: float(i) for i, name in enumerate(seconds, 1)}
    given = {name: torch.full_like(value, numbers[name]) if name in numbers else value for name, value in raw.items()}
    seen: set[float] = set()
    for name, value in read(given)[0].items():
        if SECOND.search(name) and value.ndim > 1:
            seen.update(value.flatten(1)[:, 0].unique().tolist())
    return [name for name in seconds if numbers[name] not in seen and bool(raw[name].any())]


def _of(state: Mapping[str, Any], part: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key.startswith(f"{part}.")}


def _check_arrived(lora: Lora, name: str, network: torch.nn.Module, wanted: Mapping[str, torch.Tensor], unscaled: bool) -> None:
    """Every matrix of the file is in a layer of the network, and the layers have no others.

    Args:
        unscaled: alphas are in the matrices already, so that every layer's own scale is one.

    Raises:
        InputError: for layers that the network does not have.
    """
    found = {key: value for key, value in network.named_parameters() if ".lora_" in key}
    meta = any(value.is_meta for value in found.values())
    there, given = (Counter(_content(value, meta) for value in values.values()) for values in (found, wanted))
    layers, lost, left = {layer for layer, _ in network.named_modules()}, [], Counter(there)
    for key in sorted(wanted, key=lambda key: key.removeprefix(f"{name}.").partition(".lora")[0] not in layers):
        content = _content(wanted[key], meta)
        lost += [] if left[content] > 0 else [key]
        left[content] -= 1
    if lost:
        raise InputError(
            f"expected LoRA weights all of whose layers {name} has in {lora.file}; {len(lost)} of {len(wanted)} matrices fit "
            f"nowhere ({some(lost)}); pass one made for this backbone"
        )
    drawn = [key for key, value in found.items() if _content(value, meta) in there - given and ".lora_B." in key]
    if not meta and any(bool(found[key].any()) for key in drawn):
        raise InputError(f"expected LoRA weights for {some(drawn)} of {name} in {lora.file}; found none; fetch it again")
    if unscaled:
        for module in network.modules():
            scaling: Any = getattr(module, "scaling", None)
            if isinstance(scaling, dict) and hasattr(module, "lora_A"):
                scaling.update(dict.fromkeys(scaling, 1.0))


def _content(value: torch.Tensor, meta: bool) -> bytes:
    """What a matrix is told by: its values, or their number where a network has none."""
    flat = value.detach().float().reshape(-1)
    return str(flat.numel()).encode() if meta else hashlib.sha256(flat.contiguous().numpy().tobytes()).digest()


@contextmanager
def _fitting(lora: Lora, what: str) -> Iterator[None]:
    """Turn the errors of diffusers and peft, and what diffusers only warns of, into a line.

    Raises:
        InputError: for each of them.
    """
    logger, heard = logging.getLogger("diffusers"), _Heard()
    level, handlers = logger.level, logger.handlers
    logger.handlers = [heard]
    logger.setLevel(logging.WARNING)
    try:
        yield
    except MteoError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]  # torch and diffusers name the layers in their second line
        raise InputError(
            f"expected LoRA weights for {what} in {lora.file}; {type(error).__name__}: {reason}; pass one made for it"
        ) from error
    finally:
        logger.handlers = handlers
        logger.setLevel(level)
    if heard.lines:
        raise InputError(
            f"expected LoRA weights for {what} in {lora.file}, all of which are read; diffusers says: {heard.lines[0][:300]}"
        )


class _Heard(logging.Handler):
    """Warnings of diffusers' loaders, the first line of each."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.startswith("diffusers.loaders") or record.name.endswith("peft_utils"):
            self.lines.append(" ".join(record.getMessage().split()))
