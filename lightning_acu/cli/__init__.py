"""The console script ``lightning-acu``: training by LightningCLI, and the commands beside it."""

from .main import ACULightningCLI, main

__all__ = ["ACULightningCLI", "main"]
