"""The layers of an ``apriel2`` checkpoint, read from its config.

The names of its tensors are needed as well: where the config does not say whether a projection has a bias,
they do.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from transformers.activations import ACT2FN

from gearshift.convert.apriel2.biases import biased
from gearshift.convert.apriel2.fields import Fields
from gearshift.convert.apriel2.mixers import StoredMixer, read_mixer
from gearshift.convert.teachers.base import ConversionError
from gearshift.placement import MAX_LAYERS, known_mixers

FFN_BIASES = {"up_proj": "layer_1", "down_proj": "layer_2"}


@dataclass(frozen=True)
class StoredLayer:
    """One layer of the checkpoint.

    Attributes:
        mixers: the mixers by the supernet's long names of their kinds.
        main: the kind that is used when nothing else is asked for.
        ffn: the fields of ``SupernetConfig`` about its FFN.
    """

    mixers: dict[str, StoredMixer]
    main: str
    ffn: dict[str, Any]

    def only(self, kinds: Collection[str]) -> StoredLayer:
        """The layer without its mixers of other kinds; it must hold one of these."""
        mixers = {kind: mixer for kind, mixer in self.mixers.items() if kind in kinds}
        main = self.main if self.main in mixers else min(mixers, key=known_mixers().index)
        return replace(self, mixers=mixers, main=main)


def block_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"model.decoder.blocks.{layer}"


def read_layers(config: Fields, names: Collection[str]) -> list[StoredLayer]:
    """Every layer of a checkpoint with this config and tensors of these names.

    Raises:
        ConversionError: the supernet has no such layer, or a value cannot be.
    """
    decoder = config.inner("decoder")
    count = decoder.count("num_blocks")
    if count > min(MAX_LAYERS, len(names)):
        decoder.refuse("num_blocks", f"the checkpoint has only {len(names)} tensors")
    kind = decoder.choice("type", ("fixed", "pattern"), "fixed")
    if kind == "fixed":
        blocks = [decoder.inner("block")]
    else:
        pattern, known = decoder.value("pattern"), decoder.inner("blocks")
        if not isinstance(pattern, list) or not pattern or not all(isinstance(name, str) for name in pattern):
            decoder.refuse("pattern", "expected a list of the names of blocks")
        blocks = [known.inner(name) for name in pattern]
    epsilon = final_epsilon(config)
    return [_read_layer(blocks[i % len(blocks)], block_prefix(i), epsilon, names) for i in range(count)]


def final_epsilon(config: Fields) -> float:
    """The epsilon of the final norm, which must be that of all norms."""
    return _epsilon(config.inner("head", optional=True).inner("normalization", optional=True), 1e-5)


def _epsilon(norm: Fields, default: float) -> float:
    norm.choice("type", ("rms_norm",), "rms_norm")
    return norm.number("epsilon", default)


def _read_layer(block: Fields, prefix: str, epsilon: float, names: Collection[str]) -> StoredLayer:
    own = _epsilon(block.inner("normalization", optional=True), epsilon)
    if own != epsilon:
        raise ConversionError(
            f"{block.where}.normalization.epsilon is {own} and head.normalization.epsilon {epsilon}: some "
            "programs use the one in every block, some the other; make them equal to what it was trained with"
        )
    mixers, main = _read_mixers(block.inner("mixer"), f"{prefix}.mixer", names)
    return StoredLayer(mixers, main, _read_ffn(block.inner("mlp"), f"{prefix}.mlp", names))


def _read_mixers(mixer: Fields, prefix: str, names: Collection[str]) -> tuple[dict[str, StoredMixer], str]:
    """The mixers of a layer by kind, and the kind of the main one."""
    if mixer.value("type") != "stochastic":
        only = read_mixer(mixer, prefix, names)
        return {only.kind: only}, only.kind
    given = mixer.inner("mixers")
    named: dict[str, StoredMixer] = {}
    for name in given.given:
        named[name] = read_mixer(given.inner(name), f"{prefix}.mixers.{name}", names)
        twins = [other for other in named if named[other].kind == named[name].kind]
        if len(twins) > 1:
            raise ConversionError(
                f"{given.where}: {' and '.join(twins)} are both {named[name].kind}; a layer of a supernet "
                "holds one mixer of a kind: remove one of them from the checkpoint"
            )
    if not named:
        mixer.refuse("mixers", "expected at least one")
    main = mixer.choice("main_mixer_name", tuple(named), next(iter(named)))
    return {stored.kind: stored for stored in named.values()}, named[main].kind


def _read_ffn(mlp: Fields, prefix: str, names: Collection[str]) -> dict[str, Any]:
    mlp.choice("type", ("mlp",), "mlp")
    activation = mlp.value("activation", "silu")
    if not isinstance(activation, str) or activation not in ACT2FN:
        mlp.refuse("activation", "expected a name that Transformers knows, such as 'silu'")
    gated = mlp.flag("gated", False)
    # With a gate there is never a bias, whatever the config says.
    biases = [] if gated else biased(mlp, FFN_BIASES, prefix, names)
    return {
        "intermediate_size": mlp.count("intermediate_size"),
        "hidden_act": activation,
        "mlp_bias": bool(biases) if len(biases) in (0, len(FFN_BIASES)) else biases,
        "mlp_gated": gated,
    }
