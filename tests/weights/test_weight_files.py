"""Weight files of other toolkits are read as they were written, and nothing that they hold is ever run."""

import errno
import os
import pickle
import re
import resource
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gndet.errors import CheckpointError, OutputError
from gndet.weights.foreign.files import read_weights, write_torch

PROTOCOLS = (0, 1, 2, 3, 4, 5)
ARRAYS = {
    "c": np.arange(6, dtype="f4").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6, dtype="f4").reshape(2, 3) + 0.5),
    "permuted": np.arange(24, dtype="f4").reshape(2, 3, 4).transpose(2, 0, 1),
    "strided": np.arange(24, dtype="f4").reshape(4, 6)[::2, ::3],
    "big endian": np.array([[1.5, -2, 3]], dtype=">f4"),
    "big endian int": np.array([1, -2, 2**40], dtype=">i8"),
    "half": np.array([0.5, -65504, 6e-8], dtype="f2"),
    "double": np.array([1 / 3, -1e30]),
    "scalar": np.array(7.25, dtype="f4"),
    "scalar int": np.array(2**60),
    "empty": np.zeros((0, 3), dtype="f4"),
    "int8": np.array([-128, 127], dtype="i1"),
    "uint8": np.array([255, 0], dtype="u1"),
    "bool": np.array([True, False]),
    "read only": np.frombuffer(b"\x00\x00\x80?", "f4"),
    "all bytes": np.arange(256, dtype="u1"),
}


