"""Every form of a fold, compared with the unfolded layers in float64: of random layers, and of whole models.

    python scripts/check_folds.py --layers 2000
    python scripts/check_folds.py --models sample --out docs/folds.csv    those of tests/test_census.py
    python scripts/check_folds.py --models resnet18 torchvision/googlenet

Layers differ in kernel size, stride, padding (also "same" and other modes), dilation, groups, position groups and taps
(on and between pixels, near and far). It stops at the first layer of which a fold differs from the formula by more than
1e-10 of the largest value, and says which; the test suite runs the first 150.

Models are those of the census (scripts/census.py): random weights, an even and an odd image size where both are taken,
every 3x3 and 5x5 convolution converted, half of the taps on whole pixels and half between. A fold may differ by 1e-10
of the largest value or, in networks that amplify rounding, by 10 times what the last bit of the pixels changes.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # its helpers

from helpers.folds import assert_forms_agree, compare_forms, random_layer


def check_layers(first: int, number: int) -> bool:
    """Whether every form of these random layers is equal."""
    for seed in range(first, first + number):
        try:
            assert_forms_agree(seed)
        except AssertionError as error:
            print(f"layer {seed}, {random_layer(seed)[0]}: {error}")
            return False
    print(f"{number} layers, every form: equal")
    return True


def check_models(names: list[str], path: Path | None) -> bool:
    """Whether every form of these models is equal; ``path`` gets a row for each as they come."""
    rows = []
    for name in names:
        rows.append(compare_forms(name))
        print(*rows[-1].values(), flush=True)
        if path is not None:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
    equal = sum(row["status"] == "equal" for row in rows)
    print(f"{equal} of {len(rows)} models, every form: equal")
    return equal == len(rows)


def main() -> int:
    """Check the layers or the models; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first one")
    parser.add_argument(
        "--models", nargs="+", metavar="NAME", help="models instead of layers; 'sample': the tests' own"
    )
    parser.add_argument("--out", type=Path, help="the table of the models, as CSV")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.models is None:
        return int(not check_layers(options.first, options.layers))
    if options.models == ["sample"]:
        from test_census import SAMPLE

        options.models = SAMPLE
    return int(not check_models(options.models, options.out))


if __name__ == "__main__":
    raise SystemExit(main())
