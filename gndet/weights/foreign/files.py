"""Read weight files of other toolkits without running anything that they hold; write files completely or not at all.

A file takes memory in proportion to its size: compressed records, and tensors that claim or repeat more than the file
holds, are refused before they are read.
"""

import io
import math
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from gndet.errors import CheckpointError
from gndet.files import write_whole
from gndet.modeling.trained import MAX_NAMED, nonfinite
from gndet.weights.foreign.unpickling import Array, Names, Unfit, Unpickler

ZIP = b"PK"  # torch.save since torch 1.6
LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before: two bytes of protocol, then torch's magic number, pickled
EXPECTED = "expected a file of torch.save, a .safetensors, an .npz or a pickle of numpy arrays"
CONTAINERS = ("blobs", "model", "state_dict")  # Detectron; detectron2 and DETR; mmdetection, MMEngine and timm
SHARED = 8  # tensors may have this many times the file's bytes: heads share their weights, half precision is widened


class WeightFile(NamedTuple):
    """The tensors of a file, and its other entries."""

    path: Path
    tensors: dict[str, Tensor]  # on the CPU, by name without a leading "module."
    extras: dict[str, Any]  # "meta", "__author__" ...


class _Lines(io.BufferedReader):
    """A file whose last line must be complete, so that half a name in a truncated file is damage and not a name."""

    def readline(self, size: int | None = -1) -> bytes:
        if (line := super().readline(size)).endswith(b"\n"):
            return line
        raise EOFError("the file ends within a name")


def read_weights(path: Path) -> WeightFile:
    """Read the tensors of a .safetensors, a .pth of torch.save, an .npz or a .pkl of numpy arrays; the content decides.

    Returns them on the CPU: floating point of any width as float32, integers and bools as they are.  Leaves out the
    momentum among Detectron's blobs.
    Raises CheckpointError with the file, what was found, what was expected and the likely cause: not a weight file,
    damaged, asking for code to be run (none is), without tensors, or with NaN or infinite values.
    """
    head = _head(path)
    try:
        return WeightFile(path, *_weights(_content(path, head), path.stat().st_size))
    except Unfit as error:
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
    size = path.stat().st_size
    with _Lines(io.FileIO(path)) as file:
        if head.startswith(ZIP):
            return _zip_content(file, Names(size, torch_too=True))
        if head[2:].startswith(LEGACY):
            return _legacy_content(file, Names(size, torch_too=True))
        if head[4:9] != b"\0\0\0\0{":  # safetensors: 8 bytes of a length below 4 GB, then JSON
            return Unpickler(file, Names(size, torch_too=False)).load()
    with safetensors.safe_open(path, framework="pt") as file:
        return {**(file.metadata() or {}), **{name: file.get_tensor(name).clone() for name in [*file.keys()]}}


def _zip_content(file: io.BufferedReader, names: Names) -> Any:
    """Read a file of torch.save: a zip of data.pkl, and of a record per storage, all of them as they are."""
    records = {info.filename: info for info in zipfile.ZipFile(file).infolist()}
    if any(name.endswith("/constants.pkl") for name in records):
        raise Unfit("a TorchScript archive, which is a program; expected weights: save module.state_dict()")
    if records and all(name.endswith(".npy") for name in records):
        return _npz_content(file)
    pickles = sorted((name for name in records if name.endswith("/data.pkl")), key=len)
    if not pickles:
        raise Unfit(f"a zip of {', '.join([*records][:MAX_NAMED])}; {EXPECTED}: should it be unpacked?")
    if any(record.compress_type != zipfile.ZIP_STORED for record in records.values()):
        raise Unfit("its records are compressed, as torch.save never writes them; load it and save it with torch.save")

    def content(name: str) -> Tensor:
        """Return the bytes of a record; torch does not always write its CRC, which is not compared."""
        record = records[name]
        file.seek(record.header_offset)
        header = file.read(30)
        if header[:4] != b"PK\3\4":
            raise ValueError(f"record {name} is not where the file's directory says")
        file.seek(int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:], "little"), io.SEEK_CUR)
        names.take(record.file_size)
        return _filled(torch.empty(record.file_size, dtype=torch.uint8), file)

    def stored(dtype: torch.dtype, key: str, num: int, _: object) -> Tensor:
        if key not in storages:
            raw = content(f"{top}data/{key}")
            if len(raw) != num * dtype.itemsize:
                raise ValueError(f"record {key} has {len(raw)} bytes, expected {num * dtype.itemsize}")
            storages[key] = (raw.view(num, -1).flip(1) if is_big and num else raw).view(-1).view(dtype)
        return storages[key]

    top, storages = pickles[0].removesuffix("data.pkl"), dict[str, Tensor]()
    is_big = f"{top}byteorder" in records and content(f"{top}byteorder").numpy().tobytes() == b"big"
    return Unpickler(io.BytesIO(content(pickles[0]).numpy().tobytes()), names, stored).load()


