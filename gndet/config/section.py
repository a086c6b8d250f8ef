"""The base class of all sections of the config, and the types that several sections share.

An option is a field of a section. The comment behind it, or above it, says what it does [unit], then the source of its
default. `docs/make_configuration.py` turns these comments into docs/configuration.md.
"""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, Field, ValidationInfo, field_validator

from gndet.files import path_fault
from gndet.text import valid_text


def _a_file_can_have(path: str) -> str:
    if fault := path_fault(path):
        raise ValueError(fault)
    return path


NOT_UNICODE = "which is not valid Unicode (UTF-8); rename it, or start gndet in this folder"
FileName = Annotated[str, AfterValidator(_a_file_can_have)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
# upper limits keep a stranger's checkpoint from asking for absurd memory; anchors have ids up to this side
MAX_EDGE = 16_384  # pixels
Edge = Annotated[int, Field(ge=16, le=MAX_EDGE)]  # pixels
Side = Annotated[float, Field(gt=0, le=MAX_EDGE)]  # pixels
Sizes = Annotated[tuple[Side, ...], Field(min_length=1, max_length=16)]


class Section(BaseModel, extra="forbid", frozen=True, allow_inf_nan=False):
    """A part of the config: immutable, and it refuses unknown keys and texts that are not valid Unicode."""

    shapes: ClassVar[tuple[str, ...]] = ()  # options that decide the shapes of weights
    # options that change what weights of the same shapes compute, and the part of the model whose weights these are
    conventions: ClassVar[dict[str, str]] = {}

    @field_validator("*", mode="before")
    @classmethod
    def _is_unicode(cls, value: Any) -> Any:
        for text in value if isinstance(value, list | tuple) else (value,):
            if isinstance(text, str) and valid_text(text) != text:
                raise ValueError(f"got {text!r}, {NOT_UNICODE}")
        return value

    @field_validator("*")
    @classmethod
    def _fits_into_32_bits(cls, value: Any, field: ValidationInfo) -> Any:
        numbers = value if isinstance(value, tuple) else (value,)
        if field.field_name != "seed" and any(isinstance(n, int) and n.bit_length() > 31 for n in numbers):
            raise ValueError("expected integers of less than 2^31")
        return value
