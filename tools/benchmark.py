"""Time gndet beside other libraries on the same work; the same as `gndet benchmark`.

python tools/benchmark.py step --threads 2
"""

import sys

from gndet.cli import main

if __name__ == "__main__":  # the processes that are timed import this file again
    raise SystemExit(main(["benchmark", *sys.argv[1:]]))
