"""timm's other scripts, as they are, on a trained run; they are not packaged, so TIMM_SCRIPTS names their folder."""

import os
from pathlib import Path

import pytest
import torch

from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.run_dir import RunDir

from ..conftest import results

SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS', ''))
pytestmark = pytest.mark.skipif(not (SCRIPTS / 'benchmark.py').is_file(), reason='TIMM_SCRIPTS names no folder')
PREPROCESSING = ['--input-size', '3', '32', '32', '--mean', '.4', '.4', '.4', '--std', '.2', '.2', '.2']


def test_validate_gives_the_top1_of_the_run(run_cli, trained, folder):
    checkpoint = ['--checkpoint', trained / 'model_best.pth.tar', '--device', 'cpu', '-j', '0']
    code, out, err = run_cli(
        'timm', SCRIPTS / 'validate.py', '--model', 'resnet18_cam', '--num-classes', '3', '--data-dir', folder,
        *checkpoint, *PREPROCESSING, '--crop-pct', '1.0',
    )  # fmt: skip
    assert code == 0, err
    theirs = results(out)
    code, out, err = run_cli('timm', 'validate.py', trained, '-j', '0')
    assert code == 0, err
    best = max(row['eval_top1'] for row in RunDir(trained).rows())
    assert theirs['top1'] == pytest.approx(results(out)['top1'], abs=1e-4) == pytest.approx(best, abs=1e-4)


def test_benchmark_times_our_models(run_cli):
    code, out, err = run_cli(
        'timm', SCRIPTS / 'benchmark.py', '--model', 'resnet18_cam', '--bench', 'both', '--device', 'cpu',
        '--img-size', '32', '-b', '2', '--num-bench-iter', '5', '--num-warm-iter', '1', '--num-classes', '3',
    )  # fmt: skip
    assert code == 0, err
    assert results(out)['model'] == 'resnet18_cam' and results(out)['train_samples_per_sec'] > 0


def test_onnx_export_writes_what_the_run_computes(run_cli, trained, workdir):
    onnxruntime = pytest.importorskip('onnxruntime')
    code, out, err = run_cli(
        'timm', SCRIPTS / 'onnx_export.py', 'model.onnx', '--model', 'resnet18_cam', '--num-classes', '3',
        '--checkpoint', trained / 'model_best.pth.tar', '--img-size', '32', '--dynamo',
    )  # fmt: skip
    assert code == 0, err
    images = torch.randn(1, 3, 32, 32)
    session = onnxruntime.InferenceSession('model.onnx')
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    assert torch.allclose(torch.from_numpy(logits), load_trained(trained).model(images), atol=1e-4)
