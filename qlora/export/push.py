"""Upload of a release folder to the hub, after a check for secrets and local paths."""

import re
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol

from qlora.errors import ExportError, find_secrets

REPO_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
RELEASED = (
    "*.safetensors", "*.safetensors.index.json", "*.gguf", "*.json", "*.jinja", "*.model", "*.txt", "*.md", "*.py",
    "Modelfile",
    "LICENSE*", "NOTICE*",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.gguf", "*.model")
# Not searched for local paths, because a vocabulary's tokens can look like paths.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt")
PATH = re.compile(r"(?<![\w./:])/(?:[\w.+@-]+/)+[\w.+@-]+")


class HubClient(Protocol):
    """The methods of `huggingface_hub.HfApi` that :func:`push` calls."""

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> Any:
        """Create a repository unless it exists."""

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str, allow_patterns: list[str]) -> Any:
        """Upload files in one commit."""


@dataclass(frozen=True, slots=True)
class PushReport:
    """The result of :func:`push`.

    Attributes:
        repo: Repository on the hub.
        private: Whether the repository is created as a private one, if it is new.
        files: Bytes of each file, by name.
        num_bytes: Bytes of all files.
        dry_run: Whether nothing was sent.
    """

    repo: str
    private: bool
    files: dict[str, int]
    num_bytes: int
    dry_run: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def push(
    folder: Path, repo: str, private: bool = True, dry_run: bool = False, client: HubClient | None = None
) -> PushReport:
    """Upload a release folder in one commit.

    Args:
        folder: Folder that `merge` or `quantize` wrote.
        repo: `owner/name`, or the name alone for a repository of your account.
        private: Make a new repository private; an existing one keeps its visibility.
        dry_run: Check and report, but send nothing.
        client: Client of the hub; default: `huggingface_hub.HfApi`, which uses `hf auth login` or HF_TOKEN.

    Raises:
        ExportError: The folder contains files that do not belong to a release or must not be public, or the upload
            failed.
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
            f"{folder} is complete, but the upload to {repo} failed: {reason}. Check hf auth whoami, then run {again}"
        ) from error
    return report


def check_repo(repo: str) -> None:
    """Check that a name is a valid repository id.

    Raises:
        ExportError: It is not.
    """
    if not REPO_ID.fullmatch(repo):
        raise ExportError(f"'{repo}' is not a repository id; give owner/name, or the name alone for your account.")


def list_release(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a release, by name, after a check of the files.

    Raises:
        ExportError: The folder has no weights, a file that does not belong to a release, or one with a secret or a
            path of this machine.
    """
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if not any(_matches(path, WEIGHTS) for path in paths):
        raise ExportError(f"{folder} has no weights to upload; give a folder that qlora merge or qlora quantize wrote.")
    problems = []
    for path in paths:
        name = str(path.relative_to(folder))
        if not _matches(path, RELEASED) or name.startswith(".") or path.is_symlink():
            problems.append(f"{name} does not belong to a release")
        elif not _matches(path, WEIGHTS):
            problems += [f"{name} contains {finding}" for finding in _findings(path)]
    if problems:
        raise ExportError(f"{folder} was not uploaded: {'; '.join(problems)}. Remove these, or move them elsewhere.")
    return {str(path.relative_to(folder)): path.stat().st_size for path in paths}


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _findings(path: Path) -> list[str]:
    """Return descriptions of contents that must not be public; of a secret only the kind."""
    text = path.read_text(encoding="utf-8", errors="replace")
    found = find_secrets(text)
    if not _matches(path, VOCABULARIES):
        here = next((match for match in PATH.findall(text) if Path(match).parent.is_dir()), None)
        if here:
            found.append(f"a path of this machine ({here})")
    return found
