"""Read pickles of arrays and tensors without running anything that they name, in memory that the file's size bounds.

A pickle names functions to call.  This code never looks them up: stand-ins take the place of the few names that arrays
and tensors need, and a file that asks for anything else is refused.  What stand-ins make counts against the room of
the file: without a limit, a few bytes that name one text again and again would fill all memory.
"""

import math
import pickle
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")  # the types read, by numpy's names
STORAGES = {  # torch's names for memory of one type
    "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip


class Unfit(Exception):
    """What is wrong with a file; read_weights adds the file's name."""


class Typed:
    """Stand in for numpy.dtype: numbers only."""

    def __init__(self, name: str, *flags: object) -> None:
        if not isinstance(name, str) or name not in NUMBERS:
            kind = name if isinstance(name, str) else "?"
            raise Unfit(f"refused: an array of numpy type {kind}; only numbers are read, nothing was run")
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class Stored(NamedTuple):
    """Stand in for a storage of torch: memory of one type."""

    values: Tensor  # (n,)


class Array:
    """Stand in for numpy.ndarray and torch.Tensor; `value` is the array or the tensor."""

    value: Any
    names: "Names"

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, is_fortran, data = state
        self.value = self.names.numpy_array(dtype, data, shape, "F" if is_fortran else "C")


class Ordered(dict[Any, Any]):
    """Stand in for collections.OrderedDict."""

    def __setstate__(self, state: Any) -> None:
        """Leave out the attributes that torch gives to the dicts of its modules."""


class Names:
    """The stand-ins of one file, by the names that they stand for.

    They are classes and bound methods: a pickle could change the defaults of a plain function.
    """

    def __init__(self, room: int, torch_too: bool) -> None:
        """room: bytes that they may make, the size of the file.  torch_too: know torch's names, not numpy's alone."""
        self.room = room
        self.known: dict[str, Any] = {
            **{f"numpy.{core}.multiarray._reconstruct": self.array for core in ("core", "_core")},
            **{f"numpy.{core}.multiarray.scalar": self.scalar for core in ("core", "_core")},
            **{f"numpy.{core}.numeric._frombuffer": self.from_buffer for core in ("core", "_core")},
            **{"numpy.ndarray": Array, "numpy.dtype": Typed, "collections.OrderedDict": Ordered},
            **{"_codecs.encode": self.encoded, "builtins.bytes": self.no_bytes, "__builtin__.bytes": self.no_bytes},
        }
        if torch_too:
            self.known |= {
                **{f"torch.{name}Storage": dtype for name, dtype in STORAGES.items()},
                **{f"torch._utils._rebuild_tensor{version}": self.tensor for version in ("", "_v2")},
                **{f"torch._utils._rebuild_parameter{state}": self.parameter for state in ("", "_with_state")},
                **{"torch._tensor._rebuild_from_type_v2": self.of_type, "torch.Tensor": Array},
                **{"torch.nn.parameter.Parameter": Array, "torch.Size": self.plain, "torch.device": self.plain},
                **{"builtins.set": set, "__builtin__.set": set, "collections.Counter": dict},
                **{str(dtype): dtype for dtype in STORAGES.values()},
            }

    def take(self, num: int) -> None:
        """Use up some of the room.  Raises Unfit if that is more than is left."""
        self.room -= num
        if self.room < 0:
            raise Unfit("refused: its content claims more bytes than the file has")

    def array(self, kind: object, *empty: object) -> Array:
        """Stand in for numpy's function that creates an array to fill."""
        if kind is not Array:
            raise ValueError("an array of another class than numpy.ndarray")
        array = Array()
        array.names = self
        return array

    def from_buffer(self, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> Array:
        """Stand in for numpy's function of protocol 5; axes: the permutation that recent numpy uses for order "K"."""
        array = Array()
        value = self.numpy_array(dtype, data, shape, "C" if axes else order)
        array.value = value.transpose(axes or range(len(shape)))
        return array

    def scalar(self, dtype: Any, data: Any) -> Any:
        """Stand in for numpy's function that creates a number."""
        return self.numpy_array(dtype, data, (), "C").item()

    def numpy_array(self, dtype: Any, data: Any, shape: Any, order: Any) -> np.ndarray:
        """Make an array from bytes (Python 2: latin1 text) after checking shape, type and size against them."""
        if not isinstance(dtype, Typed) or not isinstance(data, str | bytes):
            raise ValueError("an array whose parts are not bytes and a type")
        if not is_shape(shape):
            raise ValueError("an array whose shape is not whole numbers")
        raw = self.encoded(data, "latin1") if isinstance(data, str) else data
        kind = np.dtype(dtype.order + dtype.name)
        if len(raw) != math.prod(shape) * kind.itemsize:
            raise ValueError(f"an array of shape {shape} and type {kind.name} in {len(raw)} bytes")
        return np.frombuffer(raw, kind).reshape(shape, order=order)

    def encoded(self, text: Any, encoding: Any) -> bytes:
        """Stand in for what makes the bytes of protocols 0 to 2; other encodings could swell what they get."""
        if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
            raise ValueError("bytes that are not written as latin1 text")
        self.take(len(text))
        return text.encode("latin1")

    def no_bytes(self) -> bytes:
        """Stand in for the class of bytes, which protocols 0 to 2 call for b"" only."""
        return b""

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, *rest: object) -> Array:
        """Stand in for torch's function that makes a tensor of a part of a storage.

        Raises ValueError if the part reaches beyond the storage.
        """
        if not isinstance(storage, Stored) or not (is_shape(shape) and is_shape(strides) and is_shape((offset,))):
            raise ValueError("a tensor whose parts are not a storage and whole numbers")
        last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
        if 0 not in shape and last >= len(storage.values):
            raise ValueError(f"a tensor of shape {list(shape)} reaches beyond its {len(storage.values)} stored values")
        array = Array()
        array.value = storage.values.as_strided(shape, strides, storage.values.storage_offset() + offset)
        return array

    def parameter(self, data: Any, *rest: object) -> Any:
        """Stand in for torch's function that makes a parameter of a tensor."""
        return data

    def of_type(self, function: Any, kind: Any, arguments: Any, *state: object) -> Any:
        """Stand in for torch's function that makes a tensor with attributes, which are left out."""
        if function not in (self.tensor, self.parameter):
            raise ValueError("a tensor of an unknown class")
        return function(*arguments)

    def plain(self, *parts: object) -> tuple[object, ...]:
        """Stand in for small classes of torch that no weight needs."""
        return parts


def is_shape(shape: Any) -> bool:
    """Return whether a value is a tuple of whole numbers, 0 or more."""
    return isinstance(shape, tuple) and all(type(side) is int and side >= 0 for side in shape)


class Unpickler(pickle._Unpickler):
    """An unpickler that finds only the stand-ins.

    It is Python's unpickler, not C's, because C's would fill all memory if a damaged file names a huge memo slot.
    """

    # load_bytearray8 would allocate whatever length a damaged file claims
    dispatch = pickle._Unpickler.dispatch | {pickle.BYTEARRAY8[0]: pickle._Unpickler.dispatch[pickle.BINBYTES8[0]]}

    def __init__(self, file: BinaryIO, names: Names, stored: Callable[..., Tensor] | None = None) -> None:
        """stored: for files of torch.save, returns the values (n,) of a storage from its (type, key, n, part)."""
        super().__init__(file, encoding="latin1")
        self.names, self.stored = names, stored

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name.  Raises Unfit if there is none."""
        asked = f"{module}.{name}"
        if asked in self.names.known:
            return self.names.known[asked]
        if self.stored is None:
            only = "only numpy arrays and plain containers are read, nothing was run"
            raise Unfit(f"refused: the pickle asks for {asked}; {only}")
        if asked.startswith("torch._utils._rebuild"):
            raise Unfit(f"holds a sparse or quantized tensor, or one without values ({asked}); expected dense values")
        raise Unfit(
            f"refused: the file asks for {asked}; only tensors and plain containers are read, nothing was run: "
            f"it is a whole nn.Module or a training checkpoint with objects of {asked.partition('.')[0]}; save "
            "model.state_dict()"
        )

    def persistent_load(self, pid: Any) -> Any:
        """Return the storage that a file of torch.save refers to."""
        if self.stored is None or not isinstance(pid, tuple) or pid[0] != "storage":
            raise ValueError("a reference to something outside the pickle")
        _, dtype, key, _, num, *part = pid
        if not isinstance(dtype, torch.dtype) or not isinstance(key, str) or not is_shape((num,)):
            raise ValueError("a storage whose parts are not a type, a name and a number of values")
        return Stored(self.stored(dtype, key, num, part[0] if part else None))
