"""Teacher to supernet, and out again."""

from gearshift.convert.convert import ConversionError, convert_teacher
from gearshift.convert.export import Export, export_placement
from gearshift.convert.source import ExportError
from gearshift.convert.teachers import supported_architectures
from gearshift.convert.thin import Thinned, thin_supernet

__all__ = [
    "ConversionError",
    "Export",
    "ExportError",
    "Thinned",
    "convert_teacher",
    "export_placement",
    "supported_architectures",
    "thin_supernet",
]
