"""Analyses of features, as in POD-Loss's paper: norms, eigenvalues, distances, and classifiers of features.

And of CC-Loss's attention: whether harder classes get more channels, as that paper's conclusion says.
"""

import numpy as np
from scipy import stats
from scipy.spatial import distance
from sklearn.covariance import ledoit_wolf_shrinkage

__all__ = [
    'accuracy_by_norm',
    'channels_by_accuracy',
    'class_centres',
    'class_distances',
    'cosine_accuracy',
    'eigenvalue_variance',
    'gaussian_accuracy',
]


def accuracy_by_norm(features: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
    """Accuracy in % of the images whose features are shorter than the mean, and of the others (POD-Loss, table 1).

    Args:
        features: (N, D).
        correct: (N,) bool, whether the model is right.

    Returns:
        NaN for a side without images.
    """
    norms = np.linalg.norm(features, axis=1)
    below = norms < norms.mean()
    return tuple(100 * float(side.mean()) if side.size else float('nan') for side in (correct[below], correct[~below]))


def channels_by_accuracy(attention: np.ndarray, labels: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
    """How many channels attention opens, and Spearman's rank correlation over classes of that with accuracy.

    Open are those above 1/2 in the mean of a class [assumption: CC-Loss says that harder classes get more channels, not
    how it counts them]. The correlation is negative if harder classes get more.

    Args:
        attention: (N, C), in (0, 1).
        labels: (N,).
        correct: (N,) bool, whether the model is right.

    Returns:
        Mean number over the classes, in [0, C], and the correlation, in [-1, 1], NaN if either is the same for all.
    """
    classes, means = class_centres(attention, labels)
    channels = (means > 0.5).sum(1)
    accuracies = np.array([correct[labels == k].mean() for k in classes])
    varied = np.ptp(channels) > 0 and np.ptp(accuracies) > 0
    rank = float(stats.spearmanr(channels, accuracies).statistic) if varied else float('nan')
    return float(channels.mean()), rank


def class_centres(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Classes that occur (K,), and the mean (K, D) of the features (N, D) of each."""
    classes = np.unique(labels)
    return classes, np.stack([features[labels == k].mean(0) for k in classes])


def class_distances(features: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Mean distance of features (N, D) to their class's centre, and of the centres to one another, in their own unit.

    The second is NaN for a single class.
    """
    classes, centres = class_centres(features, labels)
    intra = np.linalg.norm(features - centres[np.searchsorted(classes, labels)], axis=1).mean()
    between = distance.pdist(centres)
    return float(intra), float(between.mean()) if between.size else float('nan')


def eigenvalue_variance(features: np.ndarray, labels: np.ndarray) -> float:
    """How unevenly features scatter around their class's centre (POD-Loss, table 5).

    Variance of the D eigenvalues of the covariance of unit features (N, D) within classes: 0 if they scatter alike in
    all directions, which the SC term is for. That paper does not state what the eigenvalues are of [assumption,
    from the size of its values]: compare losses, not with it.
    """
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    classes, centres = class_centres(unit, labels)
    scatter = unit - centres[np.searchsorted(classes, labels)]
    return float(np.linalg.eigvalsh(scatter.T @ scatter / len(scatter)).var())


def cosine_accuracy(features: np.ndarray, labels: np.ndarray, vectors: np.ndarray) -> float:
    """Accuracy in % of the classifier that takes the class vector at the smallest angle.

    Args:
        features: (N, D).
        labels: (N,).
        vectors: (K, D), one per class.
    """
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return 100 * float(((features @ unit.T).argmax(1) == labels).mean())


def gaussian_accuracy(
    known_features: np.ndarray, known_labels: np.ndarray, features: np.ndarray, labels: np.ndarray
) -> float:
    """Accuracy in % of Gaussian discriminant analysis (POD-Loss, table 9): a Gaussian and a prior for each class.

    Covariances are shrunk by Ledoit and Wolf's rule, since classes may have fewer images than features have dimensions
    [assumption; that paper does not state how it fits them], and have a millionth of the mean variance added.

    Args:
        known_features: (M, D), of the training split.
        known_labels: (M,).
        features: (N, D).
        labels: (N,).
    """
    floor = 1e-6 * max(known_features.var(0).mean(), 1e-12)
    classes = np.unique(known_labels)
    scores = []
    for k in classes:
        own = known_features[known_labels == k].astype(np.float64)
        scores.append(_log_density(features, own, floor) + np.log(len(own) / len(known_labels)))
    return 100 * float((classes[np.argmax(scores, axis=0)] == labels).mean())


def _log_density(features: np.ndarray, own: np.ndarray, floor: float) -> np.ndarray:
    """Logarithm (N,) of the density of a class's Gaussian, but for what is the same for all Gaussians of D dimensions.

    The shrunk covariance is a multiple of the identity, but for the few directions in which the class's images (M, D)
    vary: nothing of D x D has to be decomposed.
    """
    shrinkage, mean = ledoit_wolf_shrinkage(own), own.mean(0)
    _, sizes, directions = np.linalg.svd(own - mean, full_matrices=False)
    rest = shrinkage * own.var(0).mean() + floor
    variances = (1 - shrinkage) * sizes**2 / len(own) + rest
    offsets = features - mean
    along = (offsets @ directions.T) ** 2
    distances = (along / variances).sum(1) + ((offsets**2).sum(1) - along.sum(1)) / rest
    return -0.5 * (distances + np.log(variances).sum() + (len(mean) - len(sizes)) * np.log(rest))
