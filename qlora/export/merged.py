"""What a folder holds that merge wrote, by its report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import ExportError
from qlora.export.companions import REPORT_FILE
from qlora.export.folder import DTYPES
from qlora.export.gguf.merge import GGUF_DTYPES
from qlora.export.weights import ONTO
from qlora.files.json_files import parse_object


@dataclass(frozen=True, slots=True)
class Merged:
    """A merge as its report describes it.

    Attributes:
        folder: That holds it.
        dtype: Of its weights.
        onto: `dequantized` or `original` base weights.
        device: That it was computed on.
        base_differs: Files of the base that are not those trained on.
        step: Of the run; None in a report that lacks it.
        adapter: SHA-256 of the adapter's tensors file; None in a report that lacks it.
        gguf: The file, if it is one for llama.cpp.
        report: All that the report says.
    """

    folder: Path
    dtype: str
    onto: str
    device: str
    base_differs: list[str]
    step: int | None
    adapter: str | None
    gguf: Path | None
    report: dict[str, Any]

    def is_merge_of(self, adapter: str, dtype: str, onto: str, as_gguf: bool) -> bool:
        """Check whether a merge with these arguments would write the same model.

        Args:
            adapter: SHA-256 of the adapter's tensors file.
            dtype: Of the weights.
            onto: `dequantized`, `original`, or `best`, which only a merge that compared losses satisfies.
            as_gguf: Whether a file for llama.cpp is wanted.
        """
        is_onto = bool(self.report.get("losses")) if onto == "best" else onto == self.onto
        return (self.adapter, self.dtype, self.gguf is not None) == (adapter, dtype, as_gguf) and is_onto


def read_merged(folder: Path) -> Merged:
    """Read the report of what merge wrote into a folder.

    Raises:
        ExportError: The folder has no report, or a damaged one.
    """
    if folder.is_file():
        raise ExportError(f"{folder} is a file; give the folder that qlora merge wrote it into.")
    path = folder / REPORT_FILE
    try:
        report = parse_object(path.read_bytes())
        gguf = next(iter(sorted(folder.glob("*.gguf"))), None)
        device, base_differs = report.get("device", "cpu"), report.get("base_differs", [])
        step, adapter = report.get("step"), report.get("adapter")
        is_list = isinstance(base_differs, list) and all(isinstance(name, str) for name in base_differs)
        are_known = isinstance(device, str) and isinstance(step, int | None) and isinstance(adapter, str | None)
        if not (is_list and are_known):
            raise TypeError("device, step, adapter or base_differs")
        if report["dtype"] not in (DTYPES if gguf is None else GGUF_DTYPES) or report["onto"] not in ONTO:
            raise ValueError(f"{report['dtype']} onto {report['onto']}")
        return Merged(folder, report["dtype"], report["onto"], device, base_differs, step, adapter, gguf, report)
    except FileNotFoundError:
        raise ExportError(f"{folder} was not written by qlora merge: it has no {REPORT_FILE}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is damaged: {error!r}") from None
