"""Exports onto the Hugging Face hub; the token comes from the hub client's own store."""

from __future__ import annotations

from pathlib import Path

from trinityx_jax.errors import UserError


def check_id(repo: str) -> None:
    """Raise UserError where ``repo`` is no hub id, before anything is written."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: not a hub id ({' '.join(str(error).split())})") from None


def push(folder: Path, repo: str, private: bool = False) -> str:
    """Upload a folder as a model repository, made where there is none; returns its address.

    Files that stand there already are replaced or kept, never removed.

    Raises:
        UserError: the hub refuses or cannot be reached; the folder is still here.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        made = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message="TrinityX export")
    except Exception as error:  # the client passes on whatever its HTTP library of the day raises
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{repo}: the hub did not take it ({cause}); the export is in {folder}") from error
    return str(made)
