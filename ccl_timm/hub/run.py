"""Training and trained models from Python, as the commands do them: :func:`train`, :func:`load`, :class:`Run`."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from ccl_timm.data.files import UnreadableImage
from ccl_timm.errors import UserError, user_errors
from ccl_timm.experiments.tables import to_cli_args
from ccl_timm.heads import HeadOutputs
from ccl_timm.hub import publish
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.config import TrainConfig
from ccl_timm.training.evaluation import Evaluation, choose_data, classifier_of, pick_device
from ccl_timm.training.gallery import Gallery, create_gallery
from ccl_timm.training.prediction import check_tta, head_outputs, preprocessing, rank, temperature_of
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.step_timing import likely_layout
from ccl_timm.training.train import train as train_run
from ccl_timm.training.validation import Measures, check_save_temperature, evaluate_split, save_temperature

__all__ = ['Run', 'load', 'train']

_Images = Image.Image | str | os.PathLike | Sequence[Image.Image | str | os.PathLike]


def train(**settings: Any) -> 'Run':
    """Train an image classifier and return the run; without data named, on the embedded handwritten digits.

    Args:
        **settings: those of `timm train.py` by name: ``model``, ``loss``, ``data_dir``, ``epochs``, ``config`` ...

    Raises:
        UserError: an unknown setting, a value that does not fit, or what the command refuses.
    """
    config = TrainConfig.from_settings(**settings)
    given = {name: value for name, value in settings.items() if value is not None and value is not False}
    return Run(train_run(config, to_cli_args(given)))


def load(source: str | os.PathLike, use_ema: bool = False, device: str = 'auto') -> 'Run':
    """Load a trained model.

    Args:
        source: folder of a run (its best checkpoint), a checkpoint file, an exported folder, or
            ``'hf-hub:owner/name'``.
        use_ema: the moving average of the weights.
        device: where it computes; ``'auto'`` takes an accelerator if there is one.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    return Run(source, use_ema, device)


