"""Trained models for others: exported as files that timm loads or as ONNX, and pushed to the Hub with a card."""

import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, get_session
from safetensors.torch import save_file

from ccl_timm import registry
from ccl_timm._compat import save_config_for_hf
from ccl_timm.console import log_info
from ccl_timm.errors import UserError
from ccl_timm.experiments.results import Result, write_record
from ccl_timm.hub import card
from ccl_timm.hub.examples import write_examples
from ccl_timm.models.cost import cost
from ccl_timm.models.hub_errors import check_repository_name, push_errors
from ccl_timm.training.checkpoints import Trained, check_outputs, load_trained
from ccl_timm.training.privacy import without_private
from ccl_timm.training.run_dir import RunDir
from ccl_timm.training.yaml_files import dump_yaml

__all__ = ['export', 'load_run', 'model_config', 'push', 'write_card']

_REMOTE_CODE = Path(__file__).with_name('modeling_ccl_timm.py')
EXPORT_FILES = {'timm': ('model.safetensors', 'config.json', _REMOTE_CODE.name), 'onnx': ('model.onnx',)}
ANSWER_SECONDS = 120.0  # how long to wait for an answer of the Hub to a push


def export(
    source: str | os.PathLike, folder: str | os.PathLike, use_ema: bool = False, form: str = 'timm'
) -> list[Path]:
    """Write a trained model for use elsewhere.

    Args:
        source: as of :func:`ccl_timm.training.checkpoints.load_trained`.
        folder: where to write; may exist, but not hold a model.
        use_ema: the moving average instead of the weights.
        form: ``'timm'``: model.safetensors and config.json, which timm (``local-dir:FOLDER``) and transformers load; it
            holds mean, std, input size, crop, interpolation and colour mode as trained, the class names, the
            temperature, and which package and plugins the architecture needs; and what transformers reads with
            ``trust_remote_code=True``.
            ``'onnx'``: model.onnx with the same in its metadata, for batches of any size.

    Returns:
        The files written.

    Raises:
        UserError: the source cannot be loaded, the folder holds a model, or packages for ONNX are missing.
    """
    if form not in EXPORT_FILES:
        raise UserError(f"There is no form '{form}' of an export; there are {' and '.join(EXPORT_FILES)}.")
    folder, names = Path(folder), EXPORT_FILES[form]
    taken = [name for name in names if (folder / name).exists()]
    if taken or (folder.exists() and not folder.is_dir()):
        raise UserError(f"'{folder}' already holds {taken[0] if taken else 'a file'}: name another folder.")
    if form == 'onnx' and not all(importlib.util.find_spec(name) for name in ('onnx', 'onnxscript')):
        raise UserError("ONNX needs two more packages: `pip install 'ccl-timm[onnx]'`.")
    trained = load_trained(source, use_ema)
    check_outputs(trained)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as part:  # an export that fails leaves no half of a model
        {'timm': _export_timm, 'onnx': _export_onnx}[form](trained, Path(part))
        for path in Path(part).iterdir():
            os.replace(path, folder / path.name)
    return [folder / name for name in names]


def _export_timm(trained: Trained, folder: Path) -> dict[str, Any]:
    """Write the weights, the code for transformers and config.json, and return the content of that."""
    shutil.copyfile(_REMOTE_CODE, folder / _REMOTE_CODE.name)
    facts = {'format': 'pt', 'package': 'ccl-timm', 'version': registry.version(), 'architecture': trained.name}
    if loss := trained.settings.get('loss'):
        facts['loss'] = loss
    save_file(trained.model.state_dict(), folder / 'model.safetensors', metadata=facts)
    _sort_metadata(folder / 'model.safetensors')
    return _write_config(trained, folder / 'config.json')


def _sort_metadata(path: Path) -> None:
    """Sort the metadata, which safetensors writes in random order: one model is one file, which is not pushed twice."""
    with path.open('r+b') as file:
        length = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(length))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        file.seek(8)
        file.write(json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(length))


def _write_config(trained: Trained, path: Path) -> dict[str, Any]:
    save_config_for_hf(trained.model, str(path), **_description(trained))
    # model_args hold whatever the model was built with
    config = without_private(json.loads(path.read_text(encoding='utf-8')))
    config.get('model_args', {}).pop('num_classes', None)  # transformers adds its own, and the config has it anyway
    path.write_text(json.dumps(config, indent=2), encoding='utf-8')
    return config


