"""Notice when objects of given classes are made."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["constructed"]


@contextmanager
def constructed(base: type, then: Callable[[Any], None]) -> Iterator[None]:
    """Inside this context call ``then`` with every new object of ``base`` or of a subclass, once it is complete.

    Subclasses that are defined meanwhile count, too. Copied and unpickled objects do not: they run no ``__init__``.
    """
    undo: list[Callable[[], None]] = []

    def watch(cls: Any) -> None:
        init = cls.__init__

        @functools.wraps(init)
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
            init(self, *args, **kwargs)
            if type(self) is cls:  # otherwise the __init__ of its own class is still running
                then(self)

        undo.append(
            functools.partial(setattr, cls, "__init__", init)
            if "__init__" in vars(cls)
            else functools.partial(delattr, cls, "__init__")
        )
        cls.__init__ = __init__

    def watch_new(cls: type, /, **kwargs: Any) -> None:
        inherited(**kwargs)
        watch(cls)

    inherited = base.__init_subclass__
    for cls in _with_subclasses(base):
        watch(cls)
    base.__init_subclass__ = classmethod(watch_new)  # type: ignore[assignment]
    try:
        yield
    finally:
        for restore in reversed(undo):
            restore()
        del base.__init_subclass__


def _with_subclasses(cls: type) -> list[type]:
    direct: list[type] = cls.__subclasses__()
    below = [found for child in direct for found in _with_subclasses(child)]
    return list(dict.fromkeys([cls, *below]))  # a class with two bases is found twice
