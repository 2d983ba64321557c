"""Hoist: the cut along binding times, the joined preludes and the batched products compute what the whole graph computes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from helpers import Array
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mteo_deploy.exporters.passes.batch_gemms import BatchGemms
from mteo_deploy.exporters.passes.bind import Bind
from mteo_deploy.exporters.passes.binding_time import RANDOM, BindingTime, binding_times
from mteo_deploy.exporters.passes.fold import Fold
from mteo_deploy.exporters.passes.hoist import VIEWS, Hoist
from mteo_deploy.exporters.passes.runner import check, run_passes
from mteo_deploy.exporters.preludes import join_preludes, merge_outputs
from mteo_deploy.exporters.trace import _export

Feeds = Mapping[str, np.ndarray]
COMPILE, BATCH, REQUEST, STEP = BindingTime


def text(signature: str, body: str, *more: str, opset: int = 20) -> ir.Model:
    """A model in ONNX's text form; ``more`` are functions of domain ``local``."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "local" : 1]>'
    return ir.from_onnx_text(f"{header} main {signature} {{ {body} }} {' '.join(more)}")


def outputs_of(model: ir.Model, feeds: Feeds) -> dict[str, np.ndarray]:
    """Run a model on those of the feeds that it takes."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    return dict(zip([value.name for value in session.get_outputs()], found, strict=True))


def assert_equal(found: Feeds, expected: Feeds, rtol: float = 1e-5) -> None:
    """Within ``rtol`` of the largest number of each output: sums may be taken in another order."""
    assert list(found) == list(expected)
    for name, value in expected.items():
        scale = float(np.max(np.abs(value[np.isfinite(value)]), initial=0)) if value.dtype.kind == "f" else 0.0
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=rtol * scale, err_msg=name)


def hoist(model: ir.Model, request: Iterable[str], *feeds: Feeds) -> Hoist:
    """Hoist in place; whatever comes out is sound, and equal to what went in, on each of ``feeds``."""
    expected = [outputs_of(model, feed) for feed in feeds]
    one = Hoist(list(request))
    run_passes(model, [one])
    if one.prelude is not None:
        check(one.prelude, "prelude")
    for feed, wanted in zip(feeds, expected, strict=True):
        early = {} if one.prelude is None else outputs_of(one.prelude, feed)
        assert_equal(outputs_of(model, {**feed, **early}), wanted)
    return one


def ops(model: ir.Model | None) -> list[str]:
    return [] if model is None else [node.op_type for node in model.graph]


def names(values: Iterable[ir.Value]) -> list[str | None]:
    return [value.name for value in values]


def numbers(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


# --- binding times ---------------------------------------------------------------------------------------------------


def times_of(model: ir.Model, request: Sequence[str] = ("label",)) -> dict[str, BindingTime]:
    return {value.name or "": time for value, time in binding_times(model, request).items()}


SIGNATURE = "(float[batch,3] state, float[batch,3] label) => (float[batch,3] output) <float[3,3] w = {1,2,3,4,5,6,7,8,9}>"


def test_a_value_is_known_when_all_it_depends_on_is() -> None:
    body = """ww = MatMul(w, w) size = Shape(state) count = Shape(label) one = Constant<value_float = 1.0>()
              l = MatMul(label, ww) s = Add(state, one) output = Add(s, l)"""
    times = times_of(text(SIGNATURE, body))
    assert times == {
        **dict.fromkeys(["w", "ww", "one"], COMPILE),
        **dict.fromkeys(["count", "size"], BATCH),  # the rest of both shapes is known
        **dict.fromkeys(["label", "l"], REQUEST),
        **dict.fromkeys(["state", "s", "output"], STEP),
    }


def test_request_inputs_must_exist() -> None:
    with pytest.raises(ValueError, match=r"found no prompt"):
        binding_times(text(SIGNATURE, "output = Add(state, label)"), ["label", "prompt"])


def test_an_input_with_a_default_value_is_an_input() -> None:
    model = text(SIGNATURE, "l = MatMul(label, w) output = Add(state, l)")
    model.graph.inputs.append(model.graph.initializers["w"])
    assert times_of(model)["w"] == times_of(model)["l"] == STEP
    assert times_of(model, ["label", "w"])["l"] == REQUEST


@pytest.mark.parametrize("op", sorted(RANDOM))
def test_random_numbers_are_drawn_at_each_step(op: str) -> None:
    arguments = {"RandomNormal": "<shape = [2, 3]> ()", "RandomUniform": "<shape = [2, 3]> ()"}.get(op, "(label)")
    assert times_of(text(SIGNATURE, f"r = {op} {arguments} output = Add(state, r)"))["r"] == STEP


def test_all_random_operators_are_known() -> None:
    """ONNX calls control flow and Dropout random too, and a few operators whose formula it gives as a function."""
    schemas = [
        schema for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == "" and schema.non_deterministic
    ]
    given_by_function = {schema.name for schema in schemas if schema.has_function or schema.has_context_dependent_function}
    others = {"If", "Loop", "Scan", "SequenceMap", "Dropout"}
    assert {schema.name for schema in schemas} - given_by_function - others <= RANDOM


def test_dropout_is_request_time_only_where_it_drops_nothing() -> None:
    model = text(
        """(float[2,3] state, float[2,3] label, bool mode) => (float[2,3] output)
           <bool yes = {1}, bool no = {0}, float r = {0.5}>""",
        """a = Dropout(label) b = Dropout(label, r, no) c = Dropout(label, r, yes) d = Dropout(label, r, mode)
           f = Constant<value = bool {0}>() e = Dropout(label, r, f) output = Sum(state, a, b, c, d, e)""",
    )
    times = times_of(model, ["label", "mode"])
    assert [times[name] for name in "abcde"] == [REQUEST, REQUEST, STEP, STEP, REQUEST]


def test_functions_are_looked_into_and_custom_operators_are_not_trusted() -> None:
    domain = '<domain: "local", opset_import: ["" : 20, "local" : 1]>'
    model = text(
        SIGNATURE,
        "a = local.pure(label) b = local.noisy(label) c = local.unknown(label) output = Sum(state, a, b, c)",
        f"{domain} pure (x) => (y) {{ y = local.inner(x) }}",
        f"{domain} inner (x) => (y) {{ y = Relu(x) }}",
        f"{domain} noisy (x) => (y) {{ z = local.inner(x) y = RandomNormalLike(z) }}",
    )
    times = times_of(model)
    assert [times[name] for name in "abc"] == [REQUEST, STEP, STEP]


IF = """then_branch = g () => (float[batch,3] t) { t = Relu(l) },
        else_branch = h () => (float[batch,3] e) { e = Neg(l) }"""


def test_control_flow_is_step_time() -> None:
    body = f"l = MatMul(label, w) yes = Constant<value = bool {{1}}>() i = If (yes) <{IF}> output = Add(state, i)"
    times = times_of(text(SIGNATURE, body))
    assert (times["l"], times["yes"], times["i"]) == (REQUEST, COMPILE, STEP)


# --- hoist, rule by rule ---------------------------------------------------------------------------------------------

FEEDS = [{"state": numbers(n, 3), "label": numbers(n, 3, seed=1)} for n in (2, 5)]


def test_what_the_label_alone_decides_moves_to_the_prelude() -> None:
    model = text(SIGNATURE, "l = MatMul(label, w) r = Relu(l) s = MatMul(state, w) output = Add(s, r)")
    opsets, tensor = dict(model.graph.opset_imports), model.graph.initializers["w"].const_value
    done = hoist(model, ["label"], *FEEDS)
    assert done.prelude is not None
    assert ops(done.prelude) == ["MatMul", "Relu"] and ops(model) == ["MatMul", "Add"]
    assert names(done.prelude.graph.inputs) == ["label"] and names(model.graph.inputs) == ["state", "request/r"]
    (crossing,) = done.prelude.graph.outputs
    entry = model.graph.inputs[1]
    assert (entry.name, entry.dtype, str(entry.shape)) == (crossing.name, crossing.dtype, str(crossing.shape))
    assert (entry.dtype, str(entry.shape)) == (ir.DataType.FLOAT, "[batch,3]")
    assert model.graph.initializers["w"].const_value is done.prelude.graph.initializers["w"].const_value is tensor
    assert dict(done.prelude.graph.opset_imports) == dict(model.graph.opset_imports) == opsets
    assert done.prelude.ir_version == model.ir_version == 10


def test_a_request_input_that_steps_use_stays() -> None:
    model = text(SIGNATURE, "l = MatMul(label, w) s = Add(state, label) output = Add(s, l)")
    hoist(model, ["label"], *FEEDS)
    assert names(model.graph.inputs) == ["state", "label", "request/l"]


def test_nothing_to_hoist() -> None:
    model = text(SIGNATURE, "output = Add(state, label)")
    one = Hoist(["label"])
    assert not one(model).modified and one.prelude is None
    assert names(model.graph.inputs) == ["state", "label"]


def test_unused_request_inputs_go() -> None:
    model = text(SIGNATURE, "dead = MatMul(label, w) output = Relu(state)")
    model.graph.inputs.append(model.graph.initializers["w"])
    one = Hoist(["label", "w"])
    assert one(model).modified and one.prelude is None
    assert ops(model) == ["Relu"] and names(model.graph.inputs) == ["state"] and not model.graph.initializers
    check(model, "hoist")


def test_a_graph_output_known_early_keeps_its_name() -> None:
    signature = "(float[batch,3] state, float[batch,3] label) => (float[batch,3] output, float[batch,3] early)"
    model = text(signature, "early = Exp(label) output = Add(state, early)")
    hoist(model, ["label"], *FEEDS)
    assert names(model.graph.outputs) == ["output", "early"] and sorted(ops(model)) == ["Add", "Identity"]


def test_values_captured_by_subgraphs_cross() -> None:
    body = f"l = MatMul(label, w) m = ReduceMax(state) z = Constant<value_float = 0.0>() c = Less(z, m) i = If (c) <{IF}>"
    model = text(SIGNATURE, body + " output = Add(state, i)")
    done = hoist(model, ["label"], *FEEDS)
    assert ops(done.prelude) == ["MatMul"] and names(model.graph.inputs) == ["state", "request/l"]


def test_what_both_sides_need_and_is_constant_is_in_both() -> None:
    model = text(SIGNATURE, "t = Transpose(w) l = MatMul(label, t) s = MatMul(state, t) output = Add(s, l)")
    done = hoist(model, ["label"], *FEEDS)
    assert ops(done.prelude) == ["Transpose", "MatMul"] and ops(model) == ["Transpose", "MatMul", "Add"]
    model = text(SIGNATURE, "t = Transpose(w) l = MatMul(label, t) output = Add(state, l)")
    hoist(model, ["label"], *FEEDS)
    assert ops(model) == ["Add"] and not model.graph.initializers


FREE = """(float[batch,3] state, float[batch,3] label) => ({output} output)
          <int64[1] one = {{1}}, int64[3] big = {{1,4,1}}, int64[2] flat = {{-1,3}}>"""
FLAT, DEEP, HALF = "float[batch,3]", "float[?,?,?]", "float16[batch,3]"


@pytest.mark.parametrize(
    ("output", "body", "early"),
    [
        (DEEP, "e = Exp(label) u = Unsqueeze(e, one) output = Add(u, state)", "Exp"),
        (DEEP, "e = Exp(label) i = Identity(e) r = Reshape(i, flat) u = Unsqueeze(r, one) output = Add(u, state)", "Exp"),
        (DEEP, "e = Exp(label) u = Unsqueeze(e, one) x = Expand(u, big) output = Add(x, state)", "Exp"),
        (DEEP, "u = Unsqueeze(label, one) x = Expand(u, big) y = Exp(x) output = Add(y, state)", "Unsqueeze Expand Exp"),
        (DEEP, "u = Unsqueeze(label, one) output = Add(u, state)", ""),
        (DEEP, "u = Unsqueeze(label, one) x = Exp(u) s = Add(u, state) output = Add(s, x)", "Unsqueeze Exp"),
        (DEEP, "u = Unsqueeze(label, one) t = Transpose<perm = [1,0,2]>(u) output = Add(t, state)", "Unsqueeze Transpose"),
        (FLAT, "e = Exp(label) n = Cast<to = 10>(e) w = Cast<to = 1>(n) output = Add(w, state)", "Exp Cast"),
        (HALF, "e = Exp(label) n = Cast<to = 10>(e) s = Cast<to = 10>(state) output = Add(n, s)", "Exp Cast"),
        (HALF, "b = Cast<to = 16>(label) h = Cast<to = 10>(b) s = Cast<to = 10>(state) output = Add(h, s)", "Cast Cast"),
        (FLAT, "e = Exp(label) z = Shape(label) x = Expand(e, z) output = Add(x, state)", "Exp"),
        (FLAT, "e = Exp(label) z = Shape(label) x = Expand(e, z) s = Expand(state, z) output = Add(x, s)", "Exp"),
    ],
)
def test_the_cut_lies_before_what_is_free(output: str, body: str, early: str) -> None:
    """Views, repetition and widening are left to the step graph if only it uses them, and nothing else must cross for it."""
    model = text(FREE.format(output=output), body)
    feeds = {"state": numbers(4, 3), "label": numbers(4, 3, seed=1)}
    done = hoist(model, ["label"], *[feeds] * (output != HALF))  # on the CPU half is float, rounded here and there
    assert " ".join(ops(done.prelude)) == early
    assert set(done.sunk) <= {node.outputs[0].name for node in model.graph}
    assert done.prelude is None or not set(done.sunk) & {node.outputs[0].name for node in done.prelude.graph}, "done twice"


def test_tensors_of_unknown_rank_stay() -> None:
    """With all that is behind them: ``x`` could cross, but would need what cannot."""
    signature = "(float[2,3] state, float[2,3] label, int64[n] size) => (float[2,3] output) <int64[2] fixed = {2,3}>"
    body = "e = Exp(label) r = Reshape(e, size) x = Reshape(r, fixed) y = Exp(x) s = Mul(r, state) output = Add(s, y)"
    model = text(signature, body)
    feeds = {"state": numbers(2, 3), "label": numbers(2, 3, seed=1), "size": np.array([2, 3])}
    done = hoist(model, ["label", "size"], feeds)
    assert ops(done.prelude) == ["Exp"] and done.sunk == ["r", "x", "y"]
    assert names(model.graph.inputs) == ["state", "size", "request/e"]


def test_sequences_stay() -> None:
    signature = "(float[2,3] state, float[2,3] label) => (float[2,3] output) <int64 zero = {0}>"
    body = "e = Exp(label) q = SequenceConstruct(e, label) i = SequenceAt(q, zero) output = Add(i, state)"
    model = text(signature, body)
    model.graph[0].outputs[0].type, model.graph[0].outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([2, 3])
    done = hoist(model, ["label"], {"state": numbers(2, 3), "label": numbers(2, 3, seed=1)})
    assert ops(done.prelude) == ["Exp"] and done.sunk == ["q", "i"]


def test_functions_are_preserved() -> None:
    function = '<domain: "local", opset_import: ["" : 20]> twice (x) => (y) { y = Add(x, x) }'
    model = text(SIGNATURE, "l = local.twice(label) s = local.twice(state) output = Add(s, l)", function)
    # nothing infers shapes through the reference to a function, so the shape must be there
    value = next(node.outputs[0] for node in model.graph if node.outputs[0].name == "l")
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", 3])
    done = hoist(model, ["label"], *FEEDS)
    assert done.prelude is not None and done.prelude.functions.keys() == model.functions.keys()
    assert ops(done.prelude) == ["twice"] and ops(model) == ["twice", "Add"]


def test_boundary_names_are_layers_and_unique() -> None:
    signature = """(float[batch,3] state, float[batch,3] label, float[batch,3] other) => (float[batch,3] output)
                   <float[3,3] w = {1,2,3,4,5,6,7,8,9}>"""
    body = "l = MatMul(label, w) r = Relu(l) o = MatMul(other, w) t = Tanh(o) a = Sum(r, l, t) b = Mul(a, state)"
    model = text(signature, body + " output = Add(b, l)")
    model.graph.initializers["w"].name = "block.0.proj.weight"
    feeds = [{**feed, "other": numbers(len(feed["state"]), 3, seed=2)} for feed in FEEDS]
    first = hoist(model, ["label"], *feeds)
    assert first.prelude is not None
    assert names(first.prelude.graph.outputs) == ["request/block.0.proj", "request/block.0.proj_1"]
    early = [outputs_of(first.prelude, feed) | feed for feed in feeds]
    second = hoist(model, ["other", "request/block.0.proj", "request/block.0.proj_1"], *early)
    assert second.prelude is not None
    assert names(second.prelude.graph.outputs) == ["request/block.0.proj_2"]
    assert names(model.graph.inputs) == ["state", "request/block.0.proj", "request/block.0.proj_2"]


# --- joined preludes -------------------------------------------------------------------------------------------------


def prelude_with(offset: Sequence[float], body: str, outputs: str = "float[batch,3] o", opset: int = 20) -> ir.Model:
    constant = ",".join(map(str, offset))
    signature = f"(float[batch,3] label) => ({outputs}) <float[3,3] w = {{1,2,3,4,5,6,7,8,9}}, float[3] c = {{{constant}}}>"
    return text(signature, body, opset=opset)


def test_joined_preludes_compute_equal_things_once() -> None:
    body = "e = Exp(label) s = Add(e, c) o = MatMul(s, w) k = MatMul(e, w)"
    parts = [prelude_with([i, i, 1], body, "float[batch,3] o, float[batch,3] k") for i in range(3)]
    feed = {"label": numbers(4, 3)}
    expected = {f"step_{i:02}/{name}": v for i, part in enumerate(parts) for name, v in outputs_of(part, feed).items()}
    joined = join_preludes(parts)
    check(joined, "join")
    assert Counter(ops(joined)) == {"Exp": 1, "Add": 3, "MatMul": 4, "Identity": 2}
    assert sorted(v.const_value.shape.numpy() for v in joined.graph.initializers.values()) == [(3,), (3,), (3,), (3, 3)]
    assert names(joined.graph.inputs) == ["label"]
    assert_equal(outputs_of(joined, feed), expected)
    assert merge_outputs(joined) == {"step_01/k": "step_00/k", "step_02/k": "step_00/k"}
    check(joined, "merge")
    assert Counter(ops(joined)) == {"Exp": 1, "Add": 3, "MatMul": 4}
    assert outputs_of(joined, feed).keys() == expected.keys() - {"step_01/k", "step_02/k"}


def test_join_keeps_step_numbers_and_input_shapes_in_symbols_of_the_inputs() -> None:
    body = "n = NonZero(label) t = Transpose(n) f = Cast<to = 1>(t) o = Exp(label)"
    part = prelude_with([0, 0, 0], body, "float[batch,3] o, float[found,2] f")
    joined = join_preludes([None, part, part])
    assert names(joined.graph.outputs) == [f"step_{i}/{name}" for i in ("01", "02") for name in "of"]
    assert [str(value.shape) for value in joined.graph.outputs] == ["[batch,3]", "[None,2]"] * 2


def test_join_refuses_what_does_not_fit() -> None:
    part = prelude_with([0, 0, 0], "o = Exp(label)")
    with pytest.raises(ValueError, match="found none"):
        join_preludes([None])
    with pytest.raises(ValueError, match=r"opsets.*step_01"):
        join_preludes([part, prelude_with([0, 0, 0], "o = Exp(label)", opset=19)])
    other = part.clone()
    other.graph.inputs[0].shape = ir.Shape(["rows", 3])
    with pytest.raises(ValueError, match="same request input label"):
        join_preludes([part, other])
    body = f"l = Exp(label) yes = Constant<value = bool {{1}}>() o = If (yes) <{IF}>"
    with pytest.raises(ValueError, match="without subgraphs"):
        join_preludes([prelude_with([0, 0, 0], body)])
    part.graph.initializers["w"].const_value = None
    with pytest.raises(ValueError, match="initialiser w"):
        join_preludes([part])


# --- batched products ------------------------------------------------------------------------------------------------

PRODUCTS = """(float[batch,3] a, float[batch,3] b, float[other,3] d, float[1,3] k) => ({outputs})
              <float[3,3] w = {{1,2,3,4,5,6,7,8,9}}, float[3] v = {{1,2,3}}, float[1,3] row = {{1,2,3}}, float s = {{2}},
               int64[2] last = {{-1,3}},
               float[2,3,3] deep = {{1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9}}>"""


def batched(body: str, opset: int = 20) -> tuple[BatchGemms, ir.Model]:
    """Outputs are ``x`` and ``y``; equal before and after, whatever the pass did."""
    model = text(PRODUCTS.format(outputs="float[?,?] x, float[?,?] y"), body, opset=opset)
    for value in model.graph.outputs:
        value.shape = None
    run_passes(model, [Infer()])
    feeds = {name: numbers(n, 3, seed=n) for name, n in {"a": 4, "b": 4, "d": 2, "k": 1}.items()}
    expected = outputs_of(model, feeds)
    one = BatchGemms()
    before = ops(model)
    modified = run_passes(model, [one])[0].modified
    assert modified == (ops(model) != before)
    assert_equal(outputs_of(model, feeds), expected)
    return one, model


class Infer(ir.passes.InPlacePass):
    """Shape inference: the text form demands a shape at every output, of any rank."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        ir.passes.common.ShapeInferencePass()(model)
        return ir.passes.PassResult(model, modified=True)


