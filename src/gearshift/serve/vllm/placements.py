"""What the engine knows of a placement, worked out once: mixers, kinds of cache and seats of its layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from gearshift.placement import Placement, PlacementError
from gearshift.serve.vllm.geometry import layer_kinds
from gearshift.slot_layout import KINDS, Kind, Share, SlotLayout
from gearshift.supernet.config import SupernetConfig

# The key in ``SamplingParams.extra_args``, and in the ``vllm_xargs`` of a request over HTTP.
EXTRA_ARG = "placement"


@dataclass(frozen=True, eq=False)
class PlacedLayers:
    """A placement as arrays over the layers, for the arithmetic of a step.

    Attributes:
        placement: which.
        number: counts the placements that this engine has seen.
        shares: the cache groups that it needs.
        kind: index in `KINDS` of each layer's cache.
        seat: group, offset, stride and fold of each layer's seat, (4, L).
    """

    placement: Placement
    number: int
    shares: tuple[Share, ...]
    kind: np.ndarray
    seat: np.ndarray


class PlacementTable:
    """All placements that this engine has seen; scheduler and worker have one each."""

    def __init__(self, config: SupernetConfig, layout: SlotLayout) -> None:
        assert config.placement is not None
        self._space, self._kinds, self._layout = config.placement_space, layer_kinds(config), layout
        self._by_text: dict[str, PlacedLayers] = {}
        self._by_placement: dict[Placement, PlacedLayers] = {}
        self.default = self.look_up(config.placement)

    def look_up(self, text: str) -> PlacedLayers:
        """What a placement's text means.

        Raises:
            PlacementError: it is no placement of this supernet.
        """
        found = self._by_text.get(text)
        if found is None:
            placement = self._space.check(Placement.parse(text))
            found = self._by_placement.get(placement) or self._place(placement)
            self._by_text[text] = found
        return found

    def of_extra_args(self, extra_args: dict[str, Any] | None) -> PlacedLayers:
        """The placement of a request; the default if it names none.

        Raises:
            PlacementError: what it names is no placement of this supernet.
        """
        given = (extra_args or {}).get(EXTRA_ARG)
        if given is None:
            return self.default
        if isinstance(given, list):
            given = str(Placement.from_json(given))
        if not isinstance(given, str):
            raise PlacementError(f"the placement {given!r}; expected a text such as 'fa*2 swa*10'")
        return self.look_up(given)

    def _place(self, placement: Placement) -> PlacedLayers:
        kinds: list[Kind] = [self._kinds[layer][mixer] for layer, mixer in enumerate(placement)]
        seats = self._layout.seats(kinds)
        placed = PlacedLayers(
            placement,
            len(self._by_placement),
            self._layout.shares(kinds),
            np.array([KINDS.index(kind) for kind in kinds]),
            np.array([(s.group, s.offset, s.stride, s.fold) for s in seats]).T,
        )
        self._by_placement[placement] = placed
        return placed
