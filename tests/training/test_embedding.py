"""embed: rows and columns of its files, what is left out, what is refused."""

import shutil

import numpy as np
import pytest
import torch

from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.prediction import find_images, predict


@pytest.mark.parametrize('form', ['npz', 'parquet'])
def test_embed_writes_what_the_model_computes(form, trained, folder, workdir, run_cli):
    code, out, err = run_cli('ccl-timm', 'embed', trained, folder / 'validation', '-o', f'x.{form}', '-b', '5')
    assert code == 0 and 'x.' + form + ', 12 images, features of' in err, err
    if form == 'npz':
        with np.load('x.npz') as file:
            found = {name: file[name] for name in file.files}
    else:
        parquet = pytest.importorskip('pyarrow.parquet')
        found = {name: np.array(column) for name, column in parquet.read_table('x.parquet').to_pydict().items()}
    assert found.keys() == {'path', 'label', 'features', 'logits', 'attention'}
    assert found['path'][:2].tolist() == ['ant/0.png', 'ant/1.png']
    assert found['label'].tolist() == ['ant'] * 4 + ['bee'] * 4 + ['cat'] * 4
    model = load_trained(trained)
    expected, _ = predict(model, find_images([str(folder / 'validation')]), topk=3)
    probabilities = torch.tensor(found['logits']).softmax(1)
    for row, own in zip(probabilities, expected, strict=True):
        for prediction in own['predictions']:
            assert row[prediction['index']].item() == pytest.approx(prediction['probability'], abs=1e-5)
    logits = model.model.get_classifier().out(torch.tensor(found['features'], dtype=torch.float32))
    assert torch.allclose(logits, torch.tensor(found['logits'], dtype=torch.float32), atol=1e-4)
    assert found['attention'].shape == found['features'].shape


def test_images_that_cannot_be_read_are_named_and_left_out(trained, folder, workdir, run_cli):
    images = workdir / 'images'
    images.mkdir()
    (images / 'a.png').write_bytes((folder / 'train' / 'ant' / '0.png').read_bytes())
    shutil.copytree(folder / 'train' / 'bee', images / 'train' / 'bee')
    (images / 'b.png').write_text('nonsense')
    code, out, err = run_cli('ccl-timm', 'embed', trained, images, '-o', 'x.npz')
    assert code == 1 and "b.png' is not a readable image" in err
    with np.load('x.npz') as file:
        assert file['path'].tolist() == ['a.png', *(f'train/bee/{number}.png' for number in range(8))]
        assert file['label'].tolist() == ['', *['bee'] * 8]  # as training names it, however deep it lies


@pytest.mark.parametrize(
    'argv, message',
    [
        (['nowhere', '-o', 'x.npz'], "There is no folder 'nowhere'."),
        (['empty', '-o', 'x.npz'], "Folder 'empty' holds no image."),
        (['empty', '-o', 'x.csv'], "'x.csv' must end in .npz or .parquet"),
        (['empty', '-o', 'taken.npz'], "'taken.npz' exists already: name another file."),
        (['empty'], 'required: -o/--output'),
    ],
)
def test_embed_refuses(argv, message, trained, workdir, run_cli):
    (workdir / 'empty').mkdir()
    (workdir / 'taken.npz').write_text('mine')
    code, out, err = run_cli('ccl-timm', 'embed', trained, *argv)
    assert code == 2 and message in err and (workdir / 'taken.npz').read_text() == 'mine'
