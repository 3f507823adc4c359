"""Models by name: those of timm and torchvision, and the networks of the paper's CIFAR experiments."""

from .caffe import import_caffe
from .create import create_model

__all__ = ["create_model", "import_caffe"]
