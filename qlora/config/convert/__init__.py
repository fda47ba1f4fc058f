"""Configs of other trainers to ours."""

from qlora.config.convert.file import Conversion, convert_file, recognize

__all__ = ["Conversion", "convert_file", "recognize"]
