"""Read a Config from YAML: the `base:` chain, `key=value` overrides, and what is said of mistakes.

Unknown keys are refused with the nearest known one; every error names the file, the line and the key.
"""

import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from gndet.config.presets import without_conventions
from gndet.config.schema import Config
from gndet.errors import ConfigError

# a config is a page of text; anything larger is a mistake or an attack
MAX_CONFIG_BYTES = 200_000
MAX_CONFIG_NODES = 20_000  # expanded aliases count: an alias bomb stops here
MAX_CONFIG_DEPTH = 20  # levels of nesting; the config has 5
MAX_BASES = 10  # configs in a `base:` chain
MAX_SHOWN = 200  # characters of a wrong value
MAX_MISTAKES = 20  # told at once
YOLO_KEYS = {"path", "train", "val", "nc"}  # beside names, in the file that names a data set there
ODD_TAGS = {
    f"tag:yaml.org,2002:{kind}": f"!!{kind}" for kind in ("binary", "omap", "pairs", "set")
}  # a set has no order
YAML_ERRORS = (  # what PyYAML raises, the others for values that do not fit their tag, like 2001-99-99 or !!bool x
    yaml.YAMLError,
    AttributeError,
    KeyError,
    RecursionError,
    ValueError,
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML config with its `base:` chain, apply `key=value` overrides, validate.

    path: YAML file.  overrides: dotted keys, values in YAML.  An unset `out` becomes runs/<file name>.
    A `norm:` section in a file replaces that of its base whole; a dotted override changes one key of it.
    Raises ConfigError that names file and line (or the override), key, value and what was expected.
    """
    origin: Origin = {}
    tree = _read_chain(Path(path), origin, [])
    tree.setdefault("out", f"runs/{Path(path).stem}")
    _override(tree, overrides, origin)
    return _validated(tree, origin, str(path))


def config_files(path: str | Path) -> list[Path]:
    """The files of a config's `base:` chain.  Raises ConfigError as `load_config` does."""
    files: list[Path] = []
    _read_chain(Path(path), {}, files)
    return files


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


def _read_chain(path: Path, origin: Origin, seen: list[Path]) -> dict[str, Any]:
    """Read path over the configs its `base:` names; note in origin where each key was set, in seen each file."""
    text = _read_text(path)
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to this file")
    if len(seen) == MAX_BASES:
        raise ConfigError(f"{path}: the {MAX_BASES + 1}th file of a `base:` chain, expected at most {MAX_BASES}")
    seen.append(path.resolve())
    own: Origin = {}
    tree = _parse(text, str(path), lambda node: f"{path}:{node.start_mark.line + 1}", (), own) or {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected `key: value` lines, got {type(tree).__name__}")
    if "names" in tree and not YOLO_KEYS.isdisjoint(tree):
        raise ConfigError(f"{path}: a YOLO data file, expected a config; convert the data to COCO's JSON")
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
    """Read a config file."""
    try:
        if path.is_fifo() or path.is_char_device() or path.is_block_device() or path.is_socket():
            raise ConfigError(f"{path}: a pipe or a device, expected a YAML file")  # it might not end
        with path.open("rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
        if len(data) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{path}: a config has at most {MAX_CONFIG_BYTES} bytes, this file has more")
        return data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except ValueError as error:  # a zero byte in the name
        raise ConfigError(f"{str(path)!r}: cannot read the config: {error}") from None


def _parse(text: str, source: str, place: Callable[[yaml.Node], str], keys: tuple[str, ...], origin: Origin) -> Any:
    """Parse YAML after a look at its size; note in origin where each key below `keys` was set, as place tells it."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _note_places(node, source, place, keys, origin, iter(range(MAX_CONFIG_NODES)), MAX_CONFIG_DEPTH)
        return yaml.safe_load(text)
    except YAML_ERRORS as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from None


def _note_places(
    node: yaml.Node, source: str, place: Callable[[yaml.Node], str], keys: tuple[str, ...], origin: Origin,
    room: Iterator[int], depth: int,
) -> None:  # fmt: skip
    """Note the place of every key; refuse duplicate keys, more values than room has, and nesting beyond depth."""
    if next(room, None) is None:
        raise ConfigError(f"{source}: more than {MAX_CONFIG_NODES} values once its aliases are expanded")
    if depth == 0:
        raise ConfigError(f"{source}: nested more than {MAX_CONFIG_DEPTH} levels deep")
    if node.tag in ODD_TAGS:
        raise ConfigError(f"{place(node)}: {ODD_TAGS[node.tag]}, expected words, numbers, lists and mappings")
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            here = place(key)
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(f"{here}: a key is a word, got a list or a mapping")
            if key.value in names:
                raise ConfigError(f"{here}: key {_cut('.'.join((*keys, key.value)))} is given twice")
            names.add(key.value)
            origin[(*keys, key.value)] = here
            _note_places(value, source, place, (*keys, key.value), origin, room, depth - 1)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _note_places(value, source, place, keys, origin, room, depth - 1)


def _override(tree: dict[str, Any], overrides: Sequence[str], origin: Origin) -> None:
    """Apply `key=value` overrides to tree in place."""
    for text in overrides:
        source = f"override {_brief(text)}"
        key, separator, value = text.partition("=")
        keys = tuple(key.strip().split("."))
        if not separator or not all(keys) or len(keys) > MAX_CONFIG_DEPTH:
            raise ConfigError(f"{source}: expected key=value, like train.global_batch=8")
        if len(value) > MAX_CONFIG_BYTES:
            raise ConfigError(f"{source}: a value has at most {MAX_CONFIG_BYTES} characters, this one has {len(value)}")
        change = _parse(value, source, lambda _, source=source: source, keys, origin)
        if not value.strip() and _is_text(keys):
            change = ""  # a shell takes the quotes off key=''
        for depth in range(len(keys), 0, -1):
            origin[keys[:depth]] = source
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
        told = [_describe(one, origin, source) for one in error.errors()[:MAX_MISTAKES]]
        if (more := error.error_count() - len(told)) > 0:
            told.append(f"{source}: and {more} more mistakes")
        raise ConfigError("\n".join(told)) from None


def _brief(value: Any) -> str:
    """Show a value, shortened; some are too large or too deep to be shown at all."""
    try:
        return _cut(repr(value))
    except (ValueError, RecursionError):
        return f"a value of type {type(value).__name__} too large to show"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _describe(error: Any, origin: Origin, source: str) -> str:
    """Turn one pydantic error into `file:line: key: value, expected ...`."""
    keys = tuple(str(part) for part in error["loc"])
    where = next((origin[keys[:n]] for n in range(len(keys), 0, -1) if keys[:n] in origin), source)
    name = _cut(".".join(keys))
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
    return f"{where}: {name}: got {_brief(error['input'])}; {message[0].lower() + message[1:]}"


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section class behind a field (Optional unwrapped), or None for a plain value."""
    annotation = model.model_fields[name].annotation
    for candidate in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _is_text(keys: tuple[str, ...]) -> bool:
    """Whether a dotted key is that of a text."""
    model: type[BaseModel] | None = Config
    for key in keys[:-1]:
        model = _section(model, key) if key in model.model_fields else None
        if model is None:
            return False
    return keys[-1] in model.model_fields and model.model_fields[keys[-1]].annotation is str


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
