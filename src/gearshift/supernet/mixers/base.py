"""What every mixer is, and the registry that a new one joins."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from gearshift.placement import register_mixer_name
from gearshift.supernet.cache import MixerState
from gearshift.supernet.config import register_mixer_config
from gearshift.supernet.context import SequenceContext

if TYPE_CHECKING:
    from gearshift.supernet.config import SupernetConfig


class Mixer(nn.Module, ABC):
    """One way for a layer's tokens to see each other.

    A subclass takes ``(config: SupernetConfig, mixer_config)``, has ``config_class`` (a dataclass of its
    sizes) and joins with :func:`register_mixer`. A padded or packed batch must give each sequence what it
    gets alone: see :class:`gearshift.supernet.context.SequenceContext`, and ``RecurrentMixer`` for the simple
    way.
    """

    config_class: ClassVar[type]

    def __init__(self, config: SupernetConfig, mixer_config: Any) -> None:  # noqa: ANN401 - its own config_class
        super().__init__()
        self.mixer_config = mixer_config

    @abstractmethod
    def forward(self, x_BTD: Tensor, context: SequenceContext, state: MixerState | None) -> Tensor:
        """Mix the tokens of a call.

        Args:
            x_BTD: the layer's normed input.
            context: positions, padding, documents.
            state: what to remember between calls, updated in place; None when nothing is cached.

        Returns:
            The output before the residual addition, (B, T, D).
        """

    @abstractmethod
    def new_state(self, max_rollback: int) -> MixerState:
        """An empty state for one layer."""

    def initialize(self) -> None:  # noqa: B027 - most mixers need nothing beyond Transformers' own initialisation
        """Set parameters that are neither linear weights nor norms, for a randomly initialised model."""


MixerT = TypeVar("MixerT", bound=Mixer)

MIXER_CLASSES: dict[str, type[Mixer]] = {}


def register_mixer(name: str, short: str) -> Callable[[type[MixerT]], type[MixerT]]:
    """Class decorator: make a mixer known to placements, configurations and models.

    Args:
        name: long name, used in files.
        short: short name, used in the text form of placements.
    """

    def register(mixer_class: type[MixerT]) -> type[MixerT]:
        register_mixer_name(name, short)
        register_mixer_config(name, mixer_class.config_class)
        MIXER_CLASSES[name] = mixer_class
        return mixer_class

    return register
