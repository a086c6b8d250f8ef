"""Read weight files of other toolkits without running anything that they hold; write files completely or not at all.

A pickle names functions to call.  This code never looks them up: its own stand-ins take the place of the few names
that numpy arrays need, and a file that asks for anything else is refused.
"""

import codecs
import io
import math
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from gndet.errors import CheckpointError
from gndet.files import write_whole
from gndet.weights.read import MAX_NAMED

ZIP = b"PK"  # torch.save since torch 1.6
LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before: two bytes of protocol, then torch's magic number, pickled
EXPECTED = "expected a file of torch.save, a .safetensors or a pickle of numpy arrays"
CONTAINERS = ("blobs", "model", "state_dict")  # Detectron; detectron2 and DETR; mmdetection, MMEngine and timm
NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")  # the types read, by numpy's names


class WeightFile(NamedTuple):
    """The tensors of a file, and its other entries."""

    path: Path
    tensors: dict[str, Tensor]  # on the CPU, by name without a leading "module."
    extras: dict[str, Any]  # "meta", "__author__" ...


class _Unfit(Exception):
    """What is wrong with a file; read_weights adds the file's name."""


class _Dtype:
    """Stand in for numpy.dtype: numbers only."""

    def __init__(self, name: str, *flags: object) -> None:
        if not isinstance(name, str) or name not in NUMBERS:
            kind = name if isinstance(name, str) else "?"
            raise _Unfit(f"refused: an array of numpy type {kind}; only numbers are read, nothing was run")
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class _Array:
    """Stand in for numpy.ndarray and the functions that create one; `value` is the array."""

    value: np.ndarray

    def __init__(self, kind: object, *empty: object) -> None:
        if kind is not _Array:
            raise ValueError("an array of another class than numpy.ndarray")

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = _numpy_array(dtype, data, shape, "F" if is_fortran else "C")

    @classmethod
    def from_buffer(cls, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> "_Array":
        """Stand in for numpy's function of protocol 5; axes: the permutation that recent numpy uses for order "K"."""
        array = cls(cls)
        array.value = _numpy_array(dtype, data, shape, "C" if axes else order).transpose(axes or range(len(shape)))
        return array

    @classmethod
    def scalar(cls, dtype: Any, data: Any) -> Any:
        """Stand in for numpy's function that creates a number."""
        return _numpy_array(dtype, data, (), "C").item()


def _numpy_array(dtype: Any, data: Any, shape: Any, order: Any) -> np.ndarray:
    """Make an array from a pickle's bytes (Python 2: latin1 text) after checking shape, type and size against them."""
    if not isinstance(dtype, _Dtype) or not isinstance(data, str | bytes):
        raise ValueError("an array whose parts are not bytes and a type")
    if not isinstance(shape, tuple) or not all(type(side) is int and side >= 0 for side in shape):
        raise ValueError("an array whose shape is not whole numbers")
    raw = data.encode("latin1") if isinstance(data, str) else data
    kind = np.dtype(dtype.order + dtype.name)
    if len(raw) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"an array of shape {shape} and type {kind.name} in {len(raw)} bytes")
    return np.frombuffer(raw, kind).reshape(shape, order=order)


# Classes and bound methods only: a pickle could change the defaults of a plain function.
STAND_INS: dict[str, Callable[..., Any]] = {
    **{f"numpy.{core}.multiarray._reconstruct": _Array for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray.scalar": _Array.scalar for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _Array.from_buffer for core in ("core", "_core")},
    **{"numpy.ndarray": _Array, "numpy.dtype": _Dtype, "collections.OrderedDict": dict},
    **{"_codecs.encode": codecs.encode, "builtins.bytes": bytes, "__builtin__.bytes": bytes},  # protocols 0 to 2
}


class _Unpickler(pickle._Unpickler):
    """An unpickler that finds only the stand-ins.

    It is Python's unpickler, not C's, because C's would fill all memory if a damaged file names a huge memo slot.
    """

    # load_bytearray8 would allocate whatever length a damaged file claims
    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]]}

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (asked := f"{module}.{name}") in STAND_INS:
            return STAND_INS[asked]
        only = "only numpy arrays and plain containers are read, nothing was run"
        raise _Unfit(f"refused: the pickle asks for {asked}; {only}")


class _Lines(io.BufferedReader):
    """A file whose last line must be complete, so that half a name in a truncated file is damage and not a name."""

    def readline(self, size: int | None = -1) -> bytes:
        if (line := super().readline(size)).endswith(b"\n"):
            return line
        raise EOFError("the file ends within a name")


def read_weights(path: Path) -> WeightFile:
    """Read the tensors of a .safetensors, a .pth of torch.save or a .pkl of numpy arrays; the content decides which.

    Returns them on the CPU: floating point of any width as float32, integers and bools as they are.  Leaves out the
    momentum among Detectron's blobs.
    Raises CheckpointError with the file, what was found, what was expected and the likely cause: not a weight file,
    damaged, asking for code to be run (none is), without tensors, or with NaN or infinite values.
    """
    head = _head(path)
    try:
        return WeightFile(path, *_weights(_content(path, head)))
    except _Unfit as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged file makes an unpickler raise nearly any type of error
        reason = (str(error).strip() or "no reason given").splitlines()[0][:200]
        raise CheckpointError(
            f"{path}: damaged or truncated: {type(error).__name__}: {reason}; {EXPECTED}: was the download cut short?"
        ) from None


