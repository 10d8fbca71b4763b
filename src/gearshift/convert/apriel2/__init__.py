"""Super Apriel's checkpoints, in ServiceNow's formats ``apriel2_text`` and ``apriel2``, read as supernets."""

from gearshift.convert.apriel2.tensors import MODEL_TYPES, plan_import

__all__ = ["MODEL_TYPES", "plan_import"]
