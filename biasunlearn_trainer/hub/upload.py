"""Sends a finished run to the Hub in one commit: weights, numbers and card change together or not at all."""

from __future__ import annotations

import logging
import shlex
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

# HTTPError is the transport library's own class; which library that is differs between versions of huggingface_hub.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from biasunlearn_trainer.hub.card import TAGS, write_card
from biasunlearn_trainer.hub.contents import Contents, contents_of, write_contents
from biasunlearn_trainer.hub.finished import FinishedRun, PublishError, read_run
from biasunlearn_trainer.hub.merging import merge
from biasunlearn_trainer.hub.naming import TOKEN

logger = logging.getLogger(__name__)

EMPTY_REPOSITORY = (".gitattributes", "README.md", ".gitignore", "LICENSE")
STALE = ("adapter_*", "model*.safetensors*", "config.json", "generation_config.json", "*.bin", "*.pt", "*.pth", "*.pkl")
"""What an earlier upload may have left; an old adapter beside a merged model would be loaded on top of it."""


class HubError(PublishError):
    """The Hub refused or was not reached; what was to be sent still lies in the run's folder."""


def push(
    run_dir: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    merged: bool = False,
    dry_run: str | Path | None = None,
    overwrite: bool = False,
    base_model: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    needs_results: bool = True,
    trust_remote_code: bool = False,
    **card: Any,
) -> str:
    """Publishes a run: adapter or model, processor, card, recipe and results.

    Args:
        run_dir: the run's folder.
        repo_id: OWNER/NAME, or NAME for a repository of your own.
        private: make the repository private; None: the Hub's default. One that is there must be so already.
        revision: the branch to commit to, made where it is not there; None: main.
        merged: publish the adapter merged into its base instead of the adapter.
        dry_run: write the files into this new folder and send nothing.
        overwrite: publish into a repository that holds something else.
        base_model: the base's Hub id, where the run read it from a folder.
        token: a token of the Hub; None: `HF_TOKEN`, or what `hf auth login` stored.
        commit_message: of the commit.
        needs_results: refuse a run without measured results.
        trust_remote_code: run modelling code that comes with the base, when merging. Off unless asked for.
        **card: `license`, `language`, `tags`, `method` of `write_card`.

    Returns:
        The commit's address, or the dry run's folder.

    Raises:
        PublishError: the run is not finished, or its files are not those that were measured.
        HubError: the name cannot be used, or the Hub refused or was not reached.
    """
    check_name(repo_id)
    if dry_run is None:
        check_token(token)
    run = read_run(run_dir, needs_results)
    with tempfile.TemporaryDirectory() as scratch:
        weights = merge(run.folder, Path(scratch) / "merged", trust_remote_code) if merged and run.is_adapter else None
        files = contents_of(run, _card_text(run, repo_id, weights, base_model, card), base_model, weights)
        if dry_run is not None:
            try:
                return str(write_contents(files, dry_run))
            except OSError as err:
                raise PublishError(str(err)) from err
        again = again_command(run.folder, repo_id, private=private, revision=revision, merged=merged)
        with explained(repo_id, run.folder, again):
            return _send(HfApi(token=token), files, repo_id, private, revision, overwrite, commit_message)


def check_name(repo_id: str) -> None:
    """Refuses a name that the Hub would refuse, before anything else is done.

    Raises:
        HubError: saying what a name looks like.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as err:
        raise HubError(
            f"{repo_id!r} is no name of a repository: {err} Expected OWNER/NAME, for instance me/unbiased-llava."
        ) from err


def check_token(token: str | None = None) -> None:
    """Refuses to go on without a token.

    Raises:
        HubError: saying where one is read from.
    """
    if not (token or get_token()):
        raise HubError(
            "There is no token of the Hub here. Run `hf auth login`, or set HF_TOKEN to one with write permission; "
            "--dry_run FOLDER writes what would be sent without one."
        )


def reserve(repo_id: str, private: bool | None, token: str | None, folder: str | Path) -> str:
    """Makes the repository, or finds it, before a run begins: a name that cannot be used is known in time.

    Returns:
        OWNER/NAME.

    Raises:
        HubError: as `push`.
    """
    check_name(repo_id)
    check_token(token)
    with explained(repo_id, folder, None):
        api = HfApi(token=token)
        found = _repository(api, repo_id, private)
        _check_repository(api.model_info(found), private, overwrite=False)
    return found


def again_command(
    folder: str | Path, repo_id: str, *, private: bool | None, revision: str | None, merged: bool = False
) -> str:
    """The command that publishes a run's folder."""
    words = ["python", "-m", "biasunlearn_trainer.hub", "push", str(folder), repo_id]
    words += (["--private"] if private else []) + (["--revision", revision] if revision else [])
    return shlex.join(words + (["--merged"] if merged else []))


