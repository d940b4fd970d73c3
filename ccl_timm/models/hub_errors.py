"""What goes wrong between us and the Hub, each in one sentence."""

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import PurePosixPath

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError

from ccl_timm.errors import UserError, reason, user_errors

__all__ = ['check_repository_name', 'hub_errors', 'load_errors', 'push_errors']

_RAISED = (HTTPError, OSError, EntryNotFoundError, OfflineModeIsEnabled, SafetensorError)

_LOG_IN = 'log in with `hf auth login`, or set HF_TOKEN'
_STATUS = {
    401: f'the Hub does not know you: {_LOG_IN}',
    403: 'your token may not do this: it needs write permission, and you a place in the owner of the repository',
    409: 'somebody else changes it at this moment: try again',
    412: 'it was changed meanwhile: try again',
    429: 'the Hub got too many requests from you: try again later',
}


def check_repository_name(repo_id: str) -> None:
    """Accept ``owner/name`` and nothing that looks like a path.

    Raises:
        UserError: it is something else.
    """
    try:
        validate_repo_id(repo_id)
        right = repo_id.count('/') == 1
    except HFValidationError:
        right = False
    if not right:
        raise UserError(
            f"'{repo_id}' names no repository of the Hub: that is owner/name, of letters, digits, '-', '_' and '.'. "
            'A folder is named local-dir:FOLDER.'
        )


def hub_errors(what: str) -> AbstractContextManager[None]:
    """Turn what the Hub, the network or a damaged file raise into a sentence that begins with ``what``."""
    return user_errors(what, (*_RAISED, RuntimeError), _reason)


@contextlib.contextmanager
def load_errors(location: str) -> Iterator[None]:
    """The same while a model is built from its config, which can make any line of timm fail if it is wrong."""
    what = f"'{location}' cannot be loaded"
    try:
        with user_errors(what, (Exception,), lambda error: _reason(error) or reason(error)):
            yield
    except UserError as error:
        if location in str(error):
            raise
        raise UserError(f'{what}: {error}') from error


def push_errors(repo_id: str) -> AbstractContextManager[None]:
    """The same for a push, where the Hub's answers may also be such that huggingface_hub cannot read them."""
    unreadable = (AttributeError, LookupError, TypeError, ValueError)
    return user_errors(f"'{repo_id}' was not pushed", (*_RAISED, RuntimeError, *unreadable), _push_reason)


def _push_reason(error: BaseException) -> str | None:
    if isinstance(error, (*_RAISED, RuntimeError)):
        return _reason(error)
    unreadable = f'{constants.ENDPOINT} gave an answer that huggingface_hub cannot read'
    return f'{unreadable} ({type(error).__name__}: {error}): try again later'


def _reason(error: BaseException) -> str | None:
    if isinstance(error, RuntimeError):  # huggingface_hub's, around what stopped an upload
        return _reason(error.__cause__) if isinstance(error.__cause__, (HTTPError, OSError)) else None
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return f'it is not in the cache, and {_reason(error.__cause__)}'
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return 'HF_HUB_OFFLINE forbids to ask the Hub: unset it, or fetch the model once while online'
    if isinstance(error, SafetensorError):
        return f'its weights are damaged ({error}): fetch or export it again'
    if isinstance(error, HfHubHTTPError):
        return _answer(error)
    if isinstance(error, HTTPError):
        late = 'Timeout' in type(error).__name__
        return f'{constants.ENDPOINT} {"does not answer in time" if late else "cannot be reached"}: try again later'
    return ' '.join(str(error).split()).rstrip('.') if isinstance(error, _RAISED) else None


def _answer(error: HfHubHTTPError) -> str:
    status = error.response.status_code
    if isinstance(error, GatedRepoError):
        return f'it is gated: ask for access on its page, and {_LOG_IN}'
    if isinstance(error, RepositoryNotFoundError):
        return f'{constants.ENDPOINT} has no such repository, or it is private: check the name, and {_LOG_IN}'
    if isinstance(error, RevisionNotFoundError):
        return 'it has no such revision (branch, tag or commit)'
    if isinstance(error, EntryNotFoundError):
        return f'it has no file {PurePosixPath(error.response.url.path).name}'
    if status in _STATUS:
        return _STATUS[status]
    if status >= 500:
        return f'the Hub answered {status}: try again later'
    return f'the Hub answered {status}: {error.server_message or "no reason given"}'.rstrip('.')
