"""Upload an export to the Hugging Face Hub, through huggingface_hub's own client."""

from __future__ import annotations

from pathlib import Path

from dualenc.errors import ConfigError, DataError


def check_repository(repository: str) -> None:
    """Raises ConfigError for a name that is not ORG/NAME, before anything is written."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        if repository.count("/") != 1:
            raise HFValidationError("it has no organisation")
        validate_repo_id(repository)
    except HFValidationError as e:
        raise ConfigError(f"--push: {repository!r} is not ORG/NAME ({str(e).splitlines()[0]})") from e


def push_folder(folder: Path, repository: str, private: bool = False) -> str:
    """Create ``repository`` (kept if it exists) and upload ``folder`` in one commit.

    Where HF_HUB_OFFLINE is set nothing is sent.

    Returns:
        A sentence that says what was done, or what would have been.

    Raises:
        ConfigError: a name that is not ORG/NAME, or no valid token.
        DataError: the Hub cannot be reached, or refuses the upload; the folder stays as it is.
    """
    import huggingface_hub as hub
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    check_repository(repository)
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    size = sum(p.stat().st_size for p in files) / 1e6
    what = f"{len(files)} files ({size:,.1f} MB) to {'the private repository ' if private else ''}{repository}"
    if HF_HUB_OFFLINE:
        return (
            f"not uploaded, HF_HUB_OFFLINE is set: without it, {what} would be uploaded; later: hf upload {repository} "
            f"{folder}"
        )
    api = hub.HfApi(library_name="dualenc")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload by dualenc export")
    except LocalTokenNotFoundError as e:
        raise ConfigError(f"--push: there is no token for the Hub; run hf auth login, or set HF_TOKEN ({e})") from e
    except HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403):
            raise ConfigError(
                f"--push: the Hub refuses this token for {repository} (HTTP {status}); {folder} is kept"
            ) from e
        raise DataError(f"--push: the Hub refused {what} (HTTP {status}); {folder} is kept") from e
    except OSError as e:
        raise DataError(f"--push: the Hub cannot be reached ({e}); {folder} is kept") from e
    return f"uploaded {what}: {done.commit_url}"
