"""Convert weights from and to other toolkits, and BN to GN; the same as `gndet convert`.

python tools/convert.py WEIGHTS.pth OUT --to gn
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["convert", *sys.argv[1:]]))
