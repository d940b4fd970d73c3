"""Models that a repository of the Hub or a folder holds: its config.json, and weights in safetensors only.

Both come from other people. A config.json may describe a model and its data; where weights lie, and what is done with
them, is not its business.
"""

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm.models
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file
from timm.models import build_model_with_cfg

from ccl_timm import registry
from ccl_timm._compat import parse_model_cfg
from ccl_timm.errors import UserError
from ccl_timm.models.checkpoints import checkpoint_name
from ccl_timm.models.hub_errors import check_repository_name, hub_errors

__all__ = [
    'WEIGHTS',
    'ForeignModel',
    'check_classes',
    'check_model_args',
    'missing_architecture',
    'read_config',
    'read_hub_weights',
    'read_local_weights',
    'read_model',
]

WEIGHTS = 'model.safetensors'


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(check: Callable[[Any], bool], length: int | None = None) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and length in (None, len(value)) and all(map(check, value))


def _is_size(value: Any) -> bool:
    return _list_of(lambda x: _is_int(x) and x > 0)(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_path(value: Any) -> bool:
    return _is_text(value) or _list_of(_is_text)(value)


# what a pretrained_cfg may hold; whatever else it holds is not read
_FIELDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(('input_size', 'test_input_size', 'min_input_size'), lambda x: _is_size(x) and len(x) == 3),
    **dict.fromkeys(('pool_size', 'test_pool_size'), _is_size),
    **dict.fromkeys(('crop_pct', 'test_crop_pct'), lambda x: _is_number(x) and x > 0),
    **dict.fromkeys(('mean', 'std'), _list_of(_is_number)),
    **dict.fromkeys(('first_conv', 'classifier'), _is_path),
    **dict.fromkeys(('num_classes', 'label_offset'), lambda x: _is_int(x) and x >= 0),
    'fixed_input_size': lambda x: isinstance(x, bool),
    'label_names': _list_of(_is_text),
    'label_descriptions': lambda x: isinstance(x, dict),
    'crop_mode': lambda x: x in ('center', 'squash', 'border'),
    'interpolation': lambda x: x in ('nearest', 'bilinear', 'bicubic', 'lanczos', 'hamming', 'box', 'random'),
    **dict.fromkeys(('license', 'description', 'origin_url', 'tag'), _is_text),
    **dict.fromkeys(('paper_name', 'paper_ids', 'notes'), _is_path),
}

# arguments of timm's factories and of our entry points: they are for whoever builds a model, not for its config.json
_OF_THE_FACTORIES = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *('self', 'device', 'dtype', 'features_only', 'out_indices', 'feature_cls', 'pruned'),
}

_ARGS: dict[str, Callable[[Any], bool]] = {
    'in_chans': lambda x: _is_int(x) and x > 0,
    'img_size': lambda x: _is_size([x]) or (_is_size(x) and len(x) == 2),
}


class ForeignModel(NamedTuple):
    """What a config.json says, checked.

    Attributes:
        architecture: with or without a tag; not yet known to exist.
        pretrained_cfg: fields of timm's ``PretrainedCfg`` that describe data and classes; none that locates weights.
        model_args: options of the architecture, the number of classes not among them.
        config: the whole file.
    """

    architecture: str
    pretrained_cfg: dict[str, Any]
    model_args: dict[str, Any]
    config: dict[str, Any]


def read_model(source: str, location: str, cache_dir: str | None = None) -> ForeignModel:
    """Read and check the config.json of a model.

    Args:
        source: ``'hf-hub'`` or ``'local-dir'``.
        location: ``owner/name``, ``owner/name@revision``, or a folder.
        cache_dir: of the Hub's downloads.

    Raises:
        UserError: there is none, it cannot be fetched, another library wrote it, or it says what it may not.
    """
    config = read_config(source, location, cache_dir)
    fields = {**config.get('pretrained_cfg', config)}
    fields.setdefault('label_names', fields.get('labels'))
    for name in ('num_classes', 'label_names', 'label_descriptions'):
        fields[name] = config.get(name, fields.get(name))
    cfg = {name: fields[name] for name in _FIELDS if fields.get(name) is not None}
    _check_values(location, cfg, _FIELDS)
    if {'mean', 'std'} & cfg.keys() and not 0 < len(cfg.get('mean', [])) == len(cfg.get('std', [])):
        raise _wrong_config(location, 'its mean and std are not of equal length')
    if cfg.get('label_names') and len(cfg['label_names']) != cfg.get('num_classes', 1000):
        raise _wrong_config(location, f'it has {len(cfg["label_names"])} class names for {cfg.get("num_classes")}')
    model_args = config.get('model_args') or {}
    if not isinstance(model_args, dict):
        raise _wrong_config(location, "its 'model_args' are no object")
    model_args = {name: value for name, value in model_args.items() if name != 'num_classes'}
    check_model_args(location, model_args)
    cfg, architecture, _ = parse_model_cfg(
        {'architecture': config['architecture'], 'pretrained_cfg': cfg, 'model_args': model_args}, {}
    )
    return ForeignModel(architecture, cfg, model_args, config)


def check_model_args(location: str, model_args: dict[str, Any]) -> None:
    """Refuse arguments of a config.json that are no options of an architecture, such as ``checkpoint_path``.

    Raises:
        UserError: there is one, or a size is none.
    """
    forbidden = sorted(_OF_THE_FACTORIES & model_args.keys())
    if forbidden:
        raise _wrong_config(location, f"its model_args set '{forbidden[0]}', which is no option of an architecture")
    _check_values(location, model_args, _ARGS)


