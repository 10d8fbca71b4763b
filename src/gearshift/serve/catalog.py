"""What a served supernet offers: its presets, and which placement a request means. Plain data, no torch.

Both engines, the embedded one and vLLM's, read requests with it, so that neither ever sees a name or a
placement that does not fit. Errors know their HTTP status and OpenAI's form.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from gearshift.errors import GearshiftError
from gearshift.files import read_json
from gearshift.inspect_directory import supernet_space
from gearshift.placement import Placement, PlacementError, PlacementSpace
from gearshift.presets import Preset, PresetError, named_preset, read_presets

# Between a model's name and a preset's, as in "my-supernet:fast".
SEPARATOR = ":"
# How the metrics call requests that name a placement, and those that name neither placement nor preset.
EXPLICIT_LABEL = "(placement)"
DEFAULT_LABEL = "(default)"

# No sensible text of a placement spends more on a layer: "sliding_attention*1, " and some room.
_CHARACTERS_PER_LAYER = 64
# Messages quote so many characters of what a client sent, half of them from either end.
_QUOTED = 240


class RequestError(GearshiftError):
    """A request that cannot be answered, in the form that OpenAI's clients understand.

    Attributes:
        status: the HTTP status.
        type: OpenAI's kind of error.
        code: a word for programs, if there is one.
        headers: further HTTP headers of the answer.
        param: the field of the request that is wrong, if it is one.
    """

    status: ClassVar[int] = 400
    type: ClassVar[str] = "invalid_request_error"
    code: ClassVar[str | None] = None
    headers: ClassVar[Mapping[str, str]] = MappingProxyType({})

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        error = {"message": str(self), "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


class BadPlacementError(RequestError):
    """A placement that is malformed, does not fit the model, or contradicts the preset beside it."""

    code = "invalid_placement"


class ModelNotFoundError(RequestError):
    """A model or preset that is not served; the message lists what is."""

    status = 404
    code = "model_not_found"


class PresetExistsError(RequestError):
    """A preset is added under a name that means another placement."""

    status = 409
    code = "preset_exists"


def shortened(text: str) -> str:
    """``text``, or both of its ends when it is long: what a client sent must not flood its answer."""
    if len(text) <= _QUOTED:
        return text
    half = _QUOTED // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


@dataclass(frozen=True)
class Choice:
    """What a request asked for.

    Attributes:
        placement: what to run; it stays valid when the preset is removed meanwhile.
        label: the preset's name, `EXPLICIT_LABEL` or `DEFAULT_LABEL`: one of few, for metrics.
    """

    placement: Placement
    label: str


class Catalog:
    """A served model's name, placements and presets; may be used and changed from any thread.

    Args:
        name: the model's name in requests.
        space: the placements that the model can run.
        presets: those there are at the start.
        default: what ``name`` alone means: a preset's name, a placement, or None for the space's default. It
            stays that placement even if the preset is removed.

    Raises:
        PresetError: ``default`` is no preset's name.
        PlacementError: a placement does not lie in ``space``.
        RequestError: the name is empty.
    """

    def __init__(
        self,
        name: str,
        space: PlacementSpace,
        presets: Iterable[Preset] = (),
        default: str | Placement | None = None,
    ) -> None:
        if not name.strip():
            raise RequestError(f"the served model's name is {name!r}; expected some text", "name")
        self.name = name
        self.space = space
        # Replaced as a whole at every change, so that reading needs no lock.
        self._presets: Mapping[str, Preset] = {preset.name: preset for preset in presets}
        self._changing = threading.Lock()
        for preset in self._presets.values():
            space.check(preset.placement)
        if isinstance(default, str):
            default = named_preset(self._presets, default).placement
        self.default = space.default if default is None else space.check(default)

    @classmethod
    def from_directory(
        cls, directory: Path, name: str | None = None, default_preset: str | None = None
    ) -> Catalog:
        """The catalog of a supernet directory.

        Args:
            directory: the supernet; only JSON is read.
            name: the model's name in requests; None for the directory's name.
            default_preset: what ``name`` alone means; None for the placement in ``config.json``.

        Raises:
            GearshiftError: it is no supernet directory, its presets are malformed, or the default is none.
        """
        space = supernet_space(directory)
        presets = read_presets(directory, space)
        default = default_preset or _configured_default(directory, space)
        return cls(name or directory.resolve().name, space, presets.values(), default)

    @property
    def presets(self) -> Mapping[str, Preset]:
        """The presets by name as they are now; later changes do not show in what is returned."""
        return MappingProxyType(self._presets)

    def models(self) -> dict[str, Placement]:
        """Every name that a request's ``model`` may have, the default first, and the placement behind it."""
        named = {self.name + SEPARATOR + name: preset.placement for name, preset in self._presets.items()}
        return {self.name: self.default, **named}

    def resolve(self, model: str | None, placement: object = None) -> Choice:
        """What a request means.

        Args:
            model: its ``model``: the served name, ``NAME:preset``, or None for the served name.
            placement: the placement it spells out, as text or a list of mixers; None if it does not.

        Raises:
            ModelNotFoundError: the model or preset is not served.
            BadPlacementError: the placement is malformed, or is not that of the preset beside it.
        """
        preset = self._named(model)
        explicit = None if placement is None else self.parse(placement)
        if preset is None and explicit is None:
            return Choice(self.default, DEFAULT_LABEL)
        if preset is None:
            assert explicit is not None
            return Choice(explicit, EXPLICIT_LABEL)
        if explicit is not None and explicit != preset.placement:
            raise BadPlacementError(
                f"the preset {preset.name!r} is '{preset.placement}', but the request also spells out "
                f"'{explicit}'; name the model {self.name!r} to run a placement of your own, or leave it out",
                "placement",
            )
        return Choice(preset.placement, preset.name)

    def _named(self, model: str | None) -> Preset | None:
        """The preset that ``model`` names; None when it names the served model alone."""
        if model is None or model == self.name:
            return None
        served, separator, name = model.rpartition(SEPARATOR)
        presets = self._presets
        if separator and served == self.name and name in presets:
            return presets[name]
        what = f"the preset {shortened(name)!r}" if served == self.name else f"the model {shortened(model)!r}"
        raise ModelNotFoundError(f"{what} is not served; {self._offer()}", "model")

    def _offer(self) -> str:
        names = ", ".join(self._presets)
        if not names:
            return f"expected {self.name!r}, which has no presets"
        named = self.name + SEPARATOR + "PRESET"
        return f"expected {self.name!r}, or {named!r} with one of the presets: {names}"

    def parse(self, given: object, param: str = "placement") -> Placement:
        """A placement as a client sent it; work and message stay small whatever that was.

        Raises:
            BadPlacementError: it is no placement of this model.
        """
        try:
            self._check_size(given)
            if isinstance(given, str):
                return self.space.check(Placement.parse(given, self.space.num_layers))
            return self.space.check(Placement.from_json(given))
        except PlacementError as error:
            raise BadPlacementError(shortened(str(error)), param) from None

    def _check_size(self, given: object) -> None:
        """Refuse what is too large to be looked at, before anything does."""
        layers = self.space.num_layers
        if isinstance(given, str) and len(given) > _CHARACTERS_PER_LAYER * layers:
            raise PlacementError(
                f"a placement of {len(given):,} characters; expected runs such as 'fa*2 swa*10' that make up "
                f"{layers} layers"
            )
        if isinstance(given, list) and len(given) != layers:
            raise PlacementError(
                f"a placement of {len(given):,} layers; expected {layers}, one mixer per layer"
            )
        if isinstance(given, list) and not all(isinstance(name, str) for name in given):
            raise PlacementError("a placement with something else than texts; expected a list of mixer names")
        if not isinstance(given, str | list):
            raise PlacementError(f"a placement of type {type(given).__name__}; expected a text or a list")

    def add_preset(self, preset: Preset) -> None:
        """Offer a preset from now on; adding the same one again changes nothing.

        Raises:
            BadPlacementError: its placement does not fit the model.
            PresetExistsError: its name already means another placement.
        """
        try:
            self.space.check(preset.placement)
        except PlacementError as error:
            raise BadPlacementError(shortened(str(error)), "placement") from None
        with self._changing:
            known = self._presets.get(preset.name)
            if known is not None and known.placement != preset.placement:
                raise PresetExistsError(
                    f"the preset {preset.name!r} is already '{known.placement}'; remove it first", "name"
                )
            self._presets = {**self._presets, preset.name: preset}

    def remove_preset(self, name: str) -> Preset:
        """Offer a preset no longer; requests that run with it go on.

        Raises:
            ModelNotFoundError: there is no preset of this name.
        """
        with self._changing:
            try:
                removed = named_preset(self._presets, name)
            except PresetError:
                raise ModelNotFoundError(
                    f"there is no preset {shortened(name)!r} to remove; {self._offer()}", "name"
                ) from None
            self._presets = {key: preset for key, preset in self._presets.items() if key != name}
        return removed


def placement_of_body(body: Mapping[str, Any]) -> object:
    """The placement that the JSON body of a request spells out, unchecked; None if it does not.

    It stands in ``vllm_xargs``, where vLLM has it, or beside the other fields, where ``extra_body`` of
    OpenAI's client puts it.

    Raises:
        BadPlacementError: ``vllm_xargs`` is no object, or it stands at both places and differs.
    """
    arguments = body.get("vllm_xargs")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise BadPlacementError("vllm_xargs is no object; expected {'placement': ...}", "vllm_xargs")
    inner, outer = (arguments or {}).get("placement"), body.get("placement")
    if inner is not None and outer is not None and inner != outer:
        raise BadPlacementError("placement and vllm_xargs.placement differ; give one of them", "placement")
    return outer if inner is None else inner


def _configured_default(directory: Path, space: PlacementSpace) -> Placement:
    """The placement in ``config.json``, which the model uses when none is asked for."""
    text = read_json(directory / "config.json").get("placement")
    return space.default if text is None else space.check(Placement.of(text, space.num_layers))
