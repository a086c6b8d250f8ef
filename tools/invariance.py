"""Show that an image trains the same whatever stands beside it; the same as `gndet invariance`.

python tools/invariance.py configs/quickstart.yaml
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # the two processes that it starts import this file again
    raise SystemExit(main(["invariance", *sys.argv[1:]]))
