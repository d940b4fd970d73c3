"""Model cards, written from what a run recorded and the config.json of its model."""

import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ccl_timm import losses, models
from ccl_timm.console import show_share
from ccl_timm.console.escape import markdown_code, markdown_text, shell_text
from ccl_timm.data.datasets import is_folder
from ccl_timm.data.files import color_mode
from ccl_timm.errors import UserError
from ccl_timm.experiments.matching import rows_of
from ccl_timm.experiments.results import Result
from ccl_timm.experiments.statistics import show_printed
from ccl_timm.heads import HeadOutputs
from ccl_timm.models.checkpoints import ORGANISATION
from ccl_timm.models.hub_errors import check_repository_name
from ccl_timm.registry import resource_dir
from ccl_timm.training.config import TrainConfig, diff_settings
from ccl_timm.training.provenance import origin_of_settings

__all__ = ['default_repository', 'is_unedited', 'render']

_STAMP = '<!-- written by ccl-timm; a card that was edited is kept when the run is pushed again. sha256 '
_CHOSEN = (
    'The checkpoint was chosen by its {metric} on the images that the accuracy is measured on, as the best of {epochs} '
    'epochs: the accuracy is somewhat too good.'
)
_NOT_CHOSEN = 'The checkpoint was not chosen among epochs by its accuracy.'
# what may differ between a run and the cross-entropy baseline of its recipe
_IGNORED_IN_BASELINE = {'data_dir', *TrainConfig.names(varies='seed'), *TrainConfig.names(varies='method')}

# torchvision's data sets that consist of a training and a test set: their name, and their repository on the Hub
_OFFICIAL = {
    'torch/mnist': ('MNIST', 'ylecun/mnist'),
    'torch/fashion_mnist': ('Fashion-MNIST', 'zalando-datasets/fashion_mnist'),
    'torch/kmnist': ('KMNIST', None),
    'torch/cifar10': ('CIFAR-10', 'uoft-cs/cifar10'),
    'torch/cifar100': ('CIFAR-100', 'uoft-cs/cifar100'),
}
_LONGEST_NAME = 96  # of a repository on the Hub


class Markdown(str):
    """Text that is Markdown already; a card escapes all other text."""


def _finalize(value: Any) -> str:
    return value if isinstance(value, Markdown) else markdown_text(value)


def render(
    config: dict[str, Any],
    run: Result,
    repo_id: str,
    baseline: Result | None = None,
    license: str = 'apache-2.0',
    note: str = '',
    widget: Sequence[dict[str, Any]] = (),
) -> str:
    """Write the model card of a checkpoint.

    Args:
        config: content of the model's config.json, as :func:`ccl_timm.hub.publish.export` writes it.
        run: that the checkpoint is of; what its environment does not have, the card calls not recorded.
        repo_id: the repository that the card's code loads.
        baseline: a run of the same recipe with cross-entropy.
        license: of the weights.
        note: what else a reader must know of the data, as a sentence.
        widget: images of the repository and their classes, as :func:`ccl_timm.hub.examples.write_examples` gives them.

    Returns:
        The text, which ends in a mark that :func:`is_unedited` knows.

    Raises:
        UserError: the repository's name is invalid, or the baseline is of another recipe or loss.
    """
    check_repository_name(repo_id)
    run = run.public()
    measured = next((row for row in run.rows if row['epoch'] == config['ccl_timm']['epoch']), {})
    origin = run.environment.get('origin') or origin_of_settings(run.settings)
    environment = jinja2.Environment(finalize=_finalize, autoescape=False)  # not HTML
    environment.filters['code'] = lambda text: Markdown(markdown_code(text))
    template = environment.from_string((resource_dir('hub_cards') / 'template.md').read_text(encoding='utf-8'))
    card_data = _front_matter(config, run.settings, measured, repo_id, license, origin)
    if widget:
        card_data['widget'] = list(widget)
    card = template.render(
        card_data=Markdown(card_data.to_yaml()),
        note=note,
        **_use(config, run.settings, repo_id),
        **_training(config, run, origin),
        **_results(run, measured, baseline and baseline.public()),
    )
    text = str(ModelCard(card)).rstrip() + '\n'
    return f'{text}\n{_STAMP}{_digest(text)} -->\n'


def is_unedited(text: str) -> bool:
    """Whether a card is one that :func:`render` wrote, and nobody changed."""
    body, mark, digest = text.rpartition(_STAMP)
    return bool(mark) and digest.strip() == f'{_digest(body.removesuffix(chr(10)))} -->'


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def default_repository(config: dict[str, Any], settings: dict[str, Any]) -> str:
    """``organisation/architecture.loss_data``, the name that our own checkpoint of such a run has."""
    dataset = settings.get('dataset')
    data = (_data(settings).name if is_folder(dataset) else dataset).rpartition('/')[2].lower()
    name = re.sub('[^a-z0-9]', '_', f'{_loss(settings)}_{data}'.lower())
    name = f'{config["architecture"]}.{name}'
    return f'{ORGANISATION}/{name}'[:_LONGEST_NAME].rstrip('_.')


