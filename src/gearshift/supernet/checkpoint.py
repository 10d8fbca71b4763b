"""A supernet directory: read, check, write.

It holds ``config.json``, ``*.safetensors`` with an index when there are several, the teacher's tokenizer, and
``presets.json`` once presets are chosen. Nothing is written in place: a directory is complete, or it is not
there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from gearshift.errors import CheckpointError
from gearshift.files import atomic_directory
from gearshift.placement import PlacementError
from gearshift.supernet.config import STUMBLES, ConfigError, SupernetConfig
from gearshift.supernet.modeling import SupernetForCausalLM
from gearshift.supernet.tensor_files import DTYPE_NAMES, all_finite, as_bytes
from gearshift.tensor_headers import (
    FLOATING,
    TensorInfo,
    file_inside,
    read_directory,
    read_json_object,
    weight_files,
)

TIED = "lm_head.weight"
# The folder of a supernet directory with those tensors of its teacher that no text needs.
EXTRA = "teacher_extra"
COMPANIONS = (".json", ".txt", ".jinja", ".model")
# No weight's shape betrays that one of these is gone, and Transformers would fill in what Llama has.
UNSHAPED_KEYS = ("hidden_act", "rms_norm_eps", "rope_parameters")
MAX_SHARD = "5GB"


def load_supernet(
    directory: Path | str, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> SupernetForCausalLM:
    """Load a supernet directory, refusing anything missing, surplus, truncated or of a wrong shape.

    Raises:
        CheckpointError: a file is absent or damaged, or tensors and config do not belong together.
        ConfigError: the config lacks a key or holds a wrong one.
    """
    directory = Path(directory)
    config = read_config(directory)
    stored = read_directory(directory)
    check_floating(directory, {name: tensor.info for name, tensor in stored.items()})
    check_shapes(directory, config, {name: tensor.info.shape for name, tensor in stored.items()})
    companions(directory)  # refused now, not when a training ends and they are copied
    with _no_progress_bars():
        loaded = SupernetForCausalLM.from_pretrained(
            directory, config=config, dtype=dtype, local_files_only=True
        )
    for name, parameter in loaded.named_parameters():
        if not all_finite(as_bytes(parameter), DTYPE_NAMES[parameter.dtype]):
            raise CheckpointError(
                f"{stored[name].path}: {name} holds infinities or what is not a number (NaN); restore it"
            )
    return loaded.to(device).eval()  # pyright: ignore[reportArgumentType] - Transformers wraps `to` loosely


def read_config(directory: Path) -> SupernetConfig:
    """The config of a supernet directory.

    Raises:
        CheckpointError: there is no supernet.
        ConfigError: the config lacks a key or holds a wrong one.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(
            f"no supernet at {directory}: there is no config.json; give a directory made by convert"
        )
    fields = read_json_object(path)
    model_type = fields.get("model_type")
    if model_type != SupernetConfig.model_type:
        raise CheckpointError(
            f"{path} has model_type {model_type!r}; expected {SupernetConfig.model_type!r}: "
            "convert a teacher first with 'gearshift convert TEACHER OUT'"
        )
    for key in UNSHAPED_KEYS:
        if fields.get(key) is None:
            raise ConfigError(f"{path} has no {key!r}; convert the teacher again, or restore the file")
    try:
        return SupernetConfig.from_dict(fields)
    except (ConfigError, PlacementError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except STUMBLES as error:
        raise ConfigError(f"{path} is refused: {error}; convert the teacher again, or restore it") from None


def tensor_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, read from the files' headers.

    Raises:
        CheckpointError: a file is missing, truncated or not in safetensors format, or the index lies.
    """
    return {name: stored.info.shape for name, stored in read_directory(directory).items()}


def expected_shapes(config: SupernetConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the supernet with this config.

    Raises:
        ConfigError: Transformers does not know the activation or the rotary embedding that it names, or
            trips over their settings.
    """
    try:
        with torch.device("meta"):
            model = SupernetForCausalLM(config)
    except KeyError as error:
        raise ConfigError(
            f"Transformers does not know {error} of the config: hidden_act is {config.hidden_act!r}, "
            f"rope_parameters is {config.rope_parameters!r}; restore config.json"
        ) from None
    except ConfigError:
        raise
    except STUMBLES as error:
        raise ConfigError(
            f"Transformers refuses the config ({error}): hidden_act is {config.hidden_act!r:.80}, "
            f"rope_parameters is {config.rope_parameters!r:.200}; restore config.json"
        ) from None
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def check_shapes(
    directory: Path,
    config: SupernetConfig,
    shapes: dict[str, tuple[int, ...]],
    origins: Mapping[str, str] | None = None,
) -> None:
    """Refuse tensors that are not those of the supernet with this config.

    Args:
        directory: where they come from, for messages.
        config: the config.
        shapes: the tensors.
        origins: names by which the user knows them, where those differ.

    Raises:
        CheckpointError: a tensor is missing, surplus or of another shape.
        ConfigError: Transformers does not know the activation or the rotary embedding of the config.
    """
    expected = expected_shapes(config)
    if config.tie_word_embeddings:
        shapes = {name: shape for name, shape in shapes.items() if name != TIED}
        expected.pop(TIED, None)
    for problem, names in (
        ("lacks", expected.keys() - shapes.keys()),
        ("has surplus", shapes.keys() - expected.keys()),
    ):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise CheckpointError(
                f"{directory} {problem} {len(names)} tensors (such as {some}); its config.json and weights "
                "do not belong together: restore it or make the directory again"
            )
    for name, shape in shapes.items():
        if shape != expected[name]:
            known = (origins or {}).get(name, name)
            raise CheckpointError(
                f"{_home(directory, known)}: {known} has shape {shape}; expected {expected[name]} from "
                "config.json: restore the one that is wrong"
            )


def _home(directory: Path, name: str) -> Path:
    """The file that holds a tensor, for messages."""
    stored = read_directory(directory).get(name)
    return directory if stored is None else stored.path


def check_floating(directory: Path, infos: Mapping[str, TensorInfo]) -> None:
    """Refuse weights that are no plain floating-point numbers.

    Raises:
        CheckpointError: a tensor has another dtype.
    """
    for name, info in infos.items():
        if info.dtype not in FLOATING:
            raise CheckpointError(
                f"{_home(directory, name)}: {name} has dtype {info.dtype}; expected {' or '.join(FLOATING)}: "
                "dequantise the model first"
            )


def save_supernet(
    model: SupernetForCausalLM,
    directory: Path | str,
    source: Path | str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a supernet directory; it appears whole or not at all.

    Args:
        model: the model; its tensors are written in their own dtype.
        directory: where; must not hold anything unless ``overwrite``.
        source: a directory whose tokenizer and other small files are copied.
        overwrite: replace what is there.

    Raises:
        OutputExistsError: there is something and ``overwrite`` is false.
        CheckpointError: it could not be written, for instance because the disk is full.
    """
    directory = Path(directory)
    with writing(directory), atomic_directory(directory, overwrite) as partial:
        with _no_progress_bars():
            model.save_pretrained(partial, max_shard_size=MAX_SHARD)
        if source is not None:
            copy_companions(companions(Path(source)), partial)
    return directory


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turn what the system says when ``directory`` cannot be written into a message for the user.

    Raises:
        CheckpointError: the disk is full, or something else is in the way.
    """
    try:
        yield
    except (SafetensorError, OSError) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or f"os error {errno.ENOSPC}" in str(error)
        reason = "no space left on the disk; free some" if full else f"{error}; mend that"
        raise CheckpointError(
            f"could not write {directory}: {reason} and try again. Nothing half-written was left there"
        ) from error


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep Transformers from drawing its own bars, and leave its settings as they were."""
    previous = logging.set_tqdm_hook(lambda _, given, options: logging.EmptyTqdm(*given, **options))
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


def companions(directory: Path) -> list[Path]:
    """What belongs to a model beside config and weights.

    It is its tokenizer, chat template, generation config, presets and teacher's config, which are small, and
    the folder with its teacher's extra tensors.

    Raises:
        CheckpointError: one is a link out of the directory, whose target might be nobody's business.
    """
    names = [
        path.name
        for path in sorted(directory.iterdir())
        if path.is_file() and path.suffix in COMPANIONS and path.name != "config.json"
    ]
    found = [file_inside(directory, name) for name in names if not name.endswith(".index.json")]
    extra = directory / EXTRA
    return [*found, extra] if extra.is_dir() and not extra.is_symlink() else found


def copy_companions(paths: Iterable[Path], target: Path) -> None:
    """Copy files, and folders of files, into the directory ``target``."""
    for path in paths:
        if path.is_dir():
            (target / path.name).mkdir()
            names = sorted(file.name for file in path.iterdir() if file.is_file())
            copy_companions([file_inside(path, name) for name in names], target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def checkpoint_digest(directory: Path | str) -> str:
    """Sixteen hexadecimal digits that name a supernet's weights and sizes, whatever its presets or tokenizer.

    Raises:
        CheckpointError: weights are missing.
    """
    directory = Path(directory)
    digest = hashlib.sha256()
    config = read_config(directory).to_dict()
    config.pop("placement", None)
    config.pop("transformers_version", None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for path in weight_files(directory):
        digest.update(struct.pack("<Q", path.stat().st_size))
        with path.open("rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]