def _description(trained: Trained) -> dict[str, Any]:
    """What timm's writers of config.json take."""
    needs = {
        'package': 'ccl-timm',
        'version': registry.version(),
        'plugins': registry.used_plugins(),
        'epoch': trained.epoch,
        'cost': cost(trained.model, trained.data_config['input_size'])._asdict(),
        **_further_facts(trained),
    }
    remote = {
        'AutoModel': f'{_REMOTE_CODE.stem}.TimmWrapperModel',
        'AutoModelForImageClassification': f'{_REMOTE_CODE.stem}.TimmWrapperForImageClassification',
    }
    return {
        'model_config': {'label_names': trained.class_names, 'ccl_timm': needs, 'auto_map': remote},
        'data_config': trained.data_config,
    }


def _further_facts(trained: Trained) -> dict[str, Any]:
    """The colour mode of images, where it is not that of their number of channels, and the temperature, if fitted."""
    facts = {'input_img_mode': trained.settings.get('input_img_mode'), 'calibration': trained.calibration}
    return {name: value for name, value in facts.items() if value}


def _export_onnx(trained: Trained, folder: Path) -> None:
    import onnx

    # two images: torch.export takes a batch of one for a constant
    images = torch.randn(2, *trained.data_config['input_size'])
    program = torch.onnx.export(
        trained.model,
        (images,),
        input_names=['images'],
        output_names=['logits'],
        dynamic_shapes=({0: torch.export.Dim('batch')},),
        dynamo=True,
        verbose=False,
    )
    model = program.model_proto
    facts = {'architecture': trained.name, 'class_names': trained.class_names, **trained.data_config}
    facts |= _further_facts(trained)
    onnx.helper.set_model_props(model, {key: json.dumps(value) for key, value in facts.items()})
    onnx.save(model, folder / 'model.onnx')


def load_run(source: str | os.PathLike, use_ema: bool = False) -> tuple[Trained, Result]:
    """Load the checkpoint of a run, and what the run recorded.

    Args:
        source: folder of a run (its best checkpoint) or a checkpoint file in one.
        use_ema: the moving average instead of the weights.

    Raises:
        UserError: the source is not a run, or its results were measured with other weights than those asked for.
    """
    trained = load_trained(source, use_ema)
    if trained.epoch is None:
        raise UserError(f"'{source}' is an exported model: name the folder of its run, which has its settings.")
    run = Result.of(RunDir.of(source))
    if bool(run.settings.get('model_ema')) != use_ema:
        raise UserError(f"'{run.source}' was measured with the moving average of its weights: give --use-ema.")
    check_outputs(trained)
    return trained, run


def model_config(trained: Trained) -> dict[str, Any]:
    """The content of the config.json that an export of the model has."""
    with tempfile.TemporaryDirectory() as folder:
        return _write_config(trained, Path(folder, 'config.json'))


def write_card(
    source: str | os.PathLike,
    *,
    repo_id: str | None = None,
    use_ema: bool = False,
    baseline: str | os.PathLike | None = None,
    license: str = 'apache-2.0',
    note: str = '',
    output: str | os.PathLike = '',
) -> str:
    """Write the card of a run's checkpoint, without a network.

    Args:
        source: folder of a run (its best checkpoint) or a checkpoint file in one.
        repo_id: the repository that the card's code loads; by default ours, named after model, loss and data.
        use_ema: the moving average instead of the weights.
        baseline: folder of a run of the same recipe with cross-entropy.
        license: of the weights.
        note: what else a reader must know of the data, as a sentence.
        output: a new folder for README.md and what it is written from: config.json, and the run and its baseline in
            runs.jsonl.

    Returns:
        The card.

    Raises:
        UserError: as :func:`load_run` and :func:`ccl_timm.hub.card.render`, or the folder exists.
    """
    if repo_id is not None:
        check_repository_name(repo_id)
    if output and Path(output).exists():
        raise UserError(f"'{output}' exists already: name a new folder with --output.")
    trained, run = load_run(source, use_ema)
    config, other = model_config(trained), _read_baseline(baseline)
    repo_id = repo_id or card.default_repository(config, run.public().settings)
    text = card.render(config, run, repo_id, other, license, note)
    if output:
        folder = Path(output)
        folder.mkdir(parents=True)
        (folder / 'README.md').write_text(text, encoding='utf-8')
        (folder / 'config.json').write_text(json.dumps(config, indent=2), encoding='utf-8')
        write_record(folder / 'runs.jsonl', [run, replace(other, name='baseline')] if other else [run])
        log_info(f'written: {output}')
    return text


