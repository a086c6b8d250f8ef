"""Prepare the day at home: fetch the packages that a machine without a network may lack, and pack the data sets.

Everything goes into one folder that git ignores (.gpu), and that travels with the checkout.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_day.notes import ROOT

PACKAGES = (  # with wheels below 3 MiB each; a machine with torch usually has the rest of gndet's dependencies
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "msgspec", "pysimdjson", "hotcoco",
    "pycocotools", "safetensors", "rich", "markdown-it-py", "mdurl", "pygments", "packaging", "pyyaml",
)  # fmt: skip
TESTING = ("pytest", "pluggy", "iniconfig", "pytest-xdist", "execnet")
LINUX = ("2_39", "2_35", "2_34", "2_31", "2_28", "2_27", "2_24", "2_17", "2_12", "2_5")  # versions of glibc
TRAVELS = 64  # MiB that may travel to some machines, the checkout included


def prepare(folder: Path, sets: dict[str, Path], python: str) -> int:
    """Fill the folder with wheels for a version of Python on Linux, and with data sets by name.  Returns 0."""
    folder.mkdir(parents=True, exist_ok=True)
    fetch_wheels(folder / "wheels", python)
    for name, source in sets.items():
        pack(source, folder / name)
    (folder / "commit").write_text(git("describe", "--always", "--dirty").strip())  # the folder .git does not travel
    for part in sorted(folder.iterdir()):
        print(f"{mib(part):6.1f} MiB  {part.name}")
    tracked = [ROOT / name for name in git("ls-files", "-z").split("\0") if name]
    whole = mib(folder) + sum(map(mib, tracked))
    print(f"{whole:6.1f} MiB  with the checkout" + (f", more than {TRAVELS}" if whole > TRAVELS else ""))
    return 0


def fetch_wheels(folder: Path, python: str) -> None:
    """Fetch the packages in the versions that are installed here, else the newest, for another version of Python."""
    shutil.rmtree(folder, ignore_errors=True)
    platforms = [f"--platform=manylinux_{version}_x86_64" for version in LINUX]
    platforms += ["--platform=manylinux2014_x86_64", "--platform=manylinux2010_x86_64", "--platform=manylinux1_x86_64"]
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *platforms]
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*command, *target, *map(requirement, (*PACKAGES, *TESTING))], check=True)


def requirement(name: str) -> str:
    """Return NAME==VERSION of an installed package, else NAME."""
    try:
        return f"{name}=={importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return name


def pack(source: Path, folder: Path) -> None:
    """Copy a COCO data set with the parts train and val; PNG becomes lossless WebP, of two thirds the size."""
    from PIL import Image

    shutil.rmtree(folder, ignore_errors=True)
    (folder / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (folder / part).mkdir()
        tree = json.loads((source / "annotations" / f"instances_{part}.json").read_bytes())
        for image in tree["images"]:
            path = source / part / image["file_name"]
            if path.suffix.lower() == ".png":
                image["file_name"] = f"{Path(image['file_name']).stem}.webp"
                with Image.open(path) as picture:
                    picture.save(folder / part / image["file_name"], lossless=True, exact=True, quality=60, method=4)
            else:
                shutil.copy(path, folder / part)
        text = json.dumps(tree, separators=(",", ":"))
        (folder / "annotations" / f"instances_{part}.json").write_text(text)


def git(*words: str) -> str:
    """Return what git prints about the checkout."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def mib(path: Path) -> float:
    """Return the size of a file or folder in MiB."""
    files = [path] if path.is_file() else [Path(top) / name for top, _, names in os.walk(path) for name in names]
    return sum(file.stat().st_size for file in files) / 2**20
