"""Conversion of other trainers' configs."""

from qlora.config.convert.file import Conversion, convert_file, recognize

__all__ = ["Conversion", "convert_file", "recognize"]
