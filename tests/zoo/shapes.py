"""Small models of our own: what real architectures above do not have, or not so plainly."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qatgraph.ir.graph import Batch
from tests.blocks import WIDTH
from tests.models import BATCH, floats, tokens
from tests.zoo.entry import Counts, Entry


class Shared(nn.Module):
    """One linear and one norm that run three times, and a sibling tied to the linear's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.tied = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.norm(x + F.relu(self.fc(x)))
        y: Tensor = self.tied(x)
        return y


class TiedLm(nn.Module):
    """A language model whose head is its embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.norm = nn.Embedding(50, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(F.silu(self.fc(self.embed(ids)))))
        return y


class Convolutions(nn.Module):
    """Grouped, dilated, depthwise, transposed and grouped transposed, with batch norms to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.ConvTranspose2d(8, 6, 2, stride=2), nn.BatchNorm2d(6), nn.LeakyReLU(0.1),
            nn.ConvTranspose2d(6, 6, 3, padding=1, groups=3), nn.Hardswish(), nn.Conv2d(6, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y


class Series(nn.Module):
    """Convolutions over time: causal padding, dilation, gates, a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.gate = (nn.Conv1d(8, 8, 3, dilation=2) for _ in range(2))
        self.out = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (4, 0))
        y: Tensor = x + self.out(torch.tanh(self.inside(padded)) * torch.sigmoid(self.gate(padded)))
        return y


class Volume(nn.Module):
    """Convolution in three dimensions, pooling, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.Linear(4 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(F.max_pool3d(F.relu(self.norm(self.conv(x))), 2).flatten(1))
        return y


class Recurrent(nn.Module):
    """An LSTM or a GRU of torch, and a head on its last state."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn, self.head = kind(8, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        y: Tensor = self.head(states[:, -1])
        return y


class Unrolled(nn.Module):
    """An LSTM cell, step by step over four steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h, c = x.new_zeros(x.shape[0], 16), x.new_zeros(x.shape[0], 16)
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
        y: Tensor = self.head(h)
        return y


class InPlace(nn.Module):
    """Operations that write: into a value, into a view, into a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        y.relu_()
        y[:, :4] = 0.0
        y.view(-1).mul_(0.5)
        y = self.down(y)
        y += x
        return torch.sigmoid_(y)


class Outputs(nn.Module):
    """Nested containers of outputs; one is an input, two are the same, one is an integer, one a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 5)
        self.register_buffer("labels", torch.arange(5))
        self.labels: Tensor

    def forward(self, x: Tensor, unused: Tensor) -> dict[str, object]:
        hidden = torch.tanh(self.fc(x))
        logits = self.head(hidden)
        return {
            "logits": logits,
            "hidden": [hidden, x],
            "again": logits,
            "best": (logits.argmax(-1), self.labels),
        }


class Counting(nn.Module):
    """Buffers that change with every call: a counter and a running mean."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.calls: Tensor
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return F.gelu(self.fc(x)) - self.fc.weight.mean()


class Dense(nn.Module):
    """Residuals that are joined by concatenation, as in DenseNet and U-Net."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH + 8 * i, 8) for i in range(3))
        self.head = nn.Linear(WIDTH + 24, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, F.elu(layer(x))], dim=-1)
        y: Tensor = self.head(x)
        return y


class Mixer(nn.Module):
    """MLP-Mixer: linears over the tokens, between transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.tokens = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.one(x).transpose(1, 2)).transpose(1, 2)
        y: Tensor = x + self.channels(self.two(x))
        return y


class Ranks(nn.Module):
    """One linear at ranks 2 to 5, one that ReLU6 reads through a dropout, one through a reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        shapes = ([-1, 8], [2, -1, 8], [2, 3, -1, 8], [2, 3, 2, -1, 8])
        ranks = [self.fc(x.reshape(shape)).relu() for shape in shapes]
        dropped = F.relu6(self.dropout(self.second(x))) * 0.5
        moved = F.relu6(self.third(x).reshape(2, -1)) * 0.5
        return (*ranks, dropped, moved)


class OneHead(nn.Module):
    """Attention without an axis of heads: causal, masked by additive and by boolean masks of rank 2 and 3."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        causal = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        masked = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        flat = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[0])
        added = F.scaled_dot_product_attention(query, key, value, attn_mask=torch.where(mask, 0.0, -1e4))
        y: Tensor = self.out(causal + masked + flat + added)
        return y


class Gates(nn.Module):
    """Gated linear units, and the activations that mobile models like."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, 2 * WIDTH)
        self.body = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Hardsigmoid(), nn.Linear(WIDTH, WIDTH), nn.Mish(), nn.Linear(WIDTH, WIDTH),
            nn.Softplus(), nn.Linear(WIDTH, WIDTH), nn.PReLU(), nn.Linear(WIDTH, WIDTH), nn.ELU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(F.glu(self.fc(x)))
        return y


