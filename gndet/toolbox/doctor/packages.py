"""The packages gndet stands on: which are there, whether they are the ones asked for, and whether they can be imported.

Each is imported when its turn comes, by name: that one cannot be is what is looked for.
"""

import importlib
import re
import time
from collections.abc import Mapping
from importlib import metadata

from gndet.config.schema import Config
from gndet.toolbox.doctor.facts import Fact, Facts, reason

NEEDED = {  # what is imported of each: the part with compiled code, where there is one
    "numpy": "numpy", "torch": "torch", "torchvision": "torchvision.ops", "pycocotools": "pycocotools.mask",
    "hotcoco": "hotcoco", "pillow": "PIL.Image", "orjson": "orjson", "safetensors": "safetensors.torch",
    "pydantic": "pydantic", "pyyaml": "yaml", "rich": "rich", "tensorboard": "torch.utils.tensorboard",
}  # fmt: skip
OPTIONAL = {  # with what is missing without it
    "matplotlib": ("matplotlib", "curves of `gndet norm-study` and benchmarks"),
    "onnx": ("onnx", "`gndet export`: pip install onnx onnxruntime"),
    "onnxruntime": ("onnxruntime", "`gndet export`: pip install onnx onnxruntime"),
    "av": ("av", "videos in `gndet predict`: pip install av"),
}
MINORS = 15  # torchvision 0.(n + 15) goes with torch 2.n
OPERATORS = {
    ">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b, "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b, ">": lambda a, b: a > b,
}  # fmt: skip


def facts(cfg: Config | None) -> Facts:
    """A line a package."""
    wanted = requirements("gndet")
    for name, module in NEEDED.items():
        yield f"importing {module}"
        yield needed(name, module, wanted.get(name, ""))
    for name, (module, use) in OPTIONAL.items():
        yield f"importing {module}"
        yield optional(name, module, use)
    yield from (fact for fact in (pairing(), numpy_exchange()) if fact)


def needed(name: str, module: str, wanted: str) -> Fact:
    """Look at a package that gndet cannot do without.  wanted: the versions that it asks for, like >=2.11,<2.16."""
    version = installed(name)
    if version is None:
        return Fact(name, f"not installed: pip install '{name}{wanted}'", "wrong")
    before = time.perf_counter()
    if trouble := import_trouble(module):
        return Fact(name, f"{version}, cannot be imported: {trouble}", "wrong")
    seconds = time.perf_counter() - before
    slow = f", imported in {seconds:.1f} s" if seconds > 1 else ""
    if not version_fits(version, wanted):
        return Fact(name, f"{version}, expected {wanted}{slow}", "warning")
    return Fact(name, version + slow, "ok")


def optional(name: str, module: str, use: str) -> Fact:
    """Look at a package that only some of gndet needs."""
    version = installed(name)
    if version is None:
        return Fact(name, f"not installed (optional): {use}")
    if trouble := import_trouble(module):
        return Fact(name, f"{version}, cannot be imported: {trouble}", "warning")
    return Fact(name, version, "ok")


def installed(name: str) -> str | None:
    """The version of a package, None where it is not there."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_trouble(module: str) -> str:
    """Why a module cannot be imported, or nothing."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken extension raises what it likes
        return reason(error)
    return ""


def requirements(name: str) -> dict[str, str]:
    """The packages that one asks for, with their versions like >=2.11,<2.16; extras are left out."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        return {}
    found = (re.match(r"([\w.-]+)\s*\(?([^;)]*)\)?\s*$", line) for line in lines)
    return {match[1].lower(): match[2].replace(" ", "") for match in found if match}


def version_fits(version: str, wanted: str) -> bool:
    """Whether a version is within bounds like >=2.11,<2.16, by its numbers: 2.11.0+cpu is 2.11."""
    for bound in filter(None, wanted.split(",")):
        match = re.fullmatch(r"(>=|<=|==|!=|<|>)([\d.]+)\S*", bound)
        if match:
            one, other = _numbers(version), _numbers(match[2])
            longest = max(len(one), len(other))
            padded = (part + (0,) * (longest - len(part)) for part in (one, other))
            if not OPERATORS[match[1]](*padded):
                return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def pairing() -> Fact | None:
    """Whether torch and torchvision were built for each other; None where one of them is missing."""
    torch, torchvision = installed("torch"), installed("torchvision")
    if torch is None or torchvision is None:
        return None
    return judge_pairing(torch, torchvision, requirements("torchvision"))


def judge_pairing(torch: str, torchvision: str, asks: Mapping[str, str]) -> Fact:
    """Compare versions of torch and torchvision.  asks: what torchvision's package asks for."""
    minor = _numbers(torchvision)[1] - MINORS
    wanted = asks.get("torch") or f"==2.{minor}"
    builds = [version.partition("+")[2] for version in (torch, torchvision)]
    if not version_fits(torch, wanted) and not (wanted == f"==2.{minor}" and _numbers(torch)[:2] == (2, minor)):
        return Fact(
            "torch with torchvision", f"torchvision {torchvision} is built for torch{wanted}, not {torch}", "wrong"
        )
    if all(builds) and builds[0] != builds[1]:
        return Fact("torch with torchvision", f"builds for {builds[0]} and {builds[1]}: install both for one", "wrong")
    return Fact("torch with torchvision", "built for each other", "ok")


def numpy_exchange() -> Fact | None:
    """Whether torch takes NumPy's arrays: it does not from a NumPy newer than it was built with."""
    if import_trouble("numpy") or import_trouble("torch"):
        return None
    numpy, torch = importlib.import_module("numpy"), importlib.import_module("torch")
    try:
        torch.from_numpy(numpy.arange(3)).numpy()
    except Exception as error:  # "Numpy is not available"; the wording is torch's
        return Fact("torch with numpy", f"{reason(error)}: this torch needs another numpy", "wrong")
    return Fact("torch with numpy", "exchange arrays", "ok")
