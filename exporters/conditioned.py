"""The conditioned graph: the same backbone with ordinary time conditioning, from the same trace.

It is what every other deployment runs, so it is the baseline of the latency comparison; and it runs any plan, the
reference trajectory's too, without torch.
"""

from __future__ import annotations

import onnx_ir as ir

from mteo_deploy.exporters.trace import embedding_input


def conditioned_graph(generic: ir.Model, time_embedding: ir.Model, sites: dict[str, int]) -> ir.Model:
    """Join both traces: ``(state [batch, ...], timestep [1]) -> output [batch, ...]``.

    Args:
        sites: site -> which output of ``time_embedding`` it takes.
    """
    model, time = generic.clone(), time_embedding.clone().graph
    graph = model.graph
    timestep, embeddings = time.inputs[0], list(time.outputs)
    time.inputs.clear()
    time.outputs.clear()
    initializers = list(time.initializers.values())
    time.initializers.clear()
    for value in initializers:
        value.name = f"time/{value.name}"
        graph.register_initializer(value)
    nodes = list(time)
    time.remove(nodes)
    for node in nodes:
        node.name = f"time/{node.name}"
        for output in node.outputs:
            output.name = f"time/{output.name}"
    graph.insert_before(graph[0], nodes)
    names = {embedding_input(site): embeddings[position] for site, position in sites.items()}
    for value in [value for value in graph.inputs if value.name in names]:
        value.replace_all_uses_with(names[value.name or ""])
        graph.inputs.remove(value)
    graph.inputs.append(timestep)
    return model
