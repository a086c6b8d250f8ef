"""Compare norms at several batch sizes; the same as `gndet norm-study`.

python tools/norm-study.py configs/quickstart.yaml --norms gn,bn --budget 30m
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # processes that decode pictures may import this file again
    raise SystemExit(main(["norm-study", *sys.argv[1:]]))