@pytest.mark.parametrize(
    "body",
    [
        "x = MatMul(a, w) y = MatMul(b, w)",
        "x = Gemm(a, w) y = Gemm(b, w)",
        "x = Gemm<transB = 1, alpha = 2.0, beta = 3.0>(a, w, v) y = Gemm<transB = 1, alpha = 2.0, beta = 3.0>(b, w, v)",
        "x = Gemm(a, w, row) y = Gemm(b, w, row)",
        "x = Gemm(a, w, k) y = Gemm(b, w, k)",
    ],
)
@pytest.mark.parametrize("opset", [17, 20])
def test_products_with_one_weight_become_one(body: str, opset: int) -> None:
    one, model = batched(body, opset)
    assert not one.declined
    assert ops(model) == ["Concat", "MatMul" if "MatMul" in body else "Gemm", "Split"]


def test_products_of_higher_rank_are_stacked_too() -> None:
    i = "i = Constant<value_ints = [1]>()"
    one, model = batched(f"{i} c = Unsqueeze(a, i) d3 = Unsqueeze(b, i) x = MatMul(c, w) y = MatMul(d3, w)")
    assert not one.declined and Counter(ops(model))["MatMul"] == 1


def test_users_between_the_products_are_sorted() -> None:
    one, model = batched("l = MatMul(a, w) x = Relu(l) e = Exp(b) y = MatMul(e, w)")
    assert not one.declined and Counter(ops(model))["MatMul"] == 1


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("x = MatMul(a, w) y = MatMul(d, w)", r"\[batch, 3\] and \[other, 3\], not known to be equal"),
        ("x = MatMul(a, w) y = MatMul(k, w)", r"\[batch, 3\] and \[1, 3\], not known"),
        ("yes = Constant<value = bool[4] {1,1,0,0}>() p = Compress<axis = 0>(a, yes) q = Compress<axis = 0>(b, yes)"
         " x = MatMul(p, w) y = MatMul(q, w)", r"unk__\d, 3\] and \[unk__\d, 3\], not known"),
        ("yes = Constant<value = bool[2] {1,1}>() z = Shape(a) size = Compress(z, yes) p = Reshape(a, size)"
         " q = Reshape(b, size) l = MatMul(p, w) m = MatMul(q, w) x = Reshape(l, last) y = Reshape(m, last)",
         "shape of its activation is not known"),
        ("x = MatMul(a, deep) y = MatMul(b, deep)", "weight of rank 2"),
        ("x = MatMul(v, w) y = MatMul(v, w)", "activation of rank 2 or more"),
        ("t = Transpose(a) u = Transpose(b) c = MatMul(t, a) e = MatMul(u, b) x = Gemm<transA = 1>(c, w)"
         " y = Gemm<transA = 1>(e, w)", "transposed"),
        ("x = Gemm(a, w, s) y = Gemm(b, w, s)", r"bias of shape \[3\] or \[1, 3\]"),
        ("l = MatMul(a, w) x = MatMul(l, w) y = Relu(x)", "depends on another product"),
    ],
)  # fmt: skip
def test_products_left_alone(body: str, reason: str) -> None:
    one, model = batched(body)
    assert "Split" not in ops(model)
    assert any(re.search(reason, line) for line in one.declined), one.declined


