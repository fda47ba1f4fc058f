"""`qlora doctor`: hardware, versions, and what a run would use here, with reasons."""

from typing import Annotated, Any

import typer

from qlora.cli.options import AsJson, expand_home
from qlora.cli.report import show_report


def doctor(
    check_resume: Annotated[
        str | None,
        typer.Option(
            metavar="CONFIG",
            help="Check that this config's run, stopped and continued, ends the same; exits with 1 if not.",
            callback=expand_home,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show hardware and versions, and what a run would use here and why."""
    if check_resume is not None:
        _check_resume(check_resume, as_json)
        return

    from importlib.util import find_spec

    import torch

    from qlora.kernels import experts_path, liger_unavailable_reason, liger_version
    from qlora.memory.estimate import available_bytes
    from qlora.model import resolve_compute_dtype, resolve_device
    from qlora.nf4 import dequantize, dequantize_path, quantize
    from qlora.training.record import describe_hardware, package_versions

    device = resolve_device()
    dtype = resolve_compute_dtype("auto", device)
    weight = torch.randn(64, 64, device=device)
    error = (dequantize(*quantize(weight), dtype).float() - weight).abs().max().item()
    reason = liger_unavailable_reason(device)
    in_use = {
        "device": f"{device}: {_why_device(torch)}",
        "compute_dtype": f"{str(dtype).removeprefix('torch.')}: {_why_dtype(device.type, dtype == torch.bfloat16)}",
        "nf4": f"works here (largest error of a 64 × 64 normal weight: {error:.3f})",
        "dequantize": dequantize_path(device),
        "experts": experts_path(device, dtype),
        "optimizer_state": "paged" if device.type == "cuda" else "not paged: paging needs CUDA's managed memory",
        "attention": "within documents where the architecture allows it; set model.attention for another one",
        "activations": f"plain torch: {reason}" if reason else f"liger-kernel {liger_version()}",
        "memory": f"{available_bytes(device) / 2**30:.1f} GiB free; qlora estimate predicts what a config needs",
        "plots": "drawn" if find_spec("matplotlib") else "not drawn: pip install matplotlib",
    }
    report: dict[str, Any] = {
        "versions": package_versions(),
        "hardware": describe_hardware(),
        "in_use": in_use,
    }
    if as_json:
        show_report(report, as_json)
        return
    for title, values in report.items():
        show_report(values, as_json, title.replace("_", " "))


def _check_resume(path: str, as_json: bool) -> None:
    from qlora.config import load_config

    config = load_config(path)

    from qlora.training import check_resume  # after the config, so that a typo there is reported without loading torch

    check = check_resume(config)
    what = f"a run of {check.steps} steps, stopped after {check.stopped_after} and continued,"
    title = f"{path}: {what} is equal, bit for bit, to one that was not stopped."
    if not check.matches:
        cause = (
            "its resume is not exact, please report it"
            if check.repeats
            else "a second uninterrupted run differs too: this machine does not reproduce its own results"
        )
        title = f"{path}: {what} differs from one that was not stopped; {cause}."
    show_report(check.as_dict(), as_json, title)
    raise typer.Exit(0 if check.matches else 1)


def _why_device(torch: Any) -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "torch sees no GPU" if torch.backends.cuda.is_built() else "this torch is built without CUDA"


def _why_dtype(device_type: str, is_bf16: bool) -> str:
    if is_bf16:
        return "the hardware multiplies bf16"
    return "no bf16 here; the loss is scaled" if device_type == "cuda" else "this CPU has no bf16 instructions"
