"""Show that an image trains the same whatever else is in its batch; the same as `gndet invariance`.

python tools/invariance.py configs/quickstart.yaml
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # the two ranks that it starts import this file again
    raise SystemExit(main(["invariance", *sys.argv[1:]]))