def write_torch(path: Path, content: dict[str, Any]) -> None:
    """Write a dict with torch.save, completely or not at all.  Raises OutputError if that fails."""
    buffer = io.BytesIO()  # torch's own writer reports a full disk as a RuntimeError without the cause
    torch.save(content, buffer)
    write_whole(path, buffer.getbuffer())


def _head(path: Path) -> bytes:
    """Read the first bytes of a file; refuse what is clearly not a weight file."""
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: a pipe or a device; {EXPECTED}")  # reading a pipe might never end
        with open(path, "rb") as file:
            head = file.read(200)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read it: {error.strerror}; {EXPECTED}") from None
    if not head:
        raise CheckpointError(f"{path}: empty, 0 bytes; {EXPECTED}: did the download fail?")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a git-lfs pointer, not the file itself; {EXPECTED}: run git lfs pull")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"<"):
        raise CheckpointError(f"{path}: an HTML page: was the download a web page?  {EXPECTED}")
    return head


def _content(path: Path, head: bytes) -> Any:
    with _Lines(io.FileIO(path)) as file:
        if head.startswith(ZIP):
            names = zipfile.ZipFile(file).namelist()
            if any(name.endswith("/constants.pkl") for name in names):
                raise _Unfit("a TorchScript archive, which is a program; expected weights: save module.state_dict()")
            if not any(name.endswith("/data.pkl") for name in names):
                raise _Unfit(f"a zip of {', '.join(names[:MAX_NAMED])}; {EXPECTED}: should it be unpacked?")
            file.seek(0)
        if head.startswith(ZIP) or head[2:].startswith(LEGACY):
            return _torch_content(file)
        if head[4:9] != b"\0\0\0\0{":  # safetensors: 8 bytes of a length below 4 GB, then JSON
            return _Unpickler(file, encoding="latin1").load()
    with safetensors.safe_open(path, framework="pt") as file:
        return {**(file.metadata() or {}), **{name: file.get_tensor(name).clone() for name in [*file.keys()]}}


def _torch_content(file: io.BufferedReader) -> Any:
    """Read a file of torch.save with torch's restricted unpickler, with the stand-ins for numpy's names."""
    try:
        with torch.serialization.safe_globals([(stand_in, name) for name, stand_in in STAND_INS.items()]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if (asked := re.search(r"GLOBAL ([\w.]+)", str(error))) is None:
            raise pickle.UnpicklingError(str(error).rpartition("WeightsUnpickler error: ")[2]) from None
    raise _Unfit(
        f"refused: the file asks for {asked[1]}; only tensors and plain containers are read, nothing was run: it is a "
        f"whole nn.Module or a training checkpoint with objects of {asked[1].split('.')[0]}; save model.state_dict()"
    )


def _weights(content: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Find the tensors in a file's content and check them.  Returns the fields of a WeightFile after its path."""
    if not isinstance(content, dict):
        raise _Unfit(f"holds a {type(content).__name__}; expected a dict of tensors by name")
    found = {key: arrays for key in CONTAINERS if (arrays := _arrays(content.get(key)))} or {"flat": _arrays(content)}
    container, arrays = next(iter(found.items()))
    if not arrays:
        keys = ", ".join(str(key) for key in list(content)[:MAX_NAMED]) or "nothing"
        raise _Unfit(f"no tensors: a dict of {keys}; expected tensors by name, alone or in {', '.join(CONTAINERS)}")
    tensors: dict[str, Tensor] = {}
    for key, array in arrays.items():
        name = key.removeprefix("module.")
        if name in tensors:
            raise _Unfit(f"holds both {name} and module.{name}; expected one of them")
        if not (container == "blobs" and key.endswith("_momentum")):
            tensors[name] = _tensor(name, array)
    counts = {name: int((~torch.isfinite(tensor)).sum()) for name, tensor in tensors.items()}
    if wrong := [f"{name} ({count} of {tensors[name].numel()})" for name, count in counts.items() if count]:
        listed = ", ".join(wrong[:MAX_NAMED]) + (", ..." if len(wrong) > MAX_NAMED else "")
        raise _Unfit(f"NaN or infinite values in {listed}; expected finite weights: did the training diverge?")
    other_keys = [key for key in content if isinstance(key, str) and key != container]
    return tensors, {key: content[key] for key in other_keys if not isinstance(content[key], Tensor | _Array)}


def _arrays(entries: Any) -> dict[str, Any]:
    pairs = entries.items() if isinstance(entries, dict) else ()
    return {key: value for key, value in pairs if isinstance(key, str) and isinstance(value, Tensor | _Array)}


def _tensor(name: str, array: Any) -> Tensor:
    if isinstance(array, _Array):  # np.array copies: from_numpy takes neither read-only arrays nor other byte orders
        array = torch.from_numpy(np.array(array.value, dtype=array.value.dtype.newbyteorder("="), order="C"))
    tensor = Tensor.detach(array)  # not array.detach(), because a file may set attributes on its tensors
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise _Unfit(f"{name} is a {tensor.layout} tensor on {tensor.device}, {tensor.dtype}; expected dense values")
    return tensor.float() if tensor.is_floating_point() else tensor
