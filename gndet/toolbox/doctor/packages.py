"""The packages that gndet needs: whether they are installed, in the right versions, and can be imported.

Each is imported by name when its turn comes, since failing imports are what is looked for.
"""

import importlib
import operator
import re
import time
from collections.abc import Mapping
from importlib import metadata

from gndet.config.schema import Config
from gndet.toolbox.doctor.facts import Fact, Facts, reason

NEEDED = {  # the module to import: the one with compiled code, where there is one
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
OPERATORS = {">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, "<": operator.lt,
             ">": operator.gt}  # fmt: skip


def facts(cfg: Config | None) -> Facts:
    """Yield one fact per package."""
    wanted = requirements("gndet")
    for name, (module, use) in ({name: (module, "") for name, module in NEEDED.items()} | OPTIONAL).items():
        yield f"importing {module}"
        yield judge_package(name, module, wanted.get(name, ""), use)
    yield from (fact for fact in (pairing(), numpy_exchange()) if fact)


def judge_package(name: str, module: str, wanted: str, use: str) -> Fact:
    """Judge a package.  wanted: versions, like >=2.11,<2.16; use: of an optional package, "" for a required one."""
    version = installed(name)
    if version is None and use:
        return Fact(name, f"not installed (optional): {use}")
    if version is None:
        return Fact(name, f"not installed: pip install '{name}{wanted}'", "wrong")
    before = time.perf_counter()
    if trouble := import_trouble(module):
        return Fact(name, f"{version}, cannot be imported: {trouble}", "warning" if use else "wrong")
    seconds = time.perf_counter() - before
    slow = f", imported in {seconds:.1f} s" if seconds > 1 else ""
    if not version_fits(version, wanted):
        return Fact(name, f"{version}, expected {wanted}{slow}", "warning")
    return Fact(name, version + slow, "ok")


def installed(name: str) -> str | None:
    """Return the version of a package; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def import_trouble(module: str) -> str:
    """Return why a module cannot be imported, or ""."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken extension may raise anything
        return reason(error)
    return ""


def requirements(name: str) -> dict[str, str]:
    """Return the requirements of a package with versions like >=2.11,<2.16, without extras."""
    try:
        lines = metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        return {}
    found = (re.match(r"([\w.-]+)\s*\(?([^;)]*)\)?\s*$", line) for line in lines)
    return {match[1].lower(): match[2].replace(" ", "") for match in found if match}


def version_fits(version: str, wanted: str) -> bool:
    """Return whether a version is within bounds like >=2.11,<2.16, by its numbers: 2.11.0+cpu is 2.11."""
    bounds = re.findall(r"(>=|<=|==|!=|<|>)([\d.]+)", wanted)
    return all(OPERATORS[sign](_numbers(version), _numbers(limit)) for sign, limit in bounds)


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version without trailing zeros."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)[0]
    return tuple(int(part) for part in re.sub(r"(\.0+)+$", "", numbers).split("."))


def pairing() -> Fact | None:
    """Return whether torch and torchvision were built for each other; None where one is missing."""
    torch, torchvision = installed("torch"), installed("torchvision")
    if torch is None or torchvision is None:
        return None
    return judge_pairing(torch, torchvision, requirements("torchvision"))


def judge_pairing(torch: str, torchvision: str, asks: Mapping[str, str]) -> Fact:
    """Compare versions of torch and torchvision.  asks: the requirements of torchvision's package."""
    name, minor = "torch with torchvision", (*_numbers(torchvision), 0)[1] - MINORS
    wanted = asks.get("torch") or f">=2.{minor},<2.{minor + 1}"
    builds = [version.partition("+")[2] for version in (torch, torchvision)]
    if not version_fits(torch, wanted):
        return Fact(name, f"torchvision {torchvision} is built for torch{wanted}, not {torch}", "wrong")
    if all(builds) and builds[0] != builds[1]:
        return Fact(name, f"builds for {builds[0]} and {builds[1]}: install both for one", "wrong")
    return Fact(name, "built for each other", "ok")


def numpy_exchange() -> Fact | None:
    """Return whether torch accepts NumPy's arrays, which it may not from a NumPy newer than its build."""
    if import_trouble("numpy") or import_trouble("torch"):
        return None
    numpy, torch = importlib.import_module("numpy"), importlib.import_module("torch")
    try:
        torch.from_numpy(numpy.arange(3)).numpy()
    except Exception as error:  # torch's "Numpy is not available"
        return Fact("torch with numpy", f"{reason(error)}: this torch needs another numpy", "wrong")
    return Fact("torch with numpy", "exchange arrays", "ok")
