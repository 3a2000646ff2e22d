"""How long ``import anyep`` takes beyond ``import torch``, in fresh interpreters.

python benchmarks/import_time.py [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import median

RUNS = 9
PROBE = """
import time
import torch
begin = time.perf_counter()
import anyep
print(time.perf_counter() - begin)
"""


def measure() -> list[float]:
    """Return seconds of each run; the first, which may write bytecode, is not counted."""
    times = [float(subprocess.check_output([sys.executable, "-c", PROBE], timeout=120)) for _ in range(RUNS + 1)]
    return times[1:]


def main() -> None:
    times = measure()
    print(f"import anyep beyond torch: median {median(times):.3f} s ({min(times):.3f} - {max(times):.3f}, {RUNS} runs)")
    if "--json" in sys.argv[1:]:
        result = {"import_s_median": median(times), "import_s_min": min(times), "import_s_max": max(times)}
        Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
