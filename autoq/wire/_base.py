"""How requests and replies are read."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Request(BaseModel):
    """What a client sends; a field that nobody knows is a mistake, not an extension."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Reply(BaseModel):
    """What the server sends."""

    model_config = ConfigDict(extra="ignore", frozen=True)


Name = Annotated[str, Field(min_length=1, max_length=200)]
"""Of a format, a study, a layer's pattern."""

Path = Annotated[str, Field(min_length=1, max_length=1000)]
"""Of a model, a data file or a checkpoint: `ROOT/inside/it`, where ROOT is a name that the server gives
one of the folders that it may use. "bundled" is the model that autoq brings."""

Positive = Annotated[float, Field(gt=0, le=1e15)]
"""A limit."""

Rules = Annotated[
    tuple[Annotated[str, Field(min_length=1, max_length=500)], ...], Field(max_length=200)
]
"""`PATTERN=FORMAT[,FORMAT...]`, each."""

Names = Annotated[tuple[Name, ...], Field(max_length=200)]
