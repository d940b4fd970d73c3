"""A trained model on a split of its data or of other data: its accuracy, and other measures that are asked for."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ccl_timm.console import log_info, log_warning
from ccl_timm.data import datasets
from ccl_timm.data.config import DataConfig
from ccl_timm.data.files import FolderReader
from ccl_timm.errors import UserError, user_errors
from ccl_timm.training import measures, retrieval
from ccl_timm.training.checkpoints import Trained
from ccl_timm.training.evaluation import Evaluation, check_labels, classifier_of, evaluate, loader_of, open_for
from ccl_timm.training.run_dir import RunDir

__all__ = [
    'Measures',
    'check_save',
    'check_save_temperature',
    'evaluate_split',
    'hint_at_last_epoch',
    'save_split',
    'save_temperature',
]


@dataclass(frozen=True)
class Measures:
    """What is measured beside accuracy; the functions are in :mod:`ccl_timm.training.measures`.

    Attributes:
        calibration: ``nll`` and ``ece``; with the temperature that the model has, also ``nll_calibrated`` and
            ``ece_calibrated``.
        fit_temperature: fit a temperature on this data.
        recall: ``recall_at_1``, ``recall_at_5`` and ``map_at_r`` of the features. Data of other classes than the
            model's may then be measured, by nothing else.
        knn: accuracy of that many nearest training images, by features.
        by_count: ``top1_many``, ``top1_medium`` and ``top1_few`` of the classes, by their training images.
        ood: folder of unknown images, which ``ood_<score>_auroc`` and ``ood_<score>_fpr95`` are measured with.
        tta: average the logits over each image and its mirror image; with measures of the confusion matrix only.
        of_classes: the confusion matrix is needed, so that the data must have the model's classes.
    """

    calibration: bool = False
    fit_temperature: bool = False
    recall: bool = False
    knn: int | None = None
    by_count: bool = False
    ood: str | None = None
    tta: bool = False
    of_classes: bool = False

    @property
    def need_outputs(self) -> bool:
        """Whether they need features or logits of all images."""
        return bool(self.calibration or self.fit_temperature or self.recall or self.knn or self.ood)


def evaluate_split(
    trained: Trained, data: DataConfig, named: bool, device: torch.device, workers: int, wanted: Measures | None = None
) -> Evaluation:
    """Measure a trained model on the validation split of some data.

    Args:
        trained: from :func:`ccl_timm.training.checkpoints.load_trained`.
        data: from :func:`ccl_timm.training.evaluation.choose_data`.
        named: see :func:`ccl_timm.training.evaluation.open_for`.
        device: where to compute.
        workers: processes that load images.
        wanted: what to measure beside accuracy.

    Raises:
        UserError: the data does not fit the model, no image can be read, or the model diverged.
    """
    wanted = wanted or Measures()
    _check_wanted(wanted, data, named)
    split = _Split(trained, data, named, device, workers)
    dataset, same_classes = split.open(wanted)
    if wanted.fit_temperature:
        split.check_unseen(dataset, DataConfig.of(trained.settings))
    if wanted.knn:
        split.check_unseen(dataset, data)
    loader = split.loader(dataset)
    trained.model.to(device)
    size = 'x'.join(map(str, trained.data_config['input_size']))
    mirrored = ', each with its mirror image' if wanted.tta else ''
    log_info(f'{trained.name}: {len(dataset)} images of {size}{mirrored}, on {device}')
    if not wanted.need_outputs:
        found = evaluate(classifier_of(trained, wanted.tta), loader, device)
    else:
        outputs = split.outputs(loader, 'validation')
        found = _of_outputs(outputs, same_classes, device)
        found.unreadable = len(dataset) - found.images
    if not math.isfinite(found.metrics.get('loss', 0.0)):
        raise UserError(f"The model's loss on this data is {found.metrics['loss']}: its accuracy would mean nothing.")
    if wanted.recall:
        found.metrics |= _retrieval(found.outputs)
    if wanted.calibration:
        found.metrics |= _calibration(found.outputs, trained.calibration, dataset)
    if wanted.fit_temperature:
        found.calibration = _fitted(found.outputs, data, dataset)
    if wanted.knn or wanted.ood or wanted.by_count:
        found.metrics |= _compared_with_training(found, split, wanted)
    return found


def _check_wanted(wanted: Measures, data: DataConfig, named: bool) -> None:
    """Raise a UserError for what cannot be measured together, or on this data."""
    if wanted.fit_temperature and named and data.val_split == data.train_split:
        raise UserError('A temperature is fitted on images that the model was not trained on: name another --split.')
    if wanted.knn and named and data.val_split == data.train_split:
        raise UserError('--knn among training images finds each one itself: name another --split.')
    if wanted.tta and wanted.need_outputs:
        raise UserError(
            '--tta is for accuracy: leave out --calibration, --plot, --fit-temperature, --recall, --knn, --ood.'
        )
    if wanted.ood and not os.path.isdir(wanted.ood):
        raise UserError(f"There is no folder '{wanted.ood}' for --ood.")


@dataclass(frozen=True)
class _Split:
    """How to open and read the data of an evaluation."""

    trained: Trained
    data: DataConfig
    named: bool
    device: torch.device
    workers: int

    def open(self, wanted: Measures) -> tuple[Any, bool]:
        """The split to evaluate on, and whether its classes are the model's."""
        split = self.data.val_split
        try:
            dataset = open_for(self.data, split, self.trained, named=self.named)
            check_labels(dataset, self.trained)
            return dataset, True
        except UserError:
            if wanted != Measures(recall=True):
                raise
        dataset = open_for(self.data, split, replace(self.trained, class_names=None), named=self.named)
        log_info('The data has classes that the model was not trained on: only retrieval is measured.')
        return dataset, False

    def open_training(self, data: DataConfig | None = None) -> Any:
        data = data or self.data
        return open_for(data, data.train_split, self.trained, training=True)

    def check_unseen(self, dataset: Any, data: DataConfig) -> None:
        """Raise a UserError if files of a data set are among the training images of some data, if that is here."""
        seen = datasets.real_paths(dataset)
        if seen:
            try:
                seen &= datasets.real_paths(self.open_training(data))
            except UserError:
                return
        if seen:
            raise UserError(
                f'{len(seen)} of these {len(dataset)} images are training images, which say nothing here: name a '
                '--split, or a --data-dir, of other images.'
            )

    def open_folder(self, folder: str) -> Any:
        """All images of a folder, whatever its structure."""
        with user_errors(f"--ood '{folder}' cannot be used", (RuntimeError,)):
            reader = FolderReader(folder)
        return datasets.ImageFiles(reader, self.trained.image_mode)

    def loader(self, dataset: Any) -> Any:
        config = {**self.trained.data_config, 'batch_size': self.data.batch_size}
        return loader_of(dataset, config, self.device, self.workers)

    def outputs(self, loader: Any, label: str) -> dict[str, Tensor]:
        found = retrieval.extract_outputs(self.trained.model, loader, ('features', 'logits'), label)
        if not len(found['labels']):
            raise UserError(f'No image for {label} can be read.')
        return found