def test_different_weights_attributes_and_weights_given_at_request_are_no_group() -> None:
    one, model = batched("x = Gemm(a, w) y = Gemm<alpha = 2.0>(b, w)")
    assert not one.declined and ops(model) == ["Gemm", "Gemm"]
    model = text(PRODUCTS.format(outputs="float[batch,3] x, float[batch,3] y"), "x = MatMul(a, w) y = MatMul(b, w)")
    model.graph.inputs.append(model.graph.initializers["w"])
    one = BatchGemms()
    assert not one(model).modified and not one.declined


def test_a_chain_in_every_step_is_batched_level_by_level() -> None:
    one, model = batched("l = MatMul(a, w) m = MatMul(b, w) x = MatMul(l, w) y = MatMul(m, w)")
    assert not one.declined and Counter(ops(model))["MatMul"] == 2


def test_crossed_dependencies_make_no_cycle() -> None:
    """The first weight's products can merge, and then the second's depend on one another through them."""
    body = """a1 = MatMul(a, w) b1 = Gemm(a1, w) b2 = Gemm(b, w) a2 = MatMul(b2, w) x = Add(b1, a1) y = Add(a2, b2)"""
    one, model = batched(body)
    assert Counter(ops(model))["MatMul"] + Counter(ops(model))["Gemm"] == 3
    assert any("depends on another product" in line for line in one.declined)


