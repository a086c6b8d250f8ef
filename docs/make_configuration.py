"""Write docs/configuration.md from the schema: `python docs/make_configuration.py`.

An option's comment in the files of gndet/config/, above it or behind it, has the form

    what the option does [unit]; more. Source: where the default comes from

Sections become headings, in the order of the schema; ranges and choices come from the types.
"""

import ast
import inspect
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gndet.config import dense
from gndet.config.cascade import CASCADE, MMDETECTION
from gndet.config.model import ModelConfig
from gndet.config.norm import NormConfig
from gndet.config.one_level import C4, DC5, DETECTRON_C4
from gndet.config.presets import PRESETS
from gndet.config.schema import Config

PAGE = Path(__file__).parent / "configuration.md"
OPENING = """# Configuration

After reading this page you know every option of a config file: what it does, its type and range, its default, its
unit, and where the default comes from. `python docs/make_configuration.py` generates the page from
`gndet/config/schema.py`, and a test keeps the two equal.

A config is a YAML file whose keys are the options below. Missing keys take their defaults, unknown keys are refused,
and `base: OTHER.yaml` starts from another file. On the command line, override an option with `section.option=value`:

```bash
gndet config configs/quickstart.yaml train.global_batch=4    # print the config with all its defaults
```

A dash in the column "source" means that the default is gndet's own choice. These pages explain how the options work
together: [training](training.md), [your data](your_data.md), [norms](norms.md), [fine-tuning](fine_tuning.md).
"""
PRESET_WORDS = """## Presets of model.compat

`model.compat` takes the conventions of another toolkit as defaults. An option that the config states itself wins. An
empty cell means gndet's own default.
"""
DENSE_WORDS = """
The dense detectors of some toolkits differ from this, and from gndet's RetinaNet, whose `conv_bias` is `false`, in:
"""
NECK_WORDS = """## Defaults of model.neck

Some options have another default with these necks. An option that the config states itself wins. An empty cell means
the default of `fpn`. The last column adds what `model.compat: detectron` means for `c4`.
"""
CASCADE_WORDS = """
`model.detector: cascade_rcnn` changes these defaults, also beneath a preset; the last column adds what
`model.compat: mmdetection` means for a cascade:
"""
BOUNDS = {Ge: "≥ {.ge}", Gt: "> {.gt}", Le: "≤ {.le}", Lt: "< {.lt}"}  # the bound's attribute has the class's name


def page() -> str:
    """Return the text of docs/configuration.md."""
    found = [*walk(Config, "", set())]
    comments: dict[tuple[str, str], str] = {}
    for file in {inspect.getfile(section) for _, section in found}:
        comments |= option_comments(Path(file).read_text(encoding="utf-8"))
    sections = [table(path, section, comments) for path, section in found]
    toolkits = {name: PRESETS[name] | {"dense": options} for name, options in dense.PRESETS.items()}
    cascades = {"cascade_rcnn": CASCADE.defaults, "and mmdetection": MMDETECTION.defaults}
    own = {f"{each.chosen['detector']} and {each.chosen['compat']}": each.defaults for each in dense.OF_TOOLKITS}
    necks = {"c4": C4.defaults, "dc5": DC5.defaults, "c4 and detectron": DETECTRON_C4.defaults}
    tables = [
        *(
            PRESET_WORDS,
            presets("gndet", toolkits),
            DENSE_WORDS,
            presets("gndet", own),
            CASCADE_WORDS,
            presets("gndet", cascades),
        ),
        *("", NECK_WORDS, presets("fpn", necks)),
    ]
    return "\n".join([OPENING, *sections, *tables, "\nNext: [training](training.md)."]) + "\n"


