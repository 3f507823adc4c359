"""Needed to unpickle whole models that version 0.1 saved (``torch.save(model)``); use :mod:`.models.cifar`."""

from .models.cifar import BasicBlock, CIFARResNet, ConvNormAct, PlainNet

__all__ = ["BasicBlock", "CIFARResNet", "ConvNormAct", "PlainNet"]
