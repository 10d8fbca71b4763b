"""Bringing a converted supernet's mixers near to its teacher, layer by layer, before any distillation."""

from gearshift.train.calibrate.run import calibrate
from gearshift.train.calibrate.settings import PARTS, CalibrationError, CalibrationSettings

__all__ = ["PARTS", "CalibrationError", "CalibrationSettings", "calibrate"]