def _of_outputs(outputs: dict[str, Tensor], same_classes: bool, device: torch.device) -> Evaluation:
    labels = outputs['labels']
    if same_classes:
        found = evaluate(nn.Identity(), [(outputs['logits'], labels)], device)
    else:
        found = Evaluation({}, torch.zeros(0, 0, dtype=torch.int64), 0, len(labels))
    return replace(found, outputs=outputs)


def _retrieval(outputs: dict[str, Tensor]) -> dict[str, float]:
    found = measures.retrieval(outputs['features'], outputs['labels'])
    if math.isnan(found['map_at_r']):
        raise UserError('No class has two images: there is no image of the same class to find.')
    return found


def _calibration(outputs: dict[str, Tensor], stored: dict[str, Any] | None, dataset: Any) -> dict[str, float]:
    logits, labels = outputs['logits'], outputs['labels']
    found = measures.calibration(logits, labels)
    if stored is None:
        return found
    if stored['fingerprint'] == datasets.content_hash(dataset):
        log_warning(
            f"The model's temperature, {stored['temperature']:.3g}, was fitted on these very images: NLL and ECE with "
            'it would be too good, and are left out. Measure them on other images.'
        )
        return found
    temperature = stored['temperature']
    with_it = measures.calibration(logits, labels, temperature)
    return {**found, 'temperature': temperature, **{f'{name}_calibrated': value for name, value in with_it.items()}}


