"""What a supernet is made of: one configuration for the shared parts and one for each kind of mixer."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from gearshift._checks import is_count
from gearshift.placement import (
    FULL_ATTENTION,
    GATED_DELTA_NET,
    KIMI_DELTA_ATTENTION,
    SLIDING_ATTENTION,
    Placement,
    PlacementSpace,
    long_name,
)
from gearshift.supernet.feed_forward_config import (
    LAYER_FIELDS,
    FeedForwardConfig,
    build_feed_forward_config,
    check_layer_ffns,
)
from gearshift.supernet.mixer_configs import (
    AttentionConfig,
    ConfigError,
    GatedDeltaNetConfig,
    KimiDeltaAttentionConfig,
    SlidingAttentionConfig,
    build_mixer_config,
    check_known,
    check_number,
)

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
)
_CONFIG_CLASSES: dict[str, type] = {
    FULL_ATTENTION: AttentionConfig,
    SLIDING_ATTENTION: SlidingAttentionConfig,
    GATED_DELTA_NET: GatedDeltaNetConfig,
    KIMI_DELTA_ATTENTION: KimiDeltaAttentionConfig,
}
# What Transformers and torch trip over where they do not check a config.
STUMBLES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Fields that the first supernets did not have, and what their absence means.
_LATER_DEFAULTS = (("mlp_gated", True), ("layer_mixers", None), ("layer_ffns", None))


def register_mixer_config(name: str, config_class: type) -> None:
    """Let ``SupernetConfig.mixers`` hold a further kind of mixer; ``config_class`` is a dataclass."""
    _CONFIG_CLASSES[name] = config_class


class SupernetConfig(PreTrainedConfig):
    """A Llama-like decoder whose layers hold several mixers each.

    The field names of the shared parts are those of ``LlamaConfig``. ``mixers`` maps a mixer's long name to
    the fields of its configuration class. ``layer_mixers`` has an object for each layer, which maps the
    mixers that this layer holds to the fields in which they differ from ``mixers``; without it every layer
    holds every mixer. ``mlp_gated`` says whether the FFN is ``down(act(gate x) * up x)`` or
    ``down(act(up x))``; without a gate, ``mlp_bias`` may list the projections that have a bias.
    ``layer_ffns`` has an object for each layer with the fields of its FFN that are its own (``hidden_act``,
    ``intermediate_size``, ``mlp_bias``, ``mlp_gated``); without it all FFNs are alike. ``placement`` is the
    one used when none is asked for.

    Raises:
        ConfigError: a needed key is absent, a mixer's entry does not fit its class, or ``layer_mixers`` or
            ``layer_ffns`` does not fit the layers and ``mixers``.
        PlacementError: ``placement`` does not fit the layers and mixers.
    """

    model_type = "gearshift_supernet"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    has_no_defaults_at_init = True

    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_hidden_layers: int | None = None
    num_attention_heads: int | None = None
    head_dim: int | None = None
    mixers: dict[str, Any] | None = None
    placement: str | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    mlp_bias: bool | list[str] = False
    mlp_gated: bool = True
    layer_mixers: list[dict[str, Any]] | None = None
    layer_ffns: list[dict[str, Any]] | None = None
    rope_parameters: dict[str, Any] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401 - Transformers passes whatever it keeps
        for key in (*_SIZES, "mixers"):
            if getattr(self, key) is None:
                raise ConfigError(
                    f"the supernet's config has no {key!r}; expected it in config.json: "
                    "convert the teacher again, or restore the file"
                )
        for key in (*_SIZES, "max_position_embeddings"):
            check_number(key, getattr(self, key), int)
        check_number("rms_norm_eps", self.rms_norm_eps, float)
        self._check_pad_token()
        self._check_ffns()
        if not isinstance(self.mixers, dict) or not self.mixers:
            raise ConfigError(f"mixers is {self.mixers!r}; expected an object with an entry for each mixer")
        for name in self.mixers:
            self.mixer_config(name)
        self._check_layer_mixers()
        space = self.placement_space
        if self.placement is None:
            self.placement = str(space.default)
        if not isinstance(self.placement, str):
            raise ConfigError(f"placement is {self.placement!r}; expected text such as 'fa*2 swa*10'")
        space.check(Placement.parse(self.placement))
        super().__post_init__(**kwargs)

    def _check_pad_token(self) -> None:
        """It has a row in the embedding; -1 and the like count from the end, as torch does."""
        pad, vocabulary = self.pad_token_id, self.vocab_size
        assert vocabulary is not None
        if pad is not None and (not is_count(pad, -vocabulary) or pad >= vocabulary):
            raise ConfigError(
                f"pad_token_id is {pad!r:.80}; expected a token of the vocabulary of {vocabulary}, or null"
            )

    def _check_ffns(self) -> None:
        assert self.num_hidden_layers is not None
        if self.layer_ffns is not None:
            check_layer_ffns(self.layer_ffns, self.num_hidden_layers)
        for layer in range(1 if self.layer_ffns is None else self.num_hidden_layers):
            self.feed_forward_config(layer)

    def _check_layer_mixers(self) -> None:
        given, layers = self.layer_mixers, self.num_hidden_layers
        if given is None:
            return
        assert self.mixers is not None
        if not isinstance(given, list) or len(given) != layers:
            entries = f"{len(given)} entries" if isinstance(given, list) else repr(given)
            raise ConfigError(f"layer_mixers has {entries}; expected a list of {layers}, one for each layer")
        for layer, entry in enumerate(given):
            where = f"layer_mixers[{layer}]"
            if not isinstance(entry, dict) or not entry:
                raise ConfigError(f"{where} is {entry!r}; expected an object with the mixers of this layer")
            check_known(where, entry, list(self.mixers))
            for name in entry:
                self.mixer_config(name, layer)
        unused = [name for name in self.mixers if not any(name in entry for entry in given)]
        if unused:
            raise ConfigError(
                f"mixers has {unused[0]}, which no layer of layer_mixers holds; remove one or add the other"
            )

    def to_dict(self) -> dict[str, Any]:
        """See Transformers. Fields younger than the format are left out where they say nothing new."""
        fields = super().to_dict()
        # Digests of supernets are taken over these fields, and older supernets have no such keys.
        return {key: value for key, value in fields.items() if (key, value) not in _LATER_DEFAULTS}

    @property
    def placement_space(self) -> PlacementSpace:
        """Every placement this supernet can run."""
        assert self.num_hidden_layers is not None and self.mixers is not None
        by_layer = None if self.layer_mixers is None else tuple(tuple(entry) for entry in self.layer_mixers)
        return PlacementSpace(self.num_hidden_layers, tuple(self.mixers), by_layer)

    def layer_mixer_names(self, layer: int) -> tuple[str, ...]:
        """Long names of the mixers that a layer holds, in the order of `known_mixers`."""
        return self.placement_space.allowed(layer)

    def feed_forward_config(self, layer: int) -> FeedForwardConfig:
        """The configuration of one layer's FFN, checked.

        Raises:
            ConfigError: a value cannot be.
        """
        fields = {name: getattr(self, name) for name in ("hidden_size", *LAYER_FIELDS)}
        own = {} if self.layer_ffns is None else self.layer_ffns[layer]
        return build_feed_forward_config(f"layer_ffns[{layer}]" if own else "", {**fields, **own})

    def mixer_config(self, name: str, layer: int | None = None) -> Any:  # noqa: ANN401 - each mixer's own class
        """The configuration of one kind of mixer, checked; in one layer, or what the layers have in common.

        Raises:
            ConfigError: the entry is absent or does not fit the class, or the layer does not hold the mixer.
        """
        assert self.mixers is not None
        name = long_name(name)
        if name not in self.mixers:
            raise ConfigError(f"this supernet holds no {name}; it holds {', '.join(self.mixers)}")
        given, where = self.mixers[name], f"mixers.{name}"
        if layer is not None and self.layer_mixers is not None:
            own = self.layer_mixers[layer]
            if name not in own:
                raise ConfigError(f"layer {layer} holds no {name}; it holds {', '.join(own)}")
            where = f"layer_mixers[{layer}].{name}"
            if not isinstance(own[name], dict):
                raise ConfigError(f"{where} is {own[name]!r}; expected an object with the fields that differ")
            given = {**given, **own[name]}
        return build_mixer_config(_CONFIG_CLASSES[name], where, given)
