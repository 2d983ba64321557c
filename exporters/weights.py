"""Weights from a model's directory, in float32, mapped rather than read; all of them, and only those.

A float32 file is mapped by safetensors: its pages belong to the system, which reads them when they are first used and drops
them when memory is short. Weights that are stored in half precision would be converted in memory, all of them at once. Here
they are converted a few at a time into a temporary file, which is mapped in their place.

Names and shapes are held against the network before anything is read, and the loader's own report is read afterwards.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mteo_deploy.errors import InputError, border
from mteo_deploy.exporters.checkpoint import SCALES, UNQUANTISE, Checkpoint, read_checkpoint, some
from mteo_deploy.files import Scratch

STEM = "diffusion_pytorch_model"
INDEX = f"{STEM}.safetensors.index.json"
CONVERTED = ("F16", "BF16", "F8_E4M3", "F8_E5M2")
SAVE_AGAIN = "save the network again with `save_pretrained`"
SHARD = 1 << 28
"""Bytes of a converted file: what is in memory while it is written."""
HARMLESS = {
    r"(^|\.)position_ids$": "a buffer of counted positions, which older libraries saved",
    r"(^|\.)num_batches_tracked$": "a counter of training",
}
"""Names that may be there or not -> why the network is the same."""
OLD_ATTENTION = re.compile(r"\.(query|key|value|proj_attn)\.(weight|bias)$")
WRAPPERS = {
    "_orig_mod.": "of torch.compile; save the module inside: `network._orig_mod.save_pretrained`",
    "module.": "of DataParallel; save the module inside: `network.module.save_pretrained`",
    "_fsdp_wrapped_module.": "of FSDP; save its full state dict",
    "base_model.model.": "of PEFT; `merge_and_unload()` before saving",
    "model.diffusion_model.": "of an original single file; load it with `from_single_file` in diffusers and `save_pretrained`",
    "first_stage_model.": "of an original single file; load it with `from_single_file` in diffusers and `save_pretrained`",
    "ema_model.": "of a moving average; copy it into the network before saving",
}
"""What a wrapped network's names have in them -> whose it is, and the way out."""


def load_network(cls: Any, directory: Path, unused: tuple[str, ...] = ()) -> Any:
    """A diffusers network of class ``cls`` from its directory, in one safetensors file or in shards, in float32.

    Args:
        unused: beginnings of the names of layers that the caller does not use: they may be missing, and are taken out then.

    Raises:
        InputError: for weights that are not exactly the network's, or not plain floating point in safetensors.
    """
    what = cls.__name__
    checkpoint = read_checkpoint(directory, STEM, what)
    with border(f"expected {what}'s config.json in {directory}", SAVE_AGAIN):
        outline = network_outline(cls, directory)
    names = diffusers_names(outline, checkpoint)
    stored = {new: checkpoint.tensors[old].shape for old, new in names.items()}
    state = {name: tuple(value.shape) for name, value in outline.state_dict().items()}
    check_names(what, directory, state, stored, (*(cls._keys_to_ignore_on_load_unexpected or ()), *HARMLESS), unused)
    with (
        _without_bars(),
        in_float32(checkpoint, names) as found,
        border(f"expected {what} weights as safetensors in {directory}", SAVE_AGAIN),
    ):
        options = {"use_safetensors": True, "torch_dtype": torch.float32, "output_loading_info": True, "local_files_only": True}
        network, report = cls.from_pretrained(found, **options)
    check_report(what, directory, report, unused)
    check_loaded(what, directory, network, unused)
    ignored = sorted(stored.keys() - state.keys())
    renamed = sum(old != new for old, new in names.items())
    network.weights_report = {**checkpoint.to_json(), "renamed": renamed, "ignored": ignored}
    return network


def network_outline(cls: Any, directory: Path) -> Any:
    """The network that a directory's ``config.json`` describes, on the meta device."""
    with torch.device("meta"):
        return cls.from_config(cls.load_config(directory, local_files_only=True))


