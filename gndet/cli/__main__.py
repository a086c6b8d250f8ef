"""`python -m gndet.cli VERB ...`, the same as `gndet VERB ...`."""

from gndet.cli.main import main

if __name__ == "__main__":  # loader processes may import this file again
    raise SystemExit(main())
