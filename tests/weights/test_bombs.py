"""A weight file takes memory in proportion to its size: what claims or repeats more than it holds is refused."""

import io
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gndet.errors import CheckpointError
from gndet.weights.foreign.files import read_weights

HUGE = 1 << 29  # values; 2 GiB of float32
UNPICKLED = b"\x80\x02}X\x01\x00\x00\x00w%s\x73."  # {"w": ...}


def saved(**tensors: torch.Tensor) -> dict[str, bytes]:
    """Return the records of a file that torch.save wrote."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(path: Path, records: dict[str, bytes], compressed: str = "") -> Path:
    """Write records as a zip; compressed: the end of the names of those to compress."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            squeezed = bool(compressed) and name.endswith(compressed)
            archive.writestr(name, content, zipfile.ZIP_DEFLATED if squeezed else zipfile.ZIP_STORED)
    return path


def claiming(records: dict[str, bytes], old: bytes, new: bytes) -> dict[str, bytes]:
    """Change what data.pkl claims."""
    changed = {name: data.replace(old, new) if name.endswith("data.pkl") else data for name, data in records.items()}
    assert changed != records
    return changed


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def compressed_values(path: Path) -> Path:
    return packed(path, saved(w=torch.zeros(1 << 20)), "data/0")


def compressed_pickle(path: Path) -> Path:
    return packed(path, saved(w=torch.zeros(16)), "data.pkl")


def fewer_values_than_claimed(path: Path) -> Path:
    return packed(path, claiming(saved(w=torch.zeros(16)), b"K\x10", number(HUGE)))


def many_claims_on_one_record(path: Path) -> Path:
    """Let a thousand entries of the directory name the same bytes."""
    names = {f"w{i:04}": torch.zeros(1 << 12) for i in range(1000)}
    records = saved(**names)
    first = next(name for name in records if name.endswith("/data/0"))
    packed(path, {name: data if name == first or "/data/" not in name else b"" for name, data in records.items()})
    content = bytearray(path.read_bytes())
    entries, start = {}, 0
    while (start := content.find(b"PK\x01\x02", start)) >= 0:
        length = struct.unpack_from("<H", content, start + 28)[0]
        entries[content[start + 46 : start + 46 + length].decode()] = start
        start += 46
    for name, at in entries.items():
        if "/data/" in name:  # CRC, sizes, and where the record begins
            content[at + 16 : at + 28] = content[entries[first] + 16 : entries[first] + 28]
            content[at + 42 : at + 46] = content[entries[first] + 42 : entries[first] + 46]
    path.write_bytes(content)
    return path


def repeated_values(path: Path) -> Path:
    """Let strides of 0 read one value 2^29 times."""
    return packed(path, claiming(saved(w=torch.zeros(1).expand(2)), b"K\x02\x85", number(HUGE) + b"\x85"))


def many_tensors_of_one_storage(path: Path) -> Path:
    storage = torch.zeros(1 << 16)
    return packed(path, saved(**{f"w{i}": storage[i:] for i in range(4000)}))


def legacy_claim(path: Path) -> Path:
    torch.save({"w": torch.zeros(16)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"K\x10", number(HUGE)).replace(struct.pack("<q", 16), struct.pack("<q", HUGE)))
    return path


def array(text: bytes) -> bytes:
    """Return the pickle of a uint8 array of 2^20 bytes, which text yields."""
    start = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
    kind = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    return start + b"(I1\n(I%d\nt" % (1 << 20) + kind + b"I00\n" + text + b"tb"


def text_of_many_arrays(path: Path) -> Path:
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x01"
    arrays = [array(text if i == 0 else b"h\x01") for i in range(2000)]
    entries = [b"X" + struct.pack("<I", 5) + b"w%04d" % i + one + b"s" for i, one in enumerate(arrays)]
    path.write_bytes(b"\x80\x02}" + b"".join(entries) + b".")
    return path


def encoded(encoding: bytes, times: int) -> bytes:
    """Return a pickle that encodes a text of 1 kB again and again; "hex" doubles it each time."""
    first = b"X" + struct.pack("<I", 1000) + b"a" * 1000
    return b"c_codecs\nencode\n(" * times + first + b"".join(b"V%s\ntR" % encoding for _ in range(times))


def swelling(path: Path) -> Path:
    path.write_bytes(UNPICKLED % encoded(b"utf-32", 1))
    assert "not written as latin1" in refusal(path)
    path.write_bytes(UNPICKLED % encoded(b"hex", 22))
    return path


def swelling_in_a_torch_file(path: Path) -> Path:
    records = saved(w=torch.zeros(16))
    hidden = {name: UNPICKLED % encoded(b"hex", 22) for name in records if name.endswith("data.pkl")}
    return packed(path, records | hidden)


