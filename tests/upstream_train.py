"""A small script that takes the same names from timm, in the same way, as timm's own train.py.

It stands in for that script, which does not come with timm's package; the tests run the real one too where the
environment variable TIMM_SCRIPTS names a folder that holds it.
"""

import argparse
import importlib
import json
import os
from collections import OrderedDict

import torch
import torch.nn as nn
import yaml
from timm import utils
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.models import create_model, safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint

config_parser = parser = argparse.ArgumentParser(description='Training Config', add_help=False)
parser.add_argument('-c', '--config', default='', type=str)

parser = argparse.ArgumentParser(description='stand-in')
parser.add_argument('--data-dir')
parser.add_argument('--dataset', default='')
parser.add_argument('--model', default='resnet50')
parser.add_argument('--num-classes', type=int, default=None)
parser.add_argument('--img-size', type=int, default=None)
parser.add_argument('--batch-size', '-b', type=int, default=128)
parser.add_argument('--epochs', type=int, default=300)
parser.add_argument('--lr', type=float, default=0.05)
parser.add_argument('--opt', default='sgd')
parser.add_argument('--momentum', type=float, default=0.9)
parser.add_argument('--weight-decay', type=float, default=2e-5)
parser.add_argument('--sched', default='cosine')
parser.add_argument('--smoothing', type=float, default=0.1)
parser.add_argument('--mixup', type=float, default=0.0)
parser.add_argument('--cutmix', type=float, default=0.0)
parser.add_argument('--jsd-loss', action='store_true')
parser.add_argument('--bce-loss', action='store_true')
parser.add_argument('--kd-model-name', default=None)
parser.add_argument('--head-init-scale', type=float, default=None)
parser.add_argument('--model-ema', action='store_true')
parser.add_argument('--device', default='cuda')
parser.add_argument('--device-modules', nargs='+', default=None)
parser.add_argument('--seed', type=int, default=42)
parser.add_argument('-j', '--workers', type=int, default=4)
parser.add_argument('--resume', default='')
parser.add_argument('--output', default='')
parser.add_argument('--experiment', default='')


def _parse_args():
    args_config, remaining = config_parser.parse_known_args()
    if args_config.config:
        with open(args_config.config) as f:
            parser.set_defaults(**yaml.safe_load(f))
    args = parser.parse_args(remaining)
    return args, yaml.safe_dump(args.__dict__, default_flow_style=False)


def main():
    args, args_text = _parse_args()
    for module in args.device_modules or []:
        importlib.import_module(module)
    device = utils.init_distributed_device(args)
    utils.random_seed(args.seed, args.rank)
    model = create_model(args.model, num_classes=args.num_classes).to(device)
    data_config = resolve_data_config(vars(args), model=model)
    loaders = []
    for split, training in (('train', True), ('validation', False)):
        dataset = create_dataset(args.dataset, root=args.data_dir, split=split, is_training=training)
        shared = dict(input_size=data_config['input_size'], batch_size=args.batch_size, device=device)
        loaders.append(create_loader(dataset, is_training=training, num_workers=args.workers, **shared))
    task = ClassificationTask(model=model, criterion=nn.CrossEntropyLoss(), device=device, dtype=None, verbose=True)
    optimizer = create_optimizer_v2(task.get_trainable_module(), **optimizer_kwargs(cfg=args))
    start = resume_task_checkpoint(task, args.resume, optimizer=optimizer) if args.resume else 0
    if args.model_ema:
        task.setup_ema(decay=0.9)
        if args.resume:
            load_task_ema_checkpoint(task, args.resume)
    output = utils.get_outdir(args.output or './output/train', args.experiment or safe_model_name(args.model))
    saver = utils.CheckpointSaver(
        task.get_trainable_module(), optimizer, args=args, checkpoint_dir=output, recovery_dir=output, task=task
    )
    with open(os.path.join(output, 'args.yaml'), 'w') as f:
        f.write(args_text)
    scheduler, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(args), updates_per_epoch=len(loaders[0]))
    results = []
    for epoch in range(start, epochs):
        results.append(run_epoch(epoch, task, loaders, optimizer))
        utils.update_summary(
            epoch, results[-1]['train'], results[-1]['validation'], os.path.join(output, 'summary.csv'), lr=args.lr
        )
        saver.save_checkpoint(epoch, metric=results[-1]['validation']['top1'])
        scheduler.step(epoch + 1)
    print(f'--result\n{json.dumps(results)}')


def run_epoch(epoch, task, loaders, optimizer):
    task.get_trainable_module().train()
    losses = utils.AverageMeter()
    for step, (images, target) in enumerate(loaders[0]):
        result = task(images, target)
        result['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
        task.update_ema(step=epoch * len(loaders[0]) + step + 1)
        losses.update(result['loss'].item(), len(images))
    model = task.get_eval_model()
    model.eval()
    top1 = utils.AverageMeter()
    with torch.inference_mode():
        for images, target in loaders[1]:
            top1.update(utils.accuracy(model(images), target)[0].item(), len(images))
    return {'epoch': epoch, 'train': OrderedDict(loss=losses.avg), 'validation': OrderedDict(top1=top1.avg)}


if __name__ == '__main__':
    main()
