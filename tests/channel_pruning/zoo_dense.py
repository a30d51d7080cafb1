"""Architectures that answer for every position, at several scales or with several outputs."""

import torch
from torch import nn
from torch.nn import functional as F

from tests.channel_pruning.zoo_plain import conv_bn, images


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.middle = conv_bn(3, 8), conv_bn(8, 16), conv_bn(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, stride=2), nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge2, self.merge1 = conv_bn(32, 16), conv_bn(16, 8)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x):
        fine = self.down1(x)
        coarse = self.down2(F.max_pool2d(fine, 2))
        x = self.middle(F.max_pool2d(coarse, 2))
        x = self.merge2(torch.cat([self.up2(x), coarse], 1))
        x = self.merge1(torch.cat([self.up1(x), fine], 1))
        return self.head(x)


def unet():
    """ConvTranspose2d up, and skips concatenated from far away."""
    return UNet(), images()


class FeaturePyramid(nn.Module):
    def __init__(self, width=24):
        super().__init__()
        self.bottom_up = nn.ModuleList([conv_bn(3, 16), conv_bn(16, 24, stride=2), conv_bn(24, 32, stride=2)])
        self.lateral = nn.ModuleList(nn.Conv2d(fan_in, width, 1) for fan_in in (16, 24, 32))
        self.heads = nn.ModuleList(nn.Conv2d(width, 6, 3, padding=1) for _ in range(3))

    def forward(self, x):
        levels = []
        for stage in self.bottom_up:
            x = stage(x)
            levels.append(x)
        merged = [lateral(level) for lateral, level in zip(self.lateral, levels, strict=True)]
        for number in (1, 0):
            merged[number] = merged[number] + F.interpolate(merged[number + 1], scale_factor=2.0, mode="nearest")
        return [head(level) for head, level in zip(self.heads, merged, strict=True)]


def feature_pyramid():
    """Outputs at three scales, and lateral layers coupled by sums over upsampled maps."""
    return FeaturePyramid(), images()


class Detector(nn.Module):
    def __init__(self, classes=5, anchors=3):
        super().__init__()
        self.classes = classes
        self.backbone = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 32, stride=2))
        self.classification, self.regression = conv_bn(32, 24), conv_bn(32, 24)
        self.head_classes = nn.Conv2d(24, anchors * classes, 3, padding=1)
        self.head_boxes = nn.Conv2d(24, anchors * 4, 3, padding=1)

    def forward(self, x):
        features = self.backbone(x)
        scores = self.head_classes(self.classification(features)).permute(0, 2, 3, 1)
        boxes = self.head_boxes(self.regression(features)).permute(0, 2, 3, 1)
        return scores.reshape(len(x), -1, self.classes), boxes.reshape(len(x), -1, 4)


def detector():
    """Heads for classes and boxes, whose outputs are permuted and reshaped to one row per anchor."""
    return Detector(), images()


class YoloHead(nn.Module):
    def __init__(self, anchors=2, classes=3):
        super().__init__()
        self.anchors = anchors
        self.backbone = nn.Sequential(conv_bn(3, 16, stride=2), conv_bn(16, 32, stride=2))
        self.head = nn.Conv2d(32, anchors * (5 + classes), 1)
        self.register_buffer("grid", torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="xy")))

    def forward(self, x):
        out = self.head(self.backbone(x))
        out = out.view(len(x), self.anchors, -1, 4, 4)
        centers, rest = out[:, :, :2], out[:, :, 2:]
        return torch.cat([centers.sigmoid() + self.grid, rest], dim=2)


def yolo():
    """The output itself is sliced and concatenated, and a buffer is added to a part of it."""
    return YoloHead(), images()


class DictOfOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(conv_bn(3, 16), conv_bn(16, 32, stride=2))
        self.head_class, self.head_mask = nn.Linear(32, 10), nn.Conv2d(32, 2, 1)

    def forward(self, x):
        features = self.trunk(x)
        return {"logits": self.head_class(features.mean((2, 3))), "masks": {"coarse": self.head_mask(features)}}


def dict_of_outputs():
    """A dict in a dict comes out."""
    return DictOfOutputs(), images()


class FeaturesAsOutput(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 48), nn.ReLU())
        self.head_features = nn.Linear(48, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        features = self.head_features(self.body(x))
        return self.head(F.relu(features)), features


def features_as_output():
    """A hidden layer is an output as well, so it must stay whole though another layer reads it."""
    return FeaturesAsOutput(), torch.randn(4, 20)


class ImageAndVector(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Sequential(conv_bn(3, 16), conv_bn(16, 32, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.vector = nn.Sequential(nn.Linear(12, 32), nn.ReLU())
        self.fusion, self.head = nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, image, vector):
        return self.head(F.relu(self.fusion(torch.cat([self.image(image), self.vector(vector)], dim=1))))


def image_and_vector():
    """Two positional inputs, fused by concatenation."""
    return ImageAndVector(), (images(), torch.randn(4, 12))


def image_and_vector_by_keyword():
    """The same inputs by keyword, in another order."""
    return ImageAndVector(), {"vector": torch.randn(4, 12), "image": images()}


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.branch = nn.Sequential(conv_bn(3, 16), conv_bn(16, 32, stride=2))
        self.embed = nn.Linear(32, 24)
        self.head = nn.Linear(24, 1)

    def forward(self, first, second):
        first, second = (self.embed(self.branch(image).mean((2, 3))) for image in (first, second))
        return self.head((first - second).abs())


def siamese():
    """One branch is called for each of two inputs, and the results are compared channel by channel."""
    return Siamese(), (images(), images())


class CosineSiamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(20, 48), nn.ReLU())
        self.head = nn.Linear(48, 16)

    def forward(self, first, second):
        first, second = F.normalize(self.head(self.body(first))), F.normalize(self.head(self.body(second)))
        return first @ second.T


def contrastive():
    """Embeddings compared across the batch as in CLIP: the width of the head does not show in the output."""
    return CosineSiamese(), (torch.randn(4, 20), torch.randn(4, 20))


class FiLM(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = conv_bn(3, 24), nn.Conv2d(24, 24, 3, padding=1)
        self.condition = nn.Linear(12, 48)
        self.head = nn.Conv2d(24, 3, 1)

    def forward(self, image, vector):
        gamma, beta = self.condition(vector)[:, :, None, None].chunk(2, dim=1)
        return self.head(F.silu((1 + gamma) * self.conv2(self.conv1(image)) + beta))


def film():
    """A Linear gives scale and shift of another layer's channels, as halves of its output."""
    return FiLM(), (images(), torch.randn(4, 12))


DENSE = [
    unet, feature_pyramid, detector, yolo, dict_of_outputs, features_as_output, image_and_vector,
    image_and_vector_by_keyword, siamese, contrastive, film,
]  # fmt: skip
