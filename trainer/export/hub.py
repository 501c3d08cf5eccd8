"""`rekatrain export ... --push-to-hub OWNER/NAME`: upload an export into a private repository of the hub."""

import os
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from rekatrain.data.errors import InputError


def check_hub(repo: str) -> None:
    """Raise InputError for a name that the hub would reject, and for a process that is offline or has no token."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub {repo!r}: {str(error).splitlines()[0]}") from error
    if repo.count("/") != 1:
        raise InputError(f"--push-to-hub {repo!r} is no name of a repository: write OWNER/NAME")
    if constants.is_offline_mode():
        raise InputError(f"--push-to-hub {repo}: HF_HUB_OFFLINE is set; unset it to upload")
    if get_token() is None:
        raise InputError(f"--push-to-hub {repo}: there is no token: set HF_TOKEN to one that may write")


def push(folder: Path, repo: str) -> str:
    """Upload a folder into a repository, a new one being private, and return the address of the commit.

    Raises InputError if the hub rejects it or does not answer; the export stays.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=get_token())
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        commit = api.upload_folder(folder_path=folder, repo_id=repo, commit_message="rekatrain export")
    except (HfHubHTTPError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"--push-to-hub {repo}: the hub did not accept it ({reason}); the export is in {str(folder)!r}: upload it "
            f"with: hf upload {repo} {folder}"
        ) from error
    return str(commit.commit_url)
