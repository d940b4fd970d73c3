"""Analyses of features against independent computations, the pictures, and the HTML report in a real browser."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn.covariance import ledoit_wolf
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.metrics.pairwise import cosine_similarity

from ccl_timm import cli
from ccl_timm.experiments import analysis, plots
from ccl_timm.experiments.features import draw_neighbours
from ccl_timm.experiments.plots import draw_retrieval
from ccl_timm.experiments.rendering import FORMATS, Report
from ccl_timm.training import retrieval
from ccl_timm.training.checkpoints import load_trained
from ccl_timm.training.run_dir import RunDir

BROWSER = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
TINY = ['--img-size', '16', '-b', '8', '-j', '0', '--epochs', '2', '--checkpoint-hist', '1']


def blobs(seed=0, count=40, classes=3, width=4, spread=0.3):
    """Features (N, width) around a centre for each class, and labels."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(classes, width))
    labels = np.repeat(np.arange(classes), count)
    return centres[labels] + spread * random.normal(size=(len(labels), width)), labels


def test_accuracy_by_norm_by_hand():
    features = np.array([[1.0, 0], [0, 2], [3, 0], [0, 6]])  # norms 1, 2, 3, 6; mean 3
    assert analysis.accuracy_by_norm(features, np.array([True, False, True, True])) == (50.0, 100.0)
    below, above = analysis.accuracy_by_norm(np.ones((2, 2)), np.array([True, False]))
    assert np.isnan(below) and above == 50.0


def test_channels_by_accuracy_by_hand():
    attention = np.array([[0.9, 0.9, 0.1], [0.3, 0.9, 0.7], [0.2, 0.4, 0.8], [0.9, 0.9, 0.9]])
    labels = np.array([0, 0, 4, 7])  # in their means, classes 0 and 7 open 2 and 3 channels, class 4 one
    found = analysis.channels_by_accuracy(attention, labels, np.array([True, False, True, False]))
    assert found == (2.0, pytest.approx(-1.0))
    assert np.isnan(analysis.channels_by_accuracy(attention, labels, np.ones(4, bool))[1])


def test_class_distances_by_hand():
    features = np.array([[0.0, 0], [0, 2], [3, 1], [3, 1], [3, 5]])
    labels = np.array([0, 0, 4, 4, 7])  # centres (0, 1), (3, 1), (3, 5), of classes with gaps between
    intra, inter = analysis.class_distances(features, labels)
    assert intra == pytest.approx(2 / 5) and inter == pytest.approx((3 + 4 + 5) / 3)
    assert np.isnan(analysis.class_distances(features[:2], labels[:2])[1])


def test_eigenvalue_variance_is_that_of_the_covariance_within_classes():
    features, labels = blobs()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    scatter = np.concatenate([unit[labels == k] - unit[labels == k].mean(0) for k in range(3)])
    eigenvalues = np.linalg.svd(scatter / np.sqrt(len(scatter)), compute_uv=False) ** 2
    assert analysis.eigenvalue_variance(features, labels) == pytest.approx(np.var(eigenvalues))
    assert analysis.eigenvalue_variance(7 * features, labels) == pytest.approx(np.var(eigenvalues))


def test_cosine_accuracy_is_scikit_learns():
    features, labels = blobs(spread=1.0)
    vectors = np.random.default_rng(5).normal(size=(3, 4)) * [[1], [10], [100]]
    expected = 100 * (cosine_similarity(features, vectors).argmax(1) == labels).mean()
    assert analysis.cosine_accuracy(features, labels, vectors) == pytest.approx(expected) and 0 < expected < 100


