"""The Cython backend for CPUs: :mod:`.backend` allocates and chooses the route, the compiled modules have the loops."""

from . import backend

__all__ = ["backend"]
