"""Which class of Transformers computes what a placement computes, and what its ``config.json`` says.

A config is a candidate first. Then the family that reads it says in the supernet's terms what it means, and
only if that is exactly what the placement computes, layer by layer, it is taken.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from gearshift.convert.convert import TEACHER_CONFIG
from gearshift.convert.teachers import FAMILIES, ConversionError, Teacher, read_teacher
from gearshift.placement import FULL_ATTENTION, SLIDING_ATTENTION, Placement, short_name
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.mixer_configs import AttentionConfig

ATTENTION = (FULL_ATTENTION, SLIDING_ATTENTION)
# What the whole model computes with, beside mixers and FFNs.
SHARED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
)
# What it says besides.
OTHERS = (
    "intermediate_size",
    "hidden_act",
    "mlp_bias",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


class NoNativeForm(Exception):
    """No class of Transformers is known to compute this; the message says why. Never leaves this package."""


@dataclass(frozen=True)
class NativeForm:
    """A model of Transformers' own that computes what a placement computes.

    Attributes:
        config: its ``config.json``, but for the dtype where it is not the teacher's own.
        teacher: the family that reads it, which knows the names of its tensors.
        windows: the window of each layer, None for none.
        is_teacher: whether the config is the teacher's own.
        is_part: whether the teacher has parts that this model does not have, such as a vision tower.
    """

    config: dict[str, Any]
    teacher: Teacher
    windows: tuple[int | None, ...]
    is_teacher: bool = False
    is_part: bool = False

    @property
    def class_name(self) -> str:
        """Transformers' name of the class, as far as the config gives it."""
        names = self.config.get("architectures")
        return str(names[0]) if isinstance(names, list) and names else f"a {self.config['model_type']} model"


def find_native_form(
    config: SupernetConfig,
    placement: Placement,
    teacher_config: dict[str, Any] | None,
    names: Collection[str],
) -> NativeForm:
    """The form in which most programs can load a placement.

    Args:
        config: the supernet's.
        placement: one of its placements.
        teacher_config: the teacher's ``config.json``, None if it is not known. One of no family of teachers,
            such as Super Apriel's, is no help.
        names: the names of all tensors at hand, those of the extra ones among them.

    Raises:
        NoNativeForm: there is none.
        ConversionError: the teacher's config is none that conversion knows.
    """
    windows = _windows(config, placement)
    if teacher_config is not None and teacher_config.get("model_type") not in list(FAMILIES):
        teacher_config = None
    if teacher_config is None:
        own = _plain_family(config, placement)
    else:
        own = read_teacher(teacher_config, TEACHER_CONFIG, names)
    different = misfit(config, placement, own)
    if different is None and (not own.has_extra or own.extra_tensors(names)):
        return NativeForm(teacher_config or own.config, own, windows, is_teacher=teacher_config is not None)
    changed = own.config_with_windows(windows)
    if changed is None:
        raise NoNativeForm(_why_no_class(own, windows, different))
    family = read_teacher(changed, "the new config.json")
    different = misfit(config, placement, family)
    if different is not None:
        raise NoNativeForm(different)
    return NativeForm(changed, family, windows, is_part=own.has_extra)


def _windows(config: SupernetConfig, placement: Placement) -> tuple[int | None, ...]:
    for layer, mixer in enumerate(placement):
        if mixer not in ATTENTION:
            raise NoNativeForm(f"layer {layer} is {short_name(mixer)}")
    return tuple(config.mixer_config(mixer, layer).window for layer, mixer in enumerate(placement))


def _why_no_class(own: Teacher, windows: tuple[int | None, ...], different: str | None) -> str:
    several = sorted({window for window in windows if window is not None})
    if len(several) > 1:
        return f"its layers have windows of {', '.join(map(str, several))} tokens; a config has one for all"
    return f"no class like {own.config['model_type']} fits: {different}"


def misfit(config: SupernetConfig, placement: Placement, teacher: Teacher) -> str | None:
    """The first thing in which a teacher is not what a placement of attention computes; None if it is it."""
    return next(_misfits(config, placement, teacher), None)


def _misfits(config: SupernetConfig, placement: Placement, teacher: Teacher) -> Iterator[str]:
    shared, attention = teacher.shared_fields(), teacher.attention_fields()
    for name in SHARED:
        yield from _difference(name, getattr(config, name), shared[name])
    described = SupernetConfig(**shared, mixers={FULL_ATTENTION: attention})
    windows = teacher.layer_windows()
    for layer, mixer in enumerate(placement):
        where = f" of layer {layer}"
        ffn, own_ffn = config.feed_forward_config(layer), described.feed_forward_config(layer)
        for name, value in asdict(own_ffn).items():
            yield from _difference(name + where, getattr(ffn, name), value)
        own = AttentionConfig(**attention, rope_parameters=shared["rope_parameters"], window=windows[layer])
        held = asdict(config.mixer_config(mixer, layer))
        held["rope_parameters"] = _rope(config, held["rope_parameters"])
        for name, value in asdict(own).items():
            yield from _difference(name + where, held[name], value)


def _difference(name: str, value: object, other: object) -> Iterator[str]:
    if value != other:
        yield f"{name} is {value!r}, where such a class has {other!r}"


def _rope(config: SupernetConfig, own: dict[str, Any] | None) -> dict[str, Any] | None:
    """A mixer's rotary parameters in Transformers' standard form."""
    if own is None:
        return config.rope_parameters
    filled = copy.copy(config)
    filled.rope_parameters = dict(own)
    filled.standardize_rope_params()
    return filled.rope_parameters


def _plain_family(config: SupernetConfig, placement: Placement) -> Teacher:
    """A Llama or, where there are its biases or norms, a Qwen of the supernet's sizes."""
    first = config.mixer_config(placement[0], 0)
    kind, name = "llama", "LlamaForCausalLM"
    if first.qk_norm:
        kind, name = "qwen3", "Qwen3ForCausalLM"
    elif set(first.biases) == {"q_proj", "k_proj", "v_proj"}:
        kind, name = "qwen2", "Qwen2ForCausalLM"
    described = {
        "model_type": kind,
        "architectures": [name],
        **{key: getattr(config, key) for key in (*SHARED, *OTHERS)},
        "num_attention_heads": first.num_heads,
        "num_key_value_heads": first.num_key_value_heads,
        "head_dim": first.head_dim,
        "rope_parameters": _rope(config, first.rope_parameters),
        "attention_bias": bool(first.biases),
    }
    try:
        return read_teacher(described, f"a config of {name}")
    except ConversionError as error:
        raise NoNativeForm(str(error)) from None