def diffusers_names(outline: Any, checkpoint: Checkpoint) -> dict[str, str]:
    """Stored name -> name in the network: diffusers renames what its older versions called otherwise.

    It does so for single files alone; shards that were made of such a file have the same names.
    """
    names = {name: name for name in checkpoint.tensors}
    if not any(OLD_ATTENTION.search(name) for name in names):
        return names
    renamed: dict[str, str] = dict(names)  # new name -> stored name
    outline._fix_state_dict_keys_on_load(renamed)
    return {old: new for new, old in renamed.items()}


def check_names(
    what: str,
    directory: Path,
    expected: Mapping[str, tuple[int, ...]],
    stored: Mapping[str, tuple[int, ...]],
    ignored: Iterable[str] = (),
    unused: tuple[str, ...] = (),
) -> None:
    """Hold names and shapes of stored weights against the network's.

    Args:
        ignored: patterns of names that may be missing or be there besides.
        unused: beginnings of names that may be missing.

    Raises:
        InputError: that names the first missing, unexpected or misshapen ones, and how many there are.
    """
    harmless = re.compile("|".join(f"(?:{pattern})" for pattern in ignored) or r"(?!)")
    missing = [name for name in expected if name not in stored and not name.startswith(unused) and not harmless.search(name)]
    beside = [name for name in stored if name not in expected and not harmless.search(name)]
    if missing or beside:
        raise InputError(misfit(what, directory, missing, beside))
    for name in sorted(expected.keys() & stored.keys()):
        if expected[name] != stored[name]:
            raise InputError(
                f"expected {what} weights as safetensors in {directory} of the shapes of its config.json; {name} is "
                f"{list(stored[name])} and not {list(expected[name])}; take both from one place"
            )


def misfit(what: str, directory: Path, missing: Iterable[str], beside: Iterable[str]) -> str:
    """The line about weights that are missing or unexpected, with the way out that their names tell."""
    missing, beside = list(missing), list(beside)
    parts = [f"{len(names)} {how} ({some(names)})" for how, names in (("missing", missing), ("unexpected", beside)) if names]
    way_out = "take config.json and weights from one place, or save the network again with `save_pretrained`"
    wrapper = next((one for one in WRAPPERS if any(one in name for name in beside)), None)
    if any(SCALES.search(name) for name in beside):
        way_out = f"they are quantised weights' scales: {UNQUANTISE}"
    elif wrapper is not None:
        way_out = f"{wrapper!r} is {WRAPPERS[wrapper]}"
    elif any(".base_layer." in name or ".lora_" in name for name in beside):
        way_out = (
            "it was saved with LoRA layers in it: `fuse_lora()` and `unload_lora()`, or `merge_and_unload()`, before saving"
        )
    return f"expected {what} weights as safetensors in {directory}, all of them and no others; {', '.join(parts)}; {way_out}"


def check_report(what: str, directory: Path, report: Mapping[str, Any], unused: tuple[str, ...] = ()) -> None:
    """Read what a loader of diffusers or transformers reports.

    Args:
        unused: beginnings of names that may be missing, or be there besides.

    Raises:
        InputError: for missing, unexpected and misshapen weights, except the known harmless ones.
    """
    harmless = re.compile("|".join(HARMLESS))
    missing, beside = (
        [name for name in report[how] if not harmless.search(name) and not name.startswith(unused)]
        for how in ("missing_keys", "unexpected_keys")
    )
    if missing or beside:
        raise InputError(misfit(what, directory, missing, beside))
    for name, found, wanted in sorted(report["mismatched_keys"]):
        raise InputError(
            f"expected {what} weights as safetensors in {directory} of the shapes of its config.json; {name} is {list(found)} "
            f"and not {list(wanted)}; take both from one place"
        )
    if report.get("error_msgs"):
        raise InputError(f"expected {what} weights as safetensors in {directory}; {report['error_msgs'][0]}; fetch them again")


def check_loaded(what: str, directory: Path, network: torch.nn.Module, unused: tuple[str, ...] = ()) -> None:
    """Every parameter is there, in float32; layers that are unused and have no weights are taken out.

    Raises:
        InputError: for parameters without values, or of another type.
    """
    absent = [name for name, value in network.named_parameters() if value.is_meta and unused and name.startswith(unused)]
    for part in {name.partition(".")[0] for name in absent}:
        setattr(network, part, None)
    empty = [name for name, value in [*network.named_parameters(), *network.named_buffers()] if value.is_meta]
    if empty:
        raise InputError(misfit(what, directory, empty, []))
    others = [name for name, value in network.named_parameters() if value.dtype != torch.float32]
    if others:
        raise InputError(
            f"expected {what} weights in floating point in {directory}; {some(others)} came as "
            f"{network.get_parameter(others[0]).dtype}; save the network again in float32"
        )


