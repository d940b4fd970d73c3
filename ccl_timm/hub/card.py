"""Model cards, written from what a run recorded: config.json, args.yaml, summary.csv, environment.json."""

import hashlib
import json
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import get_pretrained_cfg

from ccl_timm import models
from ccl_timm.console import show_share
from ccl_timm.data.datasets import is_folder
from ccl_timm.errors import UserError
from ccl_timm.models.checkpoints import ORGANISATION
from ccl_timm.packaged import packaged_folder
from ccl_timm.reports import results
from ccl_timm.reports.statistics import show_printed
from ccl_timm.training import parts, runs
from ccl_timm.training.records import without_folders

__all__ = ['RECORD', 'default_repository', 'is_unedited', 'render']

# what a card is written from, beside parts.csv where there is one
RECORD = ('config.json', 'args.yaml', 'summary.csv', 'environment.json')

_STAMP = '<!-- written by ccl-timm; a card that was edited is kept when the run is pushed again. sha256 '
_CHOSEN = (
    'The checkpoint was chosen by its {metric} on the images that the figure is measured on, as the best of {epochs} '
    'epochs: the figure is somewhat too good.'
)
_NOT_CHOSEN = 'The checkpoint was not chosen among epochs by its accuracy.'
# what may differ between a run and the cross-entropy baseline of its recipe
_FREE_IN_BASELINE = {'data_dir', 'device_modules', 'loss', 'loss_kwargs', 'model', 'model_kwargs', 'seed'}


def render(folder: Path, repo_id: str, baseline: Path | None = None, license: str = 'apache-2.0') -> str:
    """Write the model card of a checkpoint.

    Args:
        folder: holds the RECORD; without environment.json the card says what is not known.
        repo_id: the repository that the card's code loads.
        baseline: a run (args.yaml and summary.csv) of the same recipe with cross-entropy.
        license: of the weights.

    Returns:
        The text, which ends in a mark that :func:`is_unedited` knows.

    Raises:
        UserError: the folder records no run, or the baseline is of another recipe or loss.
    """
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    settings, rows = runs.read_args(folder), runs.read_summary(folder)
    environment = runs.read_environment(folder)
    measured = next((row for row in rows if row['epoch'] == config['ccl_timm']['epoch']), {})
    card = ModelCard.from_template(
        _front_matter(settings, measured, repo_id, license),
        template_path=str(packaged_folder('hub_cards') / 'template.md'),
        **_use(config, repo_id),
        **_training(config, settings, environment),
        **_results(settings, environment, rows, measured, baseline, parts.read_parts(folder)),
    )
    text = str(card).rstrip() + '\n'
    return f'{text}\n{_STAMP}{_digest(text)} -->\n'


def is_unedited(text: str) -> bool:
    """Whether a card is one that :func:`render` wrote, and nobody changed."""
    body, mark, digest = text.rpartition(_STAMP)
    return bool(mark) and digest.strip() == f'{_digest(body.removesuffix(chr(10)))} -->'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def default_repository(folder: Path) -> str:
    """``organisation/architecture.loss_data``, the name that our own checkpoint of such a run has."""
    config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
    settings = runs.read_args(folder)
    data = ''.join(c if c.isalnum() else '_' for c in _data_name(settings).rpartition('/')[2].lower())
    return f'{ORGANISATION}/{config["architecture"]}.{_loss(settings)}_{data}'


def _front_matter(settings, measured, repo_id, license) -> ModelCardData:
    data, name = _data_name(settings), repo_id.rpartition('/')[2]
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=data,
            dataset_name=data,
            dataset_split=_part(settings),
            metric_type='accuracy',
            metric_name=f'Top-{k} accuracy, %',
            metric_value=round(measured[f'eval_top{k}'], 3),
        )
        for k in (1, 5)
        if f'eval_top{k}' in measured
    ]
    return ModelCardData(
        license=license,
        library_name='timm',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'ccl-timm'],
        datasets=[data] if not is_folder(settings.get('dataset')) else None,
        metrics=['accuracy'],
        base_model=_base_model(settings),
        model_name=name,
        eval_results=results or None,
    )


