"""Models that a repository of the Hub or a folder holds: its config.json, and weights in safetensors only."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import load_state_dict_from_hf

from ccl_timm.errors import UserError
from ccl_timm.hub_errors import check_repository_name, explained

__all__ = ['WEIGHTS', 'explained_load', 'missing_architecture', 'read_config', 'read_hub_weights']

WEIGHTS = 'model.safetensors'


def read_config(source: str, location: str, cache_dir: str | None = None) -> dict[str, Any]:
    """Read the config.json of a model.

    Args:
        source: ``'hf-hub'`` or ``'local-dir'``.
        location: ``owner/name``, ``owner/name@revision``, or a folder.
        cache_dir: of the Hub's downloads.

    Raises:
        UserError: there is none, it cannot be fetched, or another library wrote it.
    """
    with explained(f"'{location}' cannot be loaded"):
        path = _fetch(location, 'config.json', cache_dir) if source == 'hf-hub' else Path(location, 'config.json')
        if not path.is_file():
            raise UserError(f"'{location}' holds no model of timm: it has no config.json.")
        text = path.read_text(encoding='utf-8', errors='replace')
    try:
        config = json.loads(text)
    except ValueError as error:
        raise UserError(f"'{location}' holds no model of timm: its config.json is not JSON ({error}).") from error
    right = isinstance(config, dict) and isinstance(config.get('architecture'), str)
    if not right or not isinstance(config.get('pretrained_cfg', {}), dict):
        raise UserError(
            f"'{location}' holds no model of timm: its config.json names no architecture, another library wrote it."
        )
    return config


def read_hub_weights(location: str, filename: str | None = None, cache_dir: str | None = None) -> dict[str, Any]:
    """Read the tensors of ``owner/name[@revision]``, from safetensors and nothing else.

    Raises:
        UserError: there are none, they cannot be fetched, or they are damaged.
    """
    filename = filename or WEIGHTS
    fetch_weights(location, filename, cache_dir)
    with explained(f"'{location}' cannot be loaded"):
        return load_state_dict_from_hf(location, filename, cache_dir=cache_dir)


def fetch_weights(location: str, filename: str = WEIGHTS, cache_dir: str | None = None) -> None:
    """Bring safetensors into the cache.

    Raises:
        UserError: there are none: timm would go on to a pickle; or they cannot be fetched.
    """
    with explained(f"'{location}' cannot be loaded"):
        try:
            if not filename.endswith('.safetensors'):
                raise EntryNotFoundError(filename)
            _fetch(location, filename, cache_dir)
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError as error:
            raise UserError(
                f"'{location}' has no {WEIGHTS}, and weights in other formats are not read: they can hold code. "
                'Ask its owner for safetensors.'
            ) from error


def _fetch(location: str, filename: str, cache_dir: str | None) -> Path:
    repo_id, _, revision = location.partition('@')
    check_repository_name(repo_id)
    return Path(hf_hub_download(repo_id, filename, revision=revision or None, cache_dir=cache_dir))


@contextlib.contextmanager
def explained_load(location: str) -> Iterator[None]:
    """Turn what timm raises over a model that does not fit its config into a sentence."""
    try:
        with explained(f"'{location}' cannot be loaded"):
            yield
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, KeyError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip().rstrip('.')
        raise UserError(f"'{location}' cannot be loaded: {reason}.") from error


def missing_architecture(location: str, config: dict[str, Any]) -> str:
    """Say which package has the architecture of a config.json that nobody here knows, as far as the config tells."""
    import ccl_timm

    name, needs = config['architecture'], config.get('ccl_timm')
    start = f"Unknown model '{name}' in '{location}'"
    if not isinstance(needs, dict):
        return f'{start}: import the package that has it before; its config.json does not name one.'
    for plugin in needs.get('plugins') or []:
        if plugin.get('kind') == 'model' and plugin.get('name') == name:
            distribution, module = plugin['distribution'], plugin['value'].partition(':')[0].strip()
            return (
                f'{start}: it belongs to the package {distribution} ({plugin["version"]} when it was trained). '
                f'`pip install {distribution}`, or import {module} before, if it is yours.'
            )
    return (
        f'{start}: it was written by {needs.get("package")} {needs.get("version")}, this is ccl-timm '
        f'{ccl_timm.__version__}: `pip install --upgrade {needs.get("package")}`.'
    )
