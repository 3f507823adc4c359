"""What the examples share: 1,797 handwritten digits from scikit-learn (installed with mlxtend), and a small network."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


def digits(size: int = 8) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train with and (images, labels) to test with: 1,536 and 261 images (N, 1, size, size)."""
    data = load_digits()
    images, labels = torch.from_numpy(data.images).float().unsqueeze(1) / 16, torch.from_numpy(data.target).long()
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    return (images[:1536], labels[:1536]), (images[1536:], labels[1536:])


def network() -> nn.Module:
    """Three 3x3 convolutions and a linear layer: class scores (N, 10)."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 16, 1), (16, 32, 2), (32, 32, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest score is that of their label."""
    model.eval()
    right = (model(images).argmax(1) == labels).float().mean().item()
    model.train()
    return right
