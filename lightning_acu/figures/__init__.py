"""Pictures of learned shapes: figures and films."""

from .animation import animate_shapes
from .plot import plot_shapes
from .shapes import LayerShape, shapes_of

__all__ = ["LayerShape", "animate_shapes", "plot_shapes", "shapes_of"]
