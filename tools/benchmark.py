"""Compare gndet with other libraries on the same work; the same as `python -m benchmarks`.

python tools/benchmark.py step --threads 2
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # gndet's package does not include `benchmarks`

from benchmarks.__main__ import main

if __name__ == "__main__":  # the timed processes import this file again
    raise SystemExit(main())