def walk(section: type[BaseModel], path: str, seen: set[type[BaseModel]]) -> Iterator[tuple[str, type[BaseModel]]]:
    """Yield (dotted path, section) for a section and the sections in it, each class once."""
    yield path, section
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner and inner not in seen:
            seen.add(inner)
            yield from walk(inner, f"{path}.{name}".strip("."), seen)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the section that an option holds, if it holds one."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def table(path: str, section: type[BaseModel], comments: dict[tuple[str, str], str]) -> str:
    """Return the heading, the words and the table of a section."""
    same = {"data.train": "data.train and data.val", "": "Top level"}
    lines = [f"## {same.get(path, path)}", "", " ".join((section.__doc__ or "").split()), ""]
    lines += ["| option | type | default | unit | what it does | source |", "|---|---|---|---|---|---|"]
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner and inner is not NormConfig:
            lines.append(f"| `{name}` | section | | | see {link(f'{path}.{name}'.strip('.'))} | |")
        elif inner and path == "model":
            lines.append(f"| `{name}` | section | | | the norm of every part; see {link('model.norm')} | |")
        else:
            meaning, unit, source = parts(comments[section.__name__, name])
            kind = f"section like {link('model.norm')}, or null" if inner else words(field.annotation, field.metadata)
            row = [f"`{name}`", kind, default(field), unit, meaning, source or "–"]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def link(path: str) -> str:
    """Return a link to a section's heading on the page."""
    path = "data.train and data.val" if path in ("data.train", "data.val") else path
    return f"[{path}](#{path.replace('.', '').replace(' ', '-')})"


def parts(comment: str) -> tuple[str, str, str]:
    """Split a comment into what the option does, its unit and its source."""
    meaning, _, source = comment.partition(" Source: ")
    unit = ""
    if "[" in meaning and "](" not in meaning:
        before, rest = meaning.split("[", 1)
        unit, after = rest.split("]", 1)
        meaning = before.rstrip() + after
    return meaning.rstrip("."), unit, source


def words(kind: Any, bounds: list[Any]) -> str:
    """Return a type in words: choices, ranges, lists."""
    if get_origin(kind) is Annotated:
        inner, *extra = get_args(kind)
        return words(inner, [bound for each in extra for bound in getattr(each, "metadata", [each])])
    if get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(kind))
    if get_origin(kind) in (Union, UnionType):
        return ", or ".join(words(inner, bounds) for inner in get_args(kind))
    if get_origin(kind) is tuple:
        inner = [each for each in get_args(kind) if each is not Ellipsis]
        number = "" if Ellipsis in get_args(kind) else f"{len(inner)} "
        return f"list of {number}({words(inner[0], [])})"
    if kind is NoneType:
        return "null"
    limits = [
        BOUNDS[type(bound)].format(bound).replace(str(2**63), "2^63") for bound in bounds if type(bound) in BOUNDS
    ]
    name = {"str": "text", "bool": "true or false", "int": "integer", "float": "number"}[kind.__name__]
    return " ".join([name, " and ".join(limits)]).strip()


def default(field: FieldInfo) -> str:
    """Return an option's default."""
    is_norm = isinstance(field.default, NormConfig)
    return f"`{{kind: {field.default.kind}}}`" if is_norm else f"`{yaml_value(field.default)}`"


def option_comments(source: str) -> dict[tuple[str, str], str]:
    """Return {(section, option): comment}: the comment lines directly above an option, or the one behind it."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    found = {}
    for section in (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)):
        for option in (node for node in section.body if isinstance(node, ast.AnnAssign)):
            assert isinstance(option.target, ast.Name)
            first = option.lineno
            while first - 1 in comments and comments[first - 1].line.strip().startswith("#"):
                first -= 1
            numbers = [*range(first, option.lineno), option.end_lineno]
            texts = [comments[number].string.lstrip("# ") for number in numbers if number in comments]
            found[section.name, option.target.id] = " ".join(text for text in texts if not text.startswith("fmt:"))
    return found


def presets(usual: str, named: dict[str, dict[str, Any]]) -> str:
    """Return the table of presets: one row per option, one column per preset; usual: what has the usual defaults."""
    options = sorted({(part, key) for preset in named.values() for part, keys in preset.items() for key in keys})
    lines = [f"| option | {usual} | {' | '.join(named)} |", "|---|---|" + "---|" * len(named)]
    for part, key in options:
        fields = section_of(ModelConfig.model_fields[part]).model_fields
        own = default(fields[key])
        of_toolkits = [preset.get(part, {}) for preset in named.values()]
        cells = [f"`{yaml_value(values[key])}`" if key in values else "" for values in of_toolkits]
        lines.append(f"| `model.{part}.{key}` | {own} | {' | '.join(cells)} |")
    return "\n".join(lines)


def yaml_value(value: object) -> str:
    """Return a value as YAML writes it, a ninth as 1/9."""
    names: dict[object, str] = {None: "null", "": "''", 1 / 9: "1/9"}
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str([list(each) if isinstance(each, tuple) else each for each in value])
    return names.get(value, str(value))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
