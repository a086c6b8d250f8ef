"""Train a detector; the same as `gndet train`.

python tools/train.py configs/quickstart.yaml train.global_batch=8
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # loader processes may import this file again
    raise SystemExit(main(["train", *sys.argv[1:]]))