def _npz_content(file: io.BufferedReader) -> dict[str, Tensor]:
    """Read a file of numpy.savez: a zip of arrays, compressed or not."""
    found = {}
    with zipfile.ZipFile(file) as archive:
        total, size = sum(info.file_size for info in archive.infolist()), file.seek(0, io.SEEK_END)
        if total > SHARED * size:
            raise Unfit(f"refused: its arrays would take {total:,} bytes, far more than the file's {size:,}")
        for info in archive.infolist():
            content = io.BytesIO(archive.read(info))  # checks the CRC
            version = np.lib.format.read_magic(content)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, by_column, dtype = read(content)
            values = np.frombuffer(content.getvalue(), dtype, offset=content.tell())  # refuses objects: no pickle
            values = values.reshape(shape, order="F" if by_column else "C")
            found[info.filename.removesuffix(".npy")] = torch.from_numpy(values.astype(dtype.newbyteorder("=")))
    return found


def _legacy_content(file: io.BufferedReader, names: Names) -> Any:
    """Read a file of torch.save before torch 1.6: four pickles, the names of the storages, then their values."""
    storages = dict[str, Tensor]()

    def stored(dtype: torch.dtype, key: str, num: int, part: Any) -> Tensor:
        if key not in storages:
            names.take(num * dtype.itemsize)
            storages[key] = torch.empty(num, dtype=dtype)  # read below
        return storages[key] if part is None else storages[key].narrow(0, part[1], part[2])

    _, _, _, content, keys = (Unpickler(file, names, stored).load() for _ in range(5))
    if sorted(keys) != sorted(storages):
        raise ValueError("the storages are not those of its tensors")
    for key in keys:
        values = storages[key]
        if (num := int.from_bytes(file.read(8), "little")) != len(values):
            raise ValueError(f"storage {key} has {num} values, expected {len(values)}")
        _filled(values, file)
    return content


def _filled(values: Tensor, file: io.BufferedReader) -> Tensor:
    """Read the bytes of values (n,) from a file; return values."""
    if file.readinto(values.view(torch.uint8).numpy().data) != len(values) * values.itemsize:
        raise EOFError("the file ends within a tensor")
    return values


def _weights(content: Any, size: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Find the tensors in the content of a file of `size` bytes and check them.

    Returns the fields of a WeightFile after its path.
    """
    if not isinstance(content, dict):
        raise Unfit(f"holds a {type(content).__name__}; expected a dict of tensors by name")
    found = {key: arrays for key in CONTAINERS if (arrays := _arrays(content.get(key)))} or {"flat": _arrays(content)}
    container, arrays = next(iter(found.items()))
    if not arrays:
        keys = ", ".join(str(key) for key in list(content)[:MAX_NAMED]) or "nothing"
        raise Unfit(f"no tensors: a dict of {keys}; expected tensors by name, alone or in {', '.join(CONTAINERS)}")
    values = (array.value if isinstance(array, Array) else array for array in arrays.values())
    if (total := sum(math.prod(value.shape) * value.itemsize for value in values)) > SHARED * size:
        raise Unfit(f"refused: its tensors would take {total:,} bytes, far more than the file's {size:,}")
    tensors: dict[str, Tensor] = {}
    for key, array in arrays.items():
        name = key.removeprefix("module.")
        if name in tensors:
            raise Unfit(f"holds both {name} and module.{name}; expected one of them")
        if not (container == "blobs" and key.endswith("_momentum")):
            tensors[name] = _tensor(array)
    if wrong := nonfinite(tensors):
        raise Unfit(f"NaN or infinite values in {wrong}; expected finite weights: did the training diverge?")
    other_keys = [key for key in content if isinstance(key, str) and key != container]
    return tensors, {key: content[key] for key in other_keys if not isinstance(content[key], Tensor | Array)}


def _arrays(entries: Any) -> dict[str, Any]:
    pairs = entries.items() if isinstance(entries, dict) else ()
    return {key: value for key, value in pairs if isinstance(key, str) and isinstance(value, Tensor | Array)}


def _tensor(array: Any) -> Tensor:
    value = array.value if isinstance(array, Array) else array
    if isinstance(
        value, np.ndarray
    ):  # np.array copies: from_numpy takes neither read-only arrays nor other byte orders
        value = torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    return value.float() if value.is_floating_point() else value
