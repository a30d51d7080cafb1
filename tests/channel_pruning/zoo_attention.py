"""Attention in the ways it is written, and what stands beside it in a transformer."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.channel_pruning.zoo_plain import images


def tokens(vocabulary=50, length=12):
    return torch.randint(0, vocabulary, (4, length))


def mlp_of(width, inner):
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))


class SeparateAttention(nn.Module):
    """Query, key and value are three layers; heads and their width are attributes."""

    def __init__(self, width, heads, head_dim=None):
        super().__init__()
        self.num_heads, self.head_dim = heads, head_dim or width // heads
        inner = heads * self.head_dim
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def split(self, x):
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)

    def forward(self, x):
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        scores = query @ key.transpose(-2, -1) / self.head_dim**0.5
        mixed = (scores.softmax(-1) @ value).transpose(1, 2)
        return self.out(mixed.reshape(*x.shape[:2], self.num_heads * self.head_dim))


class FusedAttention(nn.Module):
    """As in timm: one layer for all three."""

    def __init__(self, width, heads, causal=False):
        super().__init__()
        self.num_heads, self.head_dim, self.causal = heads, width // heads, causal
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        x = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.proj(x.transpose(1, 2).reshape(batch, length, self.num_heads * self.head_dim))


class Block(nn.Module):
    """Attention and feed-forward, each behind its norm and added to the stream."""

    def __init__(self, width, attention, feed_forward):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), attention
        self.norm2, self.feed_forward = nn.LayerNorm(width), feed_forward

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class SequenceClassifier(nn.Module):
    """Linear on features, blocks, norm, the mean over positions, head."""

    def __init__(self, features, width, blocks):
        super().__init__()
        self.embed, self.blocks = nn.Linear(features, width), nn.Sequential(*blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.embed(x))).mean(1))


def transformer_separate():
    """A hand-written encoder with separate query, key and value: 4 heads of 8."""
    blocks = [Block(32, SeparateAttention(32, 4), mlp_of(32, 64)) for _ in range(2)]
    return SequenceClassifier(12, 32, blocks), torch.randn(4, 10, 12)


def transformer_square():
    """As many heads as each is wide, so that the attributes do not tell which is which: 6 heads of 6 in 24."""
    blocks = [Block(24, SeparateAttention(24, 6, 6), mlp_of(24, 48))]
    return SequenceClassifier(12, 24, blocks), torch.randn(4, 10, 12)


class VisionTransformer(nn.Module):
    def __init__(self, width=32, depth=2):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.class_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, FusedAttention(width, 4), mlp_of(width, 64)) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def vision_transformer():
    """Fused qkv; class token and positions are bare parameters that are concatenated and added to the stream."""
    return VisionTransformer(), images()


class TorchTransformer(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Linear(12, width)
        layer = nn.TransformerEncoderLayer(width, 4, 64, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.encoder(self.embed(x)).mean(1))


def torch_transformer():
    """nn.TransformerEncoderLayer: its attention keeps all weights itself, and its eval mode takes another path."""
    return TorchTransformer(), torch.randn(4, 10, 12)


class CrossAttention(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Linear(12, width)
        self.queries = nn.Parameter(torch.randn(5, width))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm, self.hidden = nn.LayerNorm(width), nn.Linear(width, 48)
        self.head = nn.Linear(48, 6)

    def forward(self, x):
        memory = self.embed(x)
        queries = self.queries.expand(len(x), -1, -1)
        attended, _ = self.attention(queries, memory, memory)
        return self.head(F.relu(self.hidden(self.norm(queries + attended))))


def cross_attention():
    """nn.MultiheadAttention with learned queries as in DETR: query and key come from different places."""
    return CrossAttention(), torch.randn(4, 10, 12)


class GPT(nn.Module):
    def __init__(self, tied, vocabulary=50, width=32):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(12, width)
        blocks = [Block(width, FusedAttention(width, 4, causal=True), mlp_of(width, 64)) for _ in range(2)]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.token.weight

    def forward(self, x):
        x = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        return self.head(self.norm(self.blocks(x)))


def gpt():
    """Causal, with embeddings of tokens and positions."""
    return GPT(tied=False), tokens()


def gpt_tied():
    """The head's weight is the embedding's: its rows are outputs, its columns the stream."""
    return GPT(tied=True), tokens()


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class SwiGLU(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GroupedQueryAttention(nn.Module):
    """Four heads of queries share two of keys and values, with rotary positions."""

    def __init__(self, width, heads=4, shared_heads=2):
        super().__init__()
        self.heads, self.shared_heads, self.head_dim = heads, shared_heads, width // heads
        self.query = nn.Linear(width, width, bias=False)
        self.key, self.value = (nn.Linear(width, shared_heads * self.head_dim, bias=False) for _ in range(2))
        self.out = nn.Linear(width, width, bias=False)

    def rotate(self, x):
        half = x.shape[-1] // 2
        frequencies = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
        )

    def forward(self, x):
        batch, length, _ = x.shape
        query = self.rotate(self.query(x).view(batch, length, self.heads, self.head_dim).transpose(1, 2))
        key = self.rotate(self.key(x).view(batch, length, self.shared_heads, self.head_dim).transpose(1, 2))
        value = self.value(x).view(batch, length, self.shared_heads, self.head_dim).transpose(1, 2)
        key, value = (each.repeat_interleave(self.heads // self.shared_heads, dim=1) for each in (key, value))
        x = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(x.transpose(1, 2).reshape(batch, length, -1))


class Llama(nn.Module):
    def __init__(self, vocabulary=50, width=32):
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.norm1, self.attention = RMSNorm(width), GroupedQueryAttention(width)
        self.norm2, self.feed_forward = RMSNorm(width), SwiGLU(width, 64)
        self.norm3, self.head = RMSNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, x):
        x = self.token(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.feed_forward(self.norm2(x))
        return self.head(self.norm3(x))


def llama():
    """RMSNorm by hand, SwiGLU, rotary positions, and keys shared by groups of heads."""
    return Llama(), tokens()


class NonLocal(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.theta, self.phi, self.value = nn.Conv2d(width, 16, 1), nn.Conv2d(width, 16, 1), nn.Conv2d(width, width, 1)
        self.gamma = nn.Parameter(torch.full((1,), 0.5))
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        theta, phi, value = self.theta(x).flatten(2), self.phi(x).flatten(2), self.value(x).flatten(2)
        weights = torch.einsum("bci,bcj->bij", theta, phi).softmax(-1)
        mixed = torch.einsum("bij,bcj->bci", weights, value).view_as(x)
        return self.head((x + self.gamma * mixed).mean((2, 3)))


def nonlocal_attention():
    """Attention between pixels by einsum, one head; a sum over channels couples two layers that are never added."""
    return NonLocal(), images(3, 12)


ATTENTION = [
    transformer_separate, transformer_square, vision_transformer, torch_transformer, cross_attention, gpt, gpt_tied,
    llama, nonlocal_attention,
]  # fmt: skip
