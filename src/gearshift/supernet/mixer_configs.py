"""The sizes and choices of each kind of mixer, as plain data, checked."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from gearshift.errors import GearshiftError

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
GATE_ACTIVATIONS = ("silu", "sigmoid")
CONV_ACTIVATIONS = ("silu", "none")
# Numbers beyond these are damage: torch cannot count products of such sizes, nor hold such a float32.
LARGEST = {int: 2**31 - 1, float: 3e38}


class ConfigError(GearshiftError, ValueError):
    """A configuration lacks a key, has one too many, or holds a value that cannot be."""


@dataclass(frozen=True)
class AttentionConfig:
    """Grouped-query attention; query head h uses key/value head ``h // (num_heads // num_key_value_heads)``.

    Attributes:
        num_heads: query heads.
        num_key_value_heads: key and value heads; divides ``num_heads``.
        head_dim: channels of a head.
        biases: the projections that have a bias, of ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``.
        qk_norm: whether each query and key head passes an RMS norm before the rotary embedding.
        rope_parameters: this mixer's own rotary embedding, in Transformers' form; None for the supernet's.
        window: tokens that a token sees, itself among them; None for all before it.
    """

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    rope_parameters: dict[str, Any] | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_divides("num_key_value_heads", self.num_key_value_heads, "num_heads", self.num_heads)
        object.__setattr__(self, "biases", _checked_biases(self.biases))
        _check_rope(self.rope_parameters)


@dataclass(frozen=True)
class SlidingAttentionConfig(AttentionConfig):
    """Attention to a window.

    Attributes:
        window: tokens that a token sees, itself among them.
    """

    window: int = field(kw_only=True)


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Gated DeltaNet (arXiv 2412.06464); value head h uses key head ``h // (num_heads // num_key_heads)``.

    Attributes:
        num_heads: value heads.
        num_key_heads: query and key heads; divides ``num_heads``.
        key_head_dim: channels of a query or key head.
        value_head_dim: channels of a value head.
        conv_kernel: taps of the short convolutions.
        gate_activation: ``silu`` or ``sigmoid``, of the output gate.
        norm_eps: epsilon of the gated norm.
        conv_bias: whether each channel of the short convolutions has a bias, added before their activation.
        conv_activation: ``silu`` or ``none``, of the short convolutions.
    """

    num_heads: int
    num_key_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int = 4
    gate_activation: str = "silu"
    norm_eps: float = 1e-5
    conv_bias: bool = False
    conv_activation: str = "silu"

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_divides("num_key_heads", self.num_key_heads, "num_heads", self.num_heads)
        _check_choice("gate_activation", self.gate_activation, GATE_ACTIVATIONS)
        _check_choice("conv_activation", self.conv_activation, CONV_ACTIVATIONS)


@dataclass(frozen=True)
class KimiDeltaAttentionConfig:
    """Kimi Delta Attention (arXiv 2510.26692).

    Attributes:
        num_heads: heads of queries, keys and values alike.
        head_dim: channels of a head, keys and values alike.
        gate_rank: inner size of the low-rank projections to decay and output gate.
        conv_kernel: taps of the short convolutions.
        gate_activation: ``sigmoid`` or ``silu``, of the output gate.
        norm_eps: epsilon of the gated norm.
        conv_bias: whether each channel of the short convolutions has a bias, added before their activation.
    """

    num_heads: int
    head_dim: int
    gate_rank: int
    conv_kernel: int = 4
    gate_activation: str = "sigmoid"
    norm_eps: float = 1e-5
    conv_bias: bool = False

    def __post_init__(self) -> None:
        _check_kinds(self)
        _check_choice("gate_activation", self.gate_activation, GATE_ACTIVATIONS)


MixerConfigT = TypeVar("MixerConfigT")


def build_mixer_config(config_class: type[MixerConfigT], where: str, given: object) -> MixerConfigT:
    """Make a mixer's configuration from the JSON object that stands at ``where`` in a config.

    Raises:
        ConfigError: it is no object, or a field is missing, unknown or of a value that cannot be.
    """
    if not isinstance(given, dict):
        raise ConfigError(
            f"{where} is {given!r}; expected an object with the fields of {config_class.__name__}"
        )
    fields = {field.name: field for field in dataclasses.fields(config_class)}  # pyright: ignore[reportArgumentType]
    check_known(where, given, list(fields))
    missing = [k for k, f in fields.items() if f.default is dataclasses.MISSING and k not in given]
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}; expected {', '.join(fields)}")
    try:
        return config_class(**given)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def check_known(where: str, given: dict[Any, Any], known: Sequence[str]) -> None:
    """Refuse an object with a key that is not ``known``, and hint at the one that was meant.

    Raises:
        ConfigError: there is such a key.
    """
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ConfigError(f"{where} has an unknown key {key!r}; expected {', '.join(known)}{hint}")


def check_number(name: str, value: object, kind: type[int] | type[float]) -> None:
    """Refuse all but a positive number of this kind that some model could have.

    Raises:
        ConfigError: ``value`` is no such number.
    """
    if isinstance(value, int | float) and value > LARGEST[kind]:
        raise ConfigError(f"{name} is far too large; expected at most {LARGEST[kind]:,}")
    fits = isinstance(value, int | float) and isinstance(value, int | kind) and value > 0
    if not fits or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected a positive {kind.__name__}")


def check_flag(name: str, value: object) -> None:
    """Refuse all but true and false.

    Raises:
        ConfigError: ``value`` is neither.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; expected true or false")


def _check_kinds(config: Any) -> None:  # noqa: ANN401 - any of the dataclasses above
    for entry in dataclasses.fields(config):
        value, kind = getattr(config, entry.name), str(entry.type)
        if kind == "bool":
            check_flag(entry.name, value)
        elif kind in ("int", "float") or (kind == "int | None" and value is not None):
            check_number(entry.name, value, float if kind == "float" else int)


def _check_divides(divisor_name: str, divisor: int, name: str, value: int) -> None:
    if value % divisor:
        raise ConfigError(f"{divisor_name} is {divisor}, which does not divide {name} {value}")


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; expected {' or '.join(map(repr, choices))}")


def _checked_biases(biases: object) -> tuple[str, ...]:
    """The named projections in one order, so that equal configurations compare equal."""
    named = biases if isinstance(biases, list | tuple) else None
    if named is None or any(name not in PROJECTIONS or named.count(name) > 1 for name in named):
        raise ConfigError(
            f"biases is {biases!r}; expected a list of some of {', '.join(PROJECTIONS)}, each once"
        )
    return tuple(name for name in PROJECTIONS if name in named)


def _check_rope(given: object) -> None:
    if given is None:
        return
    if not isinstance(given, dict):
        raise ConfigError(
            f"rope_parameters is {given!r}; expected an object with rope_theta, as Transformers has"
        )
    check_number("rope_parameters.rope_theta", given.get("rope_theta"), float)
