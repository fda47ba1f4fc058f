"""A log of JSON lines that is appended to, on a disk that may be full for a while."""

import json
from collections.abc import Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any


class LogFile:
    """Log that keeps what can't be written, and writes it before the next line.

    Args:
        path: The file, which is created by the first line.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._unwritten = b""

    def append(self, values: Mapping[str, Any]) -> None:
        """Append a line, or keep it for :meth:`write_out` if the disk is full."""
        self._unwritten += (json.dumps(values) + "\n").encode()
        with suppress(OSError):
            self.write_out()

    def write_out(self) -> None:
        """Write the lines that are left.

        Raises:
            OSError: They can't be written.
        """
        if self._unwritten and self._file is None:
            # Unbuffered, so that a killed process leaves everything that it logged.
            self._file = self._path.open("ab", buffering=0)
        while self._file is not None and self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def close(self) -> None:
        """Close the file; lines that are left are dropped."""
        if self._file is not None:
            self._file.close()
