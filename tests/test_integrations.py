"""Epochs and steps in trainers that drive a task in another way than timm's scripts: stand-ins and the real ones."""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import ccl_timm
from ccl_timm import integrations

EPOCHS, BATCHES = 3, 4


def make_task(loss='pod'):
    torch.manual_seed(0)
    head = ccl_timm.losses.loss_class(loss).head or 'linear'
    return ccl_timm.create_task(ccl_timm.create_model(f'test_resnet_{head}', num_classes=4), loss)


IMAGES, TARGET = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 4


def counts(task):
    state = task.get_task_state()
    return state['epoch'], state['step']


class Events:
    """A base class that takes every event, as those of the trainers do."""

    def __getattr__(self, name):
        if name.startswith('on_'):
            return lambda *args, **kwargs: None
        raise AttributeError(name)


@pytest.fixture
def stand_ins(monkeypatch):
    """Trainers' packages that hold nothing but a base class, whichever are installed."""
    transformers, lightning, pytorch = (ModuleType(name) for name in ('transformers', 'lightning', 'lightning.pytorch'))
    transformers.TrainerCallback = pytorch.Callback = Events
    for module in (transformers, lightning, pytorch):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    before = dict(vars(integrations))
    for name in integrations.__all__:
        vars(integrations).pop(name, None)
    yield
    for name in integrations.__all__:
        vars(integrations).pop(name, None)
    vars(integrations).update(before)


def transformers_loop(task, callback, accumulation):
    """The order of calls of transformers.Trainer: train() before every batch."""
    args, control = None, None
    state = SimpleNamespace(epoch=0, global_step=0)
    task.train()
    callback.on_train_begin(args, state, control, model=task)
    for epoch in range(EPOCHS):
        callback.on_epoch_begin(args, state, control, model=task)
        for batch in range(BATCHES):
            task.train()
            task(IMAGES[:8], TARGET[:8])['loss'].backward()
            if (batch + 1) % accumulation == 0:
                state.global_step += 1
                state.epoch = epoch + (batch + 1) / BATCHES
                callback.on_step_end(args, state, control, model=task)
        task.eval()
        task(IMAGES[:8], TARGET[:8])


def lightning_loop(task, callback, accumulation):
    """The order of calls of lightning.Trainer: train() never, but the old modes come back after evaluation."""
    trainer = SimpleNamespace(global_step=0, current_epoch=0)
    module = torch.nn.Module()
    module.task = task
    callback.on_train_start(trainer, module)
    for epoch in range(EPOCHS):
        trainer.current_epoch = epoch
        callback.on_train_epoch_start(trainer, module)
        for batch in range(BATCHES):
            task(IMAGES[:8], TARGET[:8])['loss'].backward()
            trainer.global_step += (batch + 1) % accumulation == 0
            callback.on_train_batch_end(trainer, module, None, None, batch)
        modes = {each: each.training for each in task.modules()}
        task.eval()
        task(IMAGES[:8], TARGET[:8])
        for each, training in modes.items():
            each.training = training


LOOPS = {'TransformersCallback': transformers_loop, 'LightningCallback': lightning_loop}


@pytest.mark.parametrize('name', LOOPS)
def test_without_callback_no_epoch_is_made_up_and_one_warning_has_the_remedy(name):
    task = make_task('pod')
    with pytest.warns(UserWarning, match='PODLoss depends on the epoch') as caught:
        LOOPS[name](task, Events(), 1)
    assert len(caught) == 1 and 'task.set_epoch(epoch)' in str(caught[0].message)
    assert counts(task) == (0, EPOCHS * BATCHES)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        LOOPS[name](make_task('cot'), Events(), 1)  # a loss that does not depend on epochs


