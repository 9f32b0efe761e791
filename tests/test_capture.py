"""Capture: the user's model is never touched, the call stays the same, and every refusal can be acted on."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import Dim
from torch.nn.functional import dropout, scaled_dot_product_attention

import qatgraph as qg
from qatgraph.errors import CaptureError, PassError
from qatgraph.ir.graph import Batch, Graph
from qatgraph.ir.meta import record
from tests.models import LENGTH, WIDTH, ZOO, Encoder, Mlp, Tied, captured, floats, padded, tokens


def names(graph: Graph) -> list[str]:
    return [record(n).name for n in graph.nodes]


# ---------------------------------------------------------------- the user's model is never touched

Snapshot = dict[str, object]


def snapshot(model: nn.Module) -> Snapshot:
    """Everything about a model that capture must leave as it is; values as bytes, objects by identity."""
    seen: Snapshot = {}
    for path, module in model.named_modules():
        hooks = {k: list(v.items()) for k, v in vars(module).items() if "hooks" in k and v}
        seen[path] = (type(module), module.training, hooks, sorted(module._non_persistent_buffers_set))
        seen[f"{path} attributes"] = {k: repr(v) for k, v in vars(module).items() if not k.startswith("_")}
    for path, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        grad = None if tensor.grad is None else (id(tensor.grad), tensor.grad.numpy().tobytes())
        value = (tensor.dtype, tensor.detach().numpy().tobytes())
        seen[path] = (id(tensor), tensor.data_ptr(), tensor._version, value, tensor.requires_grad, grad)
    return seen


def storages(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}


class Used(Encoder):
    """A model in the middle of its life: partly frozen, with gradients, in mixed modes, with a hook and a counter."""

    def __init__(self, hooked: Callable[[Tensor], object] = repr) -> None:
        super().__init__(dropout=0.2)
        self.register_buffer("steps", torch.zeros(()))
        self.steps: Tensor
        self.position.weight.requires_grad_(False)
        self.token.weight.grad = torch.ones_like(self.token.weight)
        self.train()
        self.layer[0].eval()
        self.token.register_forward_hook(lambda module, args, out: hooked(out) and None)
        self.token.weight.register_hook(lambda grad: grad)  # type: ignore[no-untyped-call]

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        self.steps += 1
        return super().forward(input_ids, attention_mask)


class Attending(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value)


def test_one_tensor_at_several_inputs_is_as_many_inputs() -> None:
    x = torch.randn(2, 4, 8)
    graph = qg.capture(Attending(), (x, x, x))
    apart = tuple(torch.randn(2, 4, 8) for _ in range(3))
    assert torch.equal(graph(*apart), Attending()(*apart))


def test_the_users_model_is_never_touched() -> None:
    met: list[Tensor] = []
    model, batch = Used(met.append), padded(2, 6)
    before, inputs = snapshot(model), {k: v.clone() for k, v in batch.items()}
    graph = qg.capture(model, batch, {"input_ids": LENGTH, "attention_mask": LENGTH})
    qg.canonicalize(graph).run(batch)
    assert snapshot(model) == before
    assert storages(model) & storages(graph.module) == set()
    assert all(isinstance(t, FakeTensor) for t in met), "the hook ran only on the fake tensors of the trace"
    assert all(torch.equal(batch[k], v) for k, v in inputs.items())


def test_a_refused_model_is_not_touched_either() -> None:
    model = Branch().train()
    model.fc.eval()
    before = snapshot(model)
    with pytest.raises(CaptureError):
        qg.capture(model, floats(2, 4))
    assert snapshot(model) == before


def _set_grad(model: Used) -> None:
    model.token.weight.grad = None


FAULTS: dict[str, Callable[[Used], object]] = {
    "a value": lambda m: m.token.weight.data.add_(1),
    "a buffer that is not saved": lambda m: m.position_ids.add_(1),
    "a mode": lambda m: m.layer[0].train(),
    "requires_grad": lambda m: m.position.weight.requires_grad_(True),
    "a gradient": _set_grad,
    "a gradient's value": lambda m: m.token.weight.grad.zero_() if m.token.weight.grad is not None else None,
    "a hook more": lambda m: m.token.register_forward_pre_hook(lambda *_: None),
    "a hook less": lambda m: m.token._forward_hooks.clear(),
    "another parameter object": lambda m: setattr(m.token, "weight", nn.Parameter(m.token.weight.detach().clone())),
    "an attribute more": lambda m: setattr(m, "cache", torch.zeros(1)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_snapshot_sees(fault: str) -> None:
    model = Used()
    before = snapshot(model)
    FAULTS[fault](model)
    assert snapshot(model) != before


def test_shared_storage_is_seen() -> None:
    model = Mlp()
    assert storages(model) & storages(nn.Sequential(model.up)) != set()


# ---------------------------------------------------------------- the call stays the same


class Keywords(nn.Module):
    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None, *, scale: Tensor) -> dict[str, Any]:
        assert c is not None
        return {"sum": a + c, "more": (a * scale - c, a) if b is None else (b, b)}


class Nested(nn.Module):
    def forward(self, batch: dict[str, Any], pair: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        return batch["x"] + pair[0], {"deep": batch["inner"]["y"] * pair[1]}


A, B, C, D = (floats(2, 4, seed=seed) for seed in range(4))


def same(have: Any, want: Any) -> bool:
    """Equal structure and equal bits."""
    leaves, spec = torch.utils._pytree.tree_flatten(have)
    others, wanted = torch.utils._pytree.tree_flatten(want)
    return bool(spec == wanted) and all(torch.equal(a, b) for a, b in zip(leaves, others, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_the_graph_computes_what_the_model_computes(name: str) -> None:
    batch = ZOO[name].inputs(1)
    args, kwargs = ((), batch) if isinstance(batch, dict) else ((batch,), {})
    assert same(captured(name)(*args, **kwargs), ZOO[name].model()(*args, **kwargs))


def test_equal_outputs_are_not_taken_for_granted() -> None:
    assert not same({"a": A}, {"a": A + 1e-6})
    assert not same({"a": A}, [A])


def test_positional_and_keyword_arguments() -> None:
    graph = qg.capture(Keywords(), {"a": A, "c": C, "scale": B})
    assert graph.info.inputs == ("a", "c", "scale")
    assert graph.info.outputs == ("sum", "more_0", "more_1")
    want = Keywords()(A, c=C, scale=B)
    for have in (graph(A, c=C, scale=B), graph(a=A, c=C, scale=B), graph(scale=B, c=C, a=A)):
        assert same(have, want)


def test_keyword_arguments_in_another_order_than_captured() -> None:
    graph = qg.capture(Keywords(), {"scale": B, "c": C, "a": A})
    assert same(graph(A, c=C, scale=B), Keywords()(A, c=C, scale=B))


def test_leading_keywords_may_be_given_by_position() -> None:
    batch = padded(2, 6)
    graph = captured("encoder")
    assert same(graph(batch["input_ids"], batch["attention_mask"]), graph(**batch))


def test_nested_inputs_and_outputs() -> None:
    batch = ({"x": A, "inner": {"y": B}}, (C, D))
    graph = qg.capture(Nested(), batch, {"batch_x": {0: "n"}, "pair_0": {0: "n"}})
    assert graph.info.inputs == ("batch_x", "batch_inner_y", "pair_0", "pair_1")
    assert graph.info.outputs == ("output_0", "output_1_deep")
    assert same(graph(*batch), Nested()(*batch))
    assert same(graph(pair=batch[1], batch=batch[0]), Nested()(*batch))


class Echo(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"x": x * 2}


def test_an_output_never_takes_the_name_of_an_input() -> None:
    graph = qg.capture(Echo(), A)
    assert set(graph.info.outputs) & set(graph.info.inputs) == set()


# ---------------------------------------------------------------- parameters, names


def test_ties_stay_ties() -> None:
    graph = ZOO["tied"].capture()
    for module in (graph.module, copy.deepcopy(graph.module), qg.canonicalize(graph).module):
        readers = {record(u).kind: n for n in module.graph.nodes if n.op == "get_attr" for u in n.users}
        table, weight = (Graph.of(module).parameter(readers[kind]) for kind in ("embedding", "linear"))
        assert table is weight
        assert isinstance(table, nn.Parameter)


def test_untied_weights_are_two_parameters() -> None:
    model = Tied()
    model.head.weight = nn.Parameter(model.embedding.weight.detach().clone())
    graph = qg.capture(model, tokens(2, 5))
    assert len([p for p in graph.module.parameters() if p.ndim == 2]) == 2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.fc(x))
        return y + y


def test_names_come_from_the_users_modules() -> None:
    assert names(qg.capture(Twice(), A)) == ["fc:linear", "fc:linear#2", "Twice:add"]
    have = names(captured("encoder"))
    assert "layer.0.attention.query:linear" in have
    assert "layer.0.attention:transpose#4" in have
    assert len(set(have)) == len(have)


def test_sources_are_lines_of_the_users_code() -> None:
    for node in qg.capture(Twice(), A).nodes:
        assert record(node).source.startswith("test_capture.py:")


@pytest.mark.parametrize("name", ZOO)
def test_parameters_bear_the_users_paths(name: str) -> None:
    model, graph = ZOO[name].model(), captured(name)
    users = dict(model.named_parameters(remove_duplicate=False))
    ours = dict(graph.module.named_parameters())
    assert set(ours) <= set(users)
    assert {k: v.shape for k, v in ours.items()} == {k: users[k].shape for k in ours}
    assert len(ours) == len({id(p) for p in users.values()}), "every parameter of the model is in the graph, once"


def test_frozen_parameters_stay_frozen() -> None:
    model = ZOO["mlp"].model()
    model.get_parameter("up.weight").requires_grad_(False)
    frozen = [n for n, p in qg.capture(model, floats(4, WIDTH)).module.named_parameters() if not p.requires_grad]
    assert frozen == ["up.weight"]


def test_two_captures_share_one_copy_of_the_parameters() -> None:
    model = ZOO["encoder"].model()
    first = qg.capture(model, padded(2, 6))
    second = qg.capture(model, padded(3, 9), share_with=first)
    alone = dict(qg.capture(model, padded(2, 6)).module.named_parameters())
    for name, parameter in second.module.named_parameters():
        assert parameter is first.module.get_parameter(name)
        assert parameter is not alone[name]


def test_a_graph_is_an_ordinary_module() -> None:
    graph, batch = captured("encoder"), padded(2, 6)
    twin = copy.deepcopy(graph.module)
    assert storages(twin) & storages(graph.module) == set()
    assert str(Graph.of(twin)) == str(graph)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    assert not same(twin(**batch), graph(**batch))
    twin.load_state_dict(graph.module.state_dict())
    assert same(twin(**batch), graph(**batch))


def test_a_foreign_module_has_no_graph() -> None:
    with pytest.raises(CaptureError, match="QG108: this module was not made by qatgraph"):
        Graph.of(Mlp())


# ---------------------------------------------------------------- modes


def test_dropout_follows_the_mode() -> None:
    x = floats(4, WIDTH)
    module = qg.canonicalize(ZOO["mlp"].capture()).module
    module.train()
    assert not same(module(x), module(x))
    module.eval()
    assert same(module(x), ZOO["mlp"].model()(x))


def test_before_canonicalization_dropout_does_not_follow() -> None:
    x = floats(4, WIDTH)
    module = ZOO["mlp"].capture().module.train()
    assert same(module(x), module(x))


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, 0.5, training=self.training)


def test_dropout_written_as_a_function_follows_the_mode_too() -> None:
    module = qg.canonicalize(qg.capture(Functional(), A)).module
    assert same(module.eval()(A), A)
    assert not same(module.train()(A), A)


class Rates(nn.Module):
    """Attention whose dropout rate is a number under a name of its own, as large language models write it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_dot_product_attention(x, x, x, dropout_p=getattr(self, self.name) if self.training else 0.0)


