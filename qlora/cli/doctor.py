"""`qlora doctor`: hardware, versions, what a run would use here, with reasons, and what to do next."""

import os
from typing import Annotated, Any

import typer

from qlora.cli.libraries import import_libraries
from qlora.cli.options import AsJson, expand_home
from qlora.cli.report import show_report

# Recipes for one GPU by the free memory that they are for, the largest first.
RECIPES = {"llama3_70b_80gb": 75 << 30, "qwen3_8b_24gb": 20 << 30, "gpt_oss_20b_16gb": 14 << 30}


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
    """Show hardware and versions, what a run would use here and why, and what to do next; under torchrun, test it."""
    if check_resume is not None:
        _check_resume(check_resume, as_json)
        return

    from importlib.util import find_spec

    import torch

    from qlora.allocator import allocator_settings
    from qlora.kernels import experts_path, linear_cross_entropy, loss_path, unfused_reason
    from qlora.memory.estimate import available_bytes
    from qlora.model import resolve_compute_dtype, resolve_device
    from qlora.nf4 import dequantize, dequantize_path, quantize
    from qlora.optim import unpaged_reason
    from qlora.processes import Processes
    from qlora.training.record import describe_hardware, package_versions
    from qlora.training.try_processes import try_processes

    device = resolve_device()
    processes = Processes()
    tried = None
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        processes = Processes.start(device.type == "cpu")
        tried = try_processes(processes)
    if not processes.is_first:
        return
    dtype = resolve_compute_dtype("auto", device)
    weight = torch.randn(64, 64, device=device)
    error = (dequantize(*quantize(weight), dtype).float() - weight).abs().max().item()
    hidden, head = torch.randn(3, 64, device=device, dtype=dtype), torch.randn(8192, 64, device=device, dtype=dtype)
    linear_cross_entropy(hidden, head, torch.arange(3, device=device))  # tries the kernel
    reason, unpaged = unfused_reason(device), unpaged_reason(device)
    in_use = {
        "device": f"{device}: {_why_device(torch)}",
        "compute_dtype": f"{str(dtype).removeprefix('torch.')}: {_why_dtype(device.type, dtype == torch.bfloat16)}",
        "nf4": f"works here (largest error of a 64 × 64 normal weight: {error:.3f})",
        "dequantize": ": ".join(dequantize_path(device, dtype)),
        "experts": experts_path(device, dtype),
        "loss": ": ".join(loss_path(device, dtype)),
        "optimizer_state": "paged" if unpaged is None else f"not paged: {unpaged}",
        "allocator": allocator_settings() or "torch's own settings",
        "attention": "within documents where the architecture allows it; set model.attention for another one",
        "activations": f"plain torch: {reason}"
        if reason
        else "fused kernels, where they give what a model's own modules give",
        "memory": f"{available_bytes(device) / 2**30:.1f} GiB free; qlora estimate predicts what a config needs",
        "plots": "drawn" if find_spec("matplotlib") else "not drawn: pip install matplotlib",
    }
    if tried is not None:
        in_use["processes"] = tried
    report: dict[str, Any] = {
        "versions": package_versions(),
        "hardware": describe_hardware(),
        "in_use": in_use,
    }
    steps = _next_steps(device.type, available_bytes(device))
    if as_json:
        show_report(report | {"next": steps}, as_json)
        return
    for title, values in report.items():
        show_report(values, as_json, title.replace("_", " "))
    print("\n".join(["next", *(f"  {step}" for step in steps)]))


def _next_steps(device: str, free_bytes: int) -> list[str]:
    """Return what to do next on a device: commands, with what each is for."""
    if device != "cuda":
        recipe = "qwen3_8b_24gb"
        steps = [
            "A base of billions of parameters needs a GPU; here, train a small one, such as HuggingFaceTB/SmolLM2-135M."
        ]
    else:
        recipe = next((name for name, size in RECIPES.items() if free_bytes >= size), "qwen3_8b_24gb")
        steps = []
    return [
        *steps,
        "qlora init lists the recipes; with --from FILE it converts a config of another trainer.",
        f"qlora init {recipe} -o my.yaml writes one; set model.base and data.train in it.",
        "qlora preview my.yaml shows what is supervised, and qlora estimate my.yaml whether it fits.",
        "qlora train my.yaml trains; its page is report.html in train.output_dir.",
    ]


def _check_resume(path: str, as_json: bool) -> None:
    from qlora.config import load_config

    config = load_config(path)
    import_libraries()

    from qlora.training import check_resume

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
