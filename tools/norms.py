"""Show the norm layers of a config or checkpoint; the same as `gndet norms`.

python tools/norms.py configs/quickstart.yaml
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main(["norms", *sys.argv[1:]]))
