"""The schema of the JSON in a checkpoint: adapter_config.json, the index of shards, what a header has of them.

Types are strict, so that true is no 1 and "8" no 8, numbers are finite, and pydantic's parser bounds how deep JSON may
be nested. What a field means, and which of them can be kept, is each command's to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, RootModel, ValidationError
from pydantic_core import PydanticCustomError

from dora_kernels.files.reading import read_bytes, shown


def _held(expected: str, holds: Callable[[Any], bool]) -> Any:
    """The type of the values for which `holds` is true, with one error that says all that was expected."""

    def check(value: Any) -> Any:
        if holds(value):
            return value
        raise PydanticCustomError("held", "{expected}", {"expected": expected})

    return Annotated[Any, AfterValidator(check)]


def _each_held(expected: str, holds: Callable[[Any], bool]) -> Any:
    """The type of the objects of JSON for whose every value `holds` is true.

    One error, of the first value: pydantic makes one for each, and a message, and 10^6 in 10 MB took 15 s and 1.4 GB.
    """

    def check(values: dict[str, Any]) -> dict[str, Any]:
        for key, value in values.items():
            if not holds(value):
                raise PydanticCustomError("held", "{expected}", {"expected": expected, "key": key, "value": value})
        return values

    return Annotated[dict[str, Any], AfterValidator(check)]


def is_number(value: Any) -> bool:
    """True for an int or a float that is finite as a float64; True and False are none."""
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # an integer that no float64 holds
        return False


def _is_in_the_folder(name: Any) -> bool:
    return type(name) is str and name not in ("", ".", "..") and not set(name) & set("/\\\0") and len(name) < 256


_RANK: tuple[str, Callable[[Any], bool]]
_RANK = ("an integer of 1 or more", lambda value: type(value) is int and 1 <= value < 2**31)
_NUMBER = ("a number that float64 holds", is_number)

Rank, Ranks = _held(*_RANK), _each_held(*_RANK)
Number, Numbers = _held(*_NUMBER), _each_held(*_NUMBER)
Shards = _each_held("the name of a file in the same folder", _is_in_the_folder)
Initial = _held("true, false or a name", lambda value: value is None or type(value) in (bool, str))


class AdapterConfig(BaseModel):
    """PEFT's adapter_config.json, and those of the libraries that write the same fields. All others are kept as well.

    null is refused where PEFT could not read it; what the file does not say is in no `model_fields_set`.
    """

    model_config = ConfigDict(strict=True, extra="allow")
    most_bytes: ClassVar[int] = 16 << 20  # with 46,000 experts' layers by name, rank and alpha it has 9 MB

    peft_type: str | None = None
    r: Rank = None
    lora_alpha: Number = None
    rank_pattern: Ranks | None = None
    alpha_pattern: Numbers | None = None
    use_dora: bool | None = None
    use_rslora: bool | None = None
    fan_in_fan_out: bool | None = None
    init_lora_weights: Initial = None


class ModelIndex(BaseModel):
    """model.safetensors.index.json: the file of each tensor, in the index's own folder."""

    model_config = ConfigDict(strict=True)
    most_bytes: ClassVar[int] = 64 << 20  # of a model of 10^5 tensors it has 10 MB

    weight_map: Shards


class ModelConfig(BaseModel):
    """config.json of a model: what a merge asks of it. All other fields are kept as well."""

    model_config = ConfigDict(strict=True, extra="allow")
    most_bytes: ClassVar[int] = 16 << 20

    model_type: str | None = None
    tie_word_embeddings: bool | None = None
    quantization_config: Any = None
    compression_config: Any = None
    text_config: Any = None


class HeaderAlphas(RootModel[Numbers]):
    """{module: alpha}, of the files written by `convert`."""

    model_config = ConfigDict(strict=True)
    most_bytes: ClassVar[int] = 16 << 20  # 75 MB of brackets, which a header may have, became 5 GB of lists


class HeaderConfig(RootModel[dict[str, Any]]):
    """`lora_adapter_metadata` of a header: the fields of one adapter_config.json, or of several by a model's name."""

    model_config = ConfigDict(strict=True)
    most_bytes: ClassVar[int] = AdapterConfig.most_bytes


_Model = TypeVar("_Model", bound=BaseModel)
_File = TypeVar("_File", AdapterConfig, ModelConfig, ModelIndex)


def read_json(function: str, path: Path, model: type[_File]) -> _File:
    """The model in a file. Raises one ValueError with the file, the key, its value and what was expected."""
    return parsed(function, shown(path), read_bytes(function, path, model.most_bytes), model)


def read_config(function: str, path: Path) -> dict[str, Any]:
    """The fields that an adapter_config.json has. Raises ValueError as `read_json` does."""
    config = read_json(function, path, AdapterConfig)
    return {name: value for name, value in config if name in config.model_fields_set}


def parsed(function: str, where: str, text: bytes | str, model: type[_Model]) -> _Model:
    """The model in JSON, of which `where` is the name in messages. Raises one ValueError as `read_json` does."""
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    place, value = (
        ([*first["loc"], context["key"]], context["value"]) if "key" in context else (first["loc"], first["input"])
    )
    key = shown(".".join(map(str, place)))
    expected = first["msg"].removeprefix("Input should be ")
    if first["type"] == "json_invalid":
        raise ValueError(f"{function}: {where} cannot be read: {expected}; expected JSON")
    if first["type"] == "missing":
        raise ValueError(f"{function}: {where} has no {key}; expected one")
    if first["type"] in ("model_type", "dict_type"):
        expected = "a JSON object"
    raise ValueError(f"{function}: {where}: {f'{key} ' if key else 'it '}is {value!r:.80}; expected {expected}")