def check_finite(what: str, directory: Path, named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Refuse NaN and infinity, which half precision ends in where a weight or a training overflowed.

    Raises:
        InputError: that names the weights.
    """
    broken = [name for name, value in named if value.numel() and not all(bool(end.isfinite()) for end in value.aminmax())]
    if broken:
        raise InputError(
            f"expected finite {what} weights in {directory}; {some(broken)} have NaN or infinity; fetch them again"
        )


def check_tied(what: str, checkpoint: Checkpoint, tied: Mapping[str, str]) -> None:
    """Refuse weights that are one in the network and stored as two: which arrives depends on the library's version.

    Args:
        tied: name -> the name that it is one with.

    Raises:
        InputError: that names both.
    """
    for one, other in tied.items():
        if one in checkpoint.tensors and other in checkpoint.tensors:
            values = []
            for name in (one, other):
                with safe_open(checkpoint.tensors[name].file, "pt") as file:
                    values.append(file.get_tensor(name))
            if not torch.equal(*values):
                raise InputError(
                    f"expected {what} weights in {checkpoint.directory} with {one} and {other} alike, which are one; they "
                    f"differ; {SAVE_AGAIN}"
                )


@contextmanager
def _without_bars() -> Iterator[None]:
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()


@contextmanager
def in_float32(checkpoint: Checkpoint, names: Mapping[str, str] | None = None) -> Iterator[Path]:
    """The directory, or a copy of it with float32 weights where it has weights of half precision, shards with old names, or
    a variant's file names.

    The copy is unlinked at the end; what was mapped from it stays until it is let go.

    Args:
        names: stored name -> name in the copy.

    Raises:
        InputError: when the copy does not fit where temporary files go.
    """
    names = names or {name: name for name in checkpoint.tensors}
    renamed = checkpoint.is_sharded and any(old != new for old, new in names.items())
    half = any(stored.dtype in CONVERTED for stored in checkpoint.tensors.values())
    if not half and not renamed and checkpoint.variant is None:
        yield checkpoint.directory
        return
    wanted = 4 * sum(math.prod(stored.shape) for stored in checkpoint.tensors.values())
    with ExitStack() as stack:
        with _room(wanted, checkpoint.directory):
            target = stack.enter_context(Scratch("mteo-weights-"))
            if 0 < (free := shutil.disk_usage(target).free) < wanted:
                raise OSError(errno.ENOSPC, f"{free:,} are free there")
            for path in checkpoint.directory.glob("*.json"):
                if ".safetensors.index" not in path.name:
                    shutil.copy(path, target)
            _convert(checkpoint.files, target, names)
        yield target


@contextmanager
def _room(wanted: int, directory: Path) -> Iterator[None]:
    """Turn what goes wrong with a temporary copy into a line that names its place and size."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        place = os.environ.get("TMPDIR") or tempfile.gettempdir()
        raise InputError(
            f"expected {wanted:,} bytes free where TMPDIR is ({place}), to convert the weights in {directory} to float32; "
            f"{reason}; set TMPDIR to a directory with room for them"
        ) from None


def _convert(files: Iterable[Path], target: Path, names: Mapping[str, str]) -> None:
    """Write the tensors of ``files`` to shards of about :data:`SHARD` bytes, floating-point ones in float32."""
    places: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}

    def flush() -> None:
        name = f"{STEM}-{len(set(places.values())):05}.safetensors"
        save_file(part, target / name)
        places.update(dict.fromkeys(part, name))
        part.clear()

    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                stored = tensors.get_tensor(name)
                part[names[name]] = stored.to(torch.float32) if stored.is_floating_point() else stored
                if sum(tensor.nbytes for tensor in part.values()) >= SHARD:
                    flush()
    if part:
        flush()
    (target / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")
