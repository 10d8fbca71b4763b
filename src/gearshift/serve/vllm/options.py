"""The settings of this plugin, from vLLM's ``--additional-config '{"gearshift": {...}}'``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from gearshift.errors import GearshiftError

KEY = "gearshift"
_LEAST = {"slots": 1, "max_placements_per_step": 0, "graph_seconds": 0, "graph_bytes": 0}


class OptionError(GearshiftError, ValueError):
    """A setting of the plugin has an unknown name or a value that cannot be."""


@dataclass(frozen=True)
class Options:
    """What can be set.

    Attributes:
        slots: attention pages on a super-page of the cache (see `gearshift.slot_layout`); by default a
            quarter of the layers, at most 12.
        max_placements_per_step: how many placements may share one step; 0 for as many as there are. With 1
            the placements take turns.
        graph_seconds: time at start that the CUDA graphs may take.
        graph_bytes: memory that they may take.
        pretend_prefilled: treat all of a prompt but its last token as computed already, so that decoding at
            long contexts can be timed without prompts; what is generated is nonsense.
    """

    slots: int | None = None
    max_placements_per_step: int = 0
    graph_seconds: int = 90
    graph_bytes: int = 4_000_000_000
    pretend_prefilled: bool = False

    def slots_for(self, layers: int) -> int:
        """The slots of a model with so many layers."""
        return self.slots or min(12, -(-layers // 4))

    @classmethod
    def read(cls, additional_config: Any) -> Options:  # noqa: ANN401 - whatever vLLM was given
        """Read them from ``VllmConfig.additional_config``.

        Raises:
            OptionError: one is unknown, or its value cannot be.
        """
        given = additional_config.get(KEY, {}) if isinstance(additional_config, dict) else {}
        known = [field.name for field in fields(cls)]
        if not isinstance(given, dict) or set(given) - set(known):
            raise OptionError(
                f"additional_config[{KEY!r}] is {given!r}; expected an object with some of {', '.join(known)}"
            )
        for name, least in _LEAST.items():
            value = given.get(name, least)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise OptionError(f"{KEY}.{name} is {value!r}; expected a whole number, at least {least}")
        if not isinstance(given.get("pretend_prefilled", False), bool):
            raise OptionError(
                f"{KEY}.pretend_prefilled is {given['pretend_prefilled']!r}; expected true or false"
            )
        return cls(**given)
