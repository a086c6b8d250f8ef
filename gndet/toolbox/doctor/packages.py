"""Check the packages that gndet needs: whether they are installed, in the right versions, and can be imported.

Each package is imported by name when its turn comes, because the doctor looks for imports that fail.
"""

import importlib
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from gndet.config.schema import Config
from gndet.toolbox.doctor.facts import Fact, Facts, reason

NEEDED = {  # {package: module to import}, the module with compiled code if there is one
    "numpy": "numpy", "torch": "torch", "torchvision": "torchvision.ops", "pycocotools": "pycocotools.mask",
    "hotcoco": "hotcoco", "pillow": "PIL.Image", "msgspec": "msgspec", "pysimdjson": "csimdjson",
    "safetensors": "safetensors.torch", "pydantic": "pydantic", "pyyaml": "yaml", "rich": "rich",
    "tensorboard": "torch.utils.tensorboard", "matplotlib": "matplotlib",
}  # fmt: skip
OPTIONAL = {  # {package: (module, what needs it and how to install it)}
    "onnx": ("onnx", "`gndet export`: pip install onnx onnxruntime"),
    "onnxruntime": ("onnxruntime", "`gndet export`: pip install onnx onnxruntime"),
    "av": ("av", "videos in `gndet predict`: pip install av"),
}


def facts(cfg: Config | None) -> Facts:
    """Yield one fact per package, and whether torch fits torchvision and numpy."""
    wanted = requirements("gndet")
    for name, (module, use) in ({name: (module, "") for name, module in NEEDED.items()} | OPTIONAL).items():
        yield f"importing {module}"
        yield judge_package(name, module, wanted.get(name, SpecifierSet()), use)
    torch, torchvision = installed("torch"), installed("torchvision")
    if torch and torchvision:
        yield judge_pairing(torch, torchvision, requirements("torchvision").get("torch", SpecifierSet()))
    yield numpy_exchange()


def judge_package(name: str, module: str, wanted: SpecifierSet, use: str) -> Fact:
    """Judge a package.  wanted: the accepted versions.  use: what an optional package is for; "" if required."""
    version = installed(name)
    if version is None and use:
        return Fact(name, f"not installed (optional): {use}")
    if version is None:
        return Fact(name, f"not installed: pip install '{name}{wanted}'", "wrong")
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken extension may raise anything
        return Fact(name, f"{version}, cannot be imported: {reason(error)}", "warning" if use else "wrong")
    if not wanted.contains(version, prereleases=True):
        return Fact(name, f"{version}, expected {wanted}", "warning")
    return Fact(name, version, "ok")


def installed(name: str) -> str | None:
    """Return the version of a package; None if it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def requirements(name: str) -> dict[str, SpecifierSet]:
    """Return the versions that a package requires of other packages, without extras."""
    try:
        found = map(Requirement, metadata.requires(name) or [])
    except metadata.PackageNotFoundError:  # run from a folder, not installed
        return {}
    return {requirement.name.lower(): requirement.specifier for requirement in found if requirement.marker is None}


def judge_pairing(torch: str, torchvision: str, asked: SpecifierSet) -> Fact:
    """Judge whether torch and torchvision fit.  asked: the versions of torch that torchvision requires."""
    name, builds = "torch with torchvision", [version.partition("+")[2] for version in (torch, torchvision)]
    if not asked.contains(torch, prereleases=True):
        return Fact(name, f"torchvision {torchvision} is built for torch{asked}, not {torch}", "wrong")
    if all(builds) and builds[0] != builds[1]:
        return Fact(name, f"builds for {builds[0]} and {builds[1]}: install both for the same", "wrong")
    return Fact(name, "built for each other", "ok")


def numpy_exchange() -> Fact:
    """Judge whether torch accepts NumPy's arrays, which may fail if NumPy is newer than torch was built for."""
    try:
        numpy, torch = importlib.import_module("numpy"), importlib.import_module("torch")
        torch.from_numpy(numpy.arange(3)).numpy()
    except Exception as error:  # torch's "Numpy is not available"
        return Fact("torch with numpy", f"cannot exchange arrays: {reason(error)}", "wrong")
    return Fact("torch with numpy", "exchange arrays", "ok")
