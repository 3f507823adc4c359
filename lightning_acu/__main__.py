"""``python -m lightning_acu`` is ``lightning-acu``."""

from .cli import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
