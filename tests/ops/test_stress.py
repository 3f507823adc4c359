"""Some of the calls of scripts/stress_op.py, and what it says of a case that fails, crashes or hangs."""

import pytest
from helpers.stress_cases import KINDS, stress

from scripts import stress_op


@pytest.mark.filterwarnings("ignore")  # of torch, about nested tensors, anomalies, quantization, ...
@pytest.mark.parametrize("kind", [function.__name__ for function in KINDS])
def test_each_call_equals_the_oracle_or_says_what_is_wrong(kind):
    for seed in range(3_000_000, 3_000_025):
        stress(seed, kind)


@pytest.mark.slow
def test_failures_crashes_and_hangs_are_cases_that_failed(tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text("""
import os, sys, time
for seed in range(int(sys.argv[2]), int(sys.argv[3])):
    print(f"begins {seed}", flush=True)
    if seed == 2:
        os.abort()
    if seed == 4:
        time.sleep(60)
    print("FAILED values: wrong" if seed == 5 else "equal values: fine", flush=True)
""")
    monkeypatch.setattr(stress_op, "__file__", str(child))
    monkeypatch.setattr(stress_op, "TIMEOUT", 3)
    results = dict(stress_op.run(0, 7))
    assert [seed for seed, result in results.items() if result == "equal values: fine"] == [0, 1, 3, 6]
    assert results[2] == "FAILED the process ended with -6"
    assert results[4] == "FAILED it hangs: nothing for 3 s"
    assert results[5] == "FAILED values: wrong"