def test_dropout_that_is_lost_in_attention_is_noted() -> None:
    model = Encoder(depth=2, dropout=0.1)
    notes = qg.capture(model, padded(2, 6)).info.notes
    for words in ("p=0.1", "attention", "layer.0.attention", "layer.1.attention"):
        assert words in " ".join(notes)
    assert captured("encoder").info.notes == (), "no dropout, no note"


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "attn_pdrop"])
def test_a_lost_rate_is_noted_under_any_name(name: str) -> None:
    (note,) = qg.capture(Rates(name), floats(2, 3, 4)).info.notes
    assert "p=0.3" in note


# ---------------------------------------------------------------- moving axes


@pytest.mark.parametrize("shape", [(1, 6), (2, 1), (1, 1)])
def test_an_example_of_size_one_stays_dynamic(shape: tuple[int, int]) -> None:
    model = ZOO["encoder"].model()
    graph = qg.capture(model, padded(*shape), {"input_ids": LENGTH, "attention_mask": LENGTH})
    assert "token:embedding = embedding('token.weight', input_ids) : float32[batch, length, 32]" in str(graph)
    for other in ((3, 9), (1, 1), (5, 64)):
        batch = padded(*other)
        assert same(graph(**batch), model(**batch))


def test_a_size_that_nobody_declares_is_fixed() -> None:
    axes = {0: "batch"}
    graph = qg.capture(ZOO["encoder"].model(), padded(1, 6), {"input_ids": axes, "attention_mask": axes})
    assert "float32[batch, 6, 32]" in str(graph)
    assert "length" not in str(graph)