def _data_name(settings: dict[str, Any]) -> str:
    """Name of the data: the Hub's for its data sets, timm's without the scheme, else the folder's."""
    dataset = settings.get('dataset')
    if not is_folder(dataset):
        return dataset.partition('/')[2] or dataset
    return Path(settings.get('data_dir') or '').name or 'images'


def _part(settings: dict[str, Any]) -> str:
    fraction = settings.get('val_fraction')
    return f'{fraction:g} of {settings["train_split"]}, held out' if fraction else settings.get('val_split', '')


def _base_model(settings: dict[str, Any]) -> str | None:
    """The repository on the Hub that training began from; None from scratch or from a file."""
    if not settings.get('pretrained') or settings.get('pretrained_path'):
        return None
    source, name = timm.models.parse_model_name(settings['model'])
    if source:
        return name if source == 'hf-hub' else None
    models.ensure_registered(name)
    variant = models.split_variant(name)
    for candidate in (name, variant[0] if variant else name):  # a variant without weights begins from its backbone's
        cfg = get_pretrained_cfg(candidate)
        if cfg and cfg.hf_hub_id:
            return cfg.hf_hub_id
    return None


def _use(config: dict[str, Any], repo_id: str) -> dict[str, Any]:
    """What the card's code block needs: who builds the model, and what to install."""
    name, needs = config['architecture'], config['ccl_timm']
    plugins = sorted({f'`{p["distribution"]}`' for p in needs['plugins'] if p['kind'] == 'model' and p['name'] == name})
    return {
        'repo_id': repo_id,
        'loader': 'timm' if models.known_to_timm(name) else 'ccl_timm',
        'image_mode': _image_mode(config),
        'class_names': config.get('label_names'),
        'version': needs['version'],
        'plugin_note': f', and needs {", ".join(plugins)}' if plugins else '',
    }


def _image_mode(config: dict[str, Any]) -> str:
    """Pillow's mode of the images."""
    return 'L' if config['pretrained_cfg']['input_size'][0] == 1 else 'RGB'


