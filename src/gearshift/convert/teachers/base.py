"""What conversion asks of a family of teachers.

A family is a class derived from :class:`Teacher`, most simply from
:class:`~gearshift.convert.teachers.llama_like.LlamaLikeTeacher`.

``read_teacher(config, where, tensor_names)`` makes it: from the content of ``config.json``, its path for
error messages, and the names of all tensors of the checkpoint, which decide where a family has several ways
to name them. Without names (an export has only the config) a family assumes those that Transformers writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

from gearshift.errors import GearshiftError


class ConversionError(GearshiftError, ValueError):
    """A teacher cannot be converted as it is."""


class Teacher(ABC):
    """One teacher's configuration in the supernet's terms, and where its tensors lie.

    Args:
        config: the teacher's ``config.json``.
        where: its path, for error messages.
        tensor_names: the names of the checkpoint's tensors; empty if they are not known.

    Attributes:
        has_extra: whether the family's class has parts that no text needs; see :meth:`extra_tensors`.
    """

    has_extra: ClassVar[bool] = False

    def __init__(self, config: dict[str, Any], where: str, tensor_names: Collection[str] = ()) -> None:
        self.config = config
        self.where = where
        self.tensor_names = tensor_names

    def need(self, key: str) -> Any:  # noqa: ANN401 - whatever the JSON holds
        """A key that must be there.

        Raises:
            ConversionError: it is not.
        """
        if self.config.get(key) is None:
            raise ConversionError(f"{self.where} has no {key!r}; restore the teacher's config.json")
        return self.config[key]

    @abstractmethod
    def shared_fields(self) -> dict[str, Any]:
        """The fields of ``SupernetConfig`` that are not about mixers."""

    @abstractmethod
    def attention_fields(self) -> dict[str, Any]:
        """The fields of ``AttentionConfig`` that all layers share.

        They are ``num_heads``, ``num_key_value_heads``, ``head_dim``, ``biases`` (a list) and ``qk_norm``.
        """

    @abstractmethod
    def layer_windows(self) -> tuple[int | None, ...]:
        """Tokens that the teacher's own attention sees in each layer; None where it sees all."""

    @abstractmethod
    def shared_tensors(self) -> dict[str, str]:
        """Supernet name -> teacher name of the tensors outside the layers."""

    @abstractmethod
    def layer_tensors(self, layer: int) -> dict[str, str]:
        """The same for one layer's norms and FFN; the supernet's names lack ``model.layers.{i}.``."""

    @abstractmethod
    def attention_tensors(self, layer: int) -> dict[str, str]:
        """``q_proj.weight``, ``q_proj.bias``, ``q_norm.weight``, ... -> teacher name."""

    @abstractmethod
    def input_norm(self, layer: int) -> str:
        """Teacher name of the weight of the norm before a layer's attention."""

    def config_with_windows(self, windows: tuple[int | None, ...]) -> dict[str, Any] | None:
        """The ``config.json`` of a text model like this one, but with these windows in its layers.

        It is read by a family of ``FAMILIES``, not necessarily this one. None where no such class is known.
        """
        return None

    def extra_tensors(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that no text needs; carried over on request. A vision tower, for example."""
        return []

    def unused_tensors(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that are left behind without loss. Stored rotary frequencies, for example."""
        return []