def test_derived_sizes_bear_the_users_names() -> None:
    assert "[5*batch, 32]" in str(captured("gpt2"))


# ---------------------------------------------------------------- refusals


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x
        y: Tensor = self.fc(x)
        return y


class Item(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.max().item())]


class ThroughNumpy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() + 1)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.table


class Count(nn.Module):
    def forward(self, x: Tensor, count: int) -> Tensor:
        return x * count


def refusal(model: nn.Module, inputs: Batch, dynamic: Any = None, **options: Any) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        qg.capture(model, inputs, dynamic, **options)
    assert caught.value.todo, "every refusal says what to do"
    return caught.value


@pytest.mark.parametrize(
    ("model", "line"), [(Branch(), "if x.sum() > 0:"), (Item(), "return x[: int(x.max().item())]")], ids=["if", "item"]
)
def test_qg101_a_branch_on_values_names_the_users_line(model: nn.Module, line: str) -> None:
    error = refusal(model, floats(2, 4))
    assert error.code == "QG101"
    assert error.what == "the model branches on the values of a tensor"
    assert error.where.startswith("test_capture.py:")
    assert error.where.endswith(line)
    assert "torch.where" in error.todo


def test_qg102_what_cannot_be_captured_names_the_users_line() -> None:
    error = refusal(ThroughNumpy(), floats(2, 4))
    assert error.code == "QG102"
    assert error.what == "torch.export cannot capture ThroughNumpy"
    assert error.where.startswith("test_capture.py:")
    assert error.where.endswith("return torch.from_numpy(x.numpy() + 1)")


