"""A placement out of a supernet again, in the plainest form that computes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gearshift.convert.convert import TEACHER_CONFIG
from gearshift.convert.native import NativeForm, NoNativeForm, find_native_form
from gearshift.convert.plan import Plan, run_plan
from gearshift.convert.source import ExportError, Source, open_source
from gearshift.convert.thin import plan_thin
from gearshift.placement import FULL_ATTENTION, Placement
from gearshift.presets import PRESETS_FILE
from gearshift.supernet.checkpoint import EXTRA

# Safetensors' names of dtypes, and those of a config.
DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: the new directory.
        placement: what it computes.
        nbytes: bytes of its tensors.
        form: the model of Transformers' own that it is; None for a supernet.
        why_supernet: why no such model was found, if none was.
        is_part: whether the teacher has parts that are not in it, such as a vision tower.
    """

    path: Path
    placement: Placement
    nbytes: int
    form: NativeForm | None = None
    why_supernet: str = ""
    is_part: bool = False


def export_placement(
    supernet: Path | str,
    out: Path | str,
    placement: Placement | str,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> Export:
    """Write one placement of a supernet as a model directory of its own.

    With full attention in every layer that is the teacher again: its class, its config and, unless they were
    trained, its tensors, bit for bit. With full and sliding attention it is the class of Transformers that
    computes the same, if one is known; else, as for all other placements, a supernet that holds only this
    placement's mixers.

    Args:
        supernet: a supernet directory.
        out: the model directory to make.
        placement: one of the supernet's placements.
        overwrite: replace what is at ``out``.
        progress: show how far it is.

    Raises:
        PlacementError: the supernet has no such placement.
        ExportError: no class of Transformers is known for full attention in every layer, or ``out`` is where
            ``supernet`` is.
        ConversionError: the teacher's config, kept in the supernet, is broken.
        CheckpointError: the supernet is not whole, or ``out`` cannot be written.
        OutputExistsError: there is something at ``out``.
    """
    source, out = open_source(supernet, out, overwrite), Path(out)
    placement = source.space.check(Placement.of(placement, source.space.num_layers))
    form, why = None, ""
    try:
        form = find_native_form(source.config, placement, source.teacher_config, source.files.infos)
    except NoNativeForm as reason:
        why = str(reason)
    if form is not None:
        plan = _plan_native(source, placement, form)
    elif set(placement) != {FULL_ATTENTION}:
        plan = plan_thin(source, [placement], placement)
    else:
        raise ExportError(
            f"{source.directory}: no class of Transformers is known that computes {str(placement)!r}: {why}. "
            "To drop the other mixers only, make it a preset and keep that one with gearshift thin"
        )
    run_plan(plan, source.files, out, overwrite=overwrite, progress=progress)
    is_part = form is not None and not form.is_teacher and (form.is_part or source.has_extra)
    return Export(out, placement, plan.nbytes, form, why, is_part)


def _plan_native(source: Source, placement: Placement, form: NativeForm) -> Plan:
    """The tensors that the placement uses, under the names of the class."""
    teacher, names = form.teacher, dict[str, str]()
    names |= {own: name for name, own in teacher.shared_tensors().items()}
    for layer, mixer in enumerate(placement):
        prefix = f"model.layers.{layer}."
        names |= {own: prefix + name for name, own in teacher.layer_tensors(layer).items()}
        attention = teacher.attention_tensors(layer).items()
        names |= {own: f"{prefix}mixers.{mixer}.{name}" for name, own in attention}
    if form.is_teacher:
        names |= {name: name for name in teacher.extra_tensors(source.files.infos)}
    return Plan(
        config=_config_text(source, form),
        steps=(source.copies(names),),
        source=source.directory,
        companions=source.companions_without({PRESETS_FILE, TEACHER_CONFIG, EXTRA}),
    )


def _config_text(source: Source, form: NativeForm) -> bytes:
    path = source.teacher_config_path
    if form.is_teacher and path is not None:
        return path.read_bytes()
    config = {key: value for key, value in form.config.items() if key != "torch_dtype"}
    config["dtype"] = DTYPES[source.files.infos["model.embed_tokens.weight"].dtype]
    return (json.dumps(config, indent=2, allow_nan=False) + "\n").encode()
