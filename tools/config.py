"""Show a resolved config; the same as `gndet config`.

python tools/config.py configs/quickstart.yaml train.global_batch=8
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # loader processes may import this file again
    raise SystemExit(main(["config", *sys.argv[1:]]))
