"""The libraries of verbs that work on a model, imported without garbage collection."""

import gc
import sys


def import_libraries() -> None:
    """Import torch and transformers, and leave the objects of most of their modules out of garbage collection.

    Modules live as long as the process, but as their 640,000 objects are made, Python would search all of them for
    garbage again and again, and free them one by one as it exits. Nothing happens in a process that has them already.
    """
    if "torch" in sys.modules:
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        # Two thirds of the objects. What comes after may import Triton, whose bindings print all of their objects that
        # are not collected at the end as leaks.
        import torch.distributed.fsdp  # noqa: F401
        import transformers  # noqa: F401

        gc.freeze()
        # What the class of any model needs.
        from transformers import GenerationMixin, PreTrainedModel  # noqa: F401

        import qlora.model  # noqa: F401
    finally:
        if was_enabled:
            gc.enable()
