"""The sizes and choices of a layer's FFN, as plain data, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gearshift.supernet.mixer_configs import ConfigError, check_flag, check_known, check_number

# The fields of the supernet's config in which the FFNs of its layers may differ.
LAYER_FIELDS = ("intermediate_size", "hidden_act", "mlp_bias", "mlp_gated")
UNGATED_PROJECTIONS = ("up_proj", "down_proj")


@dataclass(frozen=True)
class FeedForwardConfig:
    """The FFN of one layer; its fields are named as in ``SupernetConfig``.

    Attributes:
        hidden_size: channels of its input and output.
        intermediate_size: channels in between.
        hidden_act: Transformers' name of the activation.
        mlp_bias: whether its projections have biases; without a gate also a list of those that have one, of
            ``up_proj`` and ``down_proj``.
        mlp_gated: ``down(act(gate x) * up x)`` if true, ``down(act(up x))`` if not.

    Raises:
        ConfigError: a value cannot be.
    """

    hidden_size: int
    intermediate_size: int
    hidden_act: str
    mlp_bias: bool | list[str]
    mlp_gated: bool

    def __post_init__(self) -> None:
        check_number("intermediate_size", self.intermediate_size, int)
        check_flag("mlp_gated", self.mlp_gated)
        if isinstance(self.mlp_bias, bool):
            return
        if self.mlp_gated or not _are_projections(self.mlp_bias):
            others = "" if self.mlp_gated else f", or a list of some of {', '.join(UNGATED_PROJECTIONS)}"
            raise ConfigError(f"mlp_bias is {self.mlp_bias!r}; expected true or false{others}")

    def has_bias(self, projection: str) -> bool:
        """Whether this projection has a bias."""
        return self.mlp_bias if isinstance(self.mlp_bias, bool) else projection in self.mlp_bias


def _are_projections(given: object) -> bool:
    return isinstance(given, list) and all(
        name in UNGATED_PROJECTIONS and given.count(name) == 1 for name in given
    )


def check_layer_ffns(given: object, layers: int) -> None:
    """Refuse all but one object for each layer, with fields of its FFN.

    Raises:
        ConfigError: it is something else.
    """
    if not isinstance(given, list) or len(given) != layers:
        entries = f"{len(given)} entries" if isinstance(given, list) else repr(given)
        raise ConfigError(f"layer_ffns has {entries}; expected a list of {layers}, one for each layer")
    for layer, entry in enumerate(given):
        if not isinstance(entry, dict):
            raise ConfigError(f"layer_ffns[{layer}] is {entry!r}; expected an object with what differs")
        check_known(f"layer_ffns[{layer}]", entry, LAYER_FIELDS)


def build_feed_forward_config(where: str, fields: dict[str, Any]) -> FeedForwardConfig:
    """Make it from its fields; ``where`` they stand goes into messages.

    Raises:
        ConfigError: a value cannot be.
    """
    try:
        return FeedForwardConfig(**fields)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None
