"""Write the report of a run as an HTML page; the same as `gndet report`.

python tools/report.py runs/quickstart
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # processes that decode pictures may import this file again
    raise SystemExit(main(["report", *sys.argv[1:]]))
