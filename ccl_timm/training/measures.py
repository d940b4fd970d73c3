"""Measures of a classifier beyond its accuracy: calibration, retrieval, unknown images, classes with few images.

All are functions of tensors, on any device. Accuracies, rates and errors are in percent.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    'OOD_SCORES', 'accuracy_by_count', 'calibration', 'fit_temperature', 'knn_accuracy', 'nearest', 'ood',
    'ood_scores', 'reliability', 'retrieval', 'separation', 'threshold',
]  # fmt: skip

BINS = 15  # of the confidence, as in Guo et al. (2017)
FEW, MANY = 20, 100  # training images; fewer than 20 are few and more than 100 are many, as in Liu et al. (2019)
OOD_SCORES = ('softmax', 'energy', 'nearest', 'norm')
_ROWS = 1024  # of a similarity matrix at a time
_HOTTEST = 1000.0  # temperatures are sought between 1 / 1000 and 1000


def calibration(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """How far a classifier's probabilities can be believed.

    Args:
        logits: (N, K) of any real dtype; N >= 1.
        labels: (N,) class indices.
        temperature: logits are divided by it; above 0.

    Returns:
        ``nll``: mean cross-entropy of the labels, in nats. ``ece``: expected calibration error in percent, the mean
        over the images of |accuracy - confidence| of their bin, for the predicted class and 15 bins of equal width
        (Guo et al., On Calibration of Modern Neural Networks, 2017).
    """
    scaled = logits.double() / temperature
    confidence, accuracy, counts = reliability(logits, labels, temperature)
    gaps = (confidence - accuracy).abs().nan_to_num()
    return {
        'nll': F.cross_entropy(scaled, labels).item(),
        'ece': 100 * ((gaps * counts).sum() / counts.sum()).item(),
    }


def reliability(
    logits: Tensor, labels: Tensor, temperature: float = 1.0, bins: int = BINS
) -> tuple[Tensor, Tensor, Tensor]:
    """A reliability diagram: images in bins of equal width, by the probability of the class that is predicted.

    Args:
        logits: (N, K).
        labels: (N,) class indices.
        temperature: logits are divided by it.
        bins: how many; an image on the edge of two is in the lower one.

    Returns:
        For each bin the mean confidence and the accuracy, both in [0, 1] and NaN for a bin without images, and the
        number of images: each (bins,) float64 on the CPU.
    """
    confidence, predicted = (logits.double() / temperature).softmax(1).max(1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    weights = torch.stack([confidence, (predicted == labels).double(), torch.ones_like(confidence)])
    sums = torch.zeros(3, bins, dtype=torch.float64, device=logits.device).index_add_(1, place, weights).cpu()
    return sums[0] / sums[2], sums[1] / sums[2], sums[2]


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature whose division of the logits gives the smallest cross-entropy (Guo et al., 2017).

    Where every image is classified correctly the cross-entropy would be smallest at temperature 0. The targets are
    then smoothed to (N + 1) / (N + 2), as in Platt scaling (Platt, 1999).

    Args:
        logits: (N, K) of images that the model was not trained on; N >= 1.
        labels: (N,) class indices.

    Returns:
        A number between 0.001 and 1000. Calibration measured on the same images is too optimistic.
    """
    logits, labels = logits.double().cpu(), labels.cpu()
    separable = bool((logits.argmax(1) == labels).all())
    images, classes = logits.shape
    smoothing = classes / (classes - 1) / (images + 2) if separable and classes > 1 else 0.0

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        return F.cross_entropy(scaled, labels, label_smoothing=smoothing).item()

    reach = math.log(_HOTTEST)
    return math.exp(minimize_scalar(loss, bounds=(-reach, reach), method='bounded', options={'xatol': 1e-4}).x)


def retrieval(
    features: Tensor, labels: Tensor, gallery_features: Tensor | None = None, gallery_labels: Tensor | None = None
) -> dict[str, float]:
    """How well images of the same class are found by the cosine of features.

    The values are those of pytorch-metric-learning's ``AccuracyCalculator``: an image is not its own neighbour, and a
    query without any other image of its class in the gallery does not count.

    Args:
        features: (N, D) of the queries.
        labels: (N,) of the queries.
        gallery_features: (M, D); None to search among the queries.
        gallery_labels: (M,).

    Returns:
        In percent, NaN where no query counts. ``recall_at_1``, ``recall_at_5``: queries with an image of their class
        among the nearest 1 or 5. ``map_at_r``: mean average precision among the nearest R, where R is the number of
        gallery images of the query's class (Musgrave et al., A Metric Learning Reality Check, 2020).
    """
    own = gallery_features is None
    known_labels = labels if own else gallery_labels
    sizes = torch.bincount(known_labels, minlength=int(labels.max()) + 1)
    relevant = sizes[labels] - int(own)
    names, count = ('recall_at_1', 'recall_at_5', 'map_at_r'), int((relevant > 0).sum())
    if not count:
        return dict.fromkeys(names, math.nan)
    hits, depth = torch.zeros(3, dtype=torch.float64), max(5, int(relevant.max()))
    for rows, _, index in nearest(features, gallery_features, depth):
        target = relevant[rows].unsqueeze(1)
        right = (known_labels[index] == labels[rows].unsqueeze(1)) & (target > 0)
        rank = torch.arange(1, index.shape[1] + 1, device=index.device)
        precision = right.double().cumsum(1) / rank
        average = (precision * (right & (rank <= target))).sum(1) / target.squeeze(1).clamp(min=1)
        found = right[:, 0].sum(), right[:, :5].any(1).sum(), average.sum()
        hits += torch.stack([value.double().cpu() for value in found])
    return dict(zip(names, (100 * hits / count).tolist(), strict=True))


