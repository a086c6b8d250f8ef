"""Read a Config from YAML: the `base:` chain, `key=value` overrides, and what is said of mistakes.

Unknown keys are refused with the nearest known one; every error names the file, the line and the key.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gndet.compat import without_conventions
from gndet.config import Config
from gndet.errors import ConfigError

MAX_CONFIG_BYTES = 1_000_000  # a config is a page of text; anything larger is a mistake or an attack
MAX_CONFIG_NODES = 20_000  # expanded aliases count: an alias bomb stops here


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config with its `base:` chain, apply `key=value` overrides, validate.

    path: YAML file.  overrides: dotted keys, values in YAML.  An unset `out` becomes runs/<file name>.
    A `norm:` section in a file replaces that of its base whole; a dotted override changes one key of it.
    Raises ConfigError that names file and line (or the override), key, value and what was expected.
    """
    origin: Origin = {}
    tree = _read_chain(Path(path), origin, ())
    tree.setdefault("out", f"runs/{Path(path).stem}")
    _override(tree, overrides, origin)
    return _validated(tree, origin, str(path))


def with_overrides(cfg: Config, overrides: Sequence[str], source: str) -> Config:
    """Apply `key=value` overrides to a Config; source names where it came from in errors."""
    origin: Origin = {}
    tree = cfg.model_dump(mode="json")
    if any(text.startswith("model.compat=") for text in overrides):
        tree["model"] = without_conventions(tree["model"])
    _override(tree, overrides, origin)
    return _validated(tree, origin, source)


def config_from_dict(tree: dict[str, Any], source: str) -> Config:
    """Validate a config that was stored in a run or a checkpoint; source names it in errors."""
    return _validated(tree, {}, source)


def config_to_yaml(cfg: Config) -> str:
    """Write the resolved config as YAML that `load_config` reads back to an equal Config."""
    return yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


Origin = dict[tuple[str, ...], str]  # where each key was set: "file.yaml:12" or "override 'a.b=c'"


def _read_chain(path: Path, origin: Origin, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Read path over the configs its `base:` names; note in origin where each key was set."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to this file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from None
    if len(data) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{path}: {len(data)} bytes, a config has at most {MAX_CONFIG_BYTES}")
    try:
        text = data.decode("utf-8")
        node = yaml.compose(text, yaml.SafeLoader)
        own: Origin = {}
        if node is not None:
            _note_lines(node, (), path, own, [0])
        tree = yaml.safe_load(text) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(tree).__name__}")
    base = tree.pop("base", None)
    result: dict[str, Any] = {}
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{own.get(('base',), path)}: base: {base!r}, expected the path of a YAML file")
        result = _read_chain(path.parent / base, origin, (*seen, path.resolve()))
    _merge(result, tree, whole=("norm",))
    origin.update(own)
    return result


def _note_lines(node: yaml.Node, keys: tuple[str, ...], path: Path, origin: Origin, visited: list[int]) -> None:
    """Note "file:line" of every key, refuse duplicate keys, and stop an alias bomb (visited counts nodes)."""
    visited[0] += 1
    if visited[0] > MAX_CONFIG_NODES:
        raise ConfigError(f"{path}: more than {MAX_CONFIG_NODES} values once its aliases are expanded")
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            line = f"{path}:{key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{line}: a key is a word, got a list or a mapping")
            if key.value in names:
                raise ConfigError(f"{line}: key {'.'.join((*keys, key.value))} is given twice")
            names.add(key.value)
            origin[(*keys, key.value)] = line
            _note_lines(value, (*keys, key.value), path, origin, visited)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _note_lines(value, keys, path, origin, visited)


def _override(tree: dict[str, Any], overrides: Sequence[str], origin: Origin) -> None:
    """Apply `key=value` overrides to tree in place."""
    for text in overrides:
        key, separator, value = text.partition("=")
        keys = tuple(key.strip().split("."))
        if not separator or not all(keys):
            raise ConfigError(f"override {text!r}: expected key=value, like train.global_batch=8")
        try:
            change: Any = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {text!r}: the value is not YAML: {error}") from None
        for depth in range(len(keys), 0, -1):
            origin[keys[:depth]] = f"override {text!r}"
            change = {keys[depth - 1]: change}
        _merge(tree, change)


def _merge(tree: dict[str, Any], change: dict[str, Any], whole: tuple[str, ...] = ()) -> None:
    """Put change over tree in place: mappings key by key, anything else (and the keys in whole) replaced."""
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
        raise ConfigError("\n".join(_describe(one, origin, source) for one in error.errors())) from None


def _describe(error: Any, origin: Origin, source: str) -> str:
    """Turn one pydantic error into `file:line: key: value, expected ...`."""
    keys = tuple(str(part) for part in error["loc"])
    where = next((origin[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in origin), source)
    name = ".".join(keys)
    if error["type"] == "extra_forbidden":
        known = _known_keys(keys[:-1])
        close = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.5)
        elsewhere = [path for path in _all_keys() if path.split(".")[-1] == keys[-1]]
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(known)}"
        if not close and elsewhere:
            hint = f"did you mean {elsewhere[0]}?"
        return f"{where}: unknown key {name}; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error" or not name:
        return f"{where}: {name + ': ' if name else ''}{message}"
    return f"{where}: {name}: got {error['input']!r}; {message[0].lower() + message[1:]}"


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section class behind a field (Optional unwrapped), or None for a plain value."""
    annotation = model.model_fields[name].annotation
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _known_keys(keys: tuple[str, ...]) -> list[str]:
    """The keys of the section that the dotted path keys leads to."""
    model: type[BaseModel] = Config
    for key in keys:
        model = _section(model, key) or model
    return list(model.model_fields)


def _all_keys(model: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    """Every dotted key of the config."""
    for name in model.model_fields:
        section = _section(model, name)
        if section is None:
            yield prefix + name
        else:
            yield from _all_keys(section, f"{prefix}{name}.")