def _front_matter(config, settings, measured, repo_id, license, origin) -> ModelCardData:
    data, name = _data(settings), repo_id.rpartition('/')[2]
    results = [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=data.repository or data.name,
            dataset_name=data.name,
            dataset_split=data.split,
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
        tags=['image-classification', 'timm', 'ccl-timm', *(['transformers'] if _in_transformers(config) else [])],
        datasets=[data.repository] if data.repository else None,
        metrics=['accuracy'],
        base_model=origin['name'].partition('@')[0] if origin['kind'] == 'hub' else None,
        model_name=name,
        eval_results=results or None,
    )


class _Data(NamedTuple):
    """Data as cards name it.

    Attributes:
        name: that people know it by.
        repository: on the Hub; None if it is not known to have one.
        split: that was measured on, as text.
    """

    name: str
    repository: str | None
    split: str


def _data(settings: dict[str, Any]) -> _Data:
    dataset, split = settings.get('dataset') or '', settings.get('val_split') or ''
    scheme, _, name = dataset.partition('/')
    if is_folder(dataset):
        name, repository = Path(settings.get('data_dir') or '').name or 'images', None
    elif dataset.lower() in _OFFICIAL:
        name, repository = _OFFICIAL[dataset.lower()]
        split = split and ('train' if split in ('train', 'training') else 'test')  # timm takes other names for it
    else:
        name = name or dataset
        repository = name if scheme.lower() in ('hfds', 'hfids') and name.count('/') == 1 else None
    fraction = settings.get('val_fraction')
    return _Data(name, repository, f'{fraction:g} of {settings["train_split"]}, held out' if fraction else split)


def _use(config: dict[str, Any], settings: dict[str, Any], repo_id: str) -> dict[str, Any]:
    """What the card's code blocks need: who builds the model, what to install, and what its classifier gives."""
    name, needs = config['architecture'], config['ccl_timm']
    plugins = {p['distribution'] for p in needs['plugins'] if p['kind'] == 'model' and p['name'] == name}
    needed = ', '.join(map(markdown_code, sorted(plugins)))
    variant = models.split_variant(name)
    return {
        'model': Markdown(repr(f'hf-hub:{repo_id}')),
        'loader': Markdown('timm' if models.known_to_timm(name) else 'ccl_timm'),
        'image_mode': _image_mode(config),
        'class_names': config.get('label_names'),
        'version': needs['version'],
        'cost': needs.get('cost'),
        'calibration': needs.get('calibration'),
        'repository': Markdown(repr(repo_id)),
        'in_transformers': _in_transformers(config),
        'plugin_note': Markdown(f', and needs {needed}' if needed else ''),
        'head': variant and variant[1],
        'loss_reads': Markdown(_loss_reads(settings)),
        'paper': losses.declared(loss, 'paper') if (loss := _loss(settings)) in losses.list_losses() else '',
    }


def _image_mode(config: dict[str, Any]) -> str:
    return config['ccl_timm'].get('input_img_mode') or color_mode(config['pretrained_cfg']['input_size'][0])


def _in_transformers(config: dict[str, Any]) -> bool:
    """Whether its pipeline takes the model, which makes every image an RGB one."""
    return models.known_to_timm(config['architecture']) and _image_mode(config) == 'RGB'


def _loss_reads(settings: dict[str, Any]) -> str:
    """The outputs of a head that a loss reads, for a sentence; empty if they are not known here."""
    name = _loss(settings)
    read = losses.declared(name, 'requires') if name in losses.list_losses() else ()
    return ' and '.join(f'`outputs.{key}`' for key in read if key in HeadOutputs._fields)


def _training(config: dict[str, Any], run: Result, origin: dict[str, Any]) -> dict[str, Any]:
    """What was trained, on what, how."""
    settings, environment, cfg = run.settings, run.environment, config['pretrained_cfg']
    steps = settings.get('grad_accum_steps') or 1
    command = shlex.split(environment.get('command') or 'timm train.py --config args.yaml')
    return {
        'config': config,
        'cfg': cfg,
        'name': config['architecture'],
        'settings': settings,
        'epochs': _epochs(run),
        'batch': f'{settings["batch_size"]} x {steps}' if steps > 1 else settings['batch_size'],
        'environment': environment,
        'versions': environment.get('versions', {}),
        'data': _data(settings),
        'share': show_share(settings.get('train_fraction')),
        'loss': _loss(settings),
        'loss_options': ', '.join(f'{key}={value}' for key, value in (settings.get('loss_kwargs') or {}).items()),
        'resolution': f'{cfg["input_size"][1]} x {cfg["input_size"][2]} px',
        'small_input': _small_input(settings),
        'start': Markdown(_start(origin)),
        'rate': settings.get('lr') or f'{settings["lr_base"]} for each {settings["lr_base_size"]} images',
        'command': Markdown(shell_text(command)),
    }


