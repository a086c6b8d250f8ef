"""Break a tiny run in every way it must survive; the same as `gndet selftest`.

python tools/selftest.py T8 T11
"""

import sys

from gndet.cli import main

if __name__ == "__main__":  # loader processes may import this file again
    raise SystemExit(main(["selftest", *sys.argv[1:]]))