def _training(config: dict[str, Any], settings: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """What was trained, on what, how."""
    cfg, name, loss = config['pretrained_cfg'], config['architecture'], _loss(settings)
    resolution = f'{cfg["input_size"][1]} x {cfg["input_size"][2]} px'
    options = ', '.join(f'{key}={value}' for key, value in settings.get('loss_kwargs', {}).items())
    versions = ', '.join(f'{key} {value}' for key, value in environment.get('versions', {}).items())
    hardware = [environment.get('device', 'not recorded')]
    hardware += [f'{key}: {environment[key]}' for key in ('processes', 'threads') if key in environment]
    rate = settings.get('lr') or f'{settings["lr_base"]} for each {settings["lr_base_size"]} images'
    stem = '3 x 3, stride 1, no max-pool (`small_input=True`)' if _small_input(settings) else "the backbone's own"
    share = show_share(settings.get('train_fraction'))
    share = f', {share} of the training images' if share else ''
    rows = [
        ('architecture', f'`{name}`'),
        ('loss', f'`{loss}`' + (f' ({options})' if options else ', default options')),
        ('data', f'{_data_name(settings)}, {config["num_classes"]} classes' + share),
        ('images', f'{resolution}, {_image_mode(config)}, mean {cfg["mean"]}, std {cfg["std"]}'),
        ('stem', stem),
        ('start', _start(settings)),
        ('epochs', f'{settings["epochs"]}, batches of {settings["batch_size"]}'),
        ('optimizer', f'{settings["opt"]}, learning rate {rate}, weight decay {settings["weight_decay"]}'),
        ('recipe', f'`{environment["recipe"]}`' if environment.get('recipe') else 'none'),
        ('seed', settings['seed']),
        ('hardware', ', '.join(hardware)),
        ('versions', versions or 'not recorded'),
    ]
    return {
        'title': f'{name} trained with {loss} on {_data_name(settings)}',
        'summary': f'An image classifier with {config["num_classes"]} classes, for images of {resolution}.',
        'trained': rows,
        'resolution': resolution,
        'command': environment.get('command', 'timm train.py --config args.yaml'),
    }


def _loss(settings: dict[str, Any]) -> str:
    return settings.get('loss') or 'ce'


def _start(settings: dict[str, Any]) -> str:
    for key in ('initial_checkpoint', 'pretrained_path'):
        if settings.get(key):
            return f'from the file `{Path(settings[key]).name}`'
    base = _base_model(settings)
    return f'from the weights of [{base}](https://huggingface.co/{base})' if base else 'from scratch'


def _results(settings, environment, rows, measured, baseline: Path | None, further) -> dict[str, Any]:
    """The figure beside the baseline's and the paper's, and how it was measured."""
    figures = [('this model', f'{measured["eval_top1"]:.2f}' if 'eval_top1' in measured else 'not measured')]
    same_weights = [row for row in further if row['epoch'] == measured.get('epoch')]
    figures += [
        (f'this model on "{row["part"]}", {row["images"]:.0f} images', f'{row["top1"]:.2f}') for row in same_weights
    ]
    figures.append(_baseline_figure(settings, baseline) if baseline else ('cross-entropy, same recipe', 'not run'))
    figures += _paper_figures(settings, environment.get('recipe'))
    if 'eval_top1' not in measured:
        return {'results': figures, 'measured': 'No images were held out to measure on.', 'selection': _NOT_CHOSEN}
    metric, epoch = settings.get('eval_metric', 'top1'), int(measured['epoch'])
    what = 'the moving average of the weights' if settings.get('model_ema') else 'the weights'
    chosen = len(rows) > 1 and measured == runs.best_row(rows, metric)
    return {
        'results': figures,
        'measured': f'Measured on "{_part(settings)}" of {_data_name(settings)}, with {what} after epoch {epoch + 1}.',
        'selection': _CHOSEN.format(metric=metric, epochs=len(rows)) if chosen else _NOT_CHOSEN,
    }


def _baseline_figure(settings: dict[str, Any], folder: Path) -> tuple[str, str]:
    other = runs.read_args(folder)
    if _loss(other) != 'ce':
        raise UserError(f"The baseline '{folder}' was trained with '{_loss(other)}': name a run with --loss ce.")
    changed = runs.differences(_compared(other), _compared(settings), free=_FREE_IN_BASELINE)
    if changed:
        raise UserError(f"The baseline '{folder}' is of another recipe: {', '.join(changed[:3])}.")
    best = runs.best_row(runs.read_summary(folder), other.get('eval_metric', 'top1'))
    if 'eval_top1' not in best:
        raise UserError(f"The baseline '{folder}' was never measured: its summary.csv has no eval_top1.")
    return f'cross-entropy, same recipe: `{other["model"]}`, seed {other["seed"]}', f'{best["eval_top1"]:.2f}'


def _compared(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run and its baseline must have in common, without folders, which a record does not have."""
    plain = {key: without_folders(value) for key, value in settings.items()}
    return {**plain, 'data': _data_name(settings), 'small_input': _small_input(settings)}


def _small_input(settings: dict[str, Any]) -> bool:
    return bool(settings.get('model_kwargs', {}).get('small_input'))


def _paper_figures(settings: dict[str, Any], recipe: str | None) -> list[tuple[str, str]]:
    """What the papers print for the rows of their tables that the run is of; each figure once."""
    found = {}
    for table, row, epochs in results.rows_of(settings, recipe):
        if row.paper:
            found.setdefault(show_printed(row.paper), f'the paper: {table.title}, `{row.name}`, {epochs} epochs')
    return [(source, figure) for figure, source in found.items()] or [('the papers, for these settings', 'not stated')]
