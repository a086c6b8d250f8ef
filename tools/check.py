"""Show what is wrong with a data set; the same as `gndet check`.

python tools/check.py configs/quickstart.yaml
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # processes that decode pictures may import this file again
    raise SystemExit(main(["check", *sys.argv[1:]]))
