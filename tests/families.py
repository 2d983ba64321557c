"""What tests of a backbone family need: a tiny random network as a pipeline directory, and the same checks for each family."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from helpers import Array, relative

from mteo_deploy import plan as plans
from mteo_deploy.bundle import Bundle
from mteo_deploy.distillation import Recipe
from mteo_deploy.distillation.student import Student
from mteo_deploy.distillation.training import recomputing
from mteo_deploy.exporters.base import Adapter
from mteo_deploy.exporters.taken import taken
from mteo_deploy.plan import Plan
from mteo_deploy.sampler import Sampler, noise_for


@torch.no_grad()
def redraw(network: torch.nn.Module, seed: int = 0, by: float = 0.05) -> torch.nn.Module:
    """The network with every parameter moved a little: what starts as zero would make different things equal."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return network.eval()


def save_pipeline(path: Path, network: Any, scheduler: Any, folder: str = "transformer") -> Path:
    """A pipeline directory with a network and a scheduler; its other parts are left out."""
    network.save_pretrained(path / folder)
    scheduler.save_pretrained(path / "scheduler")
    parts = {folder: network, "scheduler": scheduler}
    index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
    pipeline, *_ = taken(type(network).__name__)
    (path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **index}))
    return path


@torch.no_grad()
def ordinary_states(adapter: Adapter, plan: Plan, noise: Array, requests: Mapping[str, torch.Tensor]) -> list[Array]:
    """The torch sampler with ordinary time conditioning: the state after every evaluation."""

    def network(i: int, state: torch.Tensor) -> torch.Tensor:
        return adapter.at_timestep(state, plan.evaluations[i].timestep, **requests)

    return [state.numpy() for state in plans.run(plan, torch.from_numpy(noise), network)]


def engine_error(bundle: Path, realisation: str, adapter: Adapter, count: int = 3) -> float:
    """Largest relative difference between the built bundle's states and torch's, of a plain bundle, after any evaluation."""
    noise, given = noise_for(adapter.sample_shape, 4, range(count)), adapter.draw_requests(count, 2)
    expected = ordinary_states(adapter, Bundle.open(bundle).plan, noise, given)
    with Sampler.load(bundle, realisation=realisation) as sampler:
        found = sampler.states(noise, {name: values.numpy() for name, values in given.items()})
        return max(relative(a, b) for a, b in zip(found, expected, strict=True))


def step_weights(bundle: Path) -> dict[str, set[str]]:
    """Names of the weights that each graph of a step holds: baked, table and fused."""
    opened = Bundle.open(bundle)
    found = opened.realisations
    entries = [*found.get("baked", []), *(found[name] for name in ("table", "fused") if name in found)]
    return {entry["graph"]: weights_of(opened.file(entry["graph"])) for entry in entries}


def weights_of(graph: Path) -> set[str]:
    return {tensor.name for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer}


def prelude_weights(bundle: Path) -> set[str]:
    """Names of the weights that the prelude holds; empty where there is none."""
    opened = Bundle.open(bundle)
    prelude = opened.manifest["prelude"]
    return weights_of(opened.file(prelude["graph"])) if prelude else set()


def parameters_of(network: torch.nn.Module, parts: Iterable[str]) -> int:
    """How many parameters have one of ``parts`` in their name."""
    return sum(p.numel() for name, p in network.named_parameters() if any(part in name for part in parts))


def random_requests(adapter: Adapter, rows: int, path: Path) -> Path:
    """An npz file of request inputs to learn from."""
    np.savez(path, **{name: values.numpy() for name, values in adapter.draw_requests(rows, 3).items()})
    return path


def gradient(adapter: Adapter, checkpointing: bool, seed: int = 5) -> tuple[torch.Tensor, int]:
    """Of the mean square of a student's image, with respect to its deltas; and the bytes that were kept for it."""
    student = Student(adapter, adapter.compile_plan(2), Recipe(checkpointing=checkpointing))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        student.delta.normal_(std=0.1, generator=generator)
    noise, kept = torch.randn(2, *adapter.sample_shape, generator=generator), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with recomputing(student), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        student(noise, adapter.draw_requests(2, 1))[-1].square().mean().backward()
    assert student.delta.grad is not None
    return student.delta.grad, sum(kept.values())


def check_checkpointing(adapter: Adapter, by_block: bool) -> None:
    """Computed again, the gradient is the same, and much less was kept for it: block by block where the network can."""
    with adapter.recomputing_blocks() as found:
        assert found == by_block
    expected, whole = gradient(adapter, checkpointing=False)
    found, part = gradient(adapter, checkpointing=True)
    assert float(expected.abs().max()) > 1e-4
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert part < 0.5 * whole
    assert torch.equal(gradient(adapter, checkpointing=False)[0], expected)  # and the network is left as it was