def _read_baseline(folder: str | os.PathLike | None) -> Result | None:
    return Result.of(RunDir(folder)) if folder else None


def push(
    source: str | os.PathLike,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    use_ema: bool = False,
    baseline: str | os.PathLike | None = None,
    license: str = 'apache-2.0',
    note: str = '',
    examples: Sequence[str | os.PathLike] = (),
    replace_card: bool = False,
    dry_run: bool = False,
) -> str:
    """Put a trained model on the Hub, in a repository that is made if there is none, in one commit.

    Up go the files of :func:`export`, args.yaml (without the folders of this machine), summary.csv,
    extra_splits.csv if there is one, and README.md, the model card. A card that somebody edited stays. What is there
    already is not sent again.

    Args:
        source: folder of a run (its best checkpoint) or a checkpoint file in one.
        repo_id: ``owner/name``.
        private: only you see a new repository.
        revision: a branch, made from main if there is none; None for main.
        use_ema: the moving average instead of the weights.
        baseline: see :func:`ccl_timm.hub.card.render`.
        license: of the weights.
        note: what else a reader must know of the data, as a sentence.
        examples: image files to show on the model's page, with the classes that it finds; they go up, too.
        replace_card: write over an edited card, too.
        dry_run: list what would go up, and send nothing.

    Returns:
        Address of the commit that holds the model; empty for a dry run.

    Raises:
        UserError: the run cannot be loaded, or the Hub does not take it. Then nothing there has changed.
    """
    check_repository_name(repo_id)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trained, run = load_run(source, use_ema)
        config = _export_timm(trained, folder)
        widget = write_examples(trained, examples, folder)
        text = card.render(config, run, repo_id, _read_baseline(baseline), license, note, widget)
        (folder / 'README.md').write_text(text, encoding='utf-8')
        _write_public_files(run.public(), folder)
        for path in sorted(path for path in folder.rglob('*') if path.is_file()):
            log_info(f'{path.relative_to(folder)!s:>19}  {path.stat().st_size / 1e6:9.3f} MB')
        if dry_run:
            log_info(f"nothing was sent; without --dry-run this goes to '{repo_id}' at {constants.ENDPOINT}")
            return ''
        with push_errors(repo_id), _limited_patience():
            return _upload(folder, repo_id, private, revision, replace_card)


def _write_public_files(run: Result, folder: Path) -> None:
    """args.yaml, summary.csv, and extra_splits.csv if there is one."""
    (folder / 'args.yaml').write_text(dump_yaml(run.settings), encoding='utf-8')
    if (summary := Path(run.source, 'summary.csv')).is_file():
        shutil.copyfile(summary, folder / 'summary.csv')
    for row in run.extra_splits:
        RunDir(folder).add_extra_split(row)


def _upload(folder: Path, repo_id: str, private: bool, revision: str | None, replace_card: bool) -> str:
    api = HfApi(library_name='ccl-timm', library_version=registry.version())
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    info = api.model_info(repo_id)
    if private and not info.private:
        raise UserError(f"'{repo_id}' exists and is public: make it private on its page first, or leave out --private.")
    if revision:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
        info = api.model_info(repo_id, revision=revision)
    if 'README.md' in {file.rfilename for file in info.siblings or []} and not replace_card:
        present = Path(api.hf_hub_download(repo_id, 'README.md', revision=info.sha)).read_text(encoding='utf-8')
        if not card.is_unedited(present):
            log_info(f"the card of '{repo_id}' was written or edited by hand and stays; --replace-card writes over it")
            (folder / 'README.md').unlink()
    try:
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            parent_commit=info.sha,
            commit_message='Upload a model trained with ccl-timm',
        )
    except BaseException:
        print(file=sys.stderr)  # huggingface_hub leaves its progress bar without an end of line
        raise
    log_info('nothing to send: all of it is there already' if commit.oid == info.sha else f"pushed to '{repo_id}'")
    return str(commit.commit_url)


@contextlib.contextmanager
def _limited_patience() -> Iterator[None]:
    # huggingface_hub waits without end for an answer
    session = get_session()
    before, session.timeout = session.timeout, ANSWER_SECONDS
    try:
        yield
    finally:
        session.timeout = before
