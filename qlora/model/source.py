"""An adapter with its base: one that a run trained, or one made elsewhere."""

from dataclasses import dataclass
from pathlib import Path

import torch

from qlora.checkpoint import PeftAdapter, RunDirectory, read_adapter, read_adapter_config
from qlora.checkpoint.peft_folder import stored_scores
from qlora.config import load_config
from qlora.errors import CheckpointError, ConfigError
from qlora.files import BaseFiles, find_adapter
from qlora.lora import ScoreHead, stored_head
from qlora.lora.mixture import expert_stacks
from qlora.model.base_weights import BaseWeights
from qlora.model.device import resolve_compute_dtype
from qlora.model.formats import BITSANDBYTES_4BIT, weight_format
from qlora.model.from_config import base_files
from qlora.model.quantization import find_quantized_layers, settings_of_base
from qlora.model.run_adapter import check_expert_type, read_run_adapter
from qlora.model.skeleton import build_skeleton, of_images
from qlora.model.starts import Starts, starts_of
from qlora.nf4 import BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter, its base, and how the base was loaded in training.

    Attributes:
        folder: Folder of the adapter.
        base: Folder or hub id of the base.
        revision: Revision of the base on the hub.
        trust_remote_code: Whether to run code that comes with the base.
        run: The run that trained the adapter; None if it was made elsewhere. Its base is then loaded with the default
            settings: NF4 in blocks of 64, double quantization, compute dtype `auto`.
        is_base_named: Whether the adapter's own config names the base, rather than the caller.
    """

    folder: Path
    base: str
    revision: str | None = None
    trust_remote_code: bool = False
    run: RunDirectory | None = None
    is_base_named: bool = False

    @property
    def path(self) -> Path:
        """The run's output_dir, or the adapter's folder."""
        return self.folder if self.run is None else self.run.path

    @property
    def step(self) -> int | None:
        """Number of optimizer steps that the adapter was trained for; None if it was made elsewhere."""
        return None if self.run is None else self.run.step

    @property
    def trained_on(self) -> str | None:
        """Kind of device that the adapter was trained on; None if it is not known."""
        return None if self.run is None else self.run.read_record().in_use.device.partition(":")[0]

    @property
    def sets_pad_token(self) -> bool:
        """Whether the run's config sets the padding token."""
        return self.run is not None and "pad_token" in load_config(self.run.config).data.special_tokens

    @property
    def double_quant(self) -> bool:
        """Whether the statistics of the base's 4-bit weights were quantized in training."""
        return True if self.run is None else self.run.read_record().quantization.double_quant

    @property
    def block_size(self) -> int:
        """Number of elements per 4-bit block in training."""
        return BLOCK_SIZE if self.run is None else self.run.read_record().quantization.block_size or BLOCK_SIZE

    @property
    def keep_16bit(self) -> list[str]:
        """Patterns of the linear layers that were not quantized in training."""
        return [] if self.run is None else load_config(self.run.config).model.keep_16bit

    def read(self) -> PeftAdapter:
        """Read the adapter; a run's is checked against its run.

        Raises:
            CheckpointError: It is damaged, or another run's, or not LoRA that can be computed here.
        """
        return read_adapter(self.folder) if self.run is None else read_run_adapter(self.run)

    @property
    def head(self) -> ScoreHead | None:
        """Head of scores of whole documents; None if the adapter is for the head over the vocabulary."""
        if self.run is not None:
            return self.run.read_record().head
        num_scores = stored_scores(self.folder)
        if num_scores is None:
            return None
        named = stored_head(self.base_files().config)
        if named is not None and named.num_labels == num_scores:
            return named
        return ScoreHead(num_scores, of_images=of_images(self.base_files().config))

    def starts(self) -> Starts:
        """Return what the run's adapters started from, see :func:`starts_of`; empty if the adapter was made elsewhere.

        Raises:
            CheckpointError: The run's file of them is missing or damaged.
        """
        return {} if self.run is None else starts_of(load_config(self.run.config), self.run)

    def base_files(self) -> BaseFiles:
        """Find the base's files, or download them.

        Raises:
            ModelError: There are none, or they are damaged.
        """
        if self.run is not None:
            return base_files(load_config(self.run.config).model)
        return BaseFiles.resolve(self.base, self.revision, self.trust_remote_code)

    def base_differs(self, files: BaseFiles) -> list[str]:
        """Return the names of the base's files that differ from those used in training, as far as these are known."""
        return [] if self.run is None else files.differing(self.run.read_record().base.files)

    def compute_dtype(self, device: torch.device) -> torch.dtype:
        """Return the compute dtype of training; if it is not known, the default on a device."""
        if self.run is None:
            return resolve_compute_dtype("auto", device)
        return getattr(torch, self.run.read_record().in_use.compute_dtype)

    def quantized(self, files: BaseFiles) -> list[str]:
        """Return the names of layers and experts quantized in training; by default, of those that would be now.

        Raises:
            CheckpointError: See :func:`check_expert_type`.
        """
        if self.run is not None:
            if not self.base_differs(files):  # another base, which a merge was forced onto, is used as it is
                check_expert_type(self.run, files)
            return self.run.read_record().parameters.quantized
        skeleton = build_skeleton(files, head=self.head)
        experts = list(expert_stacks(skeleton))
        if weight_format(files) == BITSANDBYTES_4BIT:
            return experts
        settings = settings_of_base(files, skeleton, "nf4", self.double_quant, torch.bfloat16)
        layers = find_quantized_layers(skeleton, settings, files.name, BaseWeights(files).shapes)
        return [*(layer.name for layer in layers.values()), *experts]


def is_hub_id(name: str | Path) -> bool:
    """Return whether a text that names no file or folder here may be the id of a hub repository, `owner/name`."""
    text = str(name)
    is_id = text.count("/") == 1 and not text.startswith((".", "/", "~")) and not text.endswith((".yaml", ".yml"))
    return is_id and not Path(text).expanduser().exists()


def open_source(path: str | Path, base: str | None = None) -> AdapterSource:
    """Find an adapter and its base.

    Args:
        path: A run, one of its checkpoints, or a folder or hub id with PEFT's `adapter_config.json` and
            `adapter_model.safetensors`.
        base: Base of an adapter made elsewhere; None for the one that its config names.

    Raises:
        CheckpointError: There is no adapter, or the run has not finished.
        ConfigError: A run is given a base, or the base of an adapter made elsewhere is not known.
        ModelError: The hub has no such adapter.
    """
    if RunDirectory.find(path) is not None:
        if base is not None:
            raise ConfigError(f"--base {base}: {path} is a run, which has a base of its own; omit --base (base=).")
        run = RunDirectory.open(path)
        model = load_config(run.config).model
        return AdapterSource(run.adapter, model.base, model.revision, model.trust_remote_code, run)
    name = str(path)
    folder = find_adapter(name) if is_hub_id(name) or Path(name).expanduser().is_dir() else None
    if folder is None:
        raise CheckpointError(
            f"{path} is not a run, its adapter/ or one of its checkpoints; a run has a config.yaml and a run.json. "
            "An adapter made elsewhere has an adapter_config.json."
        )
    if base is not None:
        return AdapterSource(folder, base)
    named = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise ConfigError(f"{path}: adapter_config.json names no base; give it with --base (base= in Python).")
    if not Path(named).expanduser().exists() and (named.count("/") > 1 or named.startswith((".", "/", "~"))):
        raise ConfigError(
            f"{path}: adapter_config.json names the base {named}, a folder or file that does not exist here; give "
            "the base with --base (base= in Python)."
        )
    return AdapterSource(folder, named, is_base_named=True)
