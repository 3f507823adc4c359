"""Random calls of the operator: each must give the exact numbers or a clear error, and never a crash, hang or bad read.

python scripts/stress_op.py --cases 10000 --seed 0     10 minutes on 1 core
python scripts/stress_op.py --one 4711                 one case, with its traceback

Cases are numbered from --seed; `tests/helpers/stress_cases.py` makes them. They run in child processes, a thousand in
each, so that a crash or a hang is a failure of the case that was running, and the next child goes on behind it.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import select
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # its helpers

#: Cases of one child, seconds that one case may take, and bytes of address space of a child.
BATCH, TIMEOUT, MEMORY = 1000, 120, 12 << 30


def child(first: int, last: int) -> None:
    """Cases one after the other: a line when each begins and one when it ends."""
    import resource

    import torch
    from helpers.stress_cases import stress

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for seed in range(first, last):
        print(f"begins {seed}", flush=True)
        faulthandler.dump_traceback_later(TIMEOUT - 10)
        try:
            result = f"equal {stress(seed)}"
        except AssertionError as error:
            result = f"FAILED {error}"
        print(" ".join(result.split())[:400], flush=True)


def lines(process: subprocess.Popen[bytes]) -> Iterator[str | None]:
    """What the child prints; None where it is silent for too long."""
    assert process.stdout is not None
    rest, deadline = b"", time.monotonic() + TIMEOUT
    while True:
        if not select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
            yield None
            return
        piece = os.read(process.stdout.fileno(), 65536)
        if not piece:
            return
        deadline = time.monotonic() + TIMEOUT
        *whole, rest = (rest + piece).split(b"\n")
        yield from (line.decode() for line in whole)


def run(first: int, cases: int) -> Iterator[tuple[int, str]]:
    """(number, result) of each case."""
    seed, end = first, first + cases
    while seed < end:
        last = min(seed + BATCH, end)
        command = [sys.executable, "-X", "faulthandler", __file__, "--child", str(seed), str(last)]
        line: str | None = ""
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            for line in lines(process):
                if line is None:
                    process.kill()
                    yield seed, f"FAILED it hangs: nothing for {TIMEOUT} s"
                    seed += 1
                    break
                elif not line.startswith("begins "):
                    yield seed, line
                    seed += 1
        if line is not None and process.returncode:
            yield seed, f"FAILED the process ended with {process.returncode}"
            seed += 1


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--one", type=int, help="do one case in this process")
    parser.add_argument("--child", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(*options.child)
        return
    if options.one is not None:
        from helpers.stress_cases import stress

        faulthandler.enable()
        print(stress(options.one))
        return
    counts: Counter[str] = Counter()
    failures = []
    for seed, result in run(options.seed, options.cases):
        outcome, _, what = result.partition(" ")
        counts[what.partition(":")[0] if outcome == "equal" else "FAILED"] += 1
        if outcome != "equal":
            failures.append(seed)
            print(f"{what}\n    python scripts/stress_op.py --one {seed}", flush=True)
    print("; ".join(f"{kind}: {count}" for kind, count in sorted(counts.items())))
    print(f"{sum(counts.values())} cases from number {options.seed}, {len(failures)} failures")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
