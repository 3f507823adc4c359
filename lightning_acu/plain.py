"""The attributes of a plain convolution, and checks that an active one can take its place."""

from __future__ import annotations

from torch import nn

__all__ = ["CONFIGURATION", "check_own_parameters", "check_plain", "recomputed_parameter"]

#: The attributes of a convolution besides its parameters: those of nn.Conv2d, and of timm's classes.
CONFIGURATION = (
    frozenset(vars(nn.Conv2d(1, 1, 1, device="meta"))) - frozenset(vars(nn.Module())) - {"weight", "bias"}
) | {"eps", "gain_init", "same_pad", "scale"}


def check_plain(conv: nn.Module, plain_class: type[nn.Conv2d]) -> None:
    """Check that ``conv`` is of exactly the class ``plain_class``.

    Raises:
        TypeError: it is not; a subclass may compute something else.
    """
    if type(conv) is not plain_class:
        raise TypeError(
            f"`conv` (={type(conv).__name__}) must be exactly a {plain_class.__name__}: a subclass may compute "
            "something else; convert_to_acu knows which classes it can convert"
        )


def recomputed_parameter(conv: nn.Module) -> str | None:
    """The first of "weight", "bias" and "gain" that is computed from other parameters instead of being one, or None.

    Weight norm, spectral norm and pruning do that, in hooks or by parametrization.
    """
    return next((n for n in ("weight", "bias", "gain") if n not in conv._parameters and hasattr(conv, n)), None)


def check_own_parameters(conv: nn.Module) -> None:
    """Check that weight and bias are parameters of the layer itself.

    Raises:
        ValueError: one is recomputed from other parameters.
    """
    if (name := recomputed_parameter(conv)) is not None:
        raise ValueError(
            f"the {name} of this {type(conv).__name__} is recomputed from other parameters "
            "(weight norm, spectral norm or pruning); remove that first"
        )
