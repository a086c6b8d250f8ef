"""`python -m gndet.cli VERB ...`, the same as `gndet VERB ...`."""

import os
import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    try:
        if sys.path[0] == os.getcwd():
            del sys.path[0]  # put there by -m: a user's numpy.py in the current folder would be imported
    except OSError:  # the current folder was removed, as main() will say
        pass

from gndet.cli.main import main

if __name__ == "__main__":  # loader processes may import this file again
    raise SystemExit(main())
