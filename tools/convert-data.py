"""Write a checked copy of a data set; the same as `gndet convert-data`.

python tools/convert-data.py FOLDER OUT --to coco
"""

import sys

from gndet.cli.main import main

if __name__ == "__main__":  # processes that read the data may import this file again
    raise SystemExit(main(["convert-data", *sys.argv[1:]]))
