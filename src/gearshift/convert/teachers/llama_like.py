"""What the families around Llama have in common: one configuration class of Transformers, and Llama's names.

Everything that an older or newer ``config.json`` says in its own way (rotary parameters, head sizes, windows,
defaults) is read by the family's configuration class in Transformers, so it means here what it means there.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gearshift.convert.teachers.base import ConversionError, Teacher
from gearshift.placement import FULL_ATTENTION, SLIDING_ATTENTION
from gearshift.supernet.config import STUMBLES
from gearshift.supernet.mixer_configs import PROJECTIONS

NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
COPIED = (
    *NEEDED,
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
)
# Each changes what the tensors mean, or layers one by one; nothing here reads them.
REFUSED = ("quantization_config", "per_layer_config")
INPUT_NORM = "input_layernorm.weight"
NORMS = (INPUT_NORM, "post_attention_layernorm.weight")
FFN = ("gate_proj", "up_proj", "down_proj")
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ROPE_TYPES = {"default": LlamaRotaryEmbedding.compute_default_rope_parameters, **ROPE_INIT_FUNCTIONS}


class LlamaLikeTeacher(Teacher):
    """Grouped-query attention, a gated FFN and two norms a layer, named as in Llama.

    A family sets ``config_class`` and overrides what it has besides.

    Raises:
        ConversionError: the config lacks a key, or holds what does not fit.
    """

    config_class: ClassVar[type[PreTrainedConfig]]
    qk_norm: ClassVar[bool] = False

    def __init__(self, config: dict[str, Any], where: str, tensor_names: Collection[str] = ()) -> None:
        super().__init__(config, where, tensor_names)
        for key in NEEDED:
            self.need(key)
        for key in REFUSED:
            if config.get(key):
                raise ConversionError(
                    f"{where} has {key!r}, which conversion does not know; give plain weights and one config"
                )
        self._check_sizes()
        self.filled: Any = self._filled()
        self.head_dim = self._head_dim()
        self._check_heads()
        self._check_activation()
        self._check_rope()
        self._check_windows()

    def biases(self) -> tuple[str, ...]:
        """The projections of attention that have a bias."""
        return ()

    def mlp_bias(self) -> bool:
        """Whether the projections of the FFN have biases."""
        return False

    def layer_windows(self) -> tuple[int | None, ...]:
        """See :class:`Teacher`; here, no layer has a window."""
        return (None,) * self.filled.num_hidden_layers

    def tensor_name(self, name: str) -> str:
        """The checkpoint's name of a tensor, given Llama's."""
        return name

    def shared_fields(self) -> dict[str, Any]:
        """See :class:`Teacher`."""
        fields = {key: getattr(self.filled, key) for key in COPIED}
        return {**fields, "head_dim": self.head_dim, "mlp_bias": self.mlp_bias()}

    def attention_fields(self) -> dict[str, Any]:
        """See :class:`Teacher`."""
        return {
            "num_heads": self.filled.num_attention_heads,
            "num_key_value_heads": self.filled.num_key_value_heads,
            "head_dim": self.head_dim,
            "biases": list(self.biases()),
            "qk_norm": self.qk_norm,
        }

    def shared_tensors(self) -> dict[str, str]:
        """See :class:`Teacher`; a tied head is the embedding, even if a head is stored as well."""
        names = [EMBEDDING, FINAL_NORM]
        if not self.filled.tie_word_embeddings:
            names.append(HEAD)
        return {name: self.tensor_name(name) for name in names}

    def layer_tensors(self, layer: int) -> dict[str, str]:
        """See :class:`Teacher`."""
        names = [*NORMS, *(f"mlp.{part}.weight" for part in FFN)]
        if self.mlp_bias():
            names += [f"mlp.{part}.bias" for part in FFN]
        return {name: self._layer_name(layer, name) for name in names}

    def attention_tensors(self, layer: int) -> dict[str, str]:
        """See :class:`Teacher`."""
        names = [f"{name}.weight" for name in PROJECTIONS] + [f"{name}.bias" for name in self.biases()]
        if self.qk_norm:
            names += ["q_norm.weight", "k_norm.weight"]
        return {name: self._layer_name(layer, f"self_attn.{name}") for name in names}

    def input_norm(self, layer: int) -> str:
        """See :class:`Teacher`."""
        return self._layer_name(layer, INPUT_NORM)

    def unused_tensors(self, names: Iterable[str]) -> list[str]:
        """Rotary frequencies, which the config gives, and the second copy of a tied head."""
        head = self.tensor_name(HEAD) if self.filled.tie_word_embeddings else None
        return [name for name in names if name.endswith("rotary_emb.inv_freq") or name == head]

    def _layer_name(self, layer: int, name: str) -> str:
        return self.tensor_name(f"model.layers.{layer}.{name}")

    def _filled(self) -> PreTrainedConfig:
        """Transformers fills in what older configs leave out, rotary parameters above all."""
        try:
            filled = self.config_class.from_dict(copy.deepcopy(self.config))
            # Once more: only now does it see an ``original_max_position_embeddings`` at the top level.
            filled.standardize_rope_params()
        except (StrictDataclassError, *STUMBLES) as error:
            reason = " ".join(str(error).split())
            raise ConversionError(f"{self.where} is refused: {reason}; restore it") from None
        return filled

    def _check_sizes(self) -> None:
        """Before something is divided by zero, or a list of absurdly many layers is made."""
        for key in NEEDED:
            if isinstance(self.config[key], int) and self.config[key] < 1:
                raise ConversionError(
                    f"{self.where} is refused: {key} is {self.config[key]}; expected at least 1: restore it"
                )
        layers, tensors = self.config["num_hidden_layers"], len(self.tensor_names)
        if tensors and isinstance(layers, int) and layers > tensors:
            raise ConversionError(
                f"{self.where} promises {layers} layers, but the checkpoint has only {tensors} tensors; "
                "restore the teacher's files"
            )

    def _head_dim(self) -> int:
        hidden, heads = self.filled.hidden_size, self.filled.num_attention_heads
        head_dim = getattr(self.filled, "head_dim", None) or hidden // heads
        derived = self.config.get("head_dim") is None and head_dim == hidden // heads
        if derived and hidden % heads:
            raise ConversionError(
                f"{self.where} has no 'head_dim', and hidden_size {hidden} is not a multiple of its {heads} "
                "attention heads; restore it"
            )
        return head_dim

    def _check_activation(self) -> None:
        if self.filled.hidden_act not in ACT2FN:
            raise ConversionError(
                f"{self.where} has hidden_act {self.filled.hidden_act!r}; expected a name that Transformers "
                "knows, such as 'silu'"
            )

    def _check_heads(self) -> None:
        heads, groups = self.filled.num_attention_heads, self.filled.num_key_value_heads
        if groups < 1 or heads % groups:
            raise ConversionError(
                f"{self.where} has {heads} query heads and {groups} key/value heads; "
                "expected the first to be a multiple of the second"
            )

    def _check_rope(self) -> None:
        """The type is known, and its frequencies fill a head, for short and for long texts."""
        rope = self.filled.rope_parameters
        kind = rope.get("rope_type")
        if not isinstance(kind, str) or kind not in ROPE_TYPES:
            raise ConversionError(
                f"{self.where} has rope type {kind!r}; expected one of {', '.join(ROPE_TYPES)} for all layers"
            )
        lengths = (1, 2 * self.filled.max_position_embeddings)
        try:
            given = [ROPE_TYPES[kind](self.filled, seq_len=length)[0] for length in lengths]
        except STUMBLES as error:
            raise ConversionError(f"{self.where}: rotary parameters {rope} are refused: {error}") from None
        if any(
            2 * len(frequencies) != self.head_dim or not frequencies.isfinite().all() for frequencies in given
        ):
            raise ConversionError(
                f"{self.where}: rotary parameters {rope} do not turn the {self.head_dim} channels of a head; "
                "expected finite frequencies for all of them, in pairs"
            )

    def _check_windows(self) -> None:
        for layer, window in enumerate(self.layer_windows()):
            if window is not None and window < 1:
                raise ConversionError(f"{self.where}: layer {layer} has a sliding window of {window} tokens")


def window_fields(windows: tuple[int | None, ...]) -> dict[str, Any] | None:
    """What a config says of layers with these windows; None where there are several windows."""
    if len(set(windows) - {None}) > 1:
        return None
    return {
        "layer_types": [FULL_ATTENTION if window is None else SLIDING_ATTENTION for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
    }


def windows_by_type(teacher: LlamaLikeTeacher) -> tuple[int | None, ...]:
    """The window of each layer of a family whose config says by ``layer_types`` which layers are sliding."""
    window = teacher.filled.sliding_window
    for kind in teacher.filled.layer_types:
        if kind not in (FULL_ATTENTION, SLIDING_ATTENTION):
            raise ConversionError(
                f"{teacher.where} has a layer of type {kind!r}; "
                f"expected {FULL_ATTENTION} or {SLIDING_ATTENTION}"
            )
        if kind == SLIDING_ATTENTION and window is None:
            raise ConversionError(
                f"{teacher.where} has sliding layers without a window; expected 'sliding_window', and "
                "'use_sliding_window' true"
            )
    return tuple(window if kind == SLIDING_ATTENTION else None for kind in teacher.filled.layer_types)
