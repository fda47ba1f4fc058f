"""A merged folder, as its merge report describes it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora.errors import ExportError
from qlora.export.companions import REPORT_FILE
from qlora.export.folder import DTYPES
from qlora.export.gguf.adapter import FORMAT as ADAPTER_FORMAT
from qlora.export.gguf.merge import GGUF_DTYPES
from qlora.export.weights import ONTO
from qlora.files.json_files import parse_object


@dataclass(frozen=True, slots=True)
class Merged:
    """A merged model.

    Attributes:
        folder: Folder of the model.
        dtype: Dtype of its weights.
        onto: Base weights that were merged onto, `dequantized` or `original`.
        device: Device that computed the merge.
        base_differs: Files of the base that differ from those used in training.
        step: Step of the run; None in a report that lacks it.
        adapter: SHA-256 of the adapter's tensors file; None in a report that lacks it.
        gguf: The GGUF file, if the model is one.
        format: Format of the model, see :class:`qlora.export.companions.MergeReport`.
        report: All values of the report.
    """

    folder: Path
    dtype: str
    onto: str
    device: str
    base_differs: list[str]
    step: int | None
    adapter: str | None
    gguf: Path | None
    format: str
    report: dict[str, Any]

    def is_merge_of(self, adapter: str, dtype: str, onto: str, format: str) -> bool:
        """Return whether a merge with these arguments would write the same model.

        Args:
            adapter: SHA-256 of the adapter's tensors file.
            dtype: Dtype of the weights.
            onto: `dequantized`, `original`, or `best`, which only a merge that compared losses satisfies.
            format: Format of the model.
        """
        is_onto = bool(self.report.get("losses")) if onto == "best" else onto == self.onto
        return (self.adapter, self.dtype, self.format) == (adapter, dtype, format) and is_onto


def read_merged(folder: Path) -> Merged:
    """Read the merge report of a folder.

    Raises:
        ExportError: The folder has no report, or a damaged one.
    """
    if folder.is_file():
        raise ExportError(f"{folder} is a file; give the folder that qlora merge wrote.")
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
        format = report.get("format", "safetensors" if gguf is None else "gguf")  # absent in older reports
        dtypes = {"safetensors": DTYPES, "gguf": GGUF_DTYPES, ADAPTER_FORMAT: ["float32"]}
        if format not in dtypes or (gguf is None) != (format == "safetensors"):
            raise ValueError(f"format {format!r:.40}")
        if report["dtype"] not in dtypes[format] or report["onto"] not in ONTO:
            raise ValueError(f"{report['dtype']} onto {report['onto']}")
        return Merged(
            folder=folder,
            dtype=report["dtype"],
            onto=report["onto"],
            device=device,
            base_differs=base_differs,
            step=step,
            adapter=adapter,
            gguf=gguf,
            format=format,
            report=report,
        )
    except FileNotFoundError:
        problem = f"has no {REPORT_FILE}" if Path(folder).exists() else "does not exist"
        raise ExportError(f"{folder} {problem}; give a folder that qlora merge wrote.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{path} is damaged ({error!r}); merge again.") from None
