"""Where the tensors of an ``apriel2`` checkpoint go: each one is copied, none is made."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from gearshift.convert.apriel2.config import supernet_config
from gearshift.convert.apriel2.fields import Fields
from gearshift.convert.apriel2.layers import StoredLayer, block_prefix, read_layers
from gearshift.convert.apriel2.token_ids import token_ids
from gearshift.convert.plan import COPIED, Plan, PlannedTensor, Step
from gearshift.convert.teachers.base import ConversionError
from gearshift.placement import GATED_DELTA_NET, KIMI_DELTA_ATTENTION, long_name
from gearshift.supernet.checkpoint import TIED, check_floating, companions, expected_shapes
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.tensor_files import TORCH_DTYPES
from gearshift.tensor_headers import TensorInfo, read_json_object

MODEL_TYPES = ("apriel2_text", "apriel2")
VISION = "model.vision_encoder."
EMBEDDING = "model.embed_tokens.weight"
IN_LAYER = re.compile(r"model\.layers\.(?P<layer>\d+)\.(?:mixers\.(?P<kind>[^.]+)\.)?(?P<rest>.+)")
# The supernet's names of tensors inside a mixer -> the format's, where they differ.
RENAMED = {
    GATED_DELTA_NET: {"conv1d.weight": "convolution.weight"},
    KIMI_DELTA_ATTENTION: {
        "q_conv1d.weight": "q_conv.weight",
        "k_conv1d.weight": "k_conv.weight",
        "v_conv1d.weight": "v_conv.weight",
        "b_proj.weight": "beta_proj.weight",
        "o_norm.weight": "norm.weight",
    },
}
# The context that an exporter writes which does not know the true one.
UNKNOWN_CONTEXT = 2048
# How many names of missing or surplus tensors are listed.
SHOWN = 12

logger = logging.getLogger(__name__)


def plan_import(
    path: Path,
    infos: Mapping[str, TensorInfo],
    texts: Mapping[str, bytes],
    *,
    mixers: Sequence[str] | None = None,
    extra: bool = True,
) -> Plan:
    """What converting such a checkpoint will write, from its headers and config alone.

    Args:
        path: its ``config.json``.
        infos: its tensors.
        texts: small files to write, by name.
        mixers: names of the mixers that layers keep of those that they hold; None for all.
        extra: carry along the tensors of its vision encoder.

    Raises:
        ConversionError: it holds what no supernet has, a layer holds none of ``mixers``, or its config and
            its tensors do not belong together.
        CheckpointError: a tensor has a wrong shape or dtype, or a file beside them is damaged.
    """
    directory, given = path.parent, Fields(read_json_object(path), str(path))
    ids = token_ids(directory, given.given, given.count("vocab_size", 32000))
    layers = read_layers(given, infos)
    config = supernet_config(given, layers, ids)
    sources = stored_names(config, layers)
    _check_names(directory, set(sources.values()), _known(infos, config))
    if mixers is not None:
        layers = _only(layers, [long_name(name) for name in mixers], directory)
        config = supernet_config(given, layers, ids)
        sources = stored_names(config, layers)
    check_floating(directory, {name: infos[name] for name in sources.values()})
    config.dtype = TORCH_DTYPES[infos[EMBEDDING].dtype]
    if config.max_position_embeddings == UNKNOWN_CONTEXT:
        logger.warning(
            "%s says that the context is %d tokens long, which exporters write that do not know it; if it is "
            "longer, raise max_position_embeddings in the new config.json",
            path,
            UNKNOWN_CONTEXT,
        )
    return Plan(
        config=config,
        steps=(_copies(sources, infos),),
        source=directory,
        companions=tuple(companions(directory)),
        texts=texts,
        extra=_copies({name: name for name in infos if extra and name.startswith(VISION)}, infos).tensors,
    )


def stored_names(config: SupernetConfig, layers: Sequence[StoredLayer]) -> dict[str, str]:
    """For each tensor of the supernet, in its order, the name of the one that it copies."""
    return {
        name: _stored_name(name, layers)
        for name in expected_shapes(config)
        if not (config.tie_word_embeddings and name == TIED)
    }


def _stored_name(name: str, layers: Sequence[StoredLayer]) -> str:
    """The same name, except in a layer."""
    place = IN_LAYER.fullmatch(name)
    if place is None:
        return name
    layer, kind, rest = int(place["layer"]), place["kind"], place["rest"]
    if kind is None:
        return f"{block_prefix(layer)}.{rest}"
    return f"{layers[layer].mixers[kind].prefix}.{RENAMED.get(kind, {}).get(rest, rest)}"


def _known(names: Collection[str], config: SupernetConfig) -> set[str]:
    """Without those that no text needs: the vision encoder's, and a head that is tied but stored as well."""
    tied = config.tie_word_embeddings
    return {name for name in names if not name.startswith(VISION) and not (tied and name == TIED)}


def _check_names(directory: Path, expected: set[str], given: set[str]) -> None:
    found = [
        f"{what} {len(names)} tensors ({_listed(names)})"
        for what, names in (("lacks", expected - given), ("has surplus", given - expected))
        if names
    ]
    if found:
        raise ConversionError(
            f"{directory} {' and '.join(found)}: its config.json and its weights do not belong together; "
            "restore what does not fit"
        )


def _listed(names: Collection[str]) -> str:
    some, rest = sorted(names)[:SHOWN], len(names) - SHOWN
    return ", ".join(some) + (f" and {rest} more" if rest > 0 else "")


def _only(layers: Sequence[StoredLayer], kinds: Sequence[str], directory: Path) -> list[StoredLayer]:
    held = {kind for layer in layers for kind in layer.mixers}
    for kind in kinds:
        if kind not in held:
            raise ConversionError(
                f"{directory} holds no {kind}; expected some of {', '.join(sorted(held))}: such a checkpoint "
                "is taken as it is, and nothing is made anew"
            )
    for number, layer in enumerate(layers):
        if not layer.mixers.keys() & set(kinds):
            raise ConversionError(
                f"{directory}: layer {number} holds only {', '.join(layer.mixers)}, and of the mixers only "
                f"{', '.join(kinds)} were asked for; ask for more"
            )
    return [layer.only(kinds) for layer in layers]


def _copies(sources: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> Step:
    return Step(tuple(PlannedTensor(name, infos[own], (own,), COPIED) for name, own in sources.items()))
