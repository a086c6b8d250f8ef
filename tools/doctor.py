"""Describe this machine and check that gndet works on it; the same as `gndet doctor`.

python tools/doctor.py --json doctor.json
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # processes that decode pictures may import this file again
    raise SystemExit(main(["doctor", *sys.argv[1:]]))
