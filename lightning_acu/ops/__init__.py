"""The operator and its backends; README.md says what lies where.

A backend is a module with the four functions of :class:`lightning_acu.ops.backends.Backend`: ``why_not(input)`` says
why it cannot serve this input (None: it can), ``prefers`` whether it is the fastest here, ``forward`` and ``backward``
compute. To add one, write the module (beside ``dense.py``, or in a folder as ``cpu/``) and name it in ``BACKENDS``.
"""

from .backends import BACKENDS, available_backends, check_backend, require_memory, without_autocast
from .op import acu_conv2d_op

__all__ = ["BACKENDS", "acu_conv2d_op", "available_backends", "check_backend", "require_memory", "without_autocast"]
