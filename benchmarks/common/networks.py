"""Popular networks with random weights, from the packages that people take them from."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
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


class Gated(nn.Module):
    """A small network with squeeze-and-excitation and SiLU, to see that all works."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 16, 3, 2, bias=False), nn.BatchNorm2d(16), nn.SiLU()
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 4, 1), nn.ReLU(), nn.Conv2d(4, 16, 1))
        self.sigmoid, self.last, self.head = nn.Sigmoid(), nn.Conv2d(16, 32, 3), nn.Linear(32, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        images = self.act(self.norm(self.stem(images)))
        return self.head(self.last(images * self.sigmoid(self.gate(images))).mean((2, 3)))


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
    "gated": lambda _size: Gated(),
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
