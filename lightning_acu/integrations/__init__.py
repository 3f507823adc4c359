"""Training of positions in other people's training programs.

* ``python -m lightning_acu.integrations.run [OPTIONS] train.py ARGUMENTS``: any script that makes its models by timm or
  torchvision, as it is (:mod:`.run`, :mod:`.watch`);
* :class:`.huggingface.PositionCallback`: Hugging Face's Trainer.

Loops of one's own need none of this: :class:`lightning_acu.training.PositionTrainer` works in any of them.
"""

__all__ = ()  # its modules are imported by their names
