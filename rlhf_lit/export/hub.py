"""Uploading an exported folder to the Hugging Face hub, by its own client."""

from __future__ import annotations

from pathlib import Path

from rlhf_lit.errors import UserError, first_line
from rlhf_lit.files import short_path


def check_hub(name: str) -> None:
    """Refuse what cannot be uploaded, before any work is done.

    Raises:
        UserError: no name for a repository, no connection, or no token that the hub knows.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError, HTTPError  # of whichever client it speaks with
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(f"--push_to_hub {name}: no name for a repository: {first_line(error)}") from None
    if is_offline_mode():
        raise UserError(f"--push_to_hub {name}: offline (HF_HUB_OFFLINE is set); leave it out, or unset that")
    if get_token() is None:
        raise UserError(f"--push_to_hub {name}: no token; run 'hf auth login', or set HF_TOKEN")
    try:
        HfApi().whoami()
    except (OSError, HTTPError) as error:
        raise UserError(f"--push_to_hub {name}: the hub did not let us in: {_reason(error)}") from None


def upload(folder: Path, name: str) -> str:
    """Upload a folder, to a new private repository where there is none of that name. → the commit's address.

    Raises:
        UserError: the hub refused it, or could not be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    try:
        HfApi().create_repo(name, private=True, exist_ok=True)
        return str(HfApi().upload_folder(repo_id=name, folder_path=folder, commit_message="Export of rlhf_lit"))
    except (OSError, HTTPError, ValueError, RuntimeError) as error:  # RuntimeError: a large file that broke off
        raise UserError(
            f"--push_to_hub {name}: {_reason(error)}; the export is whole in {short_path(folder)}: 'hf upload {name} "
            f"{short_path(folder)}' tries again"
        ) from None


def _reason(error: BaseException) -> str:
    """What a client's error says: of a card, what is wrong with it; of a file, what broke its upload off."""
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    return first_line(error) if cause is None else f"{first_line(error).rstrip('.')}: {first_line(cause)}"
