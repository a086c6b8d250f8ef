"""Read a Config from YAML: the `base:` chain, `key=value` overrides, and error messages for mistakes.

An unknown key is refused, and the nearest known key is suggested; every error names the file, the line and the key.
"""

import difflib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gndet.config.data import DataConfig
from gndet.config.model import CONVENTIONS
from gndet.config.presets import edges_of, without
from gndet.config.schema import Config
from gndet.config.section import NOT_UNICODE
from gndet.errors import ConfigError
from gndet.files import path_fault
from gndet.text import valid_text

MAX_CONFIG_BYTES = 200_000  # a config fits on a page; an annotation file is YAML too and would be parsed for hours
MAX_CONFIG_NODES = 20_000  # expanded aliases count: an alias bomb stops here
MAX_CONFIG_DEPTH = 20  # levels of nesting; the config has 5
MAX_SHOWN = 200  # characters of a wrong value in a message
MAX_MISTAKES = 20  # shown at once
YOLO_KEYS = {"path", "train", "val", "nc"}  # besides `names`, in YOLO's data files

# inside the package in a wheel, beside it in a checkout
PACKAGED = next((top / "configs" for top in Path(__file__).parents[1:3] if (top / "configs").is_dir()), Path("configs"))

Origin = dict[tuple[str, ...], str]  # where each key was set: "file.yaml:12" or "override 'a.b=c'"


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config with its `base:` chain, apply `key=value` overrides, and validate the result.

    path: YAML file, or the name of a packaged config.  overrides: dotted keys, values in YAML.  An unset `out` becomes
    runs/<config name>.
    A `norm:` section in a file replaces the whole section of its base; a dotted override changes a single key.
    Raises a ConfigError that names the file and line (or the override), key, value and what was expected.
    """
    origin: Origin = {}
    path = find_config(path)
    tree = _read_chain(path, origin, [])
    tree.setdefault("out", f"runs/{path.stem}")
    _override(tree, overrides, origin)
    return _validated(tree, origin, str(path))


def find_config(name: str | os.PathLike[str]) -> Path:
    """Return the path of a config: a file, or the packaged config of this name, like `quickstart`.

    Anything in the working folder comes first.  Raises ConfigError for a bare word that names neither.
    """
    path = Path(os.path.expanduser(name))
    if os.path.exists(path) or path.suffix or len(path.parts) != 1:
        return path
    known = {file.stem: file for file in sorted(PACKAGED.glob("*.yaml"))}
    if path.name in known:
        return known[path.name]
    close = difflib.get_close_matches(path.name, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(
        f"{_brief(path.name)}: no such file, and no packaged config of this name{hint}\n"
        f"expected the path of a YAML file, or one of: {', '.join(known)}"
    )


def config_files(path: str | Path) -> list[Path]:
    """List the files of a config's `base:` chain.  Raises ConfigError as `load_config` does."""
    files: list[Path] = []
    _read_chain(find_config(path), {}, files)
    return files


def below(root: str, name: str) -> Path:
    """Return the path of a file or folder that is given relative to root; `~` is the user's home in both."""
    return Path(os.path.expanduser(root), os.path.expanduser(name))


def named_paths(data: DataConfig) -> list[Path]:
    """Return the annotation files and image folders that a config names."""
    names = (name for part in (data.train, data.val) for name in (part.annotations, part.images))
    return [below(data.root, name) for name in names if name]


def with_overrides(cfg: Config, overrides: Sequence[str], source: str) -> Config:
    """Apply `key=value` overrides to a Config; errors call its origin `source`."""
    origin: Origin = {}
    tree = cfg.model_dump(mode="json")
    change: dict[str, Any] = {}
    _override(change, overrides, {})
    model = change.get("model")
    if isinstance(model, dict):  # the defaults of another detector, neck or toolkit replace those of the present one
        before, after = tree["model"], {**tree["model"], **model}
        compat = before["compat"] != after["compat"]  # another toolkit's replace all that a toolkit may decide
        changed = [c for c in CONVENTIONS if c.applies(before) != c.applies(after) or (compat and "compat" in c.chosen)]
        tree["model"] = without(changed, tree["model"])
    data, crop = tree["data"], change.get("data", {}).get("crop") if isinstance(change.get("data"), dict) else None
    if isinstance(crop, dict) and crop.keys() & {"size", "size_test"}:  # edges that follow the crop, follow it anew
        for edge in [edge for edge, value in edges_of(data["crop"]).items() if data[edge] == value]:
            del data[edge]
    _override(tree, overrides, origin)
    return _validated(tree, origin, source)


