"""The paper's experiments on top of lightning_acu: not part of the package, run from a checkout (docs/paper.md)."""
