"""Command lines with numbers that mean nothing: each is refused in one sentence, before anything is read or written.

What means nothing is judged by the table here, which was written from what the flags mean and not from our parsers.
"""

import inspect
import itertools

import pytest
import yaml

from ccl_timm.losses import list_losses, loss_class

NO_NUMBER = ('nan', 'inf', '-inf', '1e400', 'many', '')
COUNT = ('0', '-1', '1.5', '99999999999999999999')  # at least 1
NATURAL = ('-1', '1.5', '99999999999999999999')  # at least 0
POSITIVE = ('0', '-1')
NOT_NEGATIVE = ('-1', '-0.1')
PROBABILITY = ('-0.1', '1.5')
FRACTION = ('-0.1', '1', '1.5')  # below 1
SHARE = ('0', '1', '-0.1')  # between 0 and 1

TRAIN = {
    COUNT: 'batch-size validation-batch-size grad-accum-steps epochs lr-batch lr-base-size patience num-classes '
    'img-size in-chans checkpoint-hist val-interval log-interval samples-per-class recount decay-milestones',
    NATURAL: 'seed workers warmup-epochs cooldown-epochs patience-epochs mixup-off-epoch pad-crop',
    POSITIVE: 'lr lr-base opt-eps bn-eps clip-grad decay-rate crop-pct layer-decay decay-epochs std',
    NOT_NEGATIVE: 'weight-decay warmup-lr min-lr mixup cutmix color-jitter',
    PROBABILITY: 'hflip vflip reprob mixup-prob mixup-switch-prob color-jitter-prob grayscale-prob gaussian-blur-prob '
    'layer-decay-min-scale bn-momentum',
    FRACTION: 'momentum opt-betas drop drop-path smoothing model-ema-decay',
    SHARE: 'val-fraction train-fraction',
}
OTHERS = {
    ('timm', 'validate.py', 'RUN'): {COUNT: 'batch-size knn', NATURAL: 'workers'},
    ('ccl-timm', 'predict', 'RUN', 'IMAGES'): {COUNT: 'batch-size topk'},
    ('ccl-timm', 'features', 'RUN'): {COUNT: 'limit', NATURAL: 'workers'},
    ('ccl-timm', 'data', 'split', 'IMAGES', 'new'): {SHARE: 'val-fraction', NATURAL: 'seed'},
    ('ccl-timm', 'data', 'check', 'IMAGES'): {NATURAL: 'show'},
    ('ccl-timm', 'reproduce', 'cc-table1'): {COUNT: 'seeds epochs'},
    ('ccl-timm', 'compare', '--data-dir', 'IMAGES'): {
        COUNT: 'seeds epochs jobs',
        NATURAL: 'trials',
        SHARE: 'tune-fraction',
        POSITIVE: 'within',
    },
    ('ccl-timm', 'bench', 'cc'): {COUNT: 'samples width classes rounds'},
    ('ccl-timm', 'bench', 'loaders'): {COUNT: 'images rounds', NATURAL: 'workers'},
    ('ccl-timm', 'bench', 'steps'): {COUNT: 'batch-size rounds'},
    ('timm',): {COUNT: 'nproc'},
}
TRAINING = ('timm', 'train.py', '--data-dir', 'IMAGES', '--model', 'test_resnet_cam', '--loss', 'cc')


def command_lines():
    """All of them: a program, its arguments, and the settings of a recipe that is named with ``--config``."""
    for command, flags in {TRAINING: TRAIN, **OTHERS}.items():
        for meaningless, names in flags.items():
            for name, value in itertools.product(names.split(), (*NO_NUMBER, *meaningless)):
                yield (*command, f'--{name}={value}'), None
                if command is TRAINING and value and name in 'batch-size epochs lr momentum hflip seed val-fraction':
                    yield TRAINING, {name.replace('-', '_'): yaml.safe_load(value) if value != '1e400' else value}
    for name in list_losses():
        for option, parameter in inspect.signature(loss_class(name)).parameters.items():
            if isinstance(parameter.default, float) or (type(parameter.default) is int):
                for value in ('nan', 'inf', '-1e400', 'many'):
                    number = value if value == 'many' else f'float("{value}")'
                    yield (*TRAINING[:-3], f'test_resnet_{loss_class(name).head or "linear"}', '--loss', name,
                           '--loss-kwargs', f'{option}={"1e400" if "e" in value else number}'), None  # fmt: skip
                    yield (*TRAINING[:-3], f'test_resnet_{loss_class(name).head or "linear"}', '--loss', name), {
                        'loss': name, 'loss_kwargs': {option: value if value == 'many' else float(value)}
                    }  # fmt: skip
    for option, value in itertools.product(('hidden_features', 'reduction'), ('-1', '0.5', 'many', '1e400')):
        yield (*TRAINING, '--model-kwargs', f'{option}={value}'), None
    for option, value in itertools.product(('momentum', 'weight_decay'), ('1e400', 'many')):
        yield (*TRAINING, '--opt-kwargs', f'{option}={value}'), None


ALL = list(command_lines())


def test_there_are_a_thousand():
    assert len(ALL) >= 1000


@pytest.mark.parametrize('chosen', [ALL[::25], pytest.param(ALL, marks=pytest.mark.slow)], ids=['some', 'all'])
def test_a_number_that_means_nothing_is_refused(chosen, run_cli, folder, trained, workdir):
    accepted = []
    for argv, recipe in chosen:
        argv = [{'RUN': trained, 'IMAGES': folder}.get(word, word) for word in argv]
        if recipe is not None:
            (workdir / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
            argv += ['--config', workdir / 'recipe.yaml']
        code, out, err = run_cli(*argv)
        last = err.strip().splitlines()[-1] if err.strip() else ''
        if code != 2 or not last.startswith('error: ') or 'Traceback' in err:
            accepted.append((argv, recipe, code, last))
    (workdir / 'recipe.yaml').unlink(missing_ok=True)
    assert not accepted, '\n'.join(map(str, accepted))
    assert not any(workdir.iterdir())