def test_qg102_too_many_inputs_is_not_blamed_on_the_standard_library() -> None:
    error = refusal(ZOO["mlp"].model(), (floats(4, WIDTH), floats(4, WIDTH)))
    assert error.code == "QG102"
    assert "too many positional arguments" in error.why
    assert "inspect.py" not in error.where


def test_qg107_an_operation_of_ones_own_that_writes_into_its_argument() -> None:
    own = torch.library.custom_op(
        "capturelib::twice_", lambda x: None, mutates_args=("x",), schema="(Tensor(a!) x) -> ()"
    )

    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(x)
            own(y)
            return y

    error = refusal(Writes(), floats(2, 4))
    assert (error.code, error.what) == ("QG107", "the operation 'capturelib.twice_' writes into its arguments")
    assert error.where.startswith("test_capture.py:")
    assert "mutates_args=()" in error.todo


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_qg103_a_weight_that_is_not_finite(value: float) -> None:
    model = ZOO["mlp"].model()
    with torch.no_grad():
        model.get_parameter("up.weight")[0, 0] = value
    error = refusal(model, floats(4, WIDTH))
    assert error.code == "QG103"
    assert error.what == "a weight contains NaN or infinity"
    assert error.where == "'up.weight' of Mlp"


def test_qg103_nan_in_a_buffer_and_not_infinity_in_a_mask() -> None:
    model = ZOO["mlp"].model()
    model.register_buffer("bias_mask", torch.tensor(float("-inf")))
    qg.capture(model, floats(4, WIDTH))
    model.register_buffer("mean", torch.tensor(float("nan")))
    assert refusal(model, floats(4, WIDTH)).where == "'mean' of Mlp"


