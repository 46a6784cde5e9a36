"""Uploads to a stand-in of the hub, whose functions have the signatures of the real client."""

from importlib import import_module
from unittest.mock import Mock, create_autospec

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from typer.testing import CliRunner

from llm_surgeon import prune_checkpoint, push
from llm_surgeon.cli import app
from llm_surgeon.errors import ConfigError, UploadError
from llm_surgeon.run.upload import _UNREACHABLE
from quick import without_what_has_other_tests

NAME = "me/smaller"
OPTIONS = {"samples": 8, "seq_len": 16, "evaluation": "none", "device": "cpu", "preset": "none", "shots": 1}


def refused(kind):
    """An answer of the hub that is an error of a kind."""
    client = import_module(_UNREACHABLE[-1].__module__.split(".")[0])
    return kind("no", response=client.Response(403, request=client.Request("GET", "https://hub.test")))


@pytest.fixture
def hub(monkeypatch):
    """A hub that knows no repository yet."""
    hub = create_autospec(HfApi, instance=True)
    hub.endpoint = "https://hub.test"
    hub.repo_info.side_effect = refused(RepositoryNotFoundError)
    hub.upload_folder.return_value = Mock(repo_url=f"https://hub.test/{NAME}")
    monkeypatch.setattr("llm_surgeon.run.upload.HfApi", lambda: hub)
    return hub


@pytest.fixture(scope="module")
def export(checkpoint, tmp_path_factory):
    place = tmp_path_factory.mktemp("export")
    (place / "words.txt").write_text(" ".join(f"w{number * 7 % 60}" for number in range(4000)))
    prune_checkpoint(str(checkpoint), place / "smaller", calibration=str(place / "words.txt"), **OPTIONS)
    (place / "smaller" / "gguf").mkdir()
    (place / "smaller" / "gguf" / "model-F16.gguf").write_bytes(b"weights")
    return place / "smaller"


def test_an_export_is_sent_with_its_card_and_private(export, hub):
    sent = push(export, NAME)
    assert (sent.private, sent.address) == (True, f"https://hub.test/{NAME}")
    hub.create_repo.assert_called_once_with(NAME, private=True, exist_ok=True)
    given = hub.upload_folder.call_args.kwargs
    assert (given["repo_id"], given["folder_path"]) == (NAME, export)
    from huggingface_hub.utils import filter_repo_objects

    everything = [str(path.relative_to(export)) for path in export.rglob("*") if path.is_file()]
    allowed, ignored = given["allow_patterns"], given["ignore_patterns"]
    chosen = set(filter_repo_objects(everything, allow_patterns=allowed, ignore_patterns=ignored))
    assert chosen == set(sent.files)
    assert {"README.md", "config.json", "model.safetensors", "report.html", "recipe.yaml"} <= chosen
    assert "gguf/model-F16.gguf" in everything
    assert sent.files["model.safetensors"] == (export / "model.safetensors").stat().st_size


def test_a_dry_run_shows_the_files_and_asks_nobody(export, monkeypatch):
    monkeypatch.setattr("llm_surgeon.run.upload.HfApi", None)
    done = CliRunner().invoke(app, ["push", str(export), NAME, "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "Would be sent to me/smaller (private)" in done.stdout
    assert "model.safetensors" in done.stdout
    assert "gguf" not in done.stdout


def test_public_only_when_it_is_asked_for(export, hub):
    push(export, NAME, public=True)
    hub.create_repo.assert_called_once_with(NAME, private=False, exist_ok=True)


def test_a_public_repository_is_not_taken_for_a_private_one(export, hub):
    hub.repo_info.side_effect, hub.repo_info.return_value = None, Mock(private=False)
    with pytest.raises(ConfigError, match="is there, and public"):
        push(export, NAME)
    hub.upload_folder.assert_not_called()
    push(export, NAME, public=True)
    hub.upload_folder.assert_called_once()


def test_a_private_repository_is_not_said_to_be_public(export, hub):
    hub.repo_info.side_effect, hub.repo_info.return_value = None, Mock(private=True)
    with pytest.raises(ConfigError, match="is there, and private"):
        push(export, NAME, public=True)
    assert push(export, NAME).private


@pytest.mark.parametrize(
    "name",
    ["smaller", "me/", "/smaller", "a/b/c", "me/small er", "", "me/" + "x" * 100, "../me/x", "me/a--b", "me/a..b"],
)
def test_names_that_are_none(export, hub, name):
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match="no name of a repository"):
            push(export, name, dry_run=dry_run)
    assert not hub.mock_calls


def test_what_is_no_export_is_not_sent(checkpoint, hub, tmp_path):
    with pytest.raises(ConfigError, match=r"no README\.md"):
        push(checkpoint, NAME)
    with pytest.raises(ConfigError, match="no config"):
        push(tmp_path / "nowhere", NAME)
    assert not hub.mock_calls


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (LocalTokenNotFoundError("none"), "Nobody is logged in"),
        (OfflineModeIsEnabled("offline mode"), "cannot be reached: offline mode"),
        (OSError("no route"), "cannot be reached: no route"),
        (_UNREACHABLE[-1]("timed out"), "cannot be reached: timed out"),
        (refused(HfHubHTTPError), "The hub refuses me/smaller"),
        (ValueError("Invalid metadata in README.md"), "refuses what is sent to me/smaller: Invalid metadata"),
    ],
)
@pytest.mark.parametrize("step", ["whoami", "create_repo", "upload_folder"])
def test_errors_of_the_hub_are_messages(export, hub, step, error, said):
    getattr(hub, step).side_effect = error
    with pytest.raises(UploadError, match=said) as caught:
        push(export, NAME)
    assert caught.value.remedy


def test_a_run_asks_the_hub_before_it_begins_and_sends_at_its_end(checkpoint, export, hub, tmp_path, monkeypatch):
    without_what_has_other_tests(monkeypatch)
    monkeypatch.setattr("sys.argv", ["llm-surgeon"])
    options = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    words = str(export.parent / "words.txt")

    def prune(out, *more):
        return CliRunner().invoke(
            app, ["prune", str(checkpoint), "--out", str(out), "--calibration", words, *options, *more]
        )

    assert prune(tmp_path / "quiet").exit_code == 0
    assert not hub.mock_calls
    hub.whoami.side_effect = LocalTokenNotFoundError("none")
    done = prune(tmp_path / "out", "--push-to-hub", NAME)
    assert (done.exit_code, (tmp_path / "out").exists()) == (1, False)
    hub.whoami.side_effect = None
    done = prune(tmp_path / "out", "--push-to-hub", NAME)
    assert done.exit_code == 0, done.output
    assert f"Sent to https://hub.test/{NAME} (private)" in done.stdout
    assert hub.upload_folder.call_args.kwargs["folder_path"] == tmp_path / "out"


def test_a_failed_upload_says_how_to_send_the_finished_export(checkpoint, export, hub, tmp_path, monkeypatch):
    without_what_has_other_tests(monkeypatch)
    monkeypatch.setattr("sys.argv", ["llm-surgeon"])
    hub.upload_folder.side_effect = OSError("no route")
    options = [text for name, value in OPTIONS.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    words = ["--calibration", str(export.parent / "words.txt")]
    out = tmp_path / "out"
    done = CliRunner().invoke(
        app, ["prune", str(checkpoint), "--out", str(out), *words, *options, "--push-to-hub", NAME]
    )
    said = " ".join(done.output.split())
    assert done.exit_code == 1
    assert "cannot be reached: no route" in said
    assert f"llm-surgeon push {out} {NAME}".replace(" ", "") in said.replace(" ", "")
    assert (out / "report.json").exists()
