"""Export a detector to ONNX and compare it with torch; the same as `gndet export`.

python tools/export.py runs/quickstart --onnx quickstart.onnx
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # processes that decode pictures may import this file again
    raise SystemExit(main(["export", *sys.argv[1:]]))
