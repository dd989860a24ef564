"""What every section of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
_MOST = 2**31  # what PyTorch and numpy take everywhere
Count = Annotated[int, Field(ge=1, lt=_MOST)]
CountOrZero = Annotated[int, Field(ge=0, lt=_MOST)]


class Section(BaseModel):
    """A section refuses keys it does not know, and cannot be changed once made."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @field_validator("*")
    @classmethod
    def _can_be_written(cls, value: object) -> object:
        """A NUL is in no path or address, and half a surrogate pair (a byte that is no UTF-8) in no file."""
        for text in value if isinstance(value, tuple) else (value,):
            if isinstance(text, str) and ("\0" in text or (not text.isascii() and _halves(text))):
                raise PydanticCustomError("text", "it has a NUL, or a byte that is no UTF-8")
        return value


def _halves(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