# --- any graph -------------------------------------------------------------------------------------------------------

SHAPES = [(2, 3), (3, 3), (3, 2), (1, 3), (3,)]
UNARY = ["Relu", "Sigmoid", "Identity", "Transpose", "Flatten"]
ANY = [*UNARY, "Add", "Mul", "Where", "MatMul", "Gemm", "Concat", "Reshape", "ReduceMean", "Gather", "Unsqueeze", "Squeeze",
       "Expand", "ExpandAs", "Cast", "Shape", "Constant", "If", "Split"]  # fmt: skip


class Builder:
    """A random graph: values with their shapes, and nodes where the shapes fit."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.dynamic = draw(st.booleans())
        for kind in ("state", "state", "request", "request", "constant", "constant"):
            self.source(kind, draw(st.sampled_from(SHAPES)))

    def source(self, kind: str, shape: tuple[int, ...]) -> None:
        name = f"{kind}_{len(self.shapes)}"
        self.shapes[name] = shape
        if kind == "constant":
            self.constants.append(numpy_helper.from_array(numbers(*shape, seed=len(self.shapes)), name))
        else:
            dims = [f"{name}_rows" if self.dynamic else shape[0], *shape[1:]]
            self.inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))

    def pick(self, *like: tuple[int, ...]) -> str:
        """Any value, or one of the shapes ``like``; the earliest is always there."""
        fitting = [name for name, shape in self.shapes.items() if not like or shape in like]
        return self.draw(st.sampled_from(fitting))

    def constant(self, *values: int) -> str:
        name = f"integers_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def node(self, op: str, inputs: list[str], shape: tuple[int, ...] | None, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=f"n{len(self.nodes)}", **attributes))
        if shape is not None:
            self.shapes[name] = shape
        return name

    def add(self, op: str) -> None:  # noqa: PLR0912 PLR0915 (a table of operators)
        x = self.pick()
        shape = self.shapes[x]
        if op != "Relu" and (int(np.prod(shape)) > 64 or len(shape) > 4):
            return
        if op in ("Relu", "Sigmoid", "Identity"):
            self.node(op, [x], shape)
        elif op == "Transpose":
            self.node(op, [x], shape[::-1])
        elif op == "Flatten":
            self.node(op, [x], (shape[0], int(np.prod(shape[1:]))), axis=1)
        elif op in ("Add", "Mul"):
            y = self.pick(shape, (3,) if shape[-1] == 3 else shape)
            self.node(op, [x, y], shape)
        elif op == "Where":
            condition = self.node("Less", [x, self.pick(shape)], None)
            self.node(op, [condition, x, self.pick(shape)], shape)
        elif op in ("MatMul", "Gemm") and len(shape) == 2:
            fitting = [s for s in self.shapes.values() if len(s) == 2 and s[0] == shape[1]]
            if fitting:
                y = self.pick(*fitting)
                width = self.shapes[y][1]
                bias = [self.pick((3,))] if op == "Gemm" and width == 3 and (3,) in self.shapes.values() else []
                self.node(op, [x, y, *bias], (shape[0], width))
        elif op == "Concat":
            self.node(op, [x, self.pick(shape)], (2 * shape[0], *shape[1:]), axis=0)
        elif op == "Reshape":
            self.node(op, [x, self.constant(1, -1)], (1, int(np.prod(shape))))
        elif op == "ReduceMean":
            self.node(op, [x, self.constant(-1)], (*shape[:-1], 1), keepdims=1)
        elif op == "Gather":
            self.node(op, [x, self.constant(0, 0, 0)], (3, *shape[1:]), axis=0)
        elif op == "Unsqueeze":
            self.node(op, [x, self.constant(0)], (1, *shape))
        elif op == "Squeeze" and shape[0] == 1 and len(shape) > 1:
            self.node(op, [x, self.constant(0)], shape[1:])
        elif op == "Expand":
            self.node(op, [x, self.constant(2, *[1] * len(shape))], (2, *shape))
        elif op == "ExpandAs":
            size = self.node("Shape", [self.pick(shape)], None)
            self.node("Expand", [x, size], shape)
        elif op == "Cast":
            doubles = [self.node(op, [value], None, to=TensorProto.DOUBLE) for value in (x, self.pick(shape))]
            self.node(op, [self.node("Sub", doubles, None)], shape, to=TensorProto.FLOAT)
        elif op == "Shape":
            size = self.node(op, [x], None)
            self.node("Cast", [size], (len(shape),), to=TensorProto.FLOAT)
        elif op == "Constant":
            self.node(op, [], shape, value=numpy_helper.from_array(numbers(*shape)))
        elif op == "If":
            self.branch(x, shape)
        elif op == "Split" and shape[0] % 2 == 0:
            first, second = (f"v{len(self.nodes)}{part}" for part in "ab")
            self.nodes.append(helper.make_node(op, [x], [first, second], num_outputs=2))
            self.shapes |= dict.fromkeys([first, second], (shape[0] // 2, *shape[1:]))

    def branch(self, x: str, shape: tuple[int, ...]) -> None:
        """If the largest element is positive: values from outside, in two ways."""
        y, number = self.pick(shape), len(self.nodes)
        largest = self.node("ReduceMax", [x], None, keepdims=0)
        condition = self.node("Less", [self.zero(), largest], None)
        graphs = {}
        for branch, op in (("then_branch", "Add"), ("else_branch", "Sub")):
            name = f"{branch}_{number}"
            value = helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(shape))
            graphs[branch] = helper.make_graph([helper.make_node(op, [x, y], [name])], branch, [], [value])
        self.node("If", [condition], shape, **graphs)

    def zero(self) -> str:
        name = f"zero_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.float32(0), name))
        return name

    def model(self) -> ir.Model:
        self.add("Relu")
        made = [name for node in self.nodes for name in node.output if name in self.shapes]
        chosen = self.draw(st.lists(st.sampled_from(made), min_size=1, max_size=4, unique=True))
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * len(self.shapes[name])) for name in chosen]
        graph = helper.make_graph(self.nodes, "any", self.inputs, outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return ir.from_proto(model)


@st.composite
def any_graph(draw: st.DrawFn) -> tuple[ir.Model, dict[str, np.ndarray]]:
    builder = Builder(draw)
    for op in draw(st.lists(st.sampled_from(ANY), min_size=4, max_size=16)):
        builder.add(op)
    feeds = {v.name: numbers(*builder.shapes[v.name], seed=i) for i, v in enumerate(builder.inputs)}
    return builder.model(), feeds


@settings(max_examples=120, deadline=None)
@given(any_graph(), st.data())
def test_any_graph_is_the_sum_of_its_prelude_and_its_step(
    case: tuple[ir.Model, dict[str, np.ndarray]], data: st.DataObject
) -> None:
    model, feeds = case
    request = [name for name in feeds if name.startswith("request")]
    twin = model.clone()
    done = hoist(model, request, feeds)
    crossing = [] if done.prelude is None else names(done.prelude.graph.outputs)
    known = [name for name in names(model.graph.inputs) if name in request or name in crossing]
    times = binding_times(model, [name for name in known if name is not None])
    left = {node for node in model.graph if node.outputs[0] in times and times[node.outputs[0]] == REQUEST}
    for node in left:
        renamed = node.op_type == "Identity" and node.outputs[0].is_graph_output()
        assert renamed or (node.outputs[0].name in done.sunk and node.op_type in VIEWS | {"Expand", "Cast"})
    assert all(value.uses() or value.is_graph_output() for value in model.graph.inputs if value.name in known)
    again = Hoist(request)
    again(twin)
    assert ir.to_proto(twin) == ir.to_proto(model), "deterministic"
    if done.prelude is not None:
        early = outputs_of(done.prelude, feeds)
        joined = join_preludes([done.prelude, None, done.prelude.clone()])
        check(joined, "join")
        both = {f"step_{i}/{name}": value for i in ("00", "02") for name, value in early.items()}
        assert_equal(outputs_of(joined, feeds), both)
        kept = merge_outputs(joined)
        assert kept.keys() >= {f"step_02/{name}" for name in early}
        run_passes(joined, [BatchGemms()])
        assert_equal(outputs_of(joined, feeds), {name: value for name, value in both.items() if name not in kept})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["MatMul", "Gemm", "Add"]), st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=10
    )
)
def test_any_network_of_products_stays_the_same_network(plan: list[tuple[str, int, int]]) -> None:
    """Two weights, any dependencies: never a cycle, never another number."""
    values, body = ["a", "b", "c"], []
    for i, (op, x, y) in enumerate(plan):
        first, second = values[x % len(values)], ("w", "u")[y % 2] if op != "Add" else values[y % len(values)]
        body.append(f"t{i} = {op}({first}, {second}) v{i} = Tanh(t{i})")
        values.append(f"v{i}")
    signature = """(float[batch,2] a, float[batch,2] b, float[1,2] c) => (float[?,2] output)
                   <float[2,2] w = {1,2,3,4}, float[2,2] u = {4,-3,2,1}>"""
    model = text(signature, " ".join(body) + f" output = Sum({', '.join(values)})")
    feeds = {"a": numbers(3, 2), "b": numbers(3, 2, seed=1), "c": numbers(1, 2)}
    expected = outputs_of(model, feeds)
    run_passes(model, [BatchGemms()])
    assert_equal(outputs_of(model, feeds), expected)


# --- diffusers' networks ---------------------------------------------------------------------------------------------

IMAGES = torch.export.Dim("batch", min=2, max=63)
DYNAMIC = {0: IMAGES}


def drawn(network: torch.nn.Module) -> torch.nn.Module:
    """Parameters that start at zero drawn anew, or whatever depends on them would be equal for a wrong reason."""
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.3)
    return network


class ClassUNet(torch.nn.Module):
    """The site's embedding before it meets the class: given + class embedding, at every site."""

    def __init__(self) -> None:
        super().__init__()
        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
        sizes = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4}
        self.network = drawn(UNet2DModel(**blocks, **sizes, num_class_embeds=10, attention_head_dim=4))
        self.sites = [module for module in self.network.modules() if isinstance(module, ResnetBlock2D)]
        self.given: list[torch.Tensor] = []
        for index, module in enumerate(self.sites):
            module.register_forward_pre_hook(lambda _, args, kwargs, i=index: (self.at(i, args, kwargs), {}), with_kwargs=True)

    def at(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return args[0] if args else kwargs["input_tensor"], self.given[index]

    def forward(self, state: torch.Tensor, labels: torch.Tensor, given: list[torch.Tensor]) -> torch.Tensor:
        classes = self.network.class_embedding(labels)
        self.given = [embedding + classes for embedding in given]
        return self.network(state, 0, class_labels=labels, return_dict=False)[0]


class PromptUNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
        sizes = {"sample_size": 8, "in_channels": 2, "out_channels": 2, "layers_per_block": 1, "norm_num_groups": 4}
        more = {"block_out_channels": (8,), "cross_attention_dim": 12, "attention_head_dim": 4}
        self.network = drawn(UNet2DConditionModel(**blocks, **sizes, **more))

    def forward(self, state: torch.Tensor, prompt: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep, prompt, return_dict=False)[0]


class ClassDiT(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"sample_size": 4, "patch_size": 2, "in_channels": 2, "out_channels": 2, "num_layers": 2, "norm_num_groups": 4}
        self.network = drawn(
            DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, num_embeds_ada_norm=10, **sizes)
        )

    def forward(self, state: torch.Tensor, labels: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.network(state, timestep=timestep, class_labels=labels, return_dict=False)[0]


def step_graph(generic: ir.Model, **values: Array) -> ir.Model:
    model = generic.clone()
    run_passes(model, [Bind({name.replace("__", "/"): value for name, value in values.items()}), Fold()])
    return model


def weights_of(network: torch.nn.Module, *endings: str) -> list[Array]:
    found = [v.detach().numpy() for n, v in network.named_parameters() if n.endswith(endings)]
    assert found
    return found


def products_with(model: ir.Model, weights: list[Array]) -> int:
    """How many products have one of these weights, or its transpose, under whatever name."""
    count = 0
    for node in model.graph:
        tensors = [v.const_value.numpy() for v in node.inputs if v is not None and v.const_value is not None]
        same = (t.shape == w.shape and np.array_equal(t, w) for t in tensors for weight in weights for w in (weight, weight.T))
        count += node.op_type in ("Gemm", "MatMul") and any(same)
    return count


def check_joined(steps: list[ir.Model], request: list[str], feeds: Feeds, weights: list[Array]) -> None:
    """One prelude for all steps, its modulation products N times fewer, and every step still what it was."""
    expected = [outputs_of(step, feeds) for step in steps]
    parts = [hoist(step, request).prelude for step in steps]
    joined = join_preludes(parts)
    check(joined, "join")
    before, batch = products_with(joined, weights), BatchGemms()
    run_passes(joined, [batch])
    assert before == len(steps) * len(weights) and products_with(joined, weights) == len(weights)
    assert not batch.declined
    early = outputs_of(joined, feeds)
    for i, (step, wanted) in enumerate(zip(steps, expected, strict=True)):
        prefix = f"step_{i:02}/"
        own = {name.removeprefix(prefix): value for name, value in early.items() if name.startswith(prefix)}
        assert_equal(outputs_of(step, {**feeds, **own}), wanted)


def test_classes_of_a_unet() -> None:
    torch.manual_seed(0)
    network = ClassUNet()
    widths = [site.time_emb_proj.in_features for site in network.sites]
    args = (torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64), [torch.zeros(1, width) for width in widths])
    inputs = ["state", "labels", *(f"emb/{i}" for i in range(len(widths)))]
    generic = _export(network, args, inputs, ["output"], (DYNAMIC, DYNAMIC, [None] * len(widths)), "it").model
    sets = [{f"emb__{i}": numbers(1, width, seed=10 * step + i) for i, width in enumerate(widths)} for step in range(3)]
    feeds = [{"state": numbers(n, 1, 8, 8), "labels": np.arange(n) * 3 % 10} for n in (1, 3)]
    weights = weights_of(network, "time_emb_proj.weight")
    step = step_graph(generic, **sets[0])
    with torch.no_grad():
        given_ = [torch.from_numpy(value) for value in sets[0].values()]
        expected = network(*(torch.from_numpy(value) for value in feeds[1].values()), given_).numpy()
    assert_equal(outputs_of(step, feeds[1]), {"output": expected}, rtol=1e-4)
    done = hoist(step, ["labels"], *feeds)
    assert done.prelude is not None and names(step.graph.inputs)[0] == "state" and "labels" not in names(step.graph.inputs)
    assert products_with(step, weights) == 0 and products_with(done.prelude, weights) == len(weights) == len(widths)
    batch = step.graph.inputs[0].shape[0]
    assert [str(value.shape) for value in done.prelude.graph.outputs] == [f"[{batch},8]"] * len(widths)
    assert all(str(name).endswith("time_emb_proj") for name in names(done.prelude.graph.outputs))
    check_joined([step_graph(generic, **values) for values in sets], ["labels"], feeds[1], weights)