def _card_text(
    run: FinishedRun, repo_id: str, weights: Path | None, base_model: str | None, card: Mapping[str, Any]
) -> str:
    kind = "merged" if weights else "adapter" if run.is_adapter else "model"
    return str(write_card(run, repo_id, kind=kind, base_model=base_model, **card))


def _send(
    api: HfApi,
    files: Contents,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    overwrite: bool,
    message: str | None,
) -> str:
    repo_id = _repository(api, repo_id, private)
    _check_repository(api.model_info(repo_id), private, overwrite)
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = api.list_repo_files(repo_id, revision=revision)
    stale = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in STALE)]
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    operations += [CommitOperationDelete(name) for name in stale]
    message = message or "Upload an unlearned model with its card"
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    return str(commit.commit_url)


def _repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """OWNER/NAME of the repository, which is made where it is not there."""
    try:
        return api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except KeyError as err:  # the client looks for the address of what is there; some conflicts have none
        raise HubError(_reason(409, repo_id)) from err


def _check_repository(info: Any, private: bool | None, overwrite: bool) -> None:
    """Refuses a repository that holds something else, or is public where a private one was asked for."""
    if private and not info.private:
        raise HubError(
            f"{info.id} is there already and public. Make it private in its settings, or choose another name."
        )
    others = [file.rfilename for file in info.siblings or [] if file.rfilename not in EMPTY_REPOSITORY]
    if others and TAGS[0] not in (info.tags or []) and not overwrite:
        raise HubError(
            f"{info.id} holds something else already ({', '.join(others[:3])}). Choose another name, or let "
            "--overwrite replace it."
        )


@contextmanager
def explained(repo_id: str, folder: str | Path, again: str | None) -> Iterator[None]:
    """Turns what the Hub or the network answers into what to do; no answer is passed on with a token in it."""
    try:
        yield
    except HubError as err:
        raise HubError(_with_rest(str(err), folder, again)) from err
    except HfHubHTTPError as err:
        reason = _reason(err.response.status_code, repo_id)
        said = f" The Hub said: {TOKEN.sub('(token)', err.server_message)}" if err.server_message else ""
        raise HubError(_with_rest(reason + said, folder, again)) from err
    except (OfflineModeIsEnabled, HTTPError, ConnectionError, TimeoutError) as err:
        reason = (
            "HF_HUB_OFFLINE is set, so nothing is sent. Unset it."
            if isinstance(err, OfflineModeIsEnabled)
            else f"The Hub was not reached ({type(err).__name__}: {TOKEN.sub('(token)', str(err))})."
        )
        raise HubError(_with_rest(reason, folder, again)) from err


def _reason(status: int, repo_id: str) -> str:
    owner = repo_id.partition("/")[0] if "/" in repo_id else "your account"
    reasons = {
        401: f"The Hub does not know the token ({status}), or {repo_id} is private and somebody else's. `hf auth "
        "login` stores a new token, `hf auth whoami` says whose it is.",
        403: f"The token may not write to {repo_id} ({status}): it is {owner}'s. Take one with write permission for "
        f"{owner}, or another name.",
        404: f"There is no {repo_id} that this token may see ({status}). Check the spelling and the token's rights.",
        409: f"{repo_id} is taken, or was changed at the same time ({status}). Choose another name, or try again.",
    }
    return reasons.get(status, f"The Hub answered with {status}.")


def _with_rest(reason: str, folder: str | Path, again: str | None) -> str:
    if again is None:
        return (
            f"{reason}\nNothing was trained. Without push_to_hub the run goes on, and can be published when it is done."
        )
    return f"{reason}\nNothing was published; everything lies in {folder} as before. To repeat it:\n    {again}"