class Run:
    """A trained model with its settings, classes and preprocessing; see :func:`load` for the arguments.

    Attributes:
        source: what it was loaded from.
        trained: model, ``data_config``, ``class_names`` and ``settings``.
        device: where it computes.
    """

    def __init__(self, source: str | os.PathLike, use_ema: bool = False, device: str = 'auto'):
        self.source = source
        self.device = torch.device(pick_device(device))
        self.trained = load_trained(source, use_ema)
        self.trained.model.to(self.device)

    def __repr__(self) -> str:
        return f"<Run '{self.source}': {self.trained.name}, {len(self.labels)} classes>"

    @property
    def model(self) -> nn.Module:
        """The model, in evaluation mode: images (N, C, H, W) to logits (N, K)."""
        return self.trained.model

    @property
    def labels(self) -> list[str]:
        """A name for each logit."""
        return self.trained.labels

    def evaluate(
        self,
        data_dir: str | None = None,
        dataset: str | None = None,
        split: str | None = None,
        *,
        batch_size: int = 256,
        workers: int = 0,
        calibration: bool = False,
        fit_temperature: bool = False,
        recall: bool = False,
        knn: int | None = None,
        by_count: bool = False,
        ood: str | None = None,
        tta: bool = False,
    ) -> Evaluation:
        """Measure the model on its run's validation split, another split, or other data.

        Args:
            data_dir: folder of other data.
            dataset: name of other data, such as ``'torch/mnist'``.
            split: name of the split.
            batch_size: images at a time.
            workers: processes that load images.
            calibration: also measure NLL and ECE, raw and with the model's temperature.
            fit_temperature: fit a temperature on these images and keep it with the run.
            recall: also measure R@1, R@5 and MAP@R of the features; the data may then have other classes.
            knn: also measure the accuracy of that many nearest training images, by features.
            by_count: also measure the accuracy of classes with few, medium and many training images.
            ood: folder of unknown images, to be detected by four scores.
            tta: average the logits over each image and its mirror image; for accuracy only.

        Returns:
            ``metrics`` (``top1``, ``top5``, ``macro_top1`` in percent, ``loss``, and those of
            :class:`ccl_timm.training.validation.Measures`), ``confusion`` (K, K), ``accuracies``.

        Raises:
            UserError: there is no such data, or it does not fit the model.
        """
        data = choose_data(self.trained.settings, data_dir, dataset, split, batch_size)
        if fit_temperature:
            check_save_temperature(self.source, self.trained)
        wanted = Measures(calibration, fit_temperature, recall, knn, by_count, ood, tta)
        found = evaluate_split(self.trained, data, split is not None, self.device, workers, wanted)
        if fit_temperature:
            save_temperature(self.source, self.trained, found)
        return found

    def predict(
        self, images: _Images, topk: int = 5, batch_size: int = 32, calibrated: bool = False, tta: bool = False
    ) -> list[list[dict[str, Any]]]:
        """Classify PIL images or image files; by the features of a gallery: ``gallery.classify(run.embed(images))``.

        Args:
            images: one, or several.
            topk: classes per image, best first.
            batch_size: images at a time.
            calibrated: divide the logits by the model's temperature.
            tta: average the logits over each image and its mirror image; not with ``calibrated``.

        Returns:
            For each image a list of ``{'class', 'index', 'probability'}``.

        Raises:
            UserError: a file cannot be read, the model computes numbers that are not finite, or has no temperature.
        """
        if tta:
            check_tta(calibrated)
        temperature = temperature_of(self.trained) if calibrated else 1.0
        classifier = classifier_of(self.trained, tta)
        with torch.inference_mode():
            logits = torch.cat([classifier(batch).float().cpu() for batch in self._batches(images, batch_size)])
        if not logits.isfinite().all():
            raise UserError('The model computes numbers that are not finite: its training diverged.')
        return rank(self.trained, (logits / temperature).softmax(-1), topk)

    def outputs(self, images: _Images) -> HeadOutputs:
        """All that the head computes for PIL images or image files, in one batch: logits, features, attention ..."""
        (outputs,) = self._outputs(images, batch_size=None)
        return outputs

    def embed(self, images: _Images, batch_size: int = 32) -> Tensor:
        """Features (N, D) of PIL images or image files, float32 on the CPU, not normalised."""
        return torch.cat([outputs.features.float().cpu() for outputs in self._outputs(images, batch_size)])

    def index(
        self, folder: str | os.PathLike, validation: str | os.PathLike | None = None, batch_size: int = 256
    ) -> Gallery:
        """Make a gallery of a folder with one folder per class; its classes may be new to the model.

        Args:
            folder: of images.
            validation: folder of other images of these classes, from which comes the threshold of unknown images.
            batch_size: images at a time.

        Raises:
            UserError: there is no such folder, or the validation images are not of its classes.
        """
        return create_gallery(self.trained, folder, validation, self.device, batch_size)

    def fit(self, **settings: Any) -> 'Run':
        """Train a new run from these weights, with the settings of this run where no other ones are given.

        Args:
            **settings: as of :func:`train`. Data that they name has its own classes, so the last layer is new; without
                them it goes on, too. Where the run kept a moving average of the weights, training begins with that.

        Raises:
            UserError: this is no run with settings, or what :func:`train` raises.
        """
        run = RunDir.of(self.source)
        if self.trained.epoch is None:
            raise UserError(f"'{self.source}' is no run: use ccl_timm.train(model=..., pretrained_path=...).")
        weights = run.best_or_last_checkpoint() if Path(self.source).is_dir() else Path(self.source)
        start: dict[str, Any] = {'pretrained': False, 'pretrained_path': None, 'initial_checkpoint': str(weights)}
        if {'data_dir', 'dataset'} & settings.keys():
            start = {'pretrained_path': str(weights), 'initial_checkpoint': ''}
            start |= {'num_classes': None, 'class_names': None, 'class_map': ''}
        return train(**{'config': str(run.path / 'args.yaml'), **start, **settings})

    def export(self, folder: str | os.PathLike, format: str = 'timm') -> list[Path]:
        """Write the model as safetensors and config.json, or as ``'onnx'``; returns the files written.

        Raises:
            UserError: the folder holds an export already, or cannot be written.
        """
        return publish.export(self.source, folder, self.trained.ema, format)

    def push(self, repo_id: str, **options: Any) -> str | None:
        """Put the model on the Hugging Face Hub; options as of ``ccl_timm.hub.publish.push``. Returns its address.

        Raises:
            UserError: the Hub refuses it, or this is no run.
        """
        return publish.push(self.source, repo_id, use_ema=self.trained.ema, **options)

    def _outputs(self, images: _Images, batch_size: int | None) -> Iterable[HeadOutputs]:
        for batch in self._batches(images, batch_size):
            with torch.inference_mode():
                yield head_outputs(self.model, batch)

    def _batches(self, images: _Images, batch_size: int | None) -> Iterable[Tensor]:
        several = list(images) if isinstance(images, Sequence) and not isinstance(images, str) else [images]
        if not several:
            raise UserError('There is no image to compute on.')
        prepare = preprocessing(self.trained)
        model, size = self.model.eval(), batch_size or len(several)
        memory_format = likely_layout(model, self.device)
        for start in range(0, len(several), size):
            batch = torch.stack([_prepared(prepare, image) for image in several[start : start + size]])
            yield batch.to(self.device, memory_format=memory_format)


def _prepared(prepare: Callable[[Any], Tensor], image: Any) -> Tensor:
    with user_errors(f"'{image}' cannot be read", (UnreadableImage,)):
        return prepare(image)
