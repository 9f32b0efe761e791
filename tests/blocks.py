"""Building blocks in the spellings of real models, for the passes that read them back. All are tiny."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

WIDTH, HEADS, VOCABULARY = 32, 2, 50


class Cnn(nn.Module):
    """Padded, strided, depthwise and transposed convolutions with batch norm: [batch, 3, 6, 6] -> [batch, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8)
        self.depth, self.depth_norm = nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)
        self.up, self.up_norm = nn.ConvTranspose2d(8, 8, 2, groups=2), nn.BatchNorm2d(8)
        self.act, self.act6 = nn.ReLU(inplace=True), nn.ReLU6(inplace=True)
        self.head, self.head_norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        for norm in (m for m in self.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))):
            for tensor in (norm.running_mean, norm.running_var, norm.weight, norm.bias):
                assert tensor is not None
                nn.init.uniform_(tensor, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act6(self.stem_norm(self.stem(functional.pad(x, (1, 1, 1, 1)))))
        x = x + self.depth_norm(self.depth(functional.pad(x, (1, 1, 1, 1))))
        x = self.act(self.up_norm(self.up(x)))
        y: Tensor = self.head_norm(self.head(x.mean((2, 3))))
        return y


class Images(nn.Module):
    """Every int8 kernel of a convolutional net: [batch, 3, 9, 9] -> [batch, 5].

    A plain, a strided and unevenly padded depthwise, a grouped and a dilated convolution; a residual add with ReLU, a
    max pool, a leaky ReLU, a gate, two branches of which the grids differ, an average and a global pool, a linear that
    writes integers.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.same, self.depth = nn.Conv2d(8, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, stride=2, groups=8)
        self.grouped, self.wide = nn.Conv2d(8, 12, 1, groups=4), nn.Conv2d(12, 6, 3, padding=2, dilation=2)
        self.gate, self.leaky = nn.Conv2d(12, 6, 1), nn.LeakyReLU(0.1)
        self.hidden, self.head = nn.Linear(12, 7), nn.Linear(7, 5)
        nn.init.uniform_(self.norm.running_var, 0.5, 1.5)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.norm(self.stem(x)))
        x = functional.relu(x + self.same(x))
        x = functional.relu6(self.depth(functional.pad(x, (0, 1, 1, 2))))
        x = self.grouped(functional.max_pool2d(x, 3, 1, 1))
        y, gate = self.leaky(self.wide(x)), self.gate(x)
        y = functional.avg_pool2d(torch.cat([y * torch.sigmoid(gate), gate], 1), 2)
        z: Tensor = self.head(functional.relu(self.hidden(y.mean((2, 3)))))
        return z


class Pixels(nn.Module):
    """An image of bytes, normalized by channel and cut into patches: uint8 [batch, 3, 8, 8] -> [batch, 5]."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Linear(8, 5)
        for name, numbers in (("mean", [0.485, 0.456, 0.406]), ("std", [0.229, 0.224, 0.225])):
            self.register_buffer(name, torch.tensor(numbers)[:, None, None])

    def forward(self, image: Tensor) -> Tensor:
        x = (image.float() / 255 - self.mean) / self.std
        y: Tensor = self.head(functional.relu(self.patches(x)).mean((2, 3)))
        return y


class WrittenLayerNorm(nn.Module):
    """LayerNorm in arithmetic, as older models write it."""

    def __init__(self, width: int = WIDTH, eps: float = 1e-12) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.rand(width)), nn.Parameter(torch.rand(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).square().mean(x.ndim - 1, keepdim=True)
        return self.weight * ((x - mean) / (variance + self.eps) ** 0.5) + self.bias


class WrittenAttention(nn.Module):
    """Multi-head attention in products, with scale, additive mask and dropout; its softmax is written out too."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            part.view(batch, length, HEADS, -1).transpose(1, 2) for part in self.qkv(x).split(WIDTH, dim=2)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH / HEADS) + mask
        powers = torch.exp(scores - scores.amax(3, keepdim=True))
        mixed = self.dropout(powers / powers.sum(3, keepdim=True)) @ value
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return y


class Written(nn.Module):
    """A layer in which nothing is called by its name: [batch, length, 32] -> [batch, length, 32].

    Positions whose first element is large are hidden.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.up = WrittenLayerNorm(), WrittenAttention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        hidden = (x[:, None, None, :, 0] > 1.0).float()
        x = x * 0.5 + self.attention(self.norm(x), hidden * -10_000.0)
        y: Tensor = self.up(x)
        return 0.5 * y * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (y + 0.044715 * torch.pow(y, 3.0))))


class RmsNorm(nn.Module):
    """RMSNorm in arithmetic, as Llama writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class ShiftedRmsNorm(RmsNorm):
    """As Gemma writes it: the weight counts from 1."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)


class RotaryAttention(nn.Module):
    """Causal attention with rotary positions: [batch, length, 32] -> [batch, length, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            p(x).view(batch, length, HEADS, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = (t * cosine + self.turned(t) * sine for t in (query, key))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        y: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return y

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((-second, first), dim=-1)


class Llama(nn.Module):
    """A decoder layer as in Llama: [batch, length] -> [batch, length, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.attention = nn.Embedding(VOCABULARY, WIDTH), RotaryAttention()
        self.norm, self.mlp_norm = RmsNorm(), ShiftedRmsNorm()
        self.gate, self.up = (nn.Linear(WIDTH, 2 * WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x: Tensor = self.token(input_ids)
        angles = torch.arange(input_ids.shape[1])[:, None] / 100.0 ** (torch.arange(0, 16, 2) / 16)
        angles = torch.cat((angles, angles), dim=-1)
        x = x + self.attention(self.norm(x), angles.cos(), angles.sin())
        y = self.mlp_norm(x)
        gate = self.gate(y)
        z: Tensor = x + self.down(gate * torch.sigmoid(gate) * self.up(y))
        return z


class Clip(nn.Module):
    """An MLP with the GELU of CLIP, and a projection that is a bare matrix: [batch, 32] -> [batch, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(WIDTH, WIDTH)
        self.projection, self.shift = nn.Parameter(torch.randn(WIDTH, 16) * 0.2), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x)
        return y * torch.sigmoid(1.702 * y) @ self.projection + self.shift


def two_of_four(weight: Tensor) -> Tensor:
    """The 2:4 mask of a weight: of four neighbours along the last axis, the two larger stay."""
    kept = weight.detach().abs().reshape(-1, 4).topk(2).indices
    return torch.zeros(weight.numel() // 4, 4).scatter_(1, kept, 1.0).reshape(weight.shape)


class Masked(nn.Module):
    """A parametrization that keeps a weight behind its 2:4 mask."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", two_of_four(weight))
        self.mask: Tensor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Pruned(nn.Module):
    """A table and an MLP, 2:4 pruned: by zeros that were written, and ``down`` by a parametrization.

    [batch, length] -> [batch, 32].
    """

    def __init__(self) -> None:
        super().__init__()
        self.token, self.act = nn.Embedding(VOCABULARY, WIDTH), nn.ReLU()
        self.up, self.down, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            for module in (self.token, self.up):
                module.weight.mul_(two_of_four(module.weight))
        parametrize.register_parametrization(self.down, "weight", Masked(self.down.weight))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.token(input_ids)
        y: Tensor = self.head(self.down(self.act(self.up(x))).mean(1))
        return y
