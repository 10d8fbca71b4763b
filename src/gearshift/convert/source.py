"""A whole supernet directory, from which another directory is copied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.convert.convert import TEACHER_CONFIG
from gearshift.convert.plan import COPIED, PlannedTensor, Step
from gearshift.errors import GearshiftError
from gearshift.files import refuse_existing
from gearshift.placement import PlacementSpace
from gearshift.presets import Preset, read_presets
from gearshift.supernet.checkpoint import EXTRA, check_floating, check_shapes, companions, read_config
from gearshift.supernet.config import SupernetConfig
from gearshift.supernet.tensor_files import TensorFiles
from gearshift.tensor_headers import file_inside, read_json_object


class ExportError(GearshiftError, ValueError):
    """A supernet cannot be written in the form that was asked for."""


@dataclass(frozen=True)
class Source:
    """A supernet directory, read but for the values of its tensors, and checked.

    Attributes:
        directory: where it is.
        config: its config.
        files: its tensors, and those of the teacher that no text needs.
        presets: its presets, by name.
        has_extra: whether there are tensors that no text needs.
    """

    directory: Path
    config: SupernetConfig
    files: TensorFiles
    presets: dict[str, Preset]
    has_extra: bool = False

    @property
    def space(self) -> PlacementSpace:
        """Its placements."""
        return self.config.placement_space

    @property
    def teacher_config_path(self) -> Path | None:
        """The teacher's ``config.json``, kept beside its own; older supernets have none."""
        present = (self.directory / TEACHER_CONFIG).exists()
        return file_inside(self.directory, TEACHER_CONFIG) if present else None

    @property
    def teacher_config(self) -> dict[str, Any] | None:
        """What it says."""
        path = self.teacher_config_path
        return None if path is None else read_json_object(path)

    def copies(self, names: Mapping[str, str]) -> Step:
        """A step that copies tensors: new name -> name of this supernet."""
        infos = self.files.infos
        return Step(tuple(PlannedTensor(name, infos[own], (own,), COPIED) for name, own in names.items()))

    def companions_without(self, names: Collection[str]) -> tuple[Path, ...]:
        """What belongs to it beside config and weights, but for files of these names."""
        return tuple(path for path in companions(self.directory) if path.name not in names)


def open_source(supernet: Path | str, out: Path | str, overwrite: bool) -> Source:
    """Read what a supernet directory holds, before anything is written to ``out``.

    Raises:
        OutputExistsError: there is something at ``out`` that must stay.
        ExportError: ``out`` is where the supernet is.
        CheckpointError: the supernet is not whole.
        PresetError: its presets are malformed.
    """
    directory, out = Path(supernet), Path(out)
    if not overwrite:
        refuse_existing(out)
    if directory.resolve().is_relative_to(out.resolve()):
        raise ExportError(f"the output {out} would replace the supernet {directory}; give another path")
    config, files = read_config(directory), TensorFiles(directory)
    check_floating(directory, files.infos)
    check_shapes(directory, config, {name: info.shape for name, info in files.infos.items()})
    extra = directory / EXTRA
    has_extra = extra.is_dir() and not extra.is_symlink()
    if has_extra:
        files = TensorFiles(directory, extra)
    return Source(directory, config, files, read_presets(directory, config.placement_space), has_extra)