def _epochs(run: Result) -> str:
    planned = run.settings['epochs']
    return f'{run.epochs} of {planned}' if 0 < run.epochs < planned else str(planned)


def _loss(settings: dict[str, Any]) -> str:
    return settings.get('loss') or 'ce'


def _start(origin: dict[str, Any]) -> str:
    """Which weights training began with, in Markdown."""
    kind, name = origin['kind'], origin.get('name', '')
    if kind == 'scratch':
        return 'from scratch'
    repository = name.partition('@')[0]
    link = f'[{markdown_text(name)}](https://huggingface.co/{repository})' if _is_repository(repository) else ''
    known = [markdown_code(origin['architecture'])] if origin.get('architecture') else []
    known += [f'{key} {markdown_code(origin[key][:12])}' for key in ('sha256', 'commit') if origin.get(key)]
    where = {
        'checkpoint': f'continues from the checkpoint {markdown_code(name)}',
        'file': f'from the weights in the file {markdown_code(name)}',
        'folder': f'from the model in the folder {markdown_code(name)}',
        'hub': f'from the weights of {link or markdown_code(name)}',
        'registry': f"from timm's pretrained weights of {markdown_code(name)}",
    }[kind]
    return where + (f' ({", ".join(known)})' if known else '')


def _is_repository(name: str) -> bool:
    try:
        check_repository_name(name)
    except UserError:
        return False
    return True


def _results(run: Result, measured: dict[str, float], baseline: Result | None) -> dict[str, Any]:
    """The result beside the baseline's and the paper's, and how it was measured."""
    values = [('this model', f'{measured["eval_top1"]:.2f}' if 'eval_top1' in measured else 'not measured')]
    for row in run.extra_splits:
        if row['epoch'] == measured.get('epoch'):  # with the same weights
            values.append((f'this model on "{row["split"]}", {row["images"]:.0f} images', f'{row["top1"]:.2f}'))
    values.append(_baseline_value(run, baseline, measured) if baseline else ('cross-entropy, same recipe', 'not run'))
    values += _paper_values(run)
    if 'eval_top1' not in measured:
        return {'results': values, 'measured': 'No images were held out to measure on.', 'selection': _NOT_CHOSEN}
    metric, epoch, data = run.settings.get('eval_metric', 'top1'), int(measured['epoch']), _data(run.settings)
    what = 'the moving average of the weights' if run.settings.get('model_ema') else 'the weights'
    epochs = sum(f'eval_{metric}' in row for row in run.rows)
    chosen = epochs > 1 and measured == run.best_row
    return {
        'results': values,
        'measured': f'Measured on "{data.split}" of {data.name}, with {what} after epoch {epoch + 1}.',
        'selection': _CHOSEN.format(metric=metric, epochs=epochs) if chosen else _NOT_CHOSEN,
    }


def _baseline_value(run: Result, baseline: Result, measured: dict[str, float]) -> tuple[str, str]:
    """Of its best epoch, if the run's is that, else of the same epoch or its last."""
    settings = baseline.settings
    if _loss(settings) != 'ce':
        raise UserError(f"The baseline '{baseline.source}' was trained with '{_loss(settings)}': name a run with "
                        '--loss ce.')  # fmt: skip
    changed = diff_settings(_comparable(settings), _comparable(run.settings), ignore=_IGNORED_IN_BASELINE)
    if changed:
        raise UserError(f"The baseline '{baseline.source}' is of another recipe: {', '.join(changed[:3])}.")
    if 'eval_top1' not in baseline.best_row:
        raise UserError(f"The baseline '{baseline.source}' was never measured: its summary.csv has no eval_top1.")
    name = f'cross-entropy, same recipe: {markdown_code(settings["model"])}, seed {markdown_text(settings["seed"])}'
    if measured == run.best_row:
        return Markdown(name), f'{baseline.best:.2f}'
    values = dict(baseline.curve)
    epoch = int(measured.get('epoch', 0)) + 1
    epoch = epoch if epoch in values else max(values)
    return Markdown(f'{name}, after epoch {epoch}'), f'{values[epoch]:.2f}'


def _comparable(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, 'data': _data(settings).name, 'small_input': _small_input(settings)}


def _small_input(settings: dict[str, Any]) -> bool:
    return bool(settings.get('model_kwargs', {}).get('small_input'))


def _paper_values(run: Result) -> list[tuple[str, str]]:
    """What the papers print for the rows of their tables that the run is of; each value once."""
    found = {}
    for table, row, epochs in rows_of(run.settings, run.environment.get('recipe')):
        if row.paper:
            source = Markdown(f'the paper: {table.title}, `{row.name}`, {epochs} epochs')
            found.setdefault(show_printed(row.paper), source)
    return [(source, value) for value, source in found.items()] or [('the papers, for these settings', 'not stated')]