def bytes_by_number(path: Path) -> Path:
    path.write_bytes(UNPICKLED % b"c__builtin__\nbytes\n(J%stR" % struct.pack("<i", HUGE))
    return path


BOMBS: dict[Callable[[Path], Path], str] = {
    compressed_values: "its records are compressed, as torch.save never writes them",
    compressed_pickle: "its records are compressed, as torch.save never writes them",
    fewer_values_than_claimed: "record 0 has 64 bytes, expected 2147483648",
    many_claims_on_one_record: "refused: its content claims more bytes than the file has",
    repeated_values: "refused: its tensors would take 2,147,483,648 bytes, far more than the file's",
    many_tensors_of_one_storage: "refused: its tensors would take",
    legacy_claim: "refused: its content claims more bytes than the file has",
    text_of_many_arrays: "refused: its content claims more bytes than the file has",
    swelling: "not written as latin1",
    swelling_in_a_torch_file: "not written as latin1",
    bytes_by_number: "damaged or truncated: TypeError",
}


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_weights(path)
    return str(caught.value)


@pytest.mark.parametrize("make", BOMBS, ids=lambda make: make.__name__)
def test_a_file_that_would_swell_is_refused_before_it_takes_memory(
    tmp_path: Path, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path / "a.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert BOMBS[make] in refusal(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**17  # KiB; each would take 1 GiB and more


def test_a_record_of_another_size_is_not_read_beyond_its_end(tmp_path: Path) -> None:
    path = packed(tmp_path / "a.pth", claiming(saved(w=torch.zeros(16)), b"K\x10", b"K\x12"))
    assert "record 0 has 64 bytes, expected 72" in refusal(path)
    path = packed(tmp_path / "b.pth", claiming(saved(w=torch.zeros(16)), b"K\x10\x85", b"K\x12\x85"))
    assert "a tensor of shape [18] reaches beyond its 16 stored values" in refusal(path)


def test_a_pickle_cannot_change_the_values_of_a_storage_it_names(tmp_path: Path) -> None:
    """BUILD would call Tensor.__setstate__, which sets what memory a tensor refers to."""
    records = saved(w=torch.zeros(16))
    hidden = {
        name: data.replace(b"Q", b"Q(K\x00(J\xff\xff\xff\x7ft(K\x01ttb", 1)
        for name, data in records.items() if name.endswith("data.pkl")
    }  # fmt: skip
    assert "damaged or truncated" in refusal(packed(tmp_path / "a.pth", records | hidden))


def test_shared_weights_and_parts_of_storages_are_read(tmp_path: Path) -> None:
    shared = torch.arange(3000.0).half()
    state: dict[str, Any] = {f"head.{i}": shared.view(30, 100).t() for i in range(3)} | {"end": shared[2990:]}
    for legacy in (False, True):
        torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=not legacy)
        loaded = read_weights(tmp_path / "a.pth").tensors
        assert all(torch.equal(loaded[key], value.float()) for key, value in state.items())


def test_a_file_of_a_big_endian_machine_is_read(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -3e38, 1e-40])
    records = saved(w=values)
    swapped = {name: b"big" for name in records if name.endswith("byteorder")}
    swapped |= {name: values.numpy().astype(">f4").tobytes() for name in records if name.endswith("data/0")}
    assert len(swapped) == 2
    loaded = read_weights(packed(tmp_path / "a.pth", records | swapped))
    assert np.array_equal(loaded.tensors["w"].numpy(), values.numpy())


def test_the_state_of_a_module_is_read_with_its_attributes(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 3)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "a.pth")
    loaded = read_weights(tmp_path / "a.pth").tensors
    assert all(torch.equal(loaded[key], value) for key, value in module.state_dict().items())


def test_the_parts_of_a_storage_in_old_files_are_read(tmp_path: Path) -> None:
    """torch before 0.4 wrote storages that are parts of others: (name, first value, number of values)."""
    torch.save({"w": torch.arange(6.0)}, tmp_path / "new.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "new.pth").read_bytes()
    assert pickle.loads(content[: content.index(b".") + 1])
    part = b"(X\x01\x00\x00\x00vK\x02K\x03tt"
    at = content.index(b"K\x06N") + 2  # the number of values, then None for the whole storage
    old = content[:at] + part[:-1] + content[at + 1 :]
    old = old.replace(b"K\x06\x85", b"K\x03\x85")  # the shape of the tensor
    (tmp_path / "old.pth").write_bytes(old)
    assert read_weights(tmp_path / "old.pth").tensors["w"].tolist() == [2, 3, 4]
