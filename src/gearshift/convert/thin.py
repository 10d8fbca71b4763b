"""A supernet with fewer mixers: in each layer those that some of its presets use, and no other."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gearshift.convert.plan import Plan, run_plan
from gearshift.convert.source import ExportError, Source, open_source
from gearshift.placement import Placement
from gearshift.presets import PRESETS_FILE, Preset, named_preset, presets_json
from gearshift.supernet.checkpoint import TIED, expected_shapes
from gearshift.supernet.config import SupernetConfig


@dataclass(frozen=True)
class Thinned:
    """What was written.

    Attributes:
        path: the new supernet directory.
        layers: for each layer the mixers that it still holds.
        presets: the names of the presets that are still there.
        default: the default placement.
        nbytes: bytes of its tensors.
        saved: how many fewer those are.
    """

    path: Path
    layers: tuple[tuple[str, ...], ...]
    presets: tuple[str, ...]
    default: str
    nbytes: int
    saved: int


def thin_supernet(
    supernet: Path | str,
    out: Path | str,
    presets: Sequence[str],
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Thinned:
    """Keep in each layer only the mixers that the named presets use there.

    Full attention goes, too, where none of them uses it. Presets that are still inside stay with all that was
    measured of them. The default placement stays if it is still inside, else the first preset becomes it.

    Args:
        supernet: a supernet directory.
        out: the supernet directory to make.
        presets: names of presets of ``supernet``, at least one.
        overwrite: replace what is at ``out``.
        progress: show how far it is.

    Raises:
        PresetError: there is no preset of that name.
        ExportError: no preset is named, or ``out`` is where ``supernet`` is.
        CheckpointError: the supernet is not whole, or ``out`` cannot be written.
        OutputExistsError: there is something at ``out``.
    """
    source = open_source(supernet, out, overwrite)
    named = [named_preset(source.presets, name).placement for name in presets]
    if not named:
        raise ExportError("no preset is named; give those that shall still run")
    assert source.config.placement is not None
    plan = plan_thin(source, named, Placement.parse(source.config.placement))
    run_plan(plan, source.files, out, overwrite=overwrite, progress=progress)
    return _thinned(source, plan, Path(out))


def _thinned(source: Source, plan: Plan, out: Path) -> Thinned:
    assert isinstance(plan.config, SupernetConfig) and plan.config.placement is not None
    space = plan.config.placement_space
    kept = tuple(preset.name for preset in _presets_inside(source, plan.config))
    saved = sum(source.files.infos[name].nbytes for name in _tensors(source.config)) - plan.nbytes
    return Thinned(out, space.layers, kept, plan.config.placement, plan.nbytes, saved)


def plan_thin(source: Source, placements: Sequence[Placement], default: Placement) -> Plan:
    """A supernet with the mixers that these placements use, and with the presets that are still inside.

    Args:
        source: the supernet.
        placements: placements of it, at least one.
        default: the placement that is used when none is asked for; the first of ``placements`` takes its
            place if it is no longer inside.
    """
    config = thin_config(source.config, placements, default)
    presets = _presets_inside(source, config)
    text = json.dumps(presets_json(presets), indent=2, allow_nan=False) + "\n"
    return Plan(
        config=config,
        steps=(source.copies({name: name for name in _tensors(config)}),),
        source=source.directory,
        companions=source.companions_without({PRESETS_FILE}),
        texts={PRESETS_FILE: text.encode()} if presets else {},
    )


def thin_config(
    config: SupernetConfig, placements: Sequence[Placement], default: Placement
) -> SupernetConfig:
    """The config of a supernet that holds the mixers of these placements; see :func:`plan_thin`."""
    used = [set(mixers) for mixers in zip(*placements, strict=True)]
    layers = [
        {
            mixer: _own_fields(config, mixer, layer)
            for mixer in config.layer_mixer_names(layer)
            if mixer in kept
        }
        for layer, kept in enumerate(used)
    ]
    fields, held = config.to_dict(), set[str]().union(*used)
    fields["mixers"] = {mixer: entry for mixer, entry in fields["mixers"].items() if mixer in held}
    alike = all(entry == dict.fromkeys(held, {}) for entry in layers)
    fields["layer_mixers"] = None if alike else layers
    inside = all(mixer in kept for mixer, kept in zip(default, used, strict=True))
    fields["placement"] = str(default if inside else placements[0])
    return SupernetConfig.from_dict(fields)


def _own_fields(config: SupernetConfig, mixer: str, layer: int) -> dict[str, object]:
    return {} if config.layer_mixers is None else dict(config.layer_mixers[layer][mixer])


def _presets_inside(source: Source, config: SupernetConfig) -> list[Preset]:
    space = config.placement_space
    return [preset for preset in source.presets.values() if space.holds(preset.placement)]


def _tensors(config: SupernetConfig) -> Iterable[str]:
    """The names of what a supernet with this config stores."""
    return (name for name in expected_shapes(config) if not (config.tie_word_embeddings and name == TIED))
