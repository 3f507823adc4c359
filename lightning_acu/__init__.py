"""Active Convolution Units for PyTorch: learnable convolution shapes for any timm or torchvision model.

Names are imported on first use (PEP 562), so that the operator, the layers and surgery need torch and NumPy only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .active_shift import ActiveShift2d
    from .classifier import ImageClassifier
    from .conv import ACUConv2d, acu_layers
    from .export import export_model
    from .figures import plot_shapes
    from .folded import FoldedConv2d
    from .functional import acu_conv2d
    from .models import create_model
    from .saving import (
        acu_state_dict,
        from_pretrained,
        load_acu,
        load_acu_state_dict,
        push_to_hub,
        save_acu,
        save_pretrained,
    )
    from .statistics import model_statistics
    from .surgery import (
        ConvertConfig,
        apply_dilations,
        convert_to_acu,
        fold_acu,
        report_acu,
        round_acu,
    )
    from .tuning import warm_up

__version__ = "0.2.0"

__all__ = [
    "ACUConv2d",
    "ActiveShift2d",
    "ConvertConfig",
    "FoldedConv2d",
    "ImageClassifier",
    "__version__",
    "acu_conv2d",
    "acu_layers",
    "acu_state_dict",
    "apply_dilations",
    "callbacks",
    "checkpoint",
    "convert_to_acu",
    "create_model",
    "data",
    "export",
    "export_model",
    "figures",
    "fold_acu",
    "from_pretrained",
    "functional",
    "integrations",
    "load_acu",
    "load_acu_state_dict",
    "metrics",
    "model_statistics",
    "plot_shapes",
    "push_to_hub",
    "report_acu",
    "round_acu",
    "save_acu",
    "save_pretrained",
    "surgery",
    "timm_convs",
    "training",
    "warm_up",
]

_HOME = {
    "ACUConv2d": "conv",
    "acu_layers": "conv",
    "ActiveShift2d": "active_shift",
    "FoldedConv2d": "folded",
    "acu_conv2d": "functional",
    "plot_shapes": "figures",
    "model_statistics": "statistics",
    "ConvertConfig": "surgery",
    "acu_state_dict": "saving",
    "apply_dilations": "surgery",
    "convert_to_acu": "surgery",
    "export_model": "export",
    "fold_acu": "surgery",
    "from_pretrained": "saving",
    "load_acu": "saving",
    "load_acu_state_dict": "saving",
    "push_to_hub": "saving",
    "report_acu": "surgery",
    "round_acu": "surgery",
    "save_acu": "saving",
    "save_pretrained": "saving",
    "ImageClassifier": "classifier",
    "create_model": "models",
    "warm_up": "tuning",
}


#: Modules that `lightning_acu.NAME` finds too.
_ROOMS = {
    "callbacks", "checkpoint", "data", "export", "figures", "functional", "integrations", "metrics", "surgery",
    "timm_convs", "training",
}  # fmt: skip


#: Packages that only some of those need, by the names that Python and pip both know them by.
_OPTIONAL = {"lightning", "matplotlib", "timm", "torchmetrics", "torchvision"}


def __getattr__(name: str) -> Any:
    if name not in _HOME and name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(f".{_HOME.get(name, name)}", __name__)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _OPTIONAL:
            raise
        raise ModuleNotFoundError(
            f"lightning_acu.{name} needs {package}, which is not installed: pip install {package}", name=package
        ) from error
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    return sorted(__all__)