def pickled(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def zipped(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def legacy(path: Path, content: Any) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


TORCH = {"zip": zipped, "legacy": legacy}
WRITERS: dict[str, Callable[[Path, Any], Path]] = {**TORCH, "pickle": pickled}


def assert_equal(got: dict[str, Tensor], expected: dict[str, np.ndarray]) -> None:
    assert got.keys() == expected.keys()
    for key, array in expected.items():
        truth = array.astype("f4") if array.dtype.kind == "f" else array
        assert got[key].dtype == (torch.float32 if array.dtype.kind == "f" else got[key].dtype), key
        assert got[key].shape == array.shape and np.array_equal(got[key].numpy(), truth), key
        assert got[key].is_contiguous() and got[key].numpy().dtype == truth.dtype.newbyteorder("="), key


def failure(path: Path) -> str:
    """Read a file that must be refused; return the error's text, which must name the file."""
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


# What is read


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickled_arrays_come_back_value_for_value(tmp_path: Path, protocol: int) -> None:
    loaded = read_weights(pickled(tmp_path / "a.pkl", ARRAYS, protocol))
    assert loaded.extras == {}
    assert_equal(loaded.tensors, ARRAYS)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_names_of_numpy_1_are_understood(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps({"w": ARRAYS["fortran"], "lr": np.float32(0.5)}, protocol)
    old = data.replace(b"numpy._core.", b"numpy.core.").replace(b"\x8c\x16numpy.core.m", b"\x8c\x15numpy.core.m")
    old = old.replace(b"\x8c\x13numpy.core.n", b"\x8c\x12numpy.core.n")
    frame = old.find(b"\x95")  # protocols 4 and 5: its length counts the bytes that follow it
    if protocol > 3:
        old = old[: frame + 1] + (len(old) - frame - 9).to_bytes(8, "little") + old[frame + 9 :]
    (tmp_path / "a.pkl").write_bytes(old)
    loaded = read_weights(tmp_path / "a.pkl")
    assert_equal(loaded.tensors, {"w": ARRAYS["fortran"]})
    assert loaded.extras == {"lr": 0.5} and b"numpy.core" in old and b"_core" not in old


def python_2(name: str, array: np.ndarray) -> bytes:
    """Pickle {"blobs": {name: array}} as Python 2 did, with both text and raw data as byte strings."""
    raw = array.tobytes()
    return b"".join(
        [
            *(b"\x80\x02}U\x05blobs}U", bytes([len(name)]), name.encode(), b"cnumpy.core.multiarray\n_reconstruct\n"),
            *(b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01(", *(bytes([75, side]) for side in array.shape), b"t"),
            *(b"cnumpy\ndtype\nU\x02", array.dtype.str[1:].encode(), b"K\x00K\x01\x87R(K\x03U\x01<NNN"),
            *(b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T", len(raw).to_bytes(4, "little"), raw, b"tbss."),
        ]
    )


@pytest.mark.parametrize("array", [np.array([[1.5, -3e38], [255, 1e-40]], dtype="<f4"), np.arange(2**16 - 9, 2**16)])
def test_arrays_of_python_2_come_back(tmp_path: Path, array: np.ndarray) -> None:
    data = python_2("conv1_w", array)
    assert np.array_equal(pickle.loads(data, encoding="latin1")["blobs"]["conv1_w"], array)
    (tmp_path / "a.pkl").write_bytes(data)
    assert_equal(read_weights(tmp_path / "a.pkl").tensors, {"conv1_w": array})


@pytest.mark.parametrize("kind", TORCH)
def test_torch_files_come_back_value_for_value(tmp_path: Path, kind: str) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {
        "float": torch.tensor([1.5, -0.0]),
        "half": torch.tensor([1.5, 2]).half(),
        "bf16": torch.tensor([1.5, 2]).bfloat16(),
        "double": torch.tensor([1 / 3], dtype=torch.float64),
        "int": torch.tensor(2**60),
        "bool": torch.tensor([True]),
        "parameter": nn.Parameter(torch.ones(2)),
        "view": base[1:].t(),
        "base": base,
    }
    loaded = read_weights(TORCH[kind](tmp_path / "a.pth", OrderedDict(state)))
    assert loaded.tensors.keys() == state.keys()
    for key, tensor in state.items():
        truth = tensor.detach().float() if tensor.is_floating_point() else tensor
        assert loaded.tensors[key].dtype == truth.dtype and torch.equal(loaded.tensors[key], truth), key
        assert type(loaded.tensors[key]) is Tensor and not loaded.tensors[key].requires_grad


def test_safetensors_come_back_with_their_metadata(tmp_path: Path) -> None:
    tensors = {"w": torch.tensor([[1.5, 2]]).half(), "n": torch.tensor(3)}
    save_file(tensors, tmp_path / "a.safetensors", {"author": "me"})
    loaded = read_weights(tmp_path / "a.safetensors")
    assert loaded.tensors.keys() == {"w", "n"} and loaded.extras == {"author": "me"}
    assert torch.equal(loaded.tensors["w"], torch.tensor([[1.5, 2.0]])) and loaded.tensors["n"].dtype == torch.int64


def test_the_content_decides_and_not_the_suffix(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "a.bin")
    zipped(tmp_path / "b.safetensors", {"w": torch.ones(2)})
    legacy(tmp_path / "c.pkl", {"w": torch.ones(2)})
    pickled(tmp_path / "d.pth", {"w": np.ones(2)})
    for path in sorted(tmp_path.iterdir()):
        assert_equal(read_weights(path).tensors, {"w": np.ones(2)})


@pytest.mark.parametrize("kind", TORCH)
def test_numpy_in_a_torch_file_is_read(tmp_path: Path, kind: str) -> None:
    arrays = {key: ARRAYS[key] for key in ("c", "fortran", "big endian", "scalar", "half")}
    meta = {"epoch": np.int64(3), "lr": np.float64(0.1), "CLASSES": ("a", "b"), "palette": [(1, 2)], "hist": np.ones(2)}
    loaded = read_weights(TORCH[kind](tmp_path / "a.pth", {"meta": meta, "state_dict": arrays}))
    assert_equal(loaded.tensors, arrays)
    found = loaded.extras["meta"]
    assert np.array_equal(found.pop("hist").value, meta.pop("hist"))
    assert loaded.extras == {"meta": meta} and type(found["lr"]) is float


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("container", ["blobs", "model", "state_dict", "flat"])
def test_tensors_are_found_in_their_container(tmp_path: Path, kind: str, container: str) -> None:
    entries = {"module.w": np.ones(2), "b": np.zeros(1), "n": 3}
    tensors = entries if kind == "pickle" else {k: torch.tensor(v) if k != "n" else v for k, v in entries.items()}
    others = {"__author__": "x", "matching_heuristics": True, "cfg": {"lr": [0.1, None]}, "optimizer": {"lr": 1}}
    content = {**others, **tensors} if container == "flat" else {**others, container: tensors}
    loaded = read_weights(WRITERS[kind](tmp_path / "a.x", content))
    assert loaded.path == tmp_path / "a.x"
    assert_equal(loaded.tensors, {"w": np.ones(2), "b": np.zeros(1)})
    assert loaded.extras == others | ({"n": 3} if container == "flat" else {})


def test_entries_without_a_name_are_left_out(tmp_path: Path) -> None:
    loaded = read_weights(pickled(tmp_path / "a.pkl", {"w": np.ones(2), 3: np.ones(2), None: 1, ("a",): 1}))
    assert loaded.tensors.keys() == {"w"} and loaded.extras == {}


def test_tensors_do_not_change_with_the_file_that_they_came_from(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(10_000)}, path)
    loaded = read_weights(path)
    with open(path, "r+b") as file:  # safetensors maps files into memory
        file.write(bytes(path.stat().st_size))
    assert loaded.tensors["w"].sum() == 10_000


def test_momentum_of_detectron_is_dropped_and_only_there(tmp_path: Path) -> None:
    blobs = {"conv1_w": np.ones(2), "conv1_w_momentum": np.full(2, np.nan)}
    assert read_weights(pickled(tmp_path / "a.pkl", {"blobs": blobs})).tensors.keys() == {"conv1_w"}
    assert read_weights(zipped(tmp_path / "a.pth", {"ema_momentum": torch.ones(1)})).tensors.keys() == {"ema_momentum"}


# What is refused


class Call:
    """An object whose pickle calls a function when pickle.load reads it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.parts = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.parts


ATTACKS: dict[str, Callable[[Path], Call]] = {
    "system": lambda canary: Call(os.system, f"touch {canary}"),
    "eval": lambda canary: Call(eval, f"open({str(canary)!r}, 'w')"),
    "open": lambda canary: Call(open, str(canary), "w"),
    "mkdir": lambda canary: Call(os.mkdir, str(canary)),
    "numpy.save": lambda canary: Call(np.save, f"{canary}.npy", 1),
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("kind", [*TORCH, *PROTOCOLS])
def test_nothing_that_a_file_asks_for_is_run(tmp_path: Path, kind: str | int, attack: str, nested: bool) -> None:
    call = ATTACKS[attack](tmp_path / "canary")
    content = {"model": {"w": np.ones(2), "x": call}} if nested else call
    if isinstance(kind, int):
        path, expected = pickled(tmp_path / "a.pkl", content, kind), f"the pickle asks for [a-z_]*\\.?{attack};"
    else:
        path, expected = TORCH[kind](tmp_path / "a.pth", content), f"the file asks for ([a-z_]*\\.)?{attack};"
    text = failure(path)
    assert re.match(f"refused: {expected} only .* are read, nothing was run", text)
    assert not list(tmp_path.glob("canary*"))
    if kind != "legacy":  # the same bytes do harm if trusted, otherwise this test would prove nothing
        torch.load(path, weights_only=False) if kind == "zip" else pickle.loads(path.read_bytes())
        assert list(tmp_path.glob("canary*"))


@pytest.mark.parametrize("name", ["os\nsystem", "posix\nsystem", "__builtin__\neval", "numpy\nload", "torch\nload"])
def test_the_error_names_what_the_pickle_asks_for(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.pkl").write_bytes(b"c" + name.encode() + b"\n(S'x'\ntR.")
    asked = name.replace("\n", ".")
    only = "only numpy arrays and plain containers are read, nothing was run"
    assert failure(tmp_path / "a.pkl") == f"refused: the pickle asks for {asked}; {only}"


@pytest.mark.parametrize(
    "array",
    [
        np.array([None, Call(os.system, "true")]),
        np.array(["text"]),
        np.array([b"bytes"]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        np.array([1j]),
        np.zeros(2, dtype=[("a", "f4")]),
    ],
    ids=lambda array: str(array.dtype),
)
@pytest.mark.parametrize("kind", ["zip", 0, 2, 5])
def test_arrays_of_anything_but_numbers_are_refused(tmp_path: Path, array: np.ndarray, kind: str | int) -> None:
    content = {"w": np.ones(2), "x": array}
    path = zipped(tmp_path / "a", content) if kind == "zip" else pickled(tmp_path / "a", content, int(kind))
    assert failure(path).startswith("refused: ")


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
F4 = b"cnumpy\ndtype\n(S'f4'\nI0\nI1\ntR(I3\nS'<'\nNNNI-1\nI-1\nI0\ntb"
FORGED = {
    "too few bytes": RECONSTRUCT + b"(I1\n(I2\nt" + F4 + b"I00\nS'abcd'\ntb",
    "too many bytes": RECONSTRUCT + b"(I1\n(I1\nt" + F4 + b"I00\nS'abcdefgh'\ntb",
    "negative sides": RECONSTRUCT + b"(I1\n(I-1\nI-1\nt" + F4 + b"I00\nS'abcd'\ntb",
    "side of text": RECONSTRUCT + b"(I1\n(S'1'\nt" + F4 + b"I00\nS'abcd'\ntb",
    "huge": RECONSTRUCT + b"(I1\n(I9999999999\nI9999999999\nt" + F4 + b"I00\nS'abcd'\ntb",
    "shape is a number": RECONSTRUCT + b"(I1\nI1\n" + F4 + b"I00\nS'abcd'\ntb",
    "many sides": RECONSTRUCT + b"(I1\n(" + b"I1\n" * 100 + b"t" + F4 + b"I00\nS'abcd'\ntb",
    "data is a list": RECONSTRUCT + b"(I1\n(I1\nt" + F4 + b"I00\n(lI1\natb",
    "no text of bytes": RECONSTRUCT + b"(I1\n(I1\nt" + F4 + b"I00\nV\\u1234abc\ntb",
    "type is text": RECONSTRUCT + b"(I1\n(I1\ntS'f4'\nI00\nS'abcd'\ntb",
    "state is None": RECONSTRUCT + b"Nb",
    "state is a dict": RECONSTRUCT + b"(dS'value'\nS'x'\nsb",
    "never filled": RECONSTRUCT,
    "made without arguments": b"cnumpy\nndarray\n)\x81",
    "another class": RECONSTRUCT.replace(b"ndarray", b"dtype") + b"(I1\n(I1\nt" + F4 + b"I00\nS'abcd'\ntb",
    "type of odd order": RECONSTRUCT + b"(I1\n(I1\nt" + F4.replace(b"'<'", b"'O'") + b"I00\nS'abcd'\ntb",
    "type of a list": b"cnumpy\ndtype\n((ltR",
    "state for a class": b"cnumpy\nndarray\n(dS'value'\nI1\nsb",
    "state for the instance's class": b"cnumpy\ndtype\n(N(dS'__init__'\nI1\nstb",
    "state for a dict": b"(d(N(dS'items'\nI1\nstb",
    "scalar of a type that is none": b"cnumpy.core.multiarray\nscalar\n(S'f4'\nS'abcd'\ntR",
    "scalar of two": b"cnumpy.core.multiarray\nscalar\n(" + F4 + b"S'abcdefgh'\ntR",
    "buffer of odd order": b"cnumpy._core.numeric\n_frombuffer\n(S'abcd'\n" + F4 + b"(I1\ntS'Q'\ntR",
    "buffer of odd axes": b"cnumpy._core.numeric\n_frombuffer\n(S'abcd'\n" + F4 + b"(I1\ntS'K'\n(I5\nttR",
    "persistent id": b"Pstorage\n",
    "extension code": b"\x82\x01",
    "out of band": b"\x97",
    "huge frame": b"\x95" + (2**62).to_bytes(8, "little"),
    "unhashable key": b"((lI1\ntd" + b"((lI1\nd",
    "no such memo": b"g77\n",
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_pickles_are_one_clear_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.pkl").write_bytes(b"(dS'w'\n" + FORGED[name] + b"s.")
    text = failure(tmp_path / "a.pkl")
    assert text.startswith(("damaged or truncated: ", "refused: an array of numpy type ?;"))


def test_an_array_that_its_bytes_do_not_fill_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.pkl").write_bytes(b"(dS'w'\n" + FORGED["too few bytes"] + b"s.")
    assert "ValueError: an array of shape (2,) and type float32 in 4 bytes; expected" in failure(tmp_path / "a.pkl")
    (tmp_path / "a.pkl").write_bytes(b"(dS'w'\n" + FORGED["negative sides"] + b"s.")
    assert "ValueError: an array whose shape is not whole numbers; expected" in failure(tmp_path / "a.pkl")


def test_a_pickle_cannot_change_how_the_next_one_is_read(tmp_path: Path) -> None:
    attack = b"cnumpy._core.numeric\n_frombuffer\n(N(dS'__defaults__'\n((I1\nI0\ntts" + b"tb."
    (tmp_path / "a.pkl").write_bytes(attack)
    assert failure(tmp_path / "a.pkl").startswith("damaged or truncated: ")
    loaded = read_weights(pickled(tmp_path / "b.pkl", {"w": ARRAYS["c"]}, 5))
    assert_equal(loaded.tensors, {"w": ARRAYS["c"]})


CLAIMS = {
    "memo slot": b"r" + (2**26).to_bytes(4, "little"),
    "bytearray": b"\x96" + (2**30).to_bytes(8, "little"),
    "bytes": b"\x8e" + (2**30).to_bytes(8, "little"),
    "text": b"X" + (2**30).to_bytes(4, "little"),
    "frame": b"\x95" + (2**30).to_bytes(8, "little"),
}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_size_that_a_file_only_claims_takes_no_memory(tmp_path: Path, name: str) -> None:
    (tmp_path / "a.pkl").write_bytes(b"\x80\x05}" + CLAIMS[name] + b"X\x01\x00\x00\x00nK\x01s.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failure(tmp_path / "a.pkl")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB; each claim would take 1 GiB


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Any]:
    """Make objects whose classes are in packages that no longer exist when the file is read."""

    def make(module: str, name: str) -> Any:
        kind = type(name, (), {"__module__": module})
        parts = module.split(".")
        for depth in range(len(parts)):
            package = ".".join(parts[: depth + 1])
            monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
        setattr(sys.modules[module], name, kind)
        return kind()

    return make


@pytest.mark.parametrize("kind", TORCH)
def test_objects_of_a_toolkit_are_named_with_the_way_out(
    tmp_path: Path, kind: str, foreign: Callable[[str, str], Any]
) -> None:
    buffer = foreign("mmengine.logging.history_buffer", "HistoryBuffer")
    path = TORCH[kind](tmp_path / "a.pth", {"state_dict": {"w": torch.ones(2)}, "message_hub": {"loss": buffer}})
    text = failure(path)
    assert text.startswith("refused: the file asks for mmengine.logging.history_buffer.HistoryBuffer; only tensors")
    assert "nothing was run" in text and "training checkpoint with objects of mmengine" in text
    assert text.endswith("save model.state_dict()")


@pytest.mark.parametrize("kind", TORCH)
@pytest.mark.filterwarnings("ignore")
def test_a_whole_module_is_refused_with_the_way_out(tmp_path: Path, kind: str) -> None:
    text = failure(TORCH[kind](tmp_path / "a.pth", nn.Sequential(nn.Linear(2, 2))))
    assert text.startswith("refused: the file asks for torch.nn.modules.container.Sequential; ")
    assert "whole nn.Module" in text and "save model.state_dict()" in text


@pytest.mark.filterwarnings("ignore")
def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), str(tmp_path / "a.pt"))
    assert failure(tmp_path / "a.pt").startswith("a TorchScript archive, which is a program; expected weights: save")


ODD_TENSORS: dict[str, Callable[[], Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.ones(2, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
}


@pytest.mark.parametrize("name", ODD_TENSORS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_values_are_refused(tmp_path: Path, name: str) -> None:
    text = failure(zipped(tmp_path / "a.pth", {"w": ODD_TENSORS[name]()}))
    assert text.startswith("holds a sparse or quantized tensor, or one without values (torch._utils._rebuild_")


def test_files_that_are_not_weight_files_are_distinguished(tmp_path: Path) -> None:
    expected = "expected a file of torch.save, a .safetensors, an .npz or a pickle of numpy arrays"
    path = tmp_path / "a.pth"
    assert failure(path) == f"cannot read it: No such file or directory; {expected}"
    path.mkdir()
    assert failure(path) == f"cannot read it: Is a directory; {expected}"
    path.rmdir()
    contents = {
        b"": "empty, 0 bytes; expected a file of torch.save",
        b"\n<!DOCTYPE html><html>": "an HTML page: was the download a web page?",
        b"\xef\xbb\xbf<html>": "an HTML page: was the download a web page?",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7\n": "a git-lfs pointer, not the file itself;",
        b"some text of no kind": "damaged or truncated: ",
        b"\x1f\x8b\x08\x00gzip": "damaged or truncated: ",
    }
    for content, text in contents.items():
        path.write_bytes(content)
        assert failure(path).startswith(text) and expected in failure(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "x")
    assert failure(path) == f"a zip of readme.txt; {expected}: should it be unpacked?"


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_without_tensors_says_what_it_holds(tmp_path: Path, kind: str) -> None:
    write, path = WRITERS[kind], tmp_path / "a"
    assert failure(write(path, [1, 2])) == "holds a list; expected a dict of tensors by name"
    assert failure(write(path, {})).startswith("no tensors: a dict of nothing; expected tensors by name, alone or in ")
    assert failure(write(path, {"epoch": 3, "model": {}})).startswith("no tensors: a dict of epoch, model; ")


def test_two_names_that_become_one_are_an_error(tmp_path: Path) -> None:
    path = pickled(tmp_path / "a.pkl", {"w": np.ones(1), "module.w": np.zeros(1)})
    assert failure(path) == "holds both w and module.w; expected one of them"


@pytest.mark.parametrize("kind", [*WRITERS, "safetensors"])
def test_values_that_are_not_finite_are_named(tmp_path: Path, kind: str) -> None:
    state = {f"w{i}": torch.tensor([1, [torch.nan, torch.inf][i % 2], -torch.inf]) for i in range(6)}
    state |= {"fine": torch.ones(2), "n": torch.tensor(2**63 - 1)}
    if kind == "safetensors":
        save_file(state, tmp_path / "a")
    else:
        arrays = {key: value.numpy() for key, value in state.items()}
        WRITERS[kind](tmp_path / "a", arrays if kind == "pickle" else state)
    listed = ", ".join(f"w{i} (2 of 3)" for i in range(5))
    expected = f"NaN or infinite values in 6 tensors: {listed}, ...; expected finite weights: did the training diverge?"
    assert failure(tmp_path / "a") == expected


def test_doubles_beyond_float32_are_not_finite(tmp_path: Path) -> None:
    assert failure(pickled(tmp_path / "a.pkl", {"w": np.array([1e300])})).startswith(
        "NaN or infinite values in w (1 of"
    )


# Damage


def whole_files(folder: Path) -> list[Path]:
    arrays = {"w": ARRAYS["c"], "f": ARRAYS["fortran"], "n": np.int64(3)}
    tensors = {"model": {"w": torch.arange(6.0), "h": torch.ones(2).half()}, "meta": {"lr": np.float32(1)}, "x": "text"}
    (folder / "python2").write_bytes(python_2("conv1_w", ARRAYS["c"]))
    save_file({"w": torch.ones(3), "n": torch.tensor(2)}, folder / "a.safetensors", {"a": "b"})
    paths = [pickled(folder / f"protocol{protocol}", {"model": arrays}, protocol) for protocol in PROTOCOLS]
    return [*paths, folder / "python2", folder / "a.safetensors", *(TORCH[k](folder / k, tensors) for k in TORCH)]


@pytest.mark.filterwarnings("ignore")
def test_a_file_cut_anywhere_is_an_error(tmp_path: Path) -> None:
    for path in whole_files(tmp_path):
        whole = path.read_bytes()
        assert read_weights(path).tensors
        for length in reversed(range(len(whole))):
            os.truncate(path, length)
            text = failure(path)
            assert text.startswith(("damaged or truncated: ", "empty, 0 bytes")), (path.name, length, text)


@pytest.mark.filterwarnings("ignore")
def test_a_file_with_a_wrong_byte_is_read_or_is_one_clear_error(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for path in whole_files(tmp_path):
        whole = path.read_bytes()
        for position in range(0, len(whole), 1 + len(whole) // 400):
            with open(path, "r+b") as file:
                file.seek(position)
                file.write(generator.bytes(1))
            try:
                read_weights(path)
            except CheckpointError as error:
                assert str(error).startswith(f"{path}: ")
            with open(path, "r+b") as file:
                file.write(whole)


# Writing


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_torch(tmp_path / "a.pth", {"model": {"w": torch.ones(2).half()}, "__author__": "x"})
    assert torch.load(tmp_path / "a.pth", weights_only=True)["model"]["w"].dtype == torch.float16
    loaded = read_weights(tmp_path / "a.pth")
    assert loaded.extras == {"__author__": "x"}
    assert_equal(loaded.tensors, {"w": np.ones(2)})


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_full_disk_is_one_clear_error_and_the_old_file_stays(tmp_path: Path, step: str) -> None:
    path = tmp_path / "a"
    write_torch(path, {"w": torch.ones(2)})
    with pytest.MonkeyPatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr(os, step, fail)
        with pytest.raises(OutputError, match="/a: cannot write it: No space left on device"):
            write_torch(path, {"w": torch.zeros(2)})
    assert os.listdir(tmp_path) == ["a"]
    assert_equal(read_weights(path).tensors, {"w": np.ones(2)})


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name, reason in {"none/a": "No such file", "file/a": "Not a directory", "folder": "Is a directory"}.items():
        with pytest.raises(OutputError, match=f"{name}: cannot write it: {reason}"):
            write_torch(tmp_path / name, {"w": torch.ones(2)})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
