"""LoRA weights (Hu et al. 2021, arXiv 2106.09685), read by diffusers' own loaders and fused before anything is traced.

A fused network is an ordinary one: its fingerprint is that of the fused weights, and an embedding set belongs to it alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mteo_deploy.bundle import sha256_file
from mteo_deploy.errors import InputError, MissingPackageError


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

    def fuse_network(self, name: str, network: Any) -> None:
        """Add them to a backbone, which is the part ``name`` of its pipeline.

        Raises:
            InputError: for a file that does not fit, or a pipeline that diffusers has no loader for.
            MissingPackageError: without peft.
        """
        for lora in self.files:
            state, alphas, metadata = self._read(lora)
            text = [key for key in state if key.startswith("text_encoder")]
            if text and not hasattr(self._class(), "load_lora_into_text_encoder"):
                raise InputError(
                    f"expected LoRA weights of {name} alone in {lora.file}, since diffusers has no loader for those of "
                    f"{self.pipeline}'s text encoders; found {_some(dict.fromkeys(text))}"
                )
            if not text and not any(key.startswith(f"{name}.") for key in state):
                raise InputError(f"expected LoRA weights of {name} in {lora.file}; found {_some(state)}")
            before = {key: value.shape for key, value in network.state_dict().items()}
            try:
                network.load_lora_adapter(state, prefix=name, network_alphas=alphas, metadata=metadata)
            except (RuntimeError, ValueError, KeyError) as error:
                raise _misfit(lora, name, error) from None
            network.fuse_lora(lora_scale=lora.scale, safe_fusing=True)
            network.unload_lora()
            if {key: value.shape for key, value in network.state_dict().items()} != before:
                raise InputError(f"expected LoRA weights that leave {name} its shapes; {lora.file} changes them; not supported")

    def fuse_text_encoder(self, name: str, encoder: Any) -> None:
        """Add what of them is for a text encoder, the part ``name`` of the pipeline, where the pipeline's loader reads any."""
        from diffusers.loaders.lora_base import fuse_text_encoder_lora
        from diffusers.utils import recurse_remove_peft_layers

        for lora in self.files:
            state, alphas, metadata = self._read(lora)
            loader = getattr(self._class(), "load_lora_into_text_encoder", None)
            if loader is None or not any(key.startswith(f"{name}.") for key in state):
                continue
            try:
                loader(state, network_alphas=alphas, text_encoder=encoder, prefix=name, metadata=metadata)
            except (RuntimeError, ValueError, KeyError) as error:
                raise _misfit(lora, name, error) from None
            fuse_text_encoder_lora(encoder, lora.scale, safe_fusing=True)
            recurse_remove_peft_layers(encoder)
            encoder._hf_peft_config_loaded = False
            del encoder.peft_config

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

    def _read(self, lora: Lora) -> tuple[dict[str, Any], Any, Any]:
        """Weights with diffusers' names, ``<part>.<layer>...``, whatever the trainer called them; alphas and metadata."""
        options = {"use_safetensors": True, "local_files_only": True, "return_alphas": True, "return_lora_metadata": True}
        try:
            found = self._class().lora_state_dict(str(lora.file.parent), weight_name=lora.file.name, **options)
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            raise _misfit(lora, self.pipeline, error) from None
        state, *alphas, metadata = found
        return state, alphas[0] if alphas else None, metadata


def _misfit(lora: Lora, what: str, error: Exception) -> InputError:
    return InputError(f"expected LoRA weights for {what} in {lora.file}; {str(error).strip().splitlines()[0]}")


def _some(state: dict[str, Any]) -> str:
    names = sorted(state)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"
