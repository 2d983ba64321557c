"""Update: the solver's update of one evaluation, inside the graph.

``(state, history_1 .. history_K) -> (next_state[, kept])`` with the plan's coefficients as constants, so that the
sampling loop does no arithmetic. Inputs that the update does not need are not there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from mteo_deploy.plan import Evaluation


class Update(ir.passes.InPlacePass):
    """Append the update of one evaluation behind the network's output.

    Args:
        evaluation: whose coefficients to write.
        keep: whether a later evaluation needs what this one keeps.
        alike: evaluations whose updates must have the same form, so that only constants differ between their graphs. A
            term is left out, or a factor of 1, where that holds for all of them.
    """

    changes_outputs = True

    def __init__(self, evaluation: Evaluation, keep: bool, alike: Sequence[Evaluation] = ()) -> None:
        super().__init__()
        self.evaluation, self.keep, self.alike = evaluation, keep, alike or [evaluation]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        graph = model.graph
        state, output = graph.inputs[0], graph.outputs[0]
        names = {id(state): "state", id(output): "output"}

        def emit(op: str, name: str, *inputs: ir.Value) -> ir.Value:
            node = ir.node(op, inputs, name=f"update/{name}")
            node.outputs[0].name = f"update/{name}"
            node.outputs[0].type, node.outputs[0].shape = state.type, state.shape
            graph.append(node)
            return node.outputs[0]

        def total(name: str, terms: list[tuple[ir.Value, list[float], float]]) -> ir.Value:
            """Sum of value times factor; each term has its factor in all the alike evaluations and in this one."""
            result = None
            for value, factors, factor in terms:
                if all(f == 0.0 for f in factors):
                    continue
                term, what = value, f"{name}/{names[id(value)]}"
                if any(f != 1.0 for f in factors):
                    constant = ir.Value(name=f"{what}_factor", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([]))
                    constant.const_value = ir.tensor(np.float32(factor), name=constant.name)
                    graph.register_initializer(constant)
                    term = emit("Mul", what, value, constant)
                result = term if result is None else emit("Add", f"{what}_sum", result, term)
            assert result is not None  # the network's output always counts
            return result

        row, rows = self.evaluation, self.alike
        kept = total(
            "kept",
            [
                (output, [r.keep_output for r in rows], row.keep_output),
                (state, [r.keep_state for r in rows], row.keep_state),
            ],
        )
        names.setdefault(id(kept), "kept")
        terms = [(state, [r.carry for r in rows], row.carry), (kept, [r.weights[0] for r in rows], row.weights[0])]
        for lag in range(1, max(len(r.weights) for r in rows)):
            factors = [weight_of(r, lag) for r in rows]
            if any(factors):
                earlier = ir.Value(name=f"history_{lag}", type=state.type, shape=state.shape)
                names[id(earlier)] = f"history_{lag}"
                graph.inputs.append(earlier)
                terms.append((earlier, factors, weight_of(row, lag)))
        next_state = total("next", terms)
        graph.outputs.clear()
        for name, value in [("next_state", next_state), *([("kept", kept)] if self.keep else [])]:
            result = emit("Identity", f"{name}_copy", value) if value.is_graph_input() or value.is_graph_output() else value
            result.name = name
            graph.outputs.append(result)
        return ir.passes.PassResult(model, modified=True)


def weight_of(evaluation: Evaluation, lag: int) -> float:
    """Factor on what was kept ``lag`` evaluations before."""
    return evaluation.weights[lag] if lag < len(evaluation.weights) else 0.0


def keeps(evaluations: Sequence[Evaluation], index: int) -> bool:
    """Whether a later evaluation needs what evaluation ``index`` keeps."""
    return any(weight_of(later, j) != 0.0 for j, later in enumerate(evaluations[index + 1 :], start=1))