def test_qg104_a_dynamic_size_that_is_not() -> None:
    error = refusal(Positions(), floats(2, 6, 4), {"x": {1: "length"}})
    assert error.code == "QG104"
    assert error.what == "a dynamic dimension does not hold for this model"
    assert "length = 6" in error.todo


def test_qg104_a_bound_that_is_missing() -> None:
    axes = {1: "length"}
    error = refusal(ZOO["encoder"].model(), padded(2, 6), {"input_ids": axes, "attention_mask": axes})
    assert error.code == "QG104"
    assert "max=64" in error.todo


def test_qg104_an_example_outside_its_bounds() -> None:
    axes = {1: Dim("length", min=8, max=64)}
    error = refusal(ZOO["encoder"].model(), padded(2, 6), {"input_ids": axes, "attention_mask": axes})
    assert error.code == "QG104"


@pytest.mark.parametrize(
    ("dynamic", "sentence"),
    [
        ({"y": {0: "n"}}, "dynamic_shapes names an input 'y' that the model was not given"),
        ({"x": {2: "n"}}, "axis 2 of 'x' does not exist"),
        ({"x": {-1: "n"}}, "axis -1 of 'x' does not exist"),
    ],
)
def test_qg105_wrong_names_and_axes(dynamic: dict[str, Any], sentence: str) -> None:
    error = refusal(ZOO["mlp"].model(), floats(4, WIDTH), dynamic)
    assert (error.code, error.what) == ("QG105", sentence)


@pytest.mark.parametrize(
    "dynamic", [{"x": ("n",)}, {"x": {0: 4}}, {"x": {0: "not a name"}}, {"count": {0: "n"}}], ids=str
)
def test_qg105_dynamic_shapes_of_another_form(dynamic: dict[str, Any]) -> None:
    assert refusal(Count(), (A, 2), dynamic).code == "QG105"


def test_qg105_wrong_output_names() -> None:
    error = refusal(ZOO["mlp"].model(), floats(4, WIDTH), output_names=("a", "b"))
    assert (error.code, error.what) == ("QG105", "2 output names for 1 outputs")
    clash = refusal(ZOO["mlp"].model(), floats(4, WIDTH), output_names=("x",))
    assert clash.code == "QG105"
    assert "'x'" in clash.what, "the sentence says which name is taken"


# ---------------------------------------------------------------- batches that do not fit


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ({**padded(2, 6), "input_ids": floats(2, 6)}, "dtype torch.float32, captured with torch.int64"),
        ({k: v[0] for k, v in padded(2, 6).items()}, "rank 1, captured with rank 2"),
        (padded(2, 65), "'length' is 65, at most 64 was captured"),
        ({"input_ids": tokens(2, 6)}, "1 inputs, the model was captured with 2"),
        ({**padded(2, 6), "input_ids": 3}, "a int where a tensor is expected"),
        ((tokens(2, 6), tokens(2, 6), tokens(2, 6)), "3 inputs, the model was captured with 2"),
    ],
    ids=["dtype", "rank", "too long", "missing", "no tensor", "one more"],
)
def test_qg110_a_batch_that_does_not_fit(batch: Batch, sentence: str) -> None:
    error = misfit(captured("encoder"), batch)
    assert error.why == sentence