@pytest.mark.parametrize('accumulation', [1, 2])
@pytest.mark.parametrize('name', LOOPS)
def test_callback_passes_epochs_and_optimizer_steps(name, accumulation, stand_ins):
    task = make_task('pod')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        LOOPS[name](task, getattr(integrations, name)(), accumulation)
    assert counts(task) == (EPOCHS - 1, EPOCHS * BATCHES // accumulation)
    assert task.loss.count == BATCHES * 8  # of this epoch only


def test_transformers_resumption_begins_where_its_state_says(stand_ins):
    task, callback = make_task('pod'), integrations.TransformersCallback()
    callback.on_train_begin(None, SimpleNamespace(epoch=2.0, global_step=8), None, model=task)
    callback.on_epoch_begin(None, None, None)
    assert counts(task) == (2, 8)


def test_a_model_without_a_task_is_one_sentence(stand_ins):
    with pytest.raises(ccl_timm.UserError, match='no LossTask in Linear'):
        integrations.LightningCallback().on_train_start(None, torch.nn.Linear(1, 1))


def test_a_callback_without_its_package_is_one_sentence(stand_ins, monkeypatch):
    for name in ('lightning', 'lightning.pytorch', 'pytorch_lightning'):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ccl_timm.UserError, match='LightningCallback needs the package lightning or pytorch_lightning'):
        integrations.LightningCallback  # noqa: B018
    with pytest.raises(AttributeError):
        integrations.Nothing  # noqa: B018


DATA = [{'input': image, 'target': label} for image, label in zip(IMAGES, TARGET, strict=True)]


@pytest.mark.parametrize('accumulation', [1, 2])
def test_transformers_trainer(tmp_path, accumulation):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    task = make_task('pod')
    options = {'num_train_epochs': EPOCHS, 'per_device_train_batch_size': 4, 'eval_strategy': 'epoch', 'use_cpu': True}
    options |= {'gradient_accumulation_steps': accumulation, 'save_strategy': 'epoch', 'disable_tqdm': True}
    options |= {'label_names': ['target'], 'remove_unused_columns': False, 'report_to': []}

    def train(task, **more):
        args = transformers.TrainingArguments(str(tmp_path), **{**options, **more})
        callbacks = [integrations.TransformersCallback()]
        return transformers.Trainer(task, args, train_dataset=DATA, eval_dataset=DATA[:4], callbacks=callbacks)

    train(task).train()
    assert counts(task) == (EPOCHS - 1, EPOCHS * BATCHES // accumulation)
    resumed = make_task('pod')
    train(resumed, num_train_epochs=EPOCHS + 1).train(resume_from_checkpoint=True)
    assert counts(resumed) == (EPOCHS, (EPOCHS + 1) * BATCHES // accumulation)


@pytest.mark.parametrize('accumulation', [1, 2])
def test_lightning_trainer(tmp_path, accumulation):
    lightning = pytest.importorskip('lightning.pytorch')

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.task = make_task('pod')

        def training_step(self, batch, index):
            return self.task(**batch)['loss']

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    def train(epochs, resumed=None):
        quiet = {'logger': False, 'enable_progress_bar': False, 'enable_model_summary': False}
        trainer = lightning.Trainer(
            max_epochs=epochs, accelerator='cpu', accumulate_grad_batches=accumulation, default_root_dir=tmp_path,
            callbacks=[integrations.LightningCallback()], enable_checkpointing=False, **quiet
        )  # fmt: skip
        module = Module()
        trainer.fit(module, torch.utils.data.DataLoader(DATA, batch_size=4), ckpt_path=resumed)
        trainer.save_checkpoint(tmp_path / 'last.ckpt')
        return module.task

    assert counts(train(EPOCHS)) == (EPOCHS - 1, EPOCHS * BATCHES // accumulation)
    assert counts(train(EPOCHS + 1, tmp_path / 'last.ckpt')) == (EPOCHS, (EPOCHS + 1) * BATCHES // accumulation)


@pytest.mark.slow
def test_accelerate_on_two_processes(tmp_path):
    """The README's example, started by torchrun: each process has half of the images, and both the same weights."""
    pytest.importorskip('accelerate')
    page = Path(ccl_timm.__file__).with_name('training') / 'README.md'
    (code,) = (block for block in re.findall(r'```python\n(.*?)```', page.read_text(), re.S) if 'Accelerator' in block)
    program = tmp_path / 'program.py'
    program.write_text(
        f'{code}\nweights = sum(parameter.sum().item() for parameter in task.parameters())\n'
        'print(accelerator.num_processes, len(loader), weights)\n'
    )
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', str(program)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACCELERATE_USE_CPU': 'true'}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ran.returncode == 0, ran.stderr
    one, two = ran.stdout.splitlines()
    assert one == two and one.startswith('2 12 ')  # 1,442 images in batches of 64, two at a time
