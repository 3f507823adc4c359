"""Data modules for image classification."""

from .arrays import ArrayDataModule
from .base import ImageDataModule
from .cifar import CIFARDataModule
from .device_loader import DeviceLoader
from .digits import DigitsDataModule
from .folder import ImageFolderDataModule
from .in_memory import InMemoryDataModule
from .places import Places365DataModule
from .whitening import ZCAWhitening, global_contrast_normalize

__all__ = [
    "ArrayDataModule",
    "CIFARDataModule",
    "DeviceLoader",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "InMemoryDataModule",
    "Places365DataModule",
    "ZCAWhitening",
    "global_contrast_normalize",
]
