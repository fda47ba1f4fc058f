"""The libraries of verbs that work on a model, imported without garbage collection."""

import atexit
import gc
import sys


def import_libraries() -> None:
    """Import torch and transformers, and leave their objects out of garbage collection until the process exits.

    Modules live as long as the process, but as their half a million objects are made, Python would search all of them
    for garbage again and again. Nothing happens in a process that has them already.
    """
    if "torch" in sys.modules:
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        # What the class of any model needs.
        from transformers import GenerationMixin, PreTrainedModel  # noqa: F401

        import qlora.model  # noqa: F401
    finally:
        if was_enabled:
            gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # objects of Triton that are not collected at the end are printed as leaks
