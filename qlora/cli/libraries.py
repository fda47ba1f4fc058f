"""The libraries of verbs that work on a model, imported without garbage collection."""

import gc
import sys


def import_libraries() -> None:
    """Import torch and transformers, and leave their objects out of garbage collection from then on.

    Modules live as long as the process, but as their half a million objects are made, Python would search all of them
    for garbage again and again, and once more as it exits. Nothing happens in a process that has them already.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    try:
        # What the class of any model needs.
        from transformers import GenerationMixin, PreTrainedModel  # noqa: F401

        import qlora.model  # noqa: F401
    finally:
        gc.enable()
    gc.freeze()