class Norms(nn.Module):
    """Norms in unusual places: a batch norm in front, one behind a linear, a GroupNorm, an InstanceNorm, an RMSNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True)
        self.fc, self.behind, self.rms = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.RMSNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.instance(F.relu(self.group(self.conv(self.first(x)))))
        out: Tensor = self.rms(self.behind(self.fc(y.amax((2, 3)))))
        return out


class Products(nn.Module):
    """Linears in disguise: einsum, a transposed matmul, addmm, a bilinear form; and two that are none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.randn(8, 8) * 0.3) for _ in range(3))
        self.bias, self.bilinear = nn.Parameter(torch.randn(8)), nn.Bilinear(8, 8, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        one = torch.einsum("bi,io->bo", x, self.a)
        two = F.silu(one @ self.b.t())
        three = torch.addmm(self.bias, two, self.c)
        outer = torch.bmm(three[:, :, None], y[:, None, :])
        return self.bilinear(three, y), outer


def parametrized() -> nn.Module:
    """Weights that are computed: weight norm and spectral norm."""
    wrap, spectral = nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm
    return nn.Sequential(wrap(nn.Linear(WIDTH, WIDTH)), nn.ReLU(), spectral(nn.Linear(WIDTH, WIDTH)), nn.Tanh())


def vector(seed: int) -> Tensor:
    return floats(3, WIDTH, seed=seed)


def sequence(seed: int) -> Tensor:
    return floats(2, 6, WIDTH, seed=seed)


def memory(seed: int) -> Batch:
    return floats(2, 4, WIDTH, seed=seed), floats(2, 6, WIDTH, seed=seed + 100)


def masked(seed: int) -> Batch:
    mask = torch.ones(2, 6, 6, dtype=torch.bool)
    mask[1, :, 4:] = False
    return sequence(seed), mask


def transformer(layer: type[nn.Module]) -> nn.Module:
    return layer(WIDTH, 4, 48, batch_first=True)


SHAPES: dict[str, Entry] = {
    "shared-module": Entry(Shared, vector, {"x": BATCH}, counts=Counts(norms=3, activations=3, linears=4)),
    "tied-head": Entry(
        TiedLm, lambda seed: tokens(2, 5, seed), {"ids": BATCH}, counts=Counts(norms=1, activations=1, linears=2)
    ),
    "convolutions": Entry(
        Convolutions, lambda seed: floats(2, 4, 8, 8, seed=seed), {"x": BATCH}, counts=Counts(activations=4, convs=5)
    ),
    "gated-series": Entry(
        Series,
        lambda seed: floats(2, 8, 20, seed=seed),
        {"x": {0: "batch", 2: "time"}},
        counts=Counts(activations=2, convs=3),
    ),
    "volume": Entry(
        Volume,
        lambda seed: floats(2, 2, 4, 4, 4, seed=seed),
        {"x": BATCH},
        counts=Counts(activations=1, linears=1, convs=1),
    ),
    "lstm": Entry(lambda: Recurrent(nn.LSTM), lambda seed: floats(2, 5, 8, seed=seed), counts=Counts(linears=1)),
    "gru": Entry(lambda: Recurrent(nn.GRU), lambda seed: floats(2, 5, 8, seed=seed), counts=Counts(linears=1)),
    "lstm-cell": Entry(Unrolled, lambda seed: floats(2, 4, 8, seed=seed), counts=Counts(linears=1)),
    "in-place": Entry(InPlace, vector, counts=Counts(activations=2, linears=2)),
    "nested-outputs": Entry(
        Outputs,
        lambda seed: (vector(seed), tokens(3, 2, seed)),
        {"x": BATCH, "unused": BATCH},
        counts=Counts(activations=1, linears=2),
    ),
    "changing-buffers": Entry(Counting, vector, counts=Counts(activations=1, linears=1)),
    "dense": Entry(Dense, vector, {"x": BATCH}, counts=Counts(activations=3, linears=4)),
    "mixer": Entry(Mixer, sequence, {"x": BATCH}, counts=Counts(norms=2, activations=2, linears=4)),
    "ranks": Entry(Ranks, lambda seed: floats(24, 8, seed=seed), counts=Counts(activations=6, linears=6)),
    "one-head": Entry(OneHead, masked, counts=Counts(attention=4, linears=2)),
    "gates": Entry(Gates, vector, {"x": BATCH}, counts=Counts(activations=6, linears=6)),
    "norms": Entry(
        Norms,
        lambda seed: floats(2, 4, 8, 8, seed=seed),
        {"x": BATCH},
        counts=Counts(norms=2, activations=1, linears=1, convs=1),
    ),
    "products": Entry(
        Products,
        lambda seed: (floats(3, 8, seed=seed), floats(3, 8, seed=seed + 100)),
        counts=Counts(activations=1, linears=3),
        gaps=Counts(linears=1),
        why="einsum with a weight is not folded",
    ),
    "parametrized": Entry(parametrized, vector, counts=Counts(activations=2, linears=2)),
    "torch-encoder-layer": Entry(
        lambda: transformer(nn.TransformerEncoderLayer),
        sequence,
        counts=Counts(attention=1, norms=2, activations=1, linears=4),
    ),
    "torch-decoder-layer": Entry(
        lambda: transformer(nn.TransformerDecoderLayer),
        memory,
        counts=Counts(attention=2, norms=3, activations=1, linears=7),
    ),
}