def override_words(overrides: Mapping[str, Any]) -> list[str]:
    """Turn overrides from Python into `key=value` words.

    overrides: {"train.schedule.updates": 60} or {"train": {"schedule": {"updates": 60}}}; values as in YAML, a path or
    a tuple too.  Raises ConfigError for a value that YAML cannot hold.
    """
    words = []
    for key, value in overrides.items():
        try:
            text = yaml.safe_dump([_plain(value)], default_flow_style=True, width=math.inf, allow_unicode=True)
        except yaml.YAMLError:
            kind = type(value).__name__
            raise ConfigError(f"{key}: got {_brief(value)} of type {kind}, expected a value that YAML holds") from None
        words.append(f"{key}={text.strip()[1:-1]}")
    return words


def _plain(value: Any) -> Any:
    """Replace paths and NumPy's numbers in nested overrides by what YAML writes."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") else value


def config_from_dict(tree: dict[str, Any], source: str) -> Config:
    """Validate a config that was stored in a run or a checkpoint; errors call it `source`."""
    return _validated(tree, {}, source)


def config_to_yaml(cfg: Config) -> str:
    """Write the resolved config as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


def _read_chain(path: Path, origin: Origin, seen: list[Path]) -> dict[str, Any]:
    """Read a config and merge it over its `base:` chain.

    Records in origin where each key was set, and in seen each file.
    """
    text = _read_text(path)
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to this file")
    seen.append(path.resolve())
    own: Origin = {}
    tree = _parse(text, str(path), lambda node: f"{path}:{node.start_mark.line + 1}", (), own) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(tree).__name__}")
    if "names" in tree and not YOLO_KEYS.isdisjoint(tree):
        raise ConfigError(f"{path}: is a YOLO data file, expected a config; data.root=FOLDER reads its folder")
    base = tree.pop("base", None)
    result: dict[str, Any] = {}
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{own.get(('base',), path)}: base: {_brief(base)}, expected the path of a YAML file")
        result = _read_chain(path.parent / base, origin, seen)
    _merge(result, tree, whole=("norm",))
    origin.update(own)
    return result


