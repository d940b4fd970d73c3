"""Where a run comes from: command, versions, machine, and the weights it started with."""

import hashlib
import json
import os
import platform
import shlex
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from huggingface_hub import try_to_load_from_cache
from timm.models import get_pretrained_cfg

from ccl_timm import models, registry
from ccl_timm.errors import UserError
from ccl_timm.training.checkpoint_files import read_checkpoint

__all__ = ['environment', 'origin', 'origin_of_settings']

_FILES = ('initial_checkpoint', 'pretrained_path')  # the first that is given wins


def environment(argv: list[str], device: str, fingerprint: str) -> dict[str, Any]:
    """What a run is made with: command, versions, commit, device, plugins, data.

    Args:
        argv: of the training script.
        device: such as ``'cpu'`` or ``'cuda:0'``.
        fingerprint: of the data, see :mod:`ccl_timm.data.fingerprint`.
    """
    return {
        'command': shlex.join(['timm', 'train.py', *argv]),
        'started': datetime.now().astimezone().isoformat(timespec='seconds'),
        'versions': {
            'ccl_timm': registry.version(),
            'timm': timm.__version__,
            'torch': torch.__version__,
            'torchvision': torchvision.__version__,
            'python': platform.python_version(),
        },
        'git_commit': _git_commit(),
        'platform': platform.platform(),
        'threads': torch.get_num_threads(),
        'processes': int(os.environ.get('WORLD_SIZE', 1)),
        'device': _device_name(device),
        'plugins': registry.used_plugins(),
        'data_fingerprint': fingerprint,
    }


def _git_commit() -> str | None:
    """Commit of the checkout that this package runs from; None for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / '.git').exists():
        return None
    command = ['git', '-C', str(root), 'describe', '--always', '--dirty', '--abbrev=40']
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _device_name(device: str) -> str:
    if device.startswith('cuda'):
        return torch.cuda.get_device_name(torch.device(device))
    return f'{device} ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)'


def origin(settings: dict[str, Any]) -> dict[str, Any]:
    """Where the weights of a run that begins now come from, with what identifies them.

    Args:
        settings: the training script's, by name.

    Returns:
        As :func:`origin_of_settings`, with the ``sha256`` of a local file or the ``commit`` of a repository, and the
        ``architecture`` that a local file or folder names, as far as they are known.
    """
    found = origin_of_settings(settings)
    if found['kind'] in ('file', 'folder', 'checkpoint'):
        path = Path(found['name'])
        weights = path / 'model.safetensors' if path.is_dir() else path
        if weights.is_file():
            digest = hashlib.sha256()
            with weights.open('rb') as file:  # hashlib.file_digest came with Python 3.11
                while block := file.read(2**20):
                    digest.update(block)
            found['sha256'] = digest.hexdigest()
        found['architecture'] = _architecture(path)
    elif found['kind'] == 'hub':
        repo_id, _, revision = found['name'].partition('@')
        cached = try_to_load_from_cache(repo_id, 'config.json', revision=revision or None)
        if isinstance(cached, str):
            found['commit'] = Path(cached).parent.name
    return {key: value for key, value in found.items() if value}


def origin_of_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Where the weights of a run come from, as far as its settings show.

    Returns:
        ``kind`` and, except from scratch, ``name``: ``'scratch'``; ``'checkpoint'``, a resumed run's, with its path;
        ``'file'`` of weights, or ``'folder'`` of an exported model, with its path; ``'hub'``, with ``owner/name`` and
        perhaps ``@revision``; ``'registry'``, timm's pretrained weights without a repository, with the architecture.
    """
    resumed = settings.get('resume')
    if resumed and resumed != 'auto':
        return {'kind': 'checkpoint', 'name': resumed}
    for key in _FILES:
        if settings.get(key):
            return {'kind': 'file', 'name': settings[key]}
    if not settings.get('pretrained'):
        return {'kind': 'scratch'}
    source, name = timm.models.parse_model_name(settings['model'])
    if source:
        return {'kind': 'hub' if source == 'hf-hub' else 'folder', 'name': name}
    return _from_registry(name)


def _from_registry(name: str) -> dict[str, Any]:
    """Of an architecture's pretrained weights; a variant without weights begins from its backbone's."""
    models.ensure_registered(name)
    variant = models.split_variant(name)
    for candidate in (name, variant[0] if variant else name):
        cfg = get_pretrained_cfg(candidate)
        if cfg and cfg.hf_hub_id:
            return {'kind': 'hub', 'name': cfg.hf_hub_id}
    return {'kind': 'registry', 'name': name}


def _architecture(path: Path) -> str | None:
    """The architecture that an export's config.json or a checkpoint of a run names."""
    config = (path if path.is_dir() else path.parent) / 'config.json'
    try:
        if config.is_file():
            return json.loads(config.read_text(encoding='utf-8')).get('architecture')
        return read_checkpoint(path).get('arch')
    except (UserError, ValueError, AttributeError):
        return None
