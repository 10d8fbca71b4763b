"""The rotary embedding of an ``apriel2`` attention mixer in Transformers' form."""

from __future__ import annotations

import math
from typing import Any

from gearshift.convert.apriel2.fields import Fields

# For each type with scaled frequencies: Transformers' name of a parameter -> the exporter's.
SCALING = {
    "llama3": {
        "factor": "scale_factor",
        "low_freq_factor": "low_frequency_factor",
        "high_freq_factor": "high_frequency_factor",
    },
    "yarn": {
        "factor": "scale_factor",
        "attention_factor": "attention_factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
    },
}
LENGTH = "original_context_length"


def rope_parameters(rotary: Fields) -> dict[str, Any]:
    """Transformers' ``rope_parameters`` of what a mixer has under ``rotary``.

    Raises:
        ConversionError: its type is not known, or what it needs is not there.
    """
    kind = rotary.choice("type", ("mistral_1d", *SCALING))
    theta = rotary.number("theta")
    if kind not in SCALING:
        return {"rope_type": "default", "rope_theta": theta}
    known = ("type", "theta", LENGTH, *SCALING[kind].values())
    for key in rotary.given:
        if key not in known:
            rotary.refuse(key, f"a rotary embedding of type {kind} has {', '.join(known)}")
    # Older exporters leave the scaling out, whatever it was: it cannot be guessed.
    factor = rotary.number("scale_factor")
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 0.1 * math.log(factor) + 1}
    scaling = {name: rotary.number(key, defaults.get(name)) for name, key in SCALING[kind].items()}
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        rotary.refuse("high_frequency_factor", "expected more than low_frequency_factor")
    original = {"original_max_position_embeddings": rotary.count(LENGTH)}
    return {"rope_type": kind, "rope_theta": theta, **original, **scaling}
