"""Teacher directory in, supernet directory out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from gearshift.convert.apriel2 import MODEL_TYPES as APRIEL_TYPES
from gearshift.convert.apriel2 import plan_import
from gearshift.convert.initialize import (
    COPIED_MIXERS,
    DEFAULT_INITIALIZER,
    INITIALIZERS,
    Initializer,
    TeacherAttention,
    seeded_generator,
)
from gearshift.convert.plan import COPIED, Plan, PlannedTensor, ReadTensor, Step, run_plan, working_memory
from gearshift.convert.teachers import ConversionError, Teacher, read_teacher, supported_architectures
from gearshift.errors import CheckpointError
from gearshift.files import refuse_existing
from gearshift.placement import FULL_ATTENTION, MIXERS, SLIDING_ATTENTION, long_name
from gearshift.supernet.checkpoint import check_floating, companions, expected_shapes
from gearshift.supernet.config import ConfigError, SupernetConfig
from gearshift.supernet.tensor_files import TORCH_DTYPES, TensorFiles
from gearshift.tensor_headers import TensorInfo, file_inside, read_json_object

DEFAULT_WINDOW = 4096
ARCHITECTURE = "SupernetForCausalLM"
TEACHER_CONFIG = "teacher_config.json"


def convert_teacher(
    teacher: Path | str,
    out: Path | str,
    *,
    mixers: Sequence[str] | None = None,
    window: int | None = None,
    init: str | Initializer | None = None,
    seed: int = 0,
    extra: bool = True,
    overwrite: bool = False,
    progress: bool = False,
) -> Path:
    """Give every layer of a teacher its mixers: make a plan and run it.

    Args:
        teacher: a model directory of a supported family, or a checkpoint of Super Apriel.
        out: the supernet directory to make.
        mixers: names of the mixers each layer gets; ``full_attention`` must be among them. By default the
            four of ``MIXERS``. Of a Super Apriel checkpoint, the mixers to keep; by default all.
        window: tokens a sliding window sees; by default 4096, or an eighth of a shorter context. Neither
            this nor ``init`` is for a Super Apriel checkpoint, in which nothing is made anew.
        init: the recipe for what is not copied: a name of ``INITIALIZERS``, ``aligned`` by default, or an
            initialiser of your own.
        seed: of the few random weights.
        extra: carry along tensors that no text needs, such as a vision tower.
        overwrite: replace what is at ``out``.
        progress: show how far it is.

    Raises:
        ConversionError: the teacher is of no supported family, lacks a tensor, or lies at ``out``.
        CheckpointError: its files are missing or damaged, or ``out`` cannot be written.
        OutputExistsError: there is something at ``out``.
    """
    teacher, out = Path(teacher), Path(out)
    check_output(teacher, out, overwrite)
    plan = plan_conversion(teacher, mixers=mixers, window=window, init=init, seed=seed, extra=extra)
    return run_plan(plan, TensorFiles(teacher), out, overwrite=overwrite, progress=progress)


def check_output(teacher: Path, out: Path, overwrite: bool) -> None:
    """Refuse an output that is not free, before anything is read.

    Raises:
        OutputExistsError: there is something, and ``overwrite`` is false.
        ConversionError: it holds the teacher.
    """
    if not overwrite:
        refuse_existing(out)
    if teacher.exists() and teacher.resolve().is_relative_to(out.resolve()):
        raise ConversionError(f"the output {out} would replace the teacher {teacher}; give another path")


def plan_conversion(
    teacher: Path | str,
    *,
    mixers: Sequence[str] | None = None,
    window: int | None = None,
    init: str | Initializer | None = None,
    seed: int = 0,
    extra: bool = True,
) -> Plan:
    """What converting a teacher will write, from its headers and config alone.

    The arguments are those of :func:`convert_teacher`.

    Raises:
        ConversionError: the teacher is of no supported family, its tensors are not those that its config
            promises, or an option is wrong.
        CheckpointError: its files are missing or damaged.
    """
    directory = Path(teacher)
    initializer = _initializer(DEFAULT_INITIALIZER if init is None else init)
    if not (directory / "config.json").is_file():
        raise CheckpointError(f"no teacher at {directory}: there is no config.json; give a model's directory")
    path = file_inside(directory, "config.json")
    fields = _read_config(path)
    infos = TensorFiles(directory).infos
    texts = {TEACHER_CONFIG: path.read_bytes()}
    if fields["model_type"] in APRIEL_TYPES:
        _refuse_recipe(path, window=window, init=init)
        return plan_import(path, infos, texts, mixers=mixers, extra=extra)
    known = read_teacher(fields, str(path), infos)
    config = supernet_config(known, mixers or MIXERS, window, initializer)
    used = _check_tensors(directory, known, infos)
    config.dtype = TORCH_DTYPES[infos[used[0]].dtype]
    return Plan(
        config=config,
        steps=tuple(_steps(known, config, infos, initializer, seed)),
        source=directory,
        companions=tuple(companions(directory)),
        texts=texts,
        extra=_copies("", {name: name for name in known.extra_tensors(infos) if extra}, infos).tensors,
    )


def _initializer(init: str | Initializer) -> Initializer:
    if not isinstance(init, str):
        return init
    if init not in INITIALIZERS:
        raise ConversionError(f"init is {init!r}; expected {' or '.join(INITIALIZERS)}")
    return INITIALIZERS[init]


def _refuse_recipe(path: Path, **options: object) -> None:
    for name, value in options.items():
        if value is not None:
            raise ConversionError(
                f"{path} is Super Apriel's, whose mixers are all there: {name} {value!r} has no meaning for "
                f"them; leave {name} out, or give the plain teacher"
            )


def _read_config(path: Path) -> dict[str, Any]:
    """The teacher's config; what makes its weights unreadable is said before they are looked at."""
    config = read_json_object(path)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if part.get("quantization_config"):
            raise ConversionError(
                f"{path} has a 'quantization_config'; expected plain weights: dequantise the teacher first, "
                "or take its unquantised checkpoint"
            )
    if config.get("model_type") not in (*supported_architectures(), *APRIEL_TYPES):
        read_teacher(config, str(path))  # raises, and says what is supported
    return config


