"""Every form of the fold of many random layers, compared with the formula in float64.

    python scripts/check_folds.py --layers 2000

Layers differ in kernel size, stride, padding (also "same" and other modes), dilation, groups, position groups and taps
(on and between pixels, near and far). It stops at the first layer of which a fold differs by more than 1e-10 of the
largest value, and says which; the test suite runs the first 150.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # its helpers

from helpers.folds import assert_forms_agree, random_layer


def main() -> int:
    """Check the layers; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(options.first, options.first + options.layers):
        try:
            assert_forms_agree(seed)
        except AssertionError as error:
            print(f"layer {seed}, {random_layer(seed)[0]}: {error}")
            return 1
    print(f"{options.layers} layers, every form: equal")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