def misfit(graph: Graph, batch: Batch) -> CaptureError:
    with pytest.raises(CaptureError) as caught:
        graph.check_batch(batch, "batch 7")
    error = caught.value
    assert error.code == "QG110"
    assert error.what == "the batch does not fit the captured model"
    assert error.where.startswith("batch 7")
    assert error.todo
    return error


def test_qg110_a_fixed_size_and_values() -> None:
    graph = captured("mlp")
    assert misfit(graph, floats(4, 31)).why == "size 31 on axis 1, which is fixed at 32"
    assert misfit(graph, torch.full((4, WIDTH), float("nan"))).why == "it contains NaN or infinity"
    assert misfit(graph, floats(4, 31)).where == "batch 7, input 'x'"


@pytest.mark.parametrize("batch", [padded(1, 1), padded(3, 9), tuple(padded(2, 64).values())])
def test_batches_that_fit(batch: Batch) -> None:
    captured("encoder").check_batch(batch, "batch 7")


class Select(nn.Module):
    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return x[ids - 1]


def test_keywords_fit_in_any_order() -> None:
    batch = {"x": A, "ids": torch.tensor([1, 2])}
    graph = qg.capture(Select(), {"ids": batch["ids"], "x": A})
    graph.check_batch(batch, "batch 7")
    assert same(graph.run(batch), A[batch["ids"] - 1])


def test_qg110_a_keyword_that_the_model_does_not_take() -> None:
    misfit(captured("encoder"), {"input_ids": tokens(2, 6), "mask": tokens(2, 6)})


def test_qg110_one_name_has_one_size() -> None:
    misfit(captured("encoder"), {"input_ids": tokens(2, 6), "attention_mask": tokens(2, 5)})


def test_qg110_an_empty_batch_and_one_below_the_bound() -> None:
    misfit(captured("encoder"), padded(0, 6))
    axes = {1: Dim("length", min=4, max=64)}
    graph = qg.capture(ZOO["encoder"].model(), padded(2, 6), {"input_ids": axes, "attention_mask": axes})
    misfit(graph, padded(2, 3))


# ---------------------------------------------------------------- names and hashes


@pytest.mark.parametrize(("name", "near"), [("up:linaer", "did you mean 'up:linear'?"), ("zzz", "print the graph")])
def test_a_name_that_no_node_bears_is_refused_with_the_nearest(name: str, near: str) -> None:
    assert record(captured("mlp").node("up:linear")).name == "up:linear"
    with pytest.raises(PassError, match=f"QG217: the graph has no node '{name}'") as caught:
        captured("mlp").node(name)
    assert near in caught.value.todo


def dropped(rate: float, name: str = "drop") -> Graph:
    layers: list[tuple[str, nn.Module]] = [("fc", nn.Linear(4, 4)), (name, nn.Dropout(rate))]
    return qg.canonicalize(qg.capture(nn.Sequential(OrderedDict(layers)), floats(2, 4)))


def test_what_a_module_is_set_to_enters_the_structural_hash_and_its_name_does_not() -> None:
    assert {n.op for n in dropped(0.1).nodes} == {"call_function", "call_module"}
    assert dropped(0.1).structural_hash() != dropped(0.2).structural_hash()
    assert dropped(0.1).structural_hash() == dropped(0.1, "other").structural_hash()


def test_several_results_print_the_type_of_each() -> None:
    class Halves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            a, b = x.chunk(2, -1)
            return a * b

    graph = qg.capture(Halves(), floats(2, 8))
    assert "Halves:chunk = chunk(x, 2, -1) : (float32[2, 4], float32[2, 4])" in str(graph)
    assert "Halves:getitem = getitem(Halves:chunk, 0) : float32[2, 4]" in str(graph)
