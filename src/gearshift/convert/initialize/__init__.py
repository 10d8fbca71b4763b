"""The first weights of a layer's mixers, from the teacher's attention of that layer, by several recipes."""

from gearshift.convert.initialize.aligned import Aligned
from gearshift.convert.initialize.attention import TeacherAttention
from gearshift.convert.initialize.base import (
    COPIED_MIXERS,
    INITIALIZED_MIXERS,
    Initializer,
    seeded_generator,
)
from gearshift.convert.initialize.modulo import Modulo

DEFAULT_INITIALIZER = "aligned"
INITIALIZERS: dict[str, Initializer] = {"aligned": Aligned(), "modulo": Modulo()}

__all__ = [
    "COPIED_MIXERS",
    "DEFAULT_INITIALIZER",
    "INITIALIZED_MIXERS",
    "INITIALIZERS",
    "Aligned",
    "Initializer",
    "Modulo",
    "TeacherAttention",
    "seeded_generator",
]
