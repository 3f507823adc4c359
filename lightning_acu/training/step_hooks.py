"""Torch's hooks around the steps of an optimizer, with or without a closure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.optim import LBFGS, Optimizer

__all__ = ["StepHooks", "check_optimizer"]


class StepHooks:
    """Calls three functions in each step of ``optimizer``.

    A closure computes the gradients inside the step, after torch's hook before it. It is replaced for that step by one
    that calls ``transform`` afterwards.

    Args:
        optimizer: checked by :func:`check_optimizer`.
        begin: called first.
        transform: called when the gradients are complete: accumulated, clipped, and unscaled unless the optimizer does
            that itself.
        end: called when the step was taken, or skipped by an optimizer that does this itself in mixed precision; with
            the optimizer's ``found_inf``, None elsewhere.
        watched: the parameters that must not move before the gradients are complete.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        begin: Callable[[], None],
        transform: Callable[[], None],
        end: Callable[[Tensor | None], None],
        watched: Callable[[], Iterator[Tensor]],
    ) -> None:
        self._begin, self._transform, self._end, self._watched = begin, transform, end, watched
        self._ready = False  # the gradients of the step that is being taken have been transformed
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Call nothing any more."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self._ready = False
        self._begin()
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        if closure is None:
            self._complete()
            return None
        versions = self._versions()

        def closure_and_transform() -> Any:
            if self._ready or versions != self._versions():
                raise RuntimeError(
                    f"{type(optimizer).__name__}.step moves parameters before it calls its closure (as SAM does), or "
                    "calls it twice, so that positions cannot be kept still, nor their gradients normalised; give "
                    "PositionTrainer the optimizer inside it (SAM: base_optimizer)"
                )
            loss = closure()
            self._complete()
            return loss

        if len(args) > 1:
            return (args[0], closure_and_transform, *args[2:]), kwargs
        return args, kwargs | {"closure": closure_and_transform}

    def _complete(self) -> None:
        self._transform()
        self._ready = True

    def _versions(self) -> list[int]:
        return [parameter._version for parameter in self._watched()]  # torch counts changes in place

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._ready:
            raise RuntimeError(f"{type(optimizer).__name__}.step did not call its closure; call step() without one")
        self._end(getattr(optimizer, "found_inf", None))


def check_optimizer(optimizer: Any) -> None:
    """Check that ``optimizer`` runs torch's hooks, and that nobody trains its positions yet.

    Raises:
        TypeError: it is not an optimizer, or is LBFGS.
        RuntimeError: it does not run torch's hooks, or has a PositionTrainer.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"`optimizer` (={optimizer!r}) must be a torch.optim.Optimizer")
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise TypeError(f"`optimizer` (={name}) takes one parameter group only; choose another")
    # Set by torch on the step methods that run hooks; wrappers (timm's Lookahead) have one that does not.
    if not getattr(type(optimizer).step, "hooked", False):
        inner = " (optimizer.optimizer)" if isinstance(getattr(optimizer, "optimizer", None), Optimizer) else ""
        raise RuntimeError(
            f"`optimizer` (={name}) does not run torch's hooks in its steps; give the optimizer that it wraps{inner}"
        )
    hooks = optimizer._optimizer_step_pre_hooks.values()
    if any(isinstance(getattr(hook, "__self__", None), StepHooks) for hook in hooks):
        raise RuntimeError(f"`optimizer` (={name}) has a PositionTrainer already; call remove() of that one first")
