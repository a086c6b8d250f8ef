"""Measure the AP of a checkpoint; the same as `gndet evaluate`.

python tools/evaluate.py runs/quickstart
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # loader processes may import this file again
    raise SystemExit(main(["evaluate", *sys.argv[1:]]))
