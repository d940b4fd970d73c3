"""Measures beyond accuracy, against scikit-learn, scipy, pytorch-metric-learning and cases done by hand."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss, roc_auc_score, roc_curve
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch.nn import functional as F

from ccl_timm.training.measures import (
    accuracy_by_count,
    calibration,
    fit_temperature,
    knn_accuracy,
    ood,
    ood_scores,
    reliability,
    retrieval,
    separation,
    threshold,
)


def clusters(count=60, classes=5, width=8, noise=1.0, seed=0):
    """Features around a centre of their class, and labels."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=random)
    return centres[labels] + noise * torch.randn(count, width, generator=random), labels


def test_calibration_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.62, 0.38], [0.62, 0.38]])
    labels = torch.tensor([0, 1, 0, 0])  # half of the confident ones are right, all of the others
    found = calibration(probabilities.log(), labels)
    assert found['ece'] == pytest.approx(100 * (0.5 * 0.4 + 0.5 * 0.38))
    assert found['nll'] == pytest.approx(log_loss(labels, probabilities.double()), rel=1e-6)
    confidence, accuracy, counts = reliability(probabilities.log(), labels)
    assert counts.tolist() == [0] * 9 + [2] + [0] * 3 + [2, 0]
    assert (accuracy[9].item(), accuracy[13].item()) == (1.0, 0.5) and confidence[9].item() == pytest.approx(0.62)


def test_ece_is_the_mean_gap_of_bins_open_on_the_left():
    torch.manual_seed(0)
    logits, labels = 3 * torch.randn(400, 6), torch.randint(6, (400,))
    probabilities = torch.softmax(logits.double() / 1.7, 1).numpy()
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    gaps = 0.0
    for low, high in zip(np.linspace(0, 1, 16)[:-1], np.linspace(0, 1, 16)[1:], strict=True):
        own = (confidence > low) & (confidence <= high)
        gaps += abs(right[own].sum() - confidence[own].sum())
    assert calibration(logits, labels, 1.7)['ece'] == pytest.approx(100 * gaps / 400)
    everything_sure = calibration(torch.tensor([[50.0, 0.0], [50.0, 0.0]]), torch.tensor([0, 1]))
    assert everything_sure['ece'] == pytest.approx(50.0)


@pytest.mark.parametrize('scale', [0.02, 1.0, 40.0])
def test_the_temperature_minimises_the_nll(scale):
    torch.manual_seed(1)
    truth = 2 * torch.randn(2000, 5)
    labels = torch.distributions.Categorical(logits=truth).sample()
    found = fit_temperature((scale * truth).half() if scale == 1 else scale * truth, labels)
    nll = minimize_scalar(lambda t: log_loss(labels, torch.softmax(scale * truth.double() / t, 1)), (scale / 2, scale))
    assert found == pytest.approx(nll.x, rel=2e-3) and found == pytest.approx(scale, rel=0.1)


def test_temperatures_of_separable_and_of_constant_logits_are_usable():
    logits = torch.eye(4).repeat(25, 1) * 8
    labels = torch.arange(4).repeat(25)
    separable = fit_temperature(logits, labels)
    assert (logits / separable).softmax(1).max().item() == pytest.approx(101 / 102, abs=1e-3)  # Platt's target
    assert 1e-3 <= fit_temperature(torch.zeros(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])) <= 1e3
    assert fit_temperature(torch.ones(3, 1), torch.zeros(3, dtype=torch.long)) > 0


def retrieval_reference(features, labels, gallery=None, gallery_labels=None):
    """With scikit-learn's neighbours and loops."""
    own = gallery is None
    known, known_labels = (features, labels) if own else (gallery, gallery_labels)
    index = NearestNeighbors(n_neighbors=len(known), metric='cosine').fit(known).kneighbors(features)[1]
    found = []
    for i, order in enumerate(index):
        order = [j for j in order if not (own and j == i)]
        right = [bool(known_labels[j] == labels[i]) for j in order]
        if (r := sum(right)) == 0:
            continue
        average = sum(sum(right[: k + 1]) / (k + 1) for k in range(r) if right[k]) / r
        found.append((right[0], any(right[:5]), average))
    return dict(zip(('recall_at_1', 'recall_at_5', 'map_at_r'), 100 * np.mean(found, 0), strict=True))


