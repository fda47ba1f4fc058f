"""Where the weights of a run go: the first place that they fit into."""

from collections.abc import Sequence
from dataclasses import replace

from qlora.config import ModelSection, RunConfig
from qlora.errors import ConfigError, ModelError
from qlora.memory.estimate import Estimate, available_bytes, check_host, check_loading, choose_level, estimate
from qlora.model import Loss, free_host_bytes
from qlora.processes import Processes


def check_weights(section: ModelSection, num_processes: int) -> None:
    """Check that a number of processes has the place for weights that a config asks for.

    Raises:
        ConfigError: There are too few processes.
    """
    if section.weights == "sharded" and num_processes == 1:
        raise ConfigError(
            "model.weights: sharded splits the weights over processes, but there is one; launch several with torchrun "
            "or accelerate launch (docs/multi-gpu.md), or set it to host."
        )


def choose_weights(
    config: RunConfig, loss: Loss, processes: Processes, lengths: Sequence[int], packed: bool
) -> tuple[str, str]:
    """Return where the 4-bit weights of a run's layers are, and the reason; the same on all processes.

    On a CPU, `auto` is the device, whose memory is the host's.

    Args:
        config: Config of the run.
        loss: Loss that is minimized.
        processes: Processes of the run.
        lengths: Number of tokens of each training document.
        packed: Whether documents are packed.

    Raises:
        ModelError: The device has too little memory for the base as it is loaded, or the host for the weights or for
            the layer inputs that would be offloaded.
    """
    section, given = config.model, None
    if section.weights != "auto":
        given = section.weights, "set by model.weights"
    elif section.quantization == "none":
        given = "device", "they are in 16 bits"
    if processes.device.type == "cpu":
        return given or ("device", "the device is the host")
    # Each process has a GPU of its own, which may differ in more than its memory.
    available, host_free = (
        int(-processes.max(-free)) for free in (available_bytes(processes.device), free_host_bytes())
    )
    try:
        expected = estimate(config, loss, processes.device)
    except ModelError as error:
        return processes.broadcast(given or ("device", f"the memory of a step is unknown: {error}"))
    # Of the largest micro-batch that the data make.
    count = config.train.micro_batch_size * expected.group_size
    tokens = min(expected.tokens, sum(lengths) if packed else sum(sorted(lengths)[-count:]))
    expected = replace(expected, processes=processes.world_size, host_free=host_free)
    level = section.recompute
    weights, why = processes.broadcast(given or first_that_fits(expected, available, tokens, level))
    placed = replace(expected, weights=weights)
    check_loading(placed, available)
    check_host(placed, tokens, levels_of(expected, level))
    return weights, why


def first_that_fits(
    expected: Estimate, available: int, tokens: int | None = None, level: str = "auto"
) -> tuple[str, str]:
    """Return the first place where a run's weights fit, and the reason.

    Args:
        expected: Prediction for the run, with its number of processes.
        available: Bytes of each device that the run may take.
        tokens: Number of tokens of the largest micro-batch; default: of the largest that the config allows.
        level: Level of recomputation that the config asks for; `auto` for the fastest one that fits.

    Returns:
        Where nothing fits: the first place that only lacks host memory, which :func:`check_host` refuses, or the last.
    """
    reason, tokens = "they fit on the device", expected.tokens if tokens is None else tokens
    levels, without_host = levels_of(expected, level), None
    for weights in places_of(expected):
        placed = replace(expected, weights=weights)
        try:
            choose_level(placed, available, tokens, levels)
        except ModelError as error:
            fits_device = any(placed.fits_device(one, available, tokens) for one in levels)
            if without_host is None and fits_device and not any(placed.fits_host(one, tokens) for one in levels):
                without_host = weights, str(error)
            reason = f"on the device they don't fit: {error}" if weights == "device" else reason
        else:
            return weights, reason
    return without_host or (weights, reason)


def levels_of(expected: Estimate, level: str) -> list[str]:
    """Return the levels of recomputation that a config allows: one, or all with `auto`.

    All with one that the model does not have, too, which is refused where it is applied.
    """
    return [level] if level in expected.levels else expected.levels


def places_of(expected: Estimate) -> list[str]:
    """Return where the weights of a run may be, the fastest first."""
    if not any(expected.footprint.layers_packed):  # they are in 16 bits
        return ["device"]
    return ["device", *(["sharded"] if expected.processes > 1 else []), "host"]
