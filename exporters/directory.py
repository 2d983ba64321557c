"""A diffusers pipeline directory as it is published: its index, where its parts lie, and what their configurations say.

Parts lie in directories of their own, or beside the index: ``google/ddpm-*`` and others of the first year have ``config.json``,
weights and ``scheduler_config.json`` there, and diffusers reads them so (``load_sub_model``).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mteo_deploy import assets
from mteo_deploy.errors import InputError
from mteo_deploy.exporters.taken import PIPELINES, PipelineKind, current_class, says, taken

INDEX = "model_index.json"
WAY_OUT = (
    "pass a directory that a diffusers pipeline's `save_pretrained` wrote, ORG/NAME of the Hub, or the name of a packaged "
    f"backbone: {', '.join(assets.backbones())}"
)
SCHEDULER = "scheduler_config.json"
CLIP_TOKENS = 77
"""Of CLIP's own text encoders."""
DECODERS = ("vae", "vqvae")
TEXT = ("text_encoder", "tokenizer")
"""How names of the parts that read prompts begin."""


def read_json(path: Path, what: str, way_out: str) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        InputError: for a file that is not there, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"expected {what} at {path}; found nothing there; {way_out}") from None
    except (ValueError, OSError, RecursionError) as error:
        raise InputError(f"expected {what} at {path}; it cannot be read ({error}); {way_out}") from None
    if not isinstance(data, dict):
        raise InputError(f"expected {what} at {path}; found another JSON value; {way_out}")
    return data