def supernet_config(
    teacher: Teacher, mixers: Sequence[str], window: int | None, initializer: Initializer
) -> SupernetConfig:
    """The supernet's config: the teacher's shared fields, and mixers of the teacher's head sizes.

    Raises:
        ConversionError: ``full_attention`` is not among the mixers, one is given twice or cannot be made, the
            window is not positive, or the teacher's sizes cannot be.
    """
    names = [long_name(name) for name in mixers]
    if FULL_ATTENTION not in names or len(set(names)) != len(names):
        raise ConversionError(
            f"mixers are {', '.join(names)}; expected {FULL_ATTENTION} and others, each once"
        )
    fields, attention = teacher.shared_fields(), teacher.attention_fields()
    if window is None:
        window = min(DEFAULT_WINDOW, max(1, fields["max_position_embeddings"] // 8))
    if window < 1:
        raise ConversionError(f"window is {window}; expected at least one token")
    sizes = {name: initializer.mixer_fields(name, attention, window) for name in names}
    own = [_own_window(names, layer_window, window) for layer_window in teacher.layer_windows()]
    # What holds in every layer is said once.
    if all(fields == own[0] for fields in own):
        sizes, own = {name: sizes[name] | own[0][name] for name in names}, None
    try:
        return SupernetConfig(**fields, mixers=sizes, layer_mixers=own, architectures=[ARCHITECTURE])
    except ConfigError as error:
        raise ConversionError(f"{teacher.where} does not make a supernet: {error}") from None


def _own_window(names: Iterable[str], own: int | None, window: int) -> dict[str, dict[str, Any]]:
    """The fields of each mixer in a layer in which the teacher itself sees only ``own`` tokens."""
    fields: dict[str, dict[str, Any]] = {name: {} for name in names}
    if own is not None:
        fields[FULL_ATTENTION] = {"window": own}
        if SLIDING_ATTENTION in fields and own < window:
            fields[SLIDING_ATTENTION] = {"window": own}
    return fields


def _check_tensors(directory: Path, teacher: Teacher, infos: Mapping[str, TensorInfo]) -> list[str]:
    """The names of the tensors that are used: all are there, in floating-point numbers, and none is ignored.

    Raises:
        ConversionError: one is missing or surplus.
        CheckpointError: one has another dtype.
    """
    used = list(teacher.shared_tensors().values())
    for layer in range(len(teacher.layer_windows())):
        used += teacher.layer_tensors(layer).values()
        used += teacher.attention_tensors(layer).values()
    if missing := [name for name in used if name not in infos]:
        raise ConversionError(
            f"{directory} lacks {len(missing)} tensors that its config.json promises, such as {missing[0]}; "
            "restore the teacher's files"
        )
    declared = {*used, *teacher.extra_tensors(infos), *teacher.unused_tensors(infos)}
    if surplus := [name for name in infos if name not in declared]:
        raise ConversionError(
            f"{directory} has {len(surplus)} tensors that no model with its config.json has, such as "
            f"{surplus[0]}; restore the teacher's files"
        )
    check_floating(directory, {name: infos[name] for name in used})
    return used


def _steps(
    teacher: Teacher,
    config: SupernetConfig,
    infos: Mapping[str, TensorInfo],
    initializer: Initializer,
    seed: int,
) -> Iterator[Step]:
    """Everything the supernet holds, layer by layer."""
    expected = expected_shapes(config)
    yield _copies("", teacher.shared_tensors(), infos)
    for layer in range(config.placement_space.num_layers):
        prefix = f"model.layers.{layer}."
        yield _copies(prefix, teacher.layer_tensors(layer), infos)
        sources = teacher.attention_tensors(layer)
        for mixer in config.layer_mixer_names(layer):
            home = f"{prefix}mixers.{mixer}."
            if mixer in COPIED_MIXERS:
                yield _copies(home, sources, infos)
                continue
            # Made in float32, and kept as the projections that they are made from.
            dtype = infos[sources["q_proj.weight"]].dtype
            shapes = {name: shape for name, shape in expected.items() if name.startswith(home)}
            read = (*sources.values(), teacher.input_norm(layer))
            tensors = tuple(
                PlannedTensor(name, TensorInfo(shape, dtype), read, initializer.name)
                for name, shape in shapes.items()
            )
            make = partial(_make_mixer, mixer, config, layer, teacher, initializer, seed)
            memory = working_memory([infos[name] for name in read], [tensor.info for tensor in tensors])
            yield Step(tensors, make, memory)


def _copies(prefix: str, sources: Mapping[str, str], infos: Mapping[str, TensorInfo]) -> Step:
    return Step(
        tuple(PlannedTensor(prefix + name, infos[own], (own,), COPIED) for name, own in sources.items())
    )


def _make_mixer(
    mixer: str,
    config: SupernetConfig,
    layer: int,
    teacher: Teacher,
    initializer: Initializer,
    seed: int,
    read: ReadTensor,
) -> dict[str, Tensor]:
    """The tensors of one mixer in one layer, by their full names."""
    given = {name: read(source) for name, source in teacher.attention_tensors(layer).items()}
    norm, head_dim = read(teacher.input_norm(layer)), teacher.attention_fields()["head_dim"]
    attention = TeacherAttention.from_tensors(given, norm, head_dim)
    made = initializer.tensors(mixer, config, layer, attention, seeded_generator(seed, layer, mixer))
    return {f"model.layers.{layer}.mixers.{mixer}.{name}": tensor for name, tensor in made.items()}