def test_classes_of_a_dit() -> None:
    torch.manual_seed(1)
    network = ClassDiT()
    args = (torch.zeros(2, 2, 4, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(1))
    generic = _export(network, args, ["state", "labels", "timestep"], ["output"], (DYNAMIC, DYNAMIC, None), "it").model
    feeds = [{"state": numbers(n, 2, 4, 4), "labels": np.arange(n) * 3 % 10} for n in (1, 3)]
    weights = weights_of(network, "norm1.linear.weight", "proj_out_1.weight")
    step = step_graph(generic, timestep=np.array([37.0], np.float32))
    done = hoist(step, ["labels"], *feeds)
    assert done.prelude is not None and "labels" not in names(step.graph.inputs)
    assert products_with(step, weights) == 0 and products_with(done.prelude, weights) == len(weights) == 3
    steps = [step_graph(generic, timestep=np.array([t], np.float32)) for t in (999.0, 500.0, 37.0)]
    check_joined(steps, ["labels"], feeds[1], weights)


def test_prompts_of_a_unet() -> None:
    torch.manual_seed(2)
    network = PromptUNet()
    args = (torch.zeros(2, 2, 8, 8), torch.zeros(2, 5, 12), torch.zeros(1))
    generic = _export(network, args, ["state", "prompt", "timestep"], ["output"], (DYNAMIC, DYNAMIC, None), "it").model
    feeds = [{"state": numbers(n, 2, 8, 8), "prompt": numbers(n, 5, 12, seed=1)} for n in (1, 3)]
    steps = [step_graph(generic, timestep=np.array([t], np.float32)) for t in (999.0, 500.0)]
    weights = weights_of(network, "attn2.to_k.weight", "attn2.to_v.weight")
    assert products_with(steps[0], weights) == len(weights) == 8
    expected = outputs_of(steps[1], feeds[1])
    first, second = (hoist(step, ["prompt"], *feeds) for step in steps)
    assert first.prelude is not None and "prompt" not in names(steps[0].graph.inputs)
    assert products_with(steps[0], weights) == 0 and products_with(first.prelude, weights) == len(weights)
    assert all(not value.shape.has_unknown_dim() for value in first.prelude.graph.outputs if value.shape is not None)
    joined = join_preludes([first.prelude, second.prelude])
    renamed = merge_outputs(joined)
    check(joined, "merge")
    assert len(renamed) == len(weights), "the prompt is the same at each step; the time, expanded to the batch, is not"
    assert products_with(joined, weights) == len(weights)
    early = outputs_of(joined, feeds[1])
    own = {name: early[renamed.get(f"step_01/{name}", f"step_01/{name}")] for name in names(steps[1].graph.inputs)[1:]}
    assert_equal(outputs_of(steps[1], {**feeds[1], **own}), expected)
