"""The former place of :mod:`lightning_acu.saving.checkpoint`, kept so that code written for it goes on working."""

from .saving.checkpoint import load_any, load_converted

__all__ = ["load_any", "load_converted"]
