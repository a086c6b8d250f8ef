"""Show what a detector gets wrong; the same as `gndet analyze`.

python tools/analyze.py runs/quickstart
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # processes that decode pictures may import this file again
    raise SystemExit(main(["analyze", *sys.argv[1:]]))
