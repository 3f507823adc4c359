"""The Cython backend for CPUs: :mod:`.backend` allocates and chooses the route, the compiled modules have the loops."""

__all__: list[str] = []