def _fitted(outputs: dict[str, Tensor], data: DataConfig, dataset: Any) -> dict[str, Any]:
    return {
        'temperature': measures.fit_temperature(outputs['logits'], outputs['labels']),
        'data': data.dataset or os.path.basename(os.path.abspath(data.data_dir)),
        'split': data.val_split if data.val_fraction is None else f'{data.val_fraction:g} of {data.train_split}',
        'images': len(outputs['labels']),
        'fingerprint': datasets.content_hash(dataset),
    }


def _compared_with_training(found: Evaluation, split: _Split, wanted: Measures) -> dict[str, float]:
    known, measured = split.open_training(), {}
    if wanted.by_count:
        targets = datasets.targets_of(known)
        if targets is None:
            raise UserError('How many training images a class of this data set has is unknown.')
        counts = torch.bincount(torch.tensor(targets), minlength=len(found.accuracies)).tolist()
        groups = measures.accuracy_by_count(found.accuracies, counts[: len(found.accuracies)])
        measured |= {f'top1_{name}': value for name, value in groups.items()}
    if not (wanted.knn or wanted.ood):
        return measured
    own, training = found.outputs, split.outputs(split.loader(known), 'features of the training split')
    if wanted.knn:
        neighbours = training['features'], training['labels'], wanted.knn
        measured['knn'] = measures.knn_accuracy(own['features'], own['labels'], *neighbours)
    if wanted.ood:
        unknown = split.outputs(split.loader(split.open_folder(wanted.ood)), 'unknown images')
        scores = [measures.ood_scores(o['logits'], o['features'], training['features']) for o in (own, unknown)]
        measured |= {f'ood_{name}': value for name, value in measures.ood(*scores).items()}
    return measured


def check_save(source: str | os.PathLike, trained: Trained, split: str | None, other_data: bool) -> None:
    """Raise a UserError unless a split's results can be saved with the run that they belong to.

    Args:
        source: what ``trained`` was loaded from.
        trained: the model.
        split: the name given; None if none was.
        other_data: whether it is of other data than the run's.
    """
    folder = RunDir.of(source).path
    if trained.epoch is None or not (folder / 'args.yaml').is_file():
        raise UserError(f"--save-split keeps results with a run, which '{folder}' is not: name a run's folder.")
    if split is None or other_data:
        raise UserError("--save-split keeps results of a split of the run's own data: name it with --split alone.")
    if bool(trained.settings.get('model_ema')) != trained.ema:
        raise UserError(f"'{folder}' was measured with the moving average of its weights: give --use-ema.")


def save_split(source: str | os.PathLike, trained: Trained, split: str, found: Evaluation) -> None:
    """Add a split's results to the run's extra_splits.csv; see :func:`check_save`."""
    run = RunDir.of(source)
    measured = {name: found.metrics[name] for name in ('top1', 'top5', 'loss')}
    path = run.add_extra_split({'split': split, 'epoch': trained.epoch, 'images': found.images, **measured})
    log_info(f'written: {path}, of epoch {trained.epoch + 1}')
    hint_at_last_epoch(run, trained.epoch)


def hint_at_last_epoch(run: RunDir, epoch: int) -> None:
    """Log that reports show results of the last epoch only, if those of another were kept."""
    rows = run.rows()
    if rows and epoch != rows[-1]['epoch']:
        log_info(f"reports show results of a run's last epoch: {run.path / 'last.pth.tar'}")


def check_save_temperature(source: str | os.PathLike, trained: Trained) -> None:
    """Raise a UserError unless a temperature can be saved with the run that ``trained`` was loaded from."""
    if trained.epoch is None:
        raise UserError(
            f"--fit-temperature keeps the temperature with a run, which '{source}' is not: name a run's folder, and "
            'export that again.'
        )


def save_temperature(source: str | os.PathLike, trained: Trained, found: Evaluation) -> None:
    """Keep a fitted temperature in the run's calibration.json, for this checkpoint; exports have it, too."""
    run, fitted = RunDir.of(source), found.calibration
    path = run.set_calibration({'epoch': trained.epoch, 'ema': trained.ema, **fitted})
    trained.calibration = fitted
    log_info(
        f'temperature {fitted["temperature"]:.4g}, fitted on {fitted["images"]} images ({fitted["data"]}, split '
        f'{fitted["split"]}); written: {path}. Measure NLL and ECE with it on other images.'
    )
