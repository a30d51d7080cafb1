"""Popular networks with random weights, from the packages that people take them from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from common.models import Network, ResNet8

WORDS, TOKENS, CLASSES = 8000, 128, 100


def _timm(name: str, **arguments: Any) -> Callable[[int], nn.Module]:
    def make(size: int) -> nn.Module:
        import timm

        sized = {"img_size": size} if "vit" in name or "swin" in name else {}
        return timm.create_model(name, num_classes=CLASSES, **sized, **arguments)

    return make


class Bert(nn.Module):
    """A classifier of 2 layers of 128 features, which takes numbers of words alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
        config = BertConfig(vocab_size=WORDS, num_labels=CLASSES, attn_implementation="eager", **sizes)
        self.model = BertForSequenceClassification(config)

    def forward(self, words: Tensor) -> Tensor:
        return self.model(input_ids=words).logits


class Inverted(nn.Module):
    """A block of MobileNetV3: wide, depthwise, gated by squeeze-and-excitation, narrow."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        wide = 4 * inputs
        self.widen = nn.Sequential(nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU())
        depthwise = nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(wide), nn.SiLU())
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(wide, inputs, 1), nn.ReLU(), nn.Conv2d(inputs, wide, 1), nn.Sigmoid()
        )
        self.narrow = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, images: Tensor) -> Tensor:
        changed = self.depthwise(self.widen(images))
        changed = self.narrow(changed * self.gate(changed))
        return images + changed if self.residual else changed


class DepthwiseNet(nn.Module):
    """A small MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.SiLU())
        self.blocks = nn.Sequential(Inverted(16, 16, 1), Inverted(16, 32, 2), Inverted(32, 32, 1), Inverted(32, 64, 2))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(images))).flatten(1))


class Layer(nn.Module):
    """A pre-norm layer of a transformer."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.act, self.down = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        parts = self.inputs(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*parts.unbind()).transpose(1, 2).flatten(2)
        tokens = tokens + self.outputs(attended)
        return tokens + self.down(self.act(self.up(self.norm2(tokens))))


class Attention(nn.Module):
    """A small vision transformer: 64 patches of 4 x 4 pixels."""

    def __init__(self, width: int = 96, depth: int = 3) -> None:
        super().__init__()
        self.patches, self.places = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.02 * torch.randn(64, width))
        self.layers = nn.Sequential(*(Layer(width, 3) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.layers(tokens)).mean(1))


NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": _timm("resnet18", zero_init_last=False),
    "resnet50": _timm("resnet50", zero_init_last=False),
    "mobilenetv2": _timm("mobilenetv2_100"),
    "mobilenetv3_large": _timm("mobilenetv3_large_100"),
    "mobilenetv4_conv_small": _timm("mobilenetv4_conv_small"),
    "efficientnet_b0": _timm("efficientnet_b0"),
    "regnety_002": _timm("regnety_002", zero_init_last=False),
    "densenet121": _timm("densenet121"),
    "convnext_atto": _timm("convnext_atto"),
    "vit_tiny": _timm("vit_tiny_patch16_224"),
    "swin_tiny": _timm("swin_tiny_patch4_window7_224"),
    "bert_tiny": lambda _size: Bert(),
}
QUICK: dict[str, Callable[[int], nn.Module]] = {
    "resnet8": lambda _size: Network(ResNet8()),
    "depthwise": lambda _size: DepthwiseNet(),
}


@torch.no_grad()
def network(name: str, size: int, count: int) -> tuple[nn.Module, Tensor]:
    """A network in eval mode, with statistics of random inputs, and `count` such inputs; the same in each process.

    Raises:
        ModuleNotFoundError: if the package of the network is missing.
    """
    torch.manual_seed(0)
    model = {**NETWORKS, **QUICK}[name](size)
    inputs = torch.randint(0, WORDS, (count, TOKENS)) if name == "bert_tiny" else torch.randn(count, 3, size, size)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
    if norms:
        model.train()(inputs[:16])
    return model.eval(), inputs
