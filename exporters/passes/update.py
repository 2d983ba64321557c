"""Update: the solver's update of one evaluation, inside the graph.

``(state, history_1 .. history_K) -> (next_state[, kept])`` with the plan's coefficients as constants, so that the
sampling loop does no arithmetic. Inputs that the update does not need are not there.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mteo_deploy.plan import Evaluation


class Update(ir.passes.InPlacePass):
    """Append the update of ``evaluation`` behind the network's output.

    Args:
        keep: whether a later evaluation needs what this one keeps.
    """

    changes_outputs = True

    def __init__(self, evaluation: Evaluation, keep: bool) -> None:
        super().__init__()
        self.evaluation, self.keep = evaluation, keep

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph, row = model.graph, self.evaluation
        state, output = graph.inputs[0], graph.outputs[0]
        count = 0

        def emit(op: str, *inputs: ir.Value) -> ir.Value:
            nonlocal count
            node = ir.node(op, inputs, name=f"update/{op.lower()}_{count}")
            node.outputs[0].name = f"update/value_{count}"
            node.outputs[0].type, node.outputs[0].shape = state.type, state.shape
            graph.append(node)
            count += 1
            return node.outputs[0]

        def scaled(value: ir.Value, factor: float) -> ir.Value:
            if factor == 1.0:
                return value
            name = f"update/factor_{count}"
            constant = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
            constant.const_value = ir.tensor(np.float32(factor), name=name)
            graph.register_initializer(constant)
            return emit("Mul", value, constant)

        def total(terms: list[tuple[ir.Value, float]]) -> ir.Value:
            used = [scaled(value, factor) for value, factor in terms if factor != 0.0]
            result = used[0]
            for term in used[1:]:
                result = emit("Add", result, term)
            return result

        kept = total([(output, row.keep_output), (state, row.keep_state)])
        history = []
        for lag, weight in enumerate(row.weights[1:], start=1):
            if weight != 0.0:
                earlier = ir.Value(name=f"history_{lag}", type=state.type, shape=state.shape)
                graph.inputs.append(earlier)
                history.append((earlier, weight))
        next_state = total([(state, row.carry), (kept, row.weights[0]), *history])
        graph.outputs.clear()
        for name, value in [("next_state", next_state), *([("kept", kept)] if self.keep else [])]:
            result = emit("Identity", value) if value.is_graph_input() or value.is_graph_output() else value
            result.name = name
            graph.outputs.append(result)
        return ir.passes.PassResult(model, modified=True)