def _check_values(location: str, values: dict[str, Any], checks: dict[str, Callable[[Any], bool]]) -> None:
    for name, check in checks.items():
        if values.get(name) is not None and not check(values[name]):
            raise _wrong_config(location, f"its '{name}' is {json.dumps(values[name])[:60]}")


def _wrong_config(location: str, what: str) -> UserError:
    return UserError(f"'{location}' cannot be loaded: {what}. Correct its config.json, or ask its owner to.")


def check_classes(location: str, weights: dict[str, Any], cfg: dict[str, Any]) -> None:
    """Refuse weights whose classifier has another number of classes than their config says.

    Args:
        location: of both.
        weights: a state_dict.
        cfg: a ``pretrained_cfg``.

    Raises:
        UserError: they disagree; timm would begin with a new classifier, and say nothing.
    """
    classifier = cfg.get('classifier')
    weight = weights.get(f'{classifier if isinstance(classifier, str) else (classifier or [""])[0]}.weight')
    if weight is None or not weight.ndim or cfg.get('num_classes', -1) < 0:
        return
    classes = weight.shape[0] - (cfg.get('label_offset') or 0)
    if classes != cfg['num_classes']:
        raise _wrong_config(location, f'its config.json says {cfg["num_classes"]} classes, its weights have {classes}')


def read_config(source: str, location: str, cache_dir: str | None = None) -> dict[str, Any]:
    """Read the config.json of a model, as it stands; arguments as for :func:`read_model`.

    Raises:
        UserError: there is none, it cannot be fetched, or another library wrote it.
    """
    with hub_errors(f"'{location}' cannot be loaded"):
        path = _fetch(location, 'config.json', cache_dir) if source == 'hf-hub' else Path(location, 'config.json')
        if not path.is_file():
            raise UserError(f"'{location}' holds no model of timm: it has no config.json.")
        text = path.read_text(encoding='utf-8', errors='replace')
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{location}' holds no model of timm: its config.json is not JSON ({error}).") from error
    right = isinstance(config, dict) and isinstance(config.get('architecture'), str)
    if not right or not isinstance(config.get('pretrained_cfg', {}), dict):
        raise UserError(
            f"'{location}' holds no model of timm: its config.json names no architecture, another library wrote it."
        )
    return config


def read_hub_weights(location: str, cache_dir: str | None = None) -> dict[str, Any]:
    """Read model.safetensors of ``owner/name[@revision]``, and no other file.

    Raises:
        UserError: there is none, it cannot be fetched, or it is damaged.
    """
    with hub_errors(f"'{location}' cannot be loaded"):
        try:
            return load_file(_fetch(location, WEIGHTS, cache_dir))
        except LocalEntryNotFoundError:
            raise
        except RepositoryNotFoundError as error:
            if name := checkpoint_name(location):
                raise UserError(
                    f"'{name}' is not published yet: `ccl-timm release {name} --dry-run` trains it on your machine, "
                    f"and ccl_timm.load('output/release/{name}') loads what that has trained."
                ) from error
            raise
        except EntryNotFoundError as error:
            raise _no_safetensors(location) from error


def read_local_weights(folder: str | Path) -> dict[str, Any]:
    """Read model.safetensors of a folder, and no other file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    with hub_errors(f"'{folder}' cannot be loaded"):
        if not Path(folder, WEIGHTS).is_file():
            raise _no_safetensors(folder)
        return load_file(Path(folder, WEIGHTS))


def _no_safetensors(location: str | Path) -> UserError:
    remedy = (
        'give safe_serialization=True to save_for_hf' if Path(location).is_dir() else 'ask its owner for safetensors'
    )
    return UserError(
        f"'{location}' has no {WEIGHTS}, and weights in other formats are not read: they can hold code; {remedy}."
    )


def _fetch(location: str, filename: str, cache_dir: str | None) -> Path:
    repo_id, _, revision = location.partition('@')
    check_repository_name(repo_id)
    return Path(hf_hub_download(repo_id, filename, revision=revision or None, cache_dir=cache_dir))


def missing_architecture(location: str, config: dict[str, Any]) -> str:
    """Say which package has the architecture of a config.json that nobody here knows, as far as the config has it."""
    name, needs = config['architecture'], config.get('ccl_timm')
    start = f"Unknown model '{name}' in '{location}'"
    if not isinstance(needs, dict):
        return f'{start}: import the package that has it before; its config.json does not name one.'
    plugins = needs.get('plugins')
    for plugin in plugins if isinstance(plugins, list) else []:
        if isinstance(plugin, dict) and plugin.get('kind') == 'model' and plugin.get('name') == name:
            distribution, module = plugin.get('distribution'), str(plugin.get('value')).partition(':')[0].strip()
            return (
                f'{start}: it belongs to the package {distribution} ({plugin.get("version")} when it was trained). '
                f'`pip install {distribution}`, or import {module} before, if it is yours.'
            )
    return (
        f'{start}: it was written by {needs.get("package")} {needs.get("version")}, this is ccl-timm '
        f'{registry.version()}: `pip install --upgrade {needs.get("package")}`.'
    )
