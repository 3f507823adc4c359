"""The Triton backend for GPUs: :mod:`.backend` chooses the route, every other file is a route or what they share."""

from . import backend

__all__ = ["backend"]