def test_gaussian_accuracy_is_that_of_scikit_learns_discriminant():
    """With many images the shrinkage vanishes; the classes' covariances differ, so that no shared one will do."""
    random = np.random.default_rng(0)
    shapes = np.random.default_rng(1).normal(size=(3, 4, 4))
    draw = [(random.normal(size=(4000, 4)) @ shape, np.full(4000, 2 * k)) for k, shape in enumerate(shapes)]
    features, labels = (np.concatenate(parts) for parts in zip(*draw, strict=True))
    keep = labels < 4  # unequal priors
    keep[: len(keep) // 6] = False
    known, rest = np.flatnonzero(keep)[::2], np.flatnonzero(keep)[1::2]
    theirs = QuadraticDiscriminantAnalysis().fit(features[known], labels[known])
    expected = 100 * theirs.score(features[rest], labels[rest])
    found = analysis.gaussian_accuracy(features[known], labels[known], features[rest], labels[rest])
    assert found == pytest.approx(expected, abs=0.5) and 60 < expected < 99


def test_gaussian_accuracy_is_that_of_shrunk_covariances():
    """With fewer images than dimensions; the covariances as a matrix, the densities of scipy."""
    random = np.random.default_rng(0)
    labels = np.repeat([3, 5, 9], (12, 20, 7))
    known, features = (random.normal(size=(39, 30)) * (1 + labels[:, None]) + 0.3 * labels[:, None] for _ in range(2))
    floor, scores = 1e-6 * known.var(0).mean() * np.eye(30), []
    for k in (3, 5, 9):
        own = known[labels == k]
        gaussian = stats.multivariate_normal(own.mean(0), ledoit_wolf(own)[0] + floor)
        scores.append(gaussian.logpdf(features) + np.log(len(own)))
    expected = 100 * (np.array([3, 5, 9])[np.argmax(scores, 0)] == labels).mean()
    assert analysis.gaussian_accuracy(known, labels, features, labels) == pytest.approx(expected) and 40 < expected < 99


def test_gaussian_accuracy_stands_fewer_images_than_dimensions_and_dead_features():
    features, labels = blobs(count=5, width=30)
    assert analysis.gaussian_accuracy(features, labels, features, labels) == 100.0
    features[labels == 1] = 0
    features[:, 7] = 0
    assert analysis.gaussian_accuracy(features, labels, features, labels) == 100.0


def test_two_features_are_drawn_as_they_are_and_more_by_t_sne():
    flat = {'training': blobs(width=2), 'test': blobs(seed=1, width=2, count=9)}
    assert plots.in_the_plane(flat, 5) == (flat, 'the two features themselves')
    wide = {'training': blobs(width=9), 'test': blobs(seed=1, width=9, count=9)}
    points, how = plots.in_the_plane(wide, 30)
    again, _ = plots.in_the_plane(wide, 30)
    assert [own[0].shape for own in points.values()] == [(30, 2), (27, 2)] and how.startswith('t-SNE of 9 features')
    assert all(np.array_equal(points[part][0], again[part][0]) for part in points)
    (near, labels), (_, known) = points['test'], points['training']
    centres = analysis.class_centres(points['training'][0], known)[1]
    assert (np.linalg.norm(near[:, None] - centres, axis=2).argmin(1) == labels).mean() > 0.9


def test_pictures_show_what_they_are_given():
    names = ['ant', 'bee', 'cat']
    points, labels = blobs(width=2)
    figure = plots.draw_features({'training': (points, labels), 'test': (points, labels)}, names, 'title', 'caption')
    first, second = figure.axes
    drawn = np.concatenate([own.get_offsets() for own in first.collections[::2]])
    assert np.allclose(np.sort(drawn, 0), np.sort(points, 0)) and first.get_xlim() == second.get_xlim()
    assert np.allclose(
        [own.get_offsets()[0] for own in first.collections[1::2]], analysis.class_centres(points, labels)[1]
    )
    assert first.get_title().startswith('training, ') and second.get_title().startswith('test, ')
    many = plots.draw_features({str(n): (n * points, labels) for n in range(1, 5)}, names, '', '', shared=False)
    assert len(many.axes) == 4 and len({axis.get_xlim() for axis in many.axes}) == 4  # two rows, without empty panels
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names  # beside the panels, not over points

    attention = np.array([[0.1, 0.9, 0.2], [0.3, 0.7, 0.2], [0.8, 0.1, 0.1], [0.2, 0.1, 0.6]])
    figure = plots.draw_attention(attention, np.array([0, 0, 1, 2]), names, 'title')
    means = np.array([[0.8, 0.2, 0.2], [0.1, 0.8, 0.1], [0.1, 0.2, 0.6]])
    assert np.allclose(figure.axes[0].images[0].get_array(), means)
    deviation = figure.axes[1].images[0]
    assert np.allclose(deviation.get_array(), means - means.mean(0)) and sum(deviation.get_clim()) == 0

    figure = plots.draw_confusion(np.array([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), names, 'title')
    assert np.allclose(figure.axes[0].images[0].get_array(), [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]])
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ['1', '2', '3']

    curves = {'ce': [[(1, 10.0), (2, 30.0)], [(1, 20.0), (2, 50.0), (3, 60.0)]], 'cc': [[(1, 5.0)]]}
    axis = plots.draw_curves('top-1', curves).axes[0]
    assert [list(line.get_ydata()) for line in axis.lines] == [[15.0, 40.0], [5.0]]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ['ce (n=2)', 'cc']


def test_a_forest_plot_shows_intervals_and_verdicts(tmp_path):
    rows = [
        plots.ForestRow('cc', 0.4, 0.1, 0.7, 'better'),
        plots.ForestRow('pod', -2.0, -3.0, -1.0, 'worse'),
        plots.ForestRow('focal', 0.1, float('nan'), float('nan'), 'one seed, no test'),
    ]
    figure = plots.draw_forest(rows, 'title', equivalence=0.5)
    axis = figure.axes[0]
    intervals = {tuple(line.get_xdata()) for line in axis.lines if len(line.get_xdata()) == 2}
    assert {(0.1, 0.7), (-3.0, -1.0)} <= intervals and axis.get_xlim()[0] < -3
    colours = {line.get_xdata()[0]: line.get_color() for line in axis.lines if line.get_marker() == 's'}
    assert len({*colours.values()}) == 3 and colours[0.1] == 'black'
    band = axis.patches[0]
    assert (band.get_x(), band.get_width()) == (-0.5, 1.0)
    plots.save(figure, tmp_path / 'a.svg')
    text = (tmp_path / 'a.svg').read_text()
    assert '+0.40 [+0.10, +0.70]  better' in text and '+0.10  one seed, no test' in text and '>pod<' in text
    assert axis.get_ylim()[0] > axis.get_ylim()[1]  # the first row is on top
    plots.save(plots.draw_forest(rows[:1], '$', 0), tmp_path / 'b.png')


def test_forests_are_in_the_html_report():
    report = Report('title', [], [], [], forests={'against ce': [plots.ForestRow('cc', 0.4, 0.1, 0.7, 'better')]})
    text = FORMATS['html'](report)
    assert text.count('<svg') == 1 and 'better' in text and 'against ce' in text


def test_a_reliability_diagram_shows_the_bins():
    bins = [np.array([np.nan, 0.4, 0.9]), np.array([np.nan, 0.5, 0.7]), np.array([0.0, 10.0, 30.0])]
    top, bottom = plots.draw_reliability({'raw': bins, 'other': bins}, 'title').axes
    assert [list(line.get_ydata()) for line in top.lines] == [[0, 1], [0.5, 0.7], [0.5, 0.7]]
    assert top.lines[1].get_label() == 'raw: ECE 17.50%'  # 0.25 * 10% + 0.75 * 20%
    assert [bar.get_height() for bar in bottom.patches[:3]] == [0, 25, 75]


def test_nearest_images_are_drawn_with_their_frames(tmp_path):
    features = np.array([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    own = {'features': features, 'labels': np.array([0, 0, 1, 0]), 'index': np.array([0, 1, 3, 4])}

    class Images(list):  # of which number 2 could not be read
        transform = 'of the model'

    images = Images((Image.new('L', (4, 4), 40 * number), -7) for number in range(5))
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, 'draw_retrieval', lambda *args: drawn.append(args) or draw_retrieval(*args))
        path = tmp_path / 'a.png'
        assert draw_neighbours(images, own, ['ant', 'bee'], 'title', path) == [path] and images.transform is None
    examples, _, _ = drawn[0]
    assert [(query.getpixel((0, 0)), label) for query, label, _ in examples] == [(0, 0), (40, 0), (120, 1), (160, 0)]
    assert [own.image.getpixel((0, 0)) for own in examples[2][2]] == [160, 40, 0]
    frames = [axis.spines['left'].get_edgecolor() for axis in draw_retrieval(*drawn[0]).axes[8:12]]
    assert len({*frames}) == 2 and frames[1] == frames[2]  # a bee's neighbours are ants
    assert draw_neighbours(images, {**own, 'labels': own['labels'][:1]}, ['ant'], '', tmp_path / 'b.png') == []


@pytest.mark.parametrize('classes', [3, 15, 40])
def test_every_number_of_classes_can_be_drawn(classes, tmp_path):
    features, labels = blobs(width=2, classes=classes, count=4)
    names = [f'class {k}' for k in range(classes)]
    for figure in (
        plots.draw_features({'test': (features, labels)}, names, '', ''),
        plots.draw_confusion(np.eye(classes, dtype=int), names, ''),
        plots.draw_attention(features, labels, names, ''),
    ):
        plots.save(figure, tmp_path / 'picture.png')
        assert np.asarray(Image.open(tmp_path / 'picture.png').convert('L')).std() > 1


@pytest.fixture(scope='module')
def place_of_runs(folder, tmp_path_factory):
    """A folder with `runs`: cc on cam, with seeds 0 and 1, and ce with two features. Do not change the runs."""
    root = tmp_path_factory.mktemp('place')
    shared = ['train.py', '--data-dir', str(folder), *TINY, '--output', str(root / 'runs')]
    for seed in '01':
        own = ['--model', 'test_resnet_cam', '--loss', 'cc', '--seed', seed, '--experiment', f'cc{seed}']
        assert cli.timm([*shared, *own]) == 0
    own = ['--model', 'test_resnet_linear', '--loss', 'ce', '--model-kwargs', 'feature_dim=2', '--experiment', 'flat']
    assert cli.timm([*shared, *own]) == 0
    return root


def test_features_of_a_run(place_of_runs, run_cli):
    code, out, err = run_cli('ccl-timm', 'features', place_of_runs / 'runs' / 'cc0', '--workers', '0')
    assert code == 0, err
    drawn = {path.name for path in (place_of_runs / 'runs' / 'cc0' / 'pictures').iterdir()}
    assert drawn == {'features.png', 'attention.png', 'confusion.png', 'retrieval.png'} and err.count('written: ') == 5
    rows = {line[:55].strip(): line[55:].split() for line in out.splitlines()}
    assert rows['images'] == ['24', '12']
    best = run_cli('timm', 'validate.py', place_of_runs / 'runs' / 'cc0', '--workers', '0')[1]
    assert float(rows['top-1 %, the model'][1]) == pytest.approx(
        json.loads(best.split('--result')[1])['top1'], abs=0.01
    )
    assert set(rows) >= {'top-1 %, Gaussian discriminant', 'mean distance between class centres'}
    assert rows['channels of attention'] == ['96', '96']


def test_measures_of_features_are_in_reports_and_records(place_of_runs, run_cli, folder, tmp_path):
    """Of all runs of a group that have them, of the last epoch only, and not those of pictures elsewhere."""
    runs = tmp_path / 'runs'
    shutil.copytree(place_of_runs / 'runs', runs)
    for name in ('cc0', 'cc1'):
        (runs / name / 'features.json').unlink(missing_ok=True)
        argv = ['ccl-timm', 'features', runs / name / 'last.pth.tar', '-j', '0']
        if name == 'cc0':
            for other in (['-o', tmp_path / name], ['--data-dir', folder]):
                assert run_cli(*argv, *other)[0] == 0
                assert not (runs / name / 'features.json').exists()
        assert run_cli(*argv)[0] == 0
    measured = [RunDir(runs / name).features() for name in ('cc0', 'cc1')]
    assert {(own['split'], own['epoch']) for own in measured} == {('validation', 1)}
    centres = [own['measures']['mean distance between class centres'] for own in measured]
    (line,) = re.findall(
        r'\| mean distance between class centres +\| (.*?) +\|', run_cli('ccl-timm', 'report', runs)[1]
    )
    assert line == f'{np.mean(centres):.4g} ± {np.std(centres, ddof=1):.2g}'

    assert run_cli('ccl-timm', 'report', runs, '--record', tmp_path / 'runs.jsonl')[0] == 0
    assert line in run_cli('ccl-timm', 'report', tmp_path / 'runs.jsonl')[1]
    RunDir(runs / 'cc0').set_features({**measured[0], 'epoch': 0})
    assert line not in run_cli('ccl-timm', 'report', runs)[1]
    (runs / 'cc0' / 'features.json').write_text('[1]')
    assert "features.json' was not written by `ccl-timm features`" in run_cli('ccl-timm', 'report', runs)[2]


def test_the_layer_that_the_paper_draws(place_of_runs, run_cli, folder, tmp_path):
    """CC-Loss's figure 3 shows f1(F), whose values have either sign; attention and ReLU come after."""
    run = place_of_runs / 'runs' / 'cc1'
    model = load_trained(run).model
    images = torch.rand(8, 3, 16, 16)
    pooled = model.forward_head(model.forward_features(images), pre_logits=True)
    found = retrieval.extract_outputs(model, [(images, torch.zeros(8, dtype=torch.long))], ['hidden', 'features'], '')
    torch.testing.assert_close(found['hidden'], model.get_classifier().hidden(pooled))
    assert found['hidden'].min() < 0
    code, out, err = run_cli('ccl-timm', 'features', run, '--layer', 'hidden', '-j', '0', '-o', tmp_path)
    assert code == 0 and (tmp_path / 'hidden.png').exists() and not (tmp_path / 'features.png').exists()
    assert 'cosine with class vectors' not in out, err
    for head, name in (('cosine', 'CosineHead'), ('linear', 'LinearHead')):
        argv = ['--data-dir', folder, *TINY, '--model', f'test_resnet_{head}', '--loss', 'ce', '--epochs', '1']
        argv += ['--model-kwargs', 'feature_dim=1', '--output', tmp_path, '--experiment', head]
        assert run_cli('timm', 'train.py', *argv)[0] == 0
        code, out, err = run_cli('ccl-timm', 'features', tmp_path / head, '--layer', 'hidden', '-j', '0')
        assert code == 2 and f'Only the heads cam and mlp have --layer hidden; this model has a {name}.' in err
    code, out, err = run_cli('ccl-timm', 'features', tmp_path / 'linear', '-j', '0', '-o', tmp_path / 'one')
    assert code == 0 and (tmp_path / 'one' / 'features.png').exists(), err  # of a single feature


def test_features_two_wide_in_another_folder(place_of_runs, run_cli):
    code, out, err = run_cli(
        'ccl-timm',
        'features',
        place_of_runs / 'runs' / 'flat',
        '--workers',
        '0',
        '-o',
        place_of_runs / 'flat',
        '--format',
        'svg',
    )
    assert code == 0, err
    assert {path.name for path in (place_of_runs / 'flat').iterdir()} == {
        'features.svg',
        'confusion.svg',
        'retrieval.svg',
    }  # no attention
    assert not (place_of_runs / 'runs' / 'flat' / 'pictures').exists()


def test_several_runs_are_drawn_side_by_side(place_of_runs, run_cli, tmp_path, monkeypatch):
    runs, drawn = place_of_runs / 'runs', []
    monkeypatch.setattr('ccl_timm.cli.features.save', lambda figure, path: drawn.append((figure, path)))
    argv = ['ccl-timm', 'features', runs / 'flat', runs / 'cc0', '-j', '0']
    code, out, err = run_cli(*argv, '-o', tmp_path / 'new')
    assert code == 0 and f'written: {tmp_path / "new" / "features.png"}' in err
    ((figure, path),) = drawn
    assert path == tmp_path / 'new' / 'features.png' and out == ''
    first, second = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ['flat, 12 images', 'cc0, 12 images']
    assert first.get_xlim() != second.get_xlim()  # each of its own scale

    code, out, err = run_cli(*argv)
    assert code == 2 and 'belongs to none of them: give its folder with --output DIR' in err
    code, out, err = run_cli(*argv[:4], runs / 'cc0' / 'last.pth.tar', *argv[4:], '-o', tmp_path)
    assert code == 2 and "Two runs are in folders called 'cc0'" in err and len(drawn) == 1
    own = ['--config', 'digits', '--model', 'test_resnet_cam', '--train-fraction', '0.05', *TINY, '--epochs', '1']
    assert run_cli('timm', 'train.py', *own, '--output', tmp_path, '--experiment', 'other')[0] == 0
    code, out, err = run_cli('ccl-timm', 'features', runs / 'cc0', tmp_path / 'other', '-j', '0', '-o', tmp_path)
    assert code == 2 and f"'{tmp_path / 'other'}' has other classes than" in err


def test_without_matplotlib_it_is_one_sentence(place_of_runs, run_cli, monkeypatch):
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    for argv in (
        ['features', place_of_runs / 'runs' / 'flat', '--workers', '0'],
        ['report', place_of_runs / 'runs', '--format', 'html'],
    ):
        code, out, err = run_cli('ccl-timm', *argv)
        assert (
            code == 2 and err.splitlines()[-1] == "error: Pictures need matplotlib: `pip install 'ccl-timm[pictures]'`."
        )
    assert run_cli('ccl-timm', 'report', place_of_runs / 'runs')[0] == 0


@pytest.mark.parametrize(
    'argv, message',
    [
        (['nowhere'], "'nowhere' does not exist"),
        (['RUN', '--limit', '1'], '--limit: 1 must be at least 2'),
        (['RUN', '--limt', '9'], "Unknown argument '--limt'; did you mean '--limit'?"),
    ],
)
def test_features_refuses(argv, message, place_of_runs, run_cli):
    argv = [place_of_runs / 'runs' / 'cc1' if word == 'RUN' else word for word in argv]
    code, out, err = run_cli('ccl-timm', 'features', *argv)
    assert code == 2 and message in err
    assert not (place_of_runs / 'runs' / 'cc1' / 'pictures').exists()


def html_of(place_of_runs, run_cli, name):
    code, out, err = run_cli(
        'ccl-timm', 'report', place_of_runs / 'runs', '--format', 'html', '-o', place_of_runs / name
    )
    assert code == 0, err
    return place_of_runs / name


def test_html_is_one_file_and_the_same_each_time(place_of_runs, run_cli):
    run_cli('ccl-timm', 'features', place_of_runs / 'runs' / 'cc0', '--workers', '0')
    text = html_of(place_of_runs, run_cli, 'one.html').read_text()
    assert text == html_of(place_of_runs, run_cli, 'two.html').read_text()
    assert text.count('<svg') == 1 and text.count('src="data:image/png;base64,') == 4
    assert not re.search(r'(src|href)="(?!data:|#)', text)


def browse(page):
    """What a browser makes of a page, and what it says on the console."""
    command = [BROWSER, '--headless', '--no-sandbox', '--disable-gpu', '--enable-logging=stderr', '--log-level=0']
    done = subprocess.run([*command, '--dump-dom', page.as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if 'CONSOLE' in line]


@pytest.mark.skipif(BROWSER is None, reason='no Chromium here')
def test_html_in_a_browser(place_of_runs, run_cli):
    """The browser has nothing to complain of, runs nothing, and shows the figures of summary.csv."""
    page = html_of(place_of_runs, run_cli, 'page.html')
    dom, said = browse(page)
    assert said == []
    last = [
        float((place_of_runs / 'runs' / f'cc{seed}' / 'summary.csv').read_text().splitlines()[-1].split(',')[5])
        for seed in '01'
    ]
    mean = sum(last) / 2
    assert f'<td>{mean:.2f} ± {abs(last[0] - mean):.2f}</td>' in dom
    control = place_of_runs / 'control.html'
    control.write_text(page.read_text().replace('</body>', '<script>throw Error("x")</script></body>'))
    assert len(browse(control)[1]) == 1
