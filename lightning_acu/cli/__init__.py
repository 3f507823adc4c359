"""The console script ``lightning-acu``: training by LightningCLI, and the commands beside it."""

from typing import Any

from .main import main

__all__ = ["ACULightningCLI", "main"]


def __getattr__(name: str) -> Any:  # training imports Lightning, which `lightning-acu --help` does without
    if name == "ACULightningCLI":
        from .training import ACULightningCLI

        return ACULightningCLI
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