def _read_text(path: Path) -> str:
    if fault := path_fault(path):
        raise ConfigError(f"{_brief(str(path))}: cannot read the config: {fault}")
    try:
        if path.is_fifo() and not str(path).startswith("/dev/fd/"):  # <(command) of a shell
            raise ConfigError(f"{path}: is a pipe, expected a YAML file")
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: a config has at most {MAX_CONFIG_BYTES} bytes, this file has more")
        return content.decode("utf-8")
    except OSError as error:
        packaged = os.path.join(PACKAGED, f"{path.stem}.yaml")
        hint = f"; own_data data.root={path} trains on the data in a folder" if os.path.isdir(path) else ""
        hint = f"; the config of this run is {path / 'config.yaml'}" if (path / "config.yaml").is_file() else hint
        hint = f"; the packaged config of this name is {packaged}" if os.path.isfile(packaged) else hint
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}{hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None


def _parse(text: str, source: str, place: Callable[..., str], keys: tuple[str, ...], origin: Origin) -> Any:
    """Parse YAML, and record in origin where each key below `keys` was set: place(the key's node).

    Refuses duplicate keys, aliases that expand beyond MAX_CONFIG_NODES, and deep nesting, before building anything.
    """
    room = iter(range(MAX_CONFIG_NODES))

    def note(node: yaml.Node, keys: tuple[str, ...], depth: int) -> None:
        if next(room, None) is None:
            raise ConfigError(f"{source}: more than {MAX_CONFIG_NODES} values once its aliases are expanded")
        if depth > MAX_CONFIG_DEPTH:
            raise ConfigError(f"{source}: nested more than {MAX_CONFIG_DEPTH} levels deep")
        if isinstance(node, yaml.MappingNode):
            names = set()
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise ConfigError(f"{place(key)}: a key is a word, got a list or a mapping")
                if key.value in names:
                    raise ConfigError(f"{place(key)}: key {_cut('.'.join((*keys, key.value)))} is given twice")
                names.add(key.value)
                origin[(*keys, key.value)] = place(key)
                note(value, (*keys, key.value), depth + 1)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                note(value, keys, depth + 1)

    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            note(node, keys, 1)
        return None if node is None else _Values("").construct_document(node)
    except (yaml.YAMLError, RecursionError, OverflowError, ValueError) as error:  # the latter two: "\UFFFFFFFF"
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


class _Values(yaml.SafeLoader):
    """Makes values of YAML's nodes; an error names the line of one that is not of its kind, like 2001-99-99."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):  # of parsing any text as any kind
            words = f"{_brief(node.value)} is no {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, words, node.start_mark) from None


def _override(tree: dict[str, Any], overrides: Sequence[str], origin: Origin) -> None:
    for text in overrides:
        source = f"override {_brief(text)}"
        key, separator, value = text.partition("=")
        keys = tuple(key.strip().split("."))
        if not separator or not all(keys):
            raise ConfigError(f"{source}: expected key=value, like train.global_batch=8")
        if valid_text(value) != value:
            raise ConfigError(f"{source}: got {_brief(value)}, {NOT_UNICODE}")
        change = _parse(value, source, lambda _, source=source: source, keys, origin)
        if not value.strip() and dict(_fields()).get(".".join(keys)) is str:
            change = ""  # the shell removes the quotes of key=''
        for depth in range(len(keys), 0, -1):
            origin[keys[:depth]] = source
            change = {keys[depth - 1]: change}
        _merge(tree, change)


def _merge(tree: dict[str, Any], change: dict[str, Any], whole: tuple[str, ...] = ()) -> None:
    """Merge change into tree in place: mappings key by key; other values, and the keys in `whole`, are replaced."""
    for key, value in change.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict) and key not in whole:
            _merge(tree[key], value, whole)
        else:
            tree[key] = value


def _validated(tree: dict[str, Any], origin: Origin, source: str) -> Config:
    """Build the Config, or raise a ConfigError with a line for every mistake."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        lines = [_describe(mistake, origin, source) for mistake in error.errors()[:MAX_MISTAKES]]
        if (more := error.error_count() - len(lines)) > 0:
            lines.append(f"{source}: and {more} more mistakes")
        raise ConfigError("\n".join(lines)) from None


def _brief(value: Any) -> str:
    try:
        return _cut(repr(value))
    except ValueError:  # an int of more than 4,300 digits, from a checkpoint's JSON
        return f"a value of type {type(value).__name__} too large to show"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _describe(error: Any, origin: Origin, source: str) -> str:
    """Turn one pydantic error into `file:line: key: value, expected ...`."""
    keys = tuple(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    # a rule on several options of a section begins with the option that it is about
    about = (*keys, *message.partition(":")[0].split(".")) if error["type"] == "value_error" else keys
    place = next((origin[about[:n]] for n in range(len(about), 0, -1) if about[:n] in origin), source)
    name = _cut(".".join(keys))
    if error["type"] == "extra_forbidden":
        paths, section = [path for path, _ in _fields()], ".".join((*keys[:-1], ""))
        known = list(dict.fromkeys(path[len(section) :].split(".")[0] for path in paths if path.startswith(section)))
        close = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        elsewhere = [path for path in paths if path.split(".")[-1] == keys[-1]]
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        if not close and elsewhere:
            hint = f"did you mean {elsewhere[0]}?"
        return f"{place}: unknown key {name}; {hint}"
    if error["type"] == "value_error" or not name:
        return f"{place}: {name + ': ' if name else ''}{message}"
    return f"{place}: {name}: got {_brief(error['input'])}; {message[0].lower() + message[1:]}"


def _fields(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        types = (field.annotation, *getattr(field.annotation, "__args__", ()))  # X, or X | None
        section = next((kind for kind in types if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if section is None:
            yield prefix + name, field.annotation
        else:
            yield from _fields(section, f"{prefix}{name}.")
