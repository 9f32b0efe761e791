"""fold-normalization: pixels that a model takes as integers, whatever the spelling of their normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qatgraph as qg
from qatgraph.errors import PassError
from qatgraph.ir.graph import Graph
from qatgraph.ir.meta import record
from tests.models import canonical, captured, pixels
from tests.rewritten import after, lines, rewritten

Normalization = Callable[[Any, Tensor], Tensor]
LITE: Normalization = lambda _, x: (x.float() - 127) / 128  # noqa: E731
IMAGENET: Normalization = lambda m, x: (x.float() / 255 - m.mean) / m.std  # noqa: E731
HALF: Normalization = lambda _, x: (x / 255 - 0.5) / 0.5  # noqa: E731


class Net(nn.Module):
    """A normalization in front of one layer: uint8 [2, 3, 6, 6] -> float."""

    mean: Tensor
    std: Tensor

    def __init__(self, normalize: Normalization, layer: nn.Module, mean: Any = None, std: Any = None) -> None:
        super().__init__()
        self.normalize, self.layer = normalize, layer
        self.register_buffer("mean", torch.tensor(mean or [0.485, 0.456, 0.406])[:, None, None])
        self.register_buffer("std", torch.tensor(std or [0.229, 0.224, 0.225])[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        y: Tensor = self.layer(self.normalize(self, image))
        return y


def conv(**options: Any) -> nn.Conv2d:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Conv2d(3, 4, 3, **options)


def graph_of(normalize: Normalization, layer: nn.Module, image: Tensor | None = None, **numbers: Any) -> Graph:
    return qg.capture(Net(normalize, layer, **numbers).eval(), pixels(2, 3, 6, 6) if image is None else image)


def folded(normalize: Normalization, layer: nn.Module, **options: Any) -> tuple[Graph, dict[str, str]]:
    """The pass holds its word in float64, or this raises."""
    before = after(graph_of(normalize, layer, **options), "functionalize-in-place", "remove-no-ops", "fold-constants")
    return rewritten("fold-normalization", before)


def grid(graph: Graph) -> tuple[float, int]:
    (node,) = (n for n in graph.nodes if record(n).kind == "dequantize")
    scale, zero = (graph.parameter(n) for n in node.args[1:3])  # type: ignore[arg-type]
    assert scale is not None
    assert zero is not None
    return float(scale), int(zero)


# ---------------------------------------------------------------- fold-normalization


SPELLINGS: dict[str, tuple[Normalization, tuple[float, int]]] = {
    "centred": (LITE, (1 / 128, 127)),
    "to 0 and 1": (lambda _, x: x / 255, (1 / 255, 0)),
    "a product": (lambda _, x: x.to(torch.float32) * 0.25 - 32.0, (0.25, 128)),
    "mean of one pixel": (lambda _, x: (x.float() / 255 - 127 / 255) / 0.5, (2 / 255, 127)),
    "in place": (lambda _, x: x.float().div_(128).sub_(1), (1 / 128, 128)),
    "a sum": (lambda _, x: 0.5 * x.float() + 0.0, (0.5, 0)),
    "as it is": (lambda _, x: x.float(), (1.0, 0)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_one_factor_and_one_integer_pixel_as_zero_are_a_grid(name: str) -> None:
    normalize, (scale, zero) = SPELLINGS[name]
    graph, refused = folded(normalize, conv(padding=1))
    assert refused == {}
    assert grid(graph) == (float(torch.tensor(scale)), zero)
    assert [record(n).kind for n in graph.nodes] == ["dequantize", "conv2d"]
    assert "layer.weight" in {str(n.target) for n in graph.module.graph.find_nodes(op="get_attr")}


@pytest.mark.parametrize(("normalize", "bias"), [(IMAGENET, True), (IMAGENET, False), (HALF, True), (HALF, False)])
def test_what_differs_by_channel_goes_into_a_convolution_that_does_not_pad(
    normalize: Normalization, bias: bool
) -> None:
    layer = conv(bias=bias)
    before = layer.weight.clone()
    graph, refused = folded(normalize, layer)
    assert refused == {}
    assert "layer:conv2d = conv2d(Net:dequantize, 'layer.weight/folded', 'layer.bias/folded')" in lines(graph)
    assert torch.equal(layer.weight, before)  # the user's
    image = pixels(2, 3, 6, 6, seed=3)
    with torch.no_grad():
        want = Net(normalize, layer).eval()(image)
    assert float((graph.run(image) - want).abs().max()) < 1e-5 * float(want.abs().max())


def test_factors_alone_go_into_one_that_pads_since_zero_stays_zero() -> None:
    graph, refused = folded(lambda m, x: x / 255 / m.std, conv(padding=1))
    assert refused == {}
    assert grid(graph)[1] == 0
    assert "layer:conv2d = conv2d(Net:dequantize, 'layer.weight/folded', 'layer.bias', [1, 1], [1, 1])" in lines(graph)


def test_a_linear_and_groups_take_factors() -> None:
    assert "dequantize" in str(folded(IMAGENET, nn.Conv2d(3, 6, 1, groups=3))[0])
    graph, refused = folded(
        lambda m, x: (x / 255 - m.mean.flatten()) / m.std.flatten(), nn.Linear(3, 4), image=pixels(5, 3)
    )
    assert refused == {}
    assert "layer:linear = linear(Net:dequantize, 'layer.weight/folded', 'layer.bias/folded')" in lines(graph)


def test_the_patches_of_the_zoo_read_integers() -> None:
    before = captured("pixels")
    assert "Pixels:dequantize" not in str(before)
    assert "patches:conv2d = conv2d(Pixels:dequantize, 'patches.weight/folded', 'patches.bias/folded'" in str(
        canonical("pixels")
    )


def test_what_another_operation_reads_is_a_grid_up_to_there() -> None:
    class Both(Net):
        def forward(self, image: Tensor) -> Any:
            x = image / 255
            return self.layer(x), x.mean()

    graph, refused = rewritten("fold-normalization", qg.capture(Both(LITE, conv()).eval(), pixels(2, 3, 6, 6)))
    assert refused == {}
    assert grid(graph) == (float(torch.tensor(1 / 255)), 0)


REFUSED: dict[str, tuple[Normalization, nn.Module, dict[str, Any], str]] = {
    "padding": (IMAGENET, conv(padding=1), {}, "'layer:conv2d' pads with zeros"),
    "padding by name": (IMAGENET, conv(padding="same"), {}, "'layer:conv2d' pads with zeros"),
    "half a pixel": (HALF, conv(padding=1), {}, "which stand for no integer pixel"),
    "two readers": (IMAGENET, nn.Sequential(nn.ReLU(), conv()), {}, ""),
    "a pad": (IMAGENET, nn.Sequential(nn.ZeroPad2d((1, 0, 1, 0)), conv()), {}, "a pad reads it"),
    "signed": (LITE, conv(), {"image": pixels(2, 3, 6, 6).to(torch.int8)}, "its pixels are torch.int8"),
    "an image of means": (
        lambda _, x: x.float() - torch.arange(6.0), conv(), {}, "differ from pixel to pixel",
    ),
    "times nothing": (lambda _, x: x.float() * 0.0, conv(), {}, "multiplies the pixels by zero"),
    "made larger": (lambda m, x: x[:, :1] / 255 - m.mean, conv(), {}, "make the image larger"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_exact_stays_and_says_why(name: str) -> None:
    normalize, layer, options, why = REFUSED[name]
    graph, refused = folded(normalize, layer, **options)
    assert "dequantize" not in str(graph)
    assert len(refused) == bool(why)
    assert all(why in reason for reason in refused.values())


@pytest.mark.parametrize("cast", [lambda x: x.to(torch.int32).float(), lambda x: x.float().sqrt(), torch.neg])
def test_other_integers_and_functions_do_not_match(cast: Callable[[Tensor], Tensor]) -> None:
    graph, refused = folded(lambda _, x: cast(x) if cast is not torch.neg else x.float(), nn.ReLU())
    assert refused == {}
    assert "dequantize" not in str(graph)


def test_a_mean_that_trains_is_left_alone() -> None:
    class Trained(Net):
        def __init__(self) -> None:
            super().__init__(lambda m, x: (x.float() - m.offset) / 128, conv())
            self.offset = nn.Parameter(torch.tensor(127.0))

    graph, refused = rewritten("fold-normalization", qg.capture(Trained().eval(), pixels(2, 3, 6, 6)))
    assert refused == {}
    assert "dequantize" not in str(graph)


@pytest.mark.parametrize(("std", "normalize"), [([0.2, 0.0, 0.2], IMAGENET), (None, lambda _, x: x.float() / 0.0)])
def test_a_normalization_by_zero_is_an_error(std: Any, normalize: Normalization) -> None:
    with pytest.raises(PassError, match="QG221: the normalization of the pixels gives no finite numbers") as caught:
        folded(normalize, conv(), std=std)
    assert "divides by zero" in str(caught.value)


def test_a_mean_that_is_not_finite_is_an_error() -> None:
    with pytest.raises(PassError, match="QG221"):
        folded(lambda _, x: x.float() - float("inf"), conv())


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[tuple[str, list[float]]], bool]:
    """One to four steps, each with one number or one a channel; and whether there is a bias."""
    numbers = st.floats(0.05, 20).map(lambda v: round(v, 3))
    steps = st.tuples(
        st.sampled_from(["add", "sub", "rsub", "mul", "div"]),
        st.lists(numbers, min_size=1, max_size=1) | st.lists(numbers, min_size=3, max_size=3),
    )
    return draw(st.lists(steps, min_size=1, max_size=4)), draw(st.booleans())


@settings(max_examples=40, deadline=None)
@given(chains())
def test_every_affine_chain_is_folded_within_its_word(chain: tuple[list[tuple[str, list[float]]], bool]) -> None:
    """The manager compares in float64; here the model is compared once more, with what torch makes of it in float64."""
    steps, bias = chain

    def normalize(_: Any, x: Tensor) -> Tensor:
        y = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        for name, numbers in steps:
            constant = torch.tensor(numbers, dtype=y.dtype)[:, None, None]
            y = constant - y if name == "rsub" else getattr(y, name)(constant)
        return y

    layer = conv(bias=bias)
    graph, refused = folded(normalize, layer)
    assert refused == {}
    assert "dequantize" in str(graph)
    image = pixels(2, 3, 6, 6, seed=1)
    want = conv(bias=bias).double()(normalize(None, image.double()))
    assert float((graph.run(image) - want).abs().max()) <= 1e-4 * float(want.abs().max())


def test_a_wrong_fold_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of all above: the zero point of another pixel breaks the word of the pass."""
    from qatgraph.passes import fold_normalization

    right = fold_normalization._common_zero
    monkeypatch.setattr(fold_normalization, "_common_zero", lambda *a: (right(*a) or 0) + 1)
    with pytest.raises(PassError, match="QG207: 'fold-normalization' declares its numerics"):
        folded(LITE, conv(padding=1))