@dataclass(frozen=True)
class PipelineDirectory:
    """A pipeline directory.

    Attributes:
        path: the directory.
        cls: the pipeline's class, as the index names it.
        parts: as the index lists them, name -> (library, class), but for those that it says are none.
        fields: what else the index says.
        kind: what is known of the class; None for one that is not taken.
        network: the part whose adapter, named by the user, answers for the pipeline; None for a pipeline that was checked.
        leave_out: parts and fields that the user leaves out.
    """

    path: Path
    cls: str
    parts: Mapping[str, tuple[str, str]]
    fields: Mapping[str, Any] = field(default_factory=dict)
    kind: PipelineKind | None = None
    network: str | None = None
    leave_out: frozenset[str] = frozenset()

    @classmethod
    def read(cls, path: Path, leave_out: Collection[str] = ()) -> PipelineDirectory:
        """The directory's index.

        Raises:
            InputError: for a directory without one.
        """
        index = read_json(path / INDEX, "a diffusers pipeline's model_index.json", WAY_OUT)
        named = index.get("_class_name")
        lists = {name: entry for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
        parts = {name: (str(entry[0]), str(entry[1])) for name, entry in lists.items() if entry[1] is not None}
        fields = {name: value for name, value in index.items() if name not in lists and not name.startswith("_")}
        name = named if isinstance(named, str) else "no class" if named is None else f"{named}"
        return cls(path, name, parts, fields, PIPELINES.get(name), leave_out=frozenset(leave_out))

    def directory(self, name: str) -> Path:
        """Where a part lies: in its own directory, or beside the index."""
        own = self.path / name
        return own if own.is_dir() else self.path

    def config(self, name: str) -> dict[str, Any]:
        """A part's configuration; empty where there is none."""
        path = self.directory(name) / "config.json"
        return read_json(path, f"the configuration of {name}", WAY_OUT) if path.is_file() else {}

    def current_class(self, name: str) -> str:
        """A part's class, under the name that diffusers has for it now."""
        return current_class(self.parts[name][1], self.config(name))

    def classes(self) -> dict[str, str]:
        """Parts that are listed, there and not left out, name -> class."""
        return {
            name: cls for name, (_, cls) in self.parts.items() if (self.path / name).is_dir() and name not in self.leave_out
        }

    def prompt_length(self, number: str = "") -> int:
        """Tokens that a CLIP text encoder takes, as diffusers pads to them: its tokenizer's length, and no more than it has
        positions for; 77, as diffusers assumes, where the pipeline has neither.

        Args:
            number: the end of their names, ``_2`` for the second.
        """
        tokenizer = self.directory(f"tokenizer{number}") / "tokenizer_config.json"
        told = read_json(tokenizer, "the tokenizer's configuration", WAY_OUT) if tokenizer.is_file() else {}
        encoder = self.config(f"text_encoder{number}") if (self.path / f"text_encoder{number}").is_dir() else {}
        encoder = encoder.get("text_config") or encoder
        lengths = [told.get("model_max_length") or told.get("max_len"), encoder.get("max_position_embeddings")]
        return min([int(n) for n in lengths if isinstance(n, (int, float)) and n >= 1], default=CLIP_TOKENS)

    def scheduler(self) -> dict[str, Any]:
        """The scheduler's configuration as the pipeline uses it.

        Raises:
            InputError: for one that is not there.
        """
        found = read_json(self.directory("scheduler") / SCHEDULER, "the noise schedule", WAY_OUT)
        return found if self.kind is None else self.kind.scheduler_config(found)

    def check_class(self, network: str, family: str, adapter: str, controlnet: bool) -> None:
        """Refuse a pipeline that is not known to call the network ``family`` as its adapter does.

        Args:
            network: the part that is it.
            adapter: ``package.module:Class`` of the family's adapter.
            controlnet: residuals of a ControlNet are taken.

        Raises:
            InputError: for a pipeline of another class, or a network of another library's class.
        """
        known = ", ".join(taken(family, controlnet))
        way_out = (
            "pass the text-to-image pipeline of this network; if its pipeline draws from noise and these request inputs alone, "
            f"say so with --adapter {adapter}"
        )
        if self.kind is not None and self.kind.controlnet and not controlnet:
            raise InputError(
                f"expected a pipeline of class {known}; {self.path / INDEX} names {self.cls}, whose network takes a "
                "ControlNet's residuals; pass --controlnet"
            )
        if self.kind is None or self.kind.family != family or self.kind.network != network:
            raise InputError(
                f"expected a pipeline of class {known}, known to sample from noise with a {family} alone; {self.path / INDEX} "
                f"names {self.cls} (its {network} is a {family}), which is not known to; {way_out}"
            )
        if self.parts[network][0] != "diffusers":
            raise InputError(
                f"expected {network} of the library diffusers; {self.path / INDEX} names {'.'.join(self.parts[network])}, code "
                f"of its own, which is not run; {way_out}"
            )

    def answered_for(self, network: str, family: str) -> PipelineDirectory:
        """The directory, where an adapter that the user names answers for how the pipeline calls its network: of a class that
        has another network, nothing is known."""
        fits = self.kind is not None and (self.kind.family, self.kind.network) == (family, network)
        return replace(self, network=network, kind=self.kind if fits else None)

    def own_size(self) -> int | None:
        """Height and width of the states, where the pipeline gives others than the network's configuration says."""
        return None if self.kind is None else self.kind.own_size(self.config(self.kind.network))

    def check_rest(self) -> None:
        """Refuse parts and fields that may change what the pipeline computes, and are nowhere in a bundle, unless they are left
        out by name.

        Raises:
            InputError: that names them, or names in ``leave_out`` that there are none of.
        """
        if self.kind is None:
            return
        own = {self.kind.network, "scheduler"}
        if needed := sorted(own & self.leave_out):
            raise InputError(f"expected --leave-out of a part that a bundle can do without; found {', '.join(needed)}")
        there = {*self.parts, *self.fields, *self.config(self.kind.network)}
        if others := sorted(self.leave_out - there):
            raise InputError(
                f"expected --leave-out of what {self.path / INDEX} or the network's configuration names; found "
                f"{', '.join(others)}"
            )
        inside = {*own, self.kind.decoder, *self.kind.outside, *self.leave_out}
        parts = [name for name in self.parts if name not in inside and not name.startswith(TEXT)]
        fields = [
            name for name, value in self.fields.items() if says(value) and name not in (*self.kind.fields, *self.leave_out)
        ]
        if not parts and not fields:
            return
        named = [f"{name}: {self.parts[name][1]}" for name in parts] + [f"{name}: {self.fields[name]!r}" for name in fields]
        raise InputError(
            f"expected a {self.cls} of the parts and fields known of it; {self.path / INDEX} has {', '.join(named)}, which may "
            f"change its images; to go without, pass --leave-out {' --leave-out '.join([*parts, *fields])}"
        )

    def to_json(self) -> dict[str, Any]:
        """Its ``class``, and whether it was ``checked`` that it samples from noise and the request inputs alone."""
        return {"class": self.cls, "checked": self.network is None}

    def left_out(self) -> dict[str, str]:
        """Parts that the index lists and no bundle has, but for decoder and text encoders, name -> why, and what it means."""
        asked = dict.fromkeys(sorted(self.leave_out & {*self.parts, *self.fields}), "left out with --leave-out")
        if self.kind is not None:
            return {name: why for name, why in self.kind.outside.items() if name in self.parts} | asked
        others = [
            name for name in self.parts if name not in (self.network, "scheduler", *DECODERS) and not name.startswith(TEXT)
        ]
        others += [name for name, value in self.fields.items() if says(value)]
        return dict.fromkeys(others, f"{self.cls} is not known; the adapter answers for what it does without") | asked
