"""Uploads: files that are sent, and files that are refused; without a network."""

import pytest
import torch
from safetensors.torch import save_file

from qlora.errors import ExportError
from qlora.export.push import push


class FakeHub:
    """Client that records its calls."""

    def __init__(self, error=None):
        self.calls = []
        self.error = error

    def create_repo(self, repo_id, **settings):
        self.calls.append(("create", repo_id, settings))
        if self.error is not None:
            raise self.error

    def upload_folder(self, **settings):
        self.calls.append(("upload", settings["repo_id"], settings))


@pytest.fixture
def release(tmp_path):
    folder = tmp_path / "my-release"
    folder.mkdir()
    save_file({"a": torch.zeros(4)}, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llama", "and": "or/and"}')
    (folder / "tokenizer.json").write_text('{"vocab": {"/usr/bin/env": 1, "/tmp/x": 2}}')
    (folder / "README.md").write_text("# my-release\n[base](https://huggingface.co/owner/base/tree/main)\n")
    (folder / "LICENSE").write_text("MIT License")
    return folder


def test_the_folder_is_sent_in_one_commit_to_a_private_repository(release):
    hub = FakeHub()
    report = push(release, "me/my-release", client=hub)
    (made, repo, settings), (sent, to, upload) = hub.calls
    assert (made, repo, settings) == ("create", "me/my-release", {"private": True, "exist_ok": True})
    assert (sent, to, upload["folder_path"]) == ("upload", "me/my-release", release)
    assert sorted(upload["allow_patterns"]) == sorted(path.name for path in release.iterdir())
    assert report.files == {path.name: path.stat().st_size for path in release.iterdir()}
    assert report.num_bytes == sum(report.files.values())


def test_a_dry_run_sends_nothing_and_reports_the_same(release):
    hub = FakeHub()
    dry = push(release, "me/my-release", private=False, dry_run=True, client=hub)
    assert hub.calls == []
    wet = push(release, "me/my-release", private=False, client=hub)
    assert hub.calls[0][2]["private"] is False
    assert dry.as_dict() | {"dry_run": False} == wet.as_dict()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("README.md", "token hf_" + "a1B2" * 9, "README.md contains a token of the hub"),
        ("config.json", '{"key": "sk-' + "x" * 40 + '"}', "config.json contains an API key"),
        ("tokenizer.json", '{"a": "ghp_' + "z" * 36 + '"}', "tokenizer.json contains a token of GitHub"),
        ("notes.txt", "AKIA" + "Q" * 16, "notes.txt contains a key of AWS"),
        ("notes.txt", "-----BEGIN RSA PRIVATE KEY-----", "notes.txt contains a private key"),
        ("optimizer.pt", "", "optimizer.pt does not belong to a release"),
        (".env", "", ".env does not belong to a release"),
    ],
)
def test_secrets_and_foreign_files_are_reported_and_nothing_is_sent(name, text, message, release):
    (release / name).write_text(text)
    hub = FakeHub()
    with pytest.raises(ExportError, match=message) as raised:
        push(release, "me/my-release", client=hub)
    assert hub.calls == []
    assert not text or text not in str(raised.value)


def test_paths_of_this_machine_are_not_sent(release):
    (release / "merge_report.json").write_text(f'{{"out_dir": "{release}"}}')
    with pytest.raises(ExportError, match=f"merge_report.json contains a path of this machine .{release}"):
        push(release, "me/my-release", dry_run=True)


def test_a_folder_without_weights_is_no_release(release):
    (release / "model.safetensors").unlink()
    with pytest.raises(ExportError, match="no weights to upload"):
        push(release, "me/my-release", dry_run=True)


@pytest.mark.parametrize("repo", ["", "a/b/c", "/a", "a b", "https://huggingface.co/a/b", "../x"])
def test_an_invalid_repository_id_is_refused(repo, release):
    with pytest.raises(ExportError, match="owner/name"):
        push(release, repo, dry_run=True)


def test_a_failed_upload_is_reported_with_the_command_to_repeat_it(release):
    with pytest.raises(ExportError, match=r"is complete, but the upload to me/x failed: 401 no token\.") as raised:
        push(release, "me/x", client=FakeHub(ValueError("401 no token\nmore")))
    assert str(raised.value).endswith(f"hf upload me/x {release} --private")
