"""The families of teachers, one file each. A new one is a file here and an entry in ``FAMILIES``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from gearshift.convert.teachers.base import ConversionError, Teacher
from gearshift.convert.teachers.llama import LlamaTeacher
from gearshift.convert.teachers.llava import LlavaTeacher
from gearshift.convert.teachers.mistral import MinistralTeacher, MistralTeacher
from gearshift.convert.teachers.qwen2 import Qwen2Teacher
from gearshift.convert.teachers.qwen3 import Qwen3Teacher

FAMILIES: dict[str, type[Teacher]] = {
    "llama": LlamaTeacher,
    "mistral": MistralTeacher,
    "ministral": MinistralTeacher,
    "qwen2": Qwen2Teacher,
    "qwen3": Qwen3Teacher,
    "llava": LlavaTeacher,
}


def supported_architectures() -> tuple[str, ...]:
    """The ``model_type`` of every family that can be converted."""
    return tuple(FAMILIES)


def read_teacher(config: dict[str, Any], where: str, tensor_names: Collection[str] = ()) -> Teacher:
    """The family that knows this ``config.json``.

    Args:
        config: its content.
        where: its path, for error messages.
        tensor_names: the names of the checkpoint's tensors; without them, those that Transformers writes.

    Raises:
        ConversionError: no family does, or the config lacks something.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConversionError(
            f"{where} has model_type {model_type!r}; supported: {', '.join(supported_architectures())}, and "
            "Super Apriel's apriel2. "
            "To add a family: one file in gearshift/convert/teachers, its name in FAMILIES, and the tests of "
            "tests/convert/teacher_contract.py"
        )
    return FAMILIES[model_type](config, where, tensor_names)


__all__ = ["FAMILIES", "ConversionError", "Teacher", "read_teacher", "supported_architectures"]
