"""Data modules for image classification."""

from .arrays import ArrayDataModule
from .base import ImageDataModule
from .cifar import CIFARDataModule
from .digits import DigitsDataModule
from .folder import ImageFolderDataModule

__all__ = ["ArrayDataModule", "CIFARDataModule", "DigitsDataModule", "ImageDataModule", "ImageFolderDataModule"]
