"""Converted models in files: a whole model (:mod:`.files`, :mod:`.hub`) or its positions alone (:mod:`.positions`).

The third way, out of a Lightning checkpoint (:mod:`.checkpoint`), needs Lightning and is imported by its own name.
"""

from .files import load_acu, save_acu
from .hub import from_pretrained, push_to_hub, save_pretrained
from .positions import acu_state_dict, load_acu_state_dict

__all__ = [
    "acu_state_dict",
    "from_pretrained",
    "load_acu",
    "load_acu_state_dict",
    "push_to_hub",
    "save_acu",
    "save_pretrained",
]
