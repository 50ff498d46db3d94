"""How long it takes to prove every registered architecture and to check every rule and block symbolically.

python tests/benchmarks/proofs.py
"""

from __future__ import annotations

import time
from collections import Counter

import architectures
import controllability as ct


def main() -> None:
    started, cpu = time.perf_counter(), time.process_time()
    counts: Counter[str] = Counter()
    slowest = (0.0, "")
    for name in architectures.names():
        before = time.perf_counter()
        try:
            rows = ct.prove(architectures.block(name)).check("symbolic")
        except ct.NotControllable:
            counts["refused"] += 1
            continue
        counts["all passed" if {row["status"] for row in rows} == {"passed"} else "NOT PASSED"] += 1
        counts["rows"] += len(rows)
        slowest = max(slowest, (time.perf_counter() - before, name))
    print(dict(counts))
    print(f"{time.perf_counter() - started:.1f} s in all ({time.process_time() - cpu:.1f} s of one core)")
    print(f"slowest: {slowest[1]}, {slowest[0]:.2f} s")


if __name__ == "__main__":
    main()
