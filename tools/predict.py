"""Detect objects in images; the same as `gndet predict`.

python tools/predict.py runs/quickstart photo.jpg --out found
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # loader processes may import this file again
    raise SystemExit(main(["predict", *sys.argv[1:]]))
