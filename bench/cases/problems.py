"""Networks for the benchmarks: each function returns (model, criterion, batch), seeded."""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

from fasthessian.study.resnet import resnet


def residual(depth, samples, batch_norm=True):
    """A ResNet on noise, with BatchNorm statistics of the batch, so that logits are of order 1."""
    torch.manual_seed(0)
    model = resnet(depth, batch_norm=batch_norm)
    batch = torch.randn(samples, 3, 32, 32), torch.randint(10, (samples,))
    update_bn([batch], model)
    return model.eval(), nn.CrossEntropyLoss(), batch


def mlp():
    torch.manual_seed(0)
    hidden = nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU()
    batch = torch.randn(256, 784), torch.randint(10, (256,))
    return nn.Sequential(*hidden, nn.Linear(512, 10)).eval(), nn.CrossEntropyLoss(), batch


def gpt():
    torch.manual_seed(0)
    tokens = torch.randint(512, (4, 257))
    return GPT(512, 128, 4, 4, 256).eval(), TokenLoss(), (tokens[:, :-1], tokens[:, 1:])


def doubled(x):
    """A copy of a model or of inputs in float64; integer tensors are returned unchanged."""
    if isinstance(x, torch.Tensor) and not x.is_floating_point():
        return x
    return copy.deepcopy(x).double()


class GPT(nn.Module):
    """Tokens (N, T) to logits (N, T, vocabulary); embedding and output layer share weights."""

    def __init__(self, vocabulary, width, layers, heads, length):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(length, width) / 50)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, tokens):
        """The logits of the next token at every position."""
        x = self.embed(tokens) + self.place[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class Layer(nn.Module):
    """Causal attention and a perceptron, each with LayerNorm and a residual connection."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """Features (N, T, width) to the same."""
        split = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TokenLoss(nn.CrossEntropyLoss):
    """Cross-entropy over all tokens, logits (N, T, C) and targets (N, T)."""

    def forward(self, logits, targets):
        """The mean over N T tokens."""
        return super().forward(logits.flatten(0, 1), targets.flatten())