@pytest.mark.parametrize('rows', [7, 1024])
def test_retrieval_is_that_of_sklearns_neighbours(rows, monkeypatch):
    monkeypatch.setattr('ccl_timm.training.measures._ROWS', rows)
    features, labels = clusters()
    labels[3] = 17  # the only one of its class: it has nobody to find, and counts in no value
    assert retrieval(features, labels) == pytest.approx(retrieval_reference(features, labels))
    gallery, gallery_labels = clusters(40, seed=1)
    found = retrieval(features, labels, gallery, gallery_labels)
    assert found == pytest.approx(retrieval_reference(features, labels, gallery, gallery_labels))
    assert 20 < found['map_at_r'] < found['recall_at_1'] < found['recall_at_5'] < 100


def test_retrieval_is_pytorch_metric_learnings():
    calculator = pytest.importorskip('pytorch_metric_learning.utils.accuracy_calculator')
    inference = pytest.importorskip('pytorch_metric_learning.utils.inference')
    distances = pytest.importorskip('pytorch_metric_learning.distances')
    names = ('precision_at_1', 'mean_average_precision_at_r')
    knn = inference.CustomKNN(distances.CosineSimilarity())
    calculate = calculator.AccuracyCalculator(
        include=names, k='max_bin_count', knn_func=knn, device=torch.device('cpu')
    )
    features, labels = clusters(200)
    labels[3] = 17
    gallery = clusters(80, seed=1)
    for ours, theirs in (
        (retrieval(features, labels), calculate.get_accuracy(features, labels)),
        (retrieval(features, labels, *gallery), calculate.get_accuracy(features, labels, *gallery)),
    ):
        assert ours['recall_at_1'] == pytest.approx(100 * theirs['precision_at_1'])
        assert ours['map_at_r'] == pytest.approx(100 * theirs['mean_average_precision_at_r'])


def test_retrieval_without_any_pair_is_not_a_number():
    assert all(map(math.isnan, retrieval(torch.randn(4, 3), torch.arange(4)).values()))
    assert all(map(math.isnan, retrieval(torch.randn(1, 3), torch.arange(1)).values()))


def test_neighbours_vote_as_sklearns_do():
    torch.manual_seed(0)
    known, labels, unknown = torch.randn(60, 5), torch.randint(3, (60,)), torch.randn(40, 5)
    reference = KNeighborsClassifier(7, metric='cosine', weights=lambda distance: 1 - distance).fit(known, labels)
    assert knn_accuracy(unknown, torch.from_numpy(reference.predict(unknown)), known, labels, 7) == 100.0
    away = torch.tensor([[1.0, 0.0]])  # the cosine of its two neighbours is negative
    assert knn_accuracy(away, torch.tensor([2]), -away.repeat(2, 1), torch.tensor([2, 2]), 2) == 100.0


def test_separation_is_sklearns():
    torch.manual_seed(0)
    known, unknown = torch.randn(200) + 1, torch.randn(150)
    truth, scores = np.r_[np.ones(200), np.zeros(150)], torch.cat([known, unknown]).numpy()
    rejected, accepted, _ = roc_curve(truth, scores, drop_intermediate=False)
    found = separation(known, unknown)
    assert found['auroc'] == pytest.approx(100 * roc_auc_score(truth, scores))
    assert found['fpr95'] == pytest.approx(100 * rejected[np.argmax(accepted >= 0.95)])
    assert separation(known + 100, unknown) == {'auroc': 100.0, 'fpr95': 0.0}
    assert separation(torch.ones(5), torch.ones(5)) == {'auroc': 50.0, 'fpr95': 100.0}
    assert (known >= threshold(known)).sum() == 190 and threshold(torch.arange(3.0)) == 0.0


def test_scores_of_unknown_images():
    logits = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    features = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    known = torch.tensor([[6.0, 8.0], [1.0, 0.0]])
    scores = ood_scores(logits, features, known)
    assert scores['softmax'].tolist() == pytest.approx([1 / (1 + math.exp(-2)), 0.5])
    assert scores['energy'].tolist() == pytest.approx([math.log(math.exp(2) + 1), math.log(2)])
    assert scores['nearest'].tolist() == pytest.approx([1.0, 0.8])
    assert scores['norm'].tolist() == [5.0, 1.0]
    unknown = {name: own - 10 for name, own in scores.items()}
    found = ood(scores, unknown)
    assert len(found) == 8 and found['energy_auroc'] == 100.0 and found['norm_fpr95'] == 0.0


def test_accuracy_by_count_of_training_images():
    found = accuracy_by_count([10.0, 20.0, 40.0, 90.0, None], [101, 100, 20, 19, 500])
    assert found == {'many': 10.0, 'medium': 30.0, 'few': 90.0}
    assert accuracy_by_count([50.0], [30]) == {'medium': 50.0}


def test_features_need_no_unit_length():
    features, labels = clusters()
    assert retrieval(features * torch.rand(60, 1), labels) == retrieval(F.normalize(features, dim=1), labels)
