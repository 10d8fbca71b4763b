"""Which linear layers of an ``apriel2`` checkpoint have a bias."""

from __future__ import annotations

from collections.abc import Collection

from gearshift.convert.apriel2.fields import Fields


def biased(fields: Fields, layers: dict[str, str], prefix: str, names: Collection[str]) -> list[str]:
    """The projections with a bias: those of which the config says so and, where it is silent, those stored.

    An absent ``add_linear_biases`` means false to the programs that read checkpoints and true to the one that
    trains them.

    Args:
        fields: the mixer or the FFN.
        layers: for each projection the config's name of its layer.
        prefix: what the names of its tensors begin with.
        names: the checkpoint's tensors.
    """
    default = fields.optional_flag("add_linear_biases")
    found = []
    for projection, layer in layers.items():
        own = fields.inner(layer, optional=True).inner("bias", optional=True).optional_flag("enabled")
        said = default if own is None else own
        if said or (said is None and f"{prefix}.{projection}.bias" in names):
            found.append(projection)
    return found
