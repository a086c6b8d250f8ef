"""gndet/files.py is the only module that writes files; tests/cli/test_outputs.py watches every output of every verb."""

import ast
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY

ROOM = REPOSITORY / "gndet"
FILES = sorted(set(ROOM.rglob("*.py")) - {ROOM / "files.py"})
# calls that write a file or give it a name, whatever the object before the dot
WRITERS = {"write_text", "write_bytes", "touch", "symlink_to", "hardlink_to", "tofile", "mkstemp", "NamedTemporaryFile"}
WRITERS |= {"copy2", "copyfile", "copytree", "save_file", "mknod"}
COMMON = {"copy", "move", "rename", "replace", "symlink", "link"}  # also methods of texts, dicts and tensors
MODULES = {"os", "shutil", "onnx"}
ALLOWED = {
    "checkpoint.py": {"os.symlink", "os.replace", "os.rename"},  # under a temporary name; a folder on its removal
    "training/run_folder.py": {"real.rename"},  # --fresh moves a run aside
    "toolbox/convert_data.py": {"os.rename"},  # of the parts of a whole copy
}


def opens_to_write(call: ast.Call) -> bool:
    """Return whether a call of open() has a mode that writes."""
    arguments = [*call.args, *(word.value for word in call.keywords)]
    modes = [value.value for value in arguments if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return any(re.fullmatch(r"(?=.*[wax+])[rwaxbt+]{1,3}", mode) for mode in modes)


def writer(call: ast.Call) -> str:
    """Return the name of a call that writes a file; "" if it does not."""
    name = ast.unparse(call.func)
    owner, _, last = name.rpartition(".")
    is_rename = last == "rename" and len(call.args) == 1  # of a Path
    is_common = last in COMMON and (owner in MODULES or is_rename)
    is_open = last in ("open", "fdopen") and owner != "av" and opens_to_write(call)
    return name if last in WRITERS or is_common or is_open else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_files_are_written_by_one_module(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = {name for call in calls if (name := writer(call))}
    assert found <= ALLOWED.get(str(path.relative_to(ROOM)), set())


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("path.write_text('a')", "path.write_text"), ("open(path, 'wb')", "open"), ("path.open('a')", "path.open"),
        ("open(path, mode='r+')", "open"), ("open(path, 'rb')", ""), ("path.open()", ""), ("os.open(path, flags)", ""),
        ("shutil.copyfile(a, b)", "shutil.copyfile"), ("tensor.copy(b)", ""), ("text.replace('a', 'b')", ""),
        ("out.rename(other)", "out.rename"), ("os.replace(a, b)", "os.replace"),
    ],
)  # fmt: skip
def test_a_call_that_writes_is_known(text: str, name: str) -> None:
    assert writer(ast.parse(text, mode="eval").body) == name