def nearest(features: Tensor, gallery: Tensor | None, count: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The nearest features by cosine, for some rows at a time: memory is M for each of those, not N x M.

    Args:
        features: (N, D) of any length.
        gallery: (M, D); None for the features themselves, of which each is then not its own neighbour.
        count: how many; at most M, or M - 1 without a gallery.

    Yields:
        The rows, and for these the cosines and the indices (n, count) of the nearest, best first.
    """
    features = F.normalize(features.float(), dim=1)
    known = features if gallery is None else F.normalize(gallery.float(), dim=1)
    count = min(count, len(known) - (gallery is None))
    for start in range(0, len(features), _ROWS):
        rows = slice(start, min(start + _ROWS, len(features)))
        similarity = features[rows] @ known.T
        if gallery is None:
            similarity.diagonal(start).fill_(-2.0)  # a cosine is at least -1
        yield rows, *similarity.topk(count, dim=1)


def knn_accuracy(
    features: Tensor, labels: Tensor, known_features: Tensor, known_labels: Tensor, neighbours: int
) -> float:
    """Accuracy in percent of the k-nearest-neighbour classifier, in which neighbours vote with their cosine.

    Only classes of neighbours can be chosen, which counts where all cosines are negative.

    Args:
        features: (N, D).
        labels: (N,).
        known_features: (M, D), of the training split.
        known_labels: (M,).
        neighbours: how many vote; at most M do.
    """
    classes = int(torch.cat([labels, known_labels]).max()) + 1
    hits = 0
    for rows, cosine, index in nearest(features, known_features, neighbours):
        among = known_labels[index]
        votes = torch.zeros(len(cosine), classes, device=cosine.device).scatter_add_(1, among, cosine)
        chosen = torch.full_like(votes, -math.inf).scatter_(1, among, votes.gather(1, among)).argmax(1)
        hits += (chosen == labels[rows]).sum().item()
    return 100 * hits / len(features)


def ood_scores(logits: Tensor, features: Tensor, known_features: Tensor) -> dict[str, Tensor]:
    """Scores that are higher for images like those trained on than for unknown ones.

    Args:
        logits: (N, K).
        features: (N, D) of the same images, not normalised.
        known_features: (M, D) of training images.

    Returns:
        Each (N,). ``softmax``: the largest probability (Hendrycks and Gimpel, 2017). ``energy``: logsumexp of the
        logits (Liu et al., Energy-based Out-of-distribution Detection, 2020). ``nearest``: largest cosine with a known
        feature (Sun et al., 2022, with k = 1). ``norm``: length of the features.
    """
    logits = logits.double()
    cosines = [cosine[:, 0] for _, cosine, _ in nearest(features, known_features, 1)]
    scores = logits.softmax(1).amax(1), logits.logsumexp(1), torch.cat(cosines), features.double().norm(dim=1)
    return dict(zip(OOD_SCORES, scores, strict=True))


def ood(known: dict[str, Tensor], unknown: dict[str, Tensor]) -> dict[str, float]:
    """How well scores separate unknown images from known ones.

    Args:
        known: scores (N,) by name, higher for known images, such as those of :func:`ood_scores`.
        unknown: the same scores (M,) of unknown images.

    Returns:
        For each score ``<name>_auroc`` and ``<name>_fpr95``, as :func:`separation` defines them.
    """
    found = {name: separation(known[name], unknown[name]) for name in known}
    return {f'{name}_{measure}': value for name, own in found.items() for measure, value in own.items()}


def separation(known: Tensor, unknown: Tensor) -> dict[str, float]:
    """Area under the ROC curve, and unknown images accepted by a threshold that accepts 95% of the known ones.

    Args:
        known: (N,) scores, higher for known images.
        unknown: (M,).

    Returns:
        ``auroc`` and ``fpr95`` in percent: 50 and about 95 for scores without information, 100 and 0 for perfect ones.
    """
    from sklearn.metrics import roc_auc_score  # takes a second, which every run would wait for

    known, unknown = known.double().cpu(), unknown.double().cpu()
    is_known = np.r_[np.ones(len(known)), np.zeros(len(unknown))]
    accepted = (unknown >= threshold(known)).double().mean().item()
    return {'auroc': 100 * float(roc_auc_score(is_known, torch.cat([known, unknown]))), 'fpr95': 100 * accepted}


def threshold(known: Tensor, share: float = 0.95) -> float:
    """The largest threshold at which at least that share of scores (N,) are not below it."""
    place = math.floor((1 - share) * len(known) + 1e-9)
    return known.sort().values[place].item()


def accuracy_by_count(accuracies: Sequence[float | None], counts: Sequence[int]) -> dict[str, float]:
    """Mean accuracy of the classes with many, medium and few training images (Liu et al., 2019).

    Args:
        accuracies: of each class in percent; None for one that was not measured.
        counts: training images of each class.

    Returns:
        ``many`` (more than 100 images), ``medium`` (20 to 100) and ``few`` (fewer than 20), as far as there are such
        classes.
    """
    groups: dict[str, list[float]] = {'many': [], 'medium': [], 'few': []}
    for accuracy, count in zip(accuracies, counts, strict=True):
        if accuracy is not None:
            groups['many' if count > MANY else 'few' if count < FEW else 'medium'].append(accuracy)
    return {name: sum(own) / len(own) for name, own in groups.items() if own}
