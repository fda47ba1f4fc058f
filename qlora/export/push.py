"""A release folder onto the hub, after a look for what should stay here."""

import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from qlora.errors import ExportError, find_secrets

REPO_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
RELEASED = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.py",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.gguf", "*.model")
# Words of a vocabulary look like anything.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
PATH = re.compile(r"(?<![\w./:])/(?:[\w.+@-]+/)+[\w.+@-]+")


class HubClient(Protocol):
    """What is used of `huggingface_hub.HfApi`."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Makes a repository where there is none."""

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str, allow_patterns: list[str]) -> Any:
        """Uploads files in one commit."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """What was uploaded, or would be.

    Attributes:
        repo: On the hub.
        private: Whether it is made so, if it is new.
        files: By name, with their bytes.
        num_bytes: Of all.
        dry_run: Whether nothing was sent.
    """

    repo: str
    private: bool
    files: dict[str, int]
    num_bytes: int
    dry_run: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def push(
    folder: Path, repo: str, private: bool = True, dry_run: bool = False, client: HubClient | None = None
) -> PushReport:
    """Uploads a release folder in one commit.

    Args:
        folder: What `merge` or `quantize` wrote.
        repo: `owner/name`, or a name of one's own.
        private: Make a new repository private; one that is there stays what it is.
        dry_run: Look and report, and send nothing.
        client: In place of `huggingface_hub.HfApi`, which is logged in by `hf auth login` or HF_TOKEN.

    Raises:
        ExportError: The folder holds what is no part of a release or must not be public, or the hub refuses.
    """
    check_repo(repo)
    files = list_release(folder)
    report = PushReport(repo, private, files, sum(files.values()), dry_run)
    if dry_run:
        return report
    if client is None:
        from huggingface_hub import HfApi

        client = HfApi()
    try:
        client.create_repo(repo, private=private, exist_ok=True)
        client.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message=f"Upload {folder.name} with qlora",
            allow_patterns=list(files),
        )
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        again = f"hf upload {repo} {folder}{' --private' * private}"
        raise ExportError(
            f"{folder} is whole, but {repo} refused it: {reason}; see hf auth whoami, and upload it with {again}"
        ) from error
    return report


def check_repo(repo: str) -> None:
    """Sees that a name can be one of a repository.

    Raises:
        ExportError: It can't.
    """
    if not REPO_ID.fullmatch(repo):
        raise ExportError(f"'{repo}' is no name of a repository; it is owner/name, or a name of one's own.")


def list_release(folder: Path) -> dict[str, int]:
    """The files of a release by name, with their bytes.

    Raises:
        ExportError: There is none, or a file that is no part of one, or a secret or a path of this machine in one.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if not any(_is_one(path, WEIGHTS) for path in paths):
        raise ExportError(f"{folder} holds no weights to upload.")
    problems = []
    for path in paths:
        name = str(path.relative_to(folder))
        if not _is_one(path, RELEASED) or name.startswith(".") or path.is_symlink():
            problems.append(f"{name} is no part of a release")
        elif not _is_one(path, WEIGHTS):
            problems += [f"{name} holds {what}" for what in _findings(path)]
    if problems:
        raise ExportError(f"{folder} is not uploaded: {'; '.join(problems)}. Remove that, or move it away.")
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def _is_one(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _findings(path: Path) -> list[str]:
    """What should not be public; secrets are named by their kind and not shown."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = find_secrets(text)
    if not _is_one(path, VOCABULARIES):
        here = next((match for match in PATH.findall(text) if Path(match).parent.is_dir()), None)
        if here:
            found.append(f"a path of this machine ({here})")
    return found
