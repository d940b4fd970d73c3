"""The fifteen losses once more, from the papers' formulas, as loops over samples, classes and pairs in float64.

Nothing here is shared with the package: no normalisation helper, no cross-entropy, no trick. Every function takes
``(outputs, target, loss)`` and the loss's options by keyword, with the documented defaults written out again; all but
Center-Loss, whose centres are state, ignore ``loss``. Values are torch scalars, so that autograd gives the gradient.

``target`` is (N,) indices or (N, K) probabilities: a sample's loss is then the weighted mean over its classes.
"""

import copy
import itertools
import math

import torch

# --- small parts -----------------------------------------------------------------------------------------------------


def weights(target, num_classes):
    """Rows of class weights as plain floats: one-hot for indices."""
    if target.ndim == 2:
        return target.double().tolist()
    return [[float(int(y) == k) for k in range(num_classes)] for y in target]


def smoothed(target, num_classes, smoothing):
    """Class weights with label smoothing, which only indices get."""
    rows = weights(target, num_classes)
    if target.ndim == 2:
        return rows
    return [[(1 - smoothing) * w + smoothing / num_classes for w in row] for row in rows]


def number(x):
    """A plain float, without gradient."""
    return x.item()


def log_sum_exp(row):
    top = max(number(x) for x in row)
    return top + sum(torch.exp(x - top) for x in row).log()


def softmax(row):
    normaliser = log_sum_exp(row)
    return [(x - normaliser).exp() for x in row]


def ce_rows(rows, classes):
    """Mean over samples of sum_k w_k (log sum exp z - z_k)."""
    total = 0
    for row, weight in zip(rows, classes, strict=True):
        normaliser = log_sum_exp(row)
        total = total + sum(w * (normaliser - z) for w, z in zip(weight, row, strict=True) if w)
    return total / len(rows)


def ce(logits, target, smoothing=0.0):
    return ce_rows(logits, smoothed(target, logits.shape[1], smoothing))


def norm(vector):
    return sum(x * x for x in vector).sqrt()


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean_over_classes(per_class, target, n, num_classes):
    """Mean over samples of sum_k w_nk per_class(n, k)."""
    rows = weights(target, num_classes)
    total = 0
    for i in range(n):
        total = total + sum(rows[i][k] * per_class(i, k) for k in range(num_classes) if rows[i][k])
    return total / n


def margin_softmax(cosine, target, scale, own):
    """Cross-entropy of s cos, the cosine of the class itself replaced by own(cos)."""

    def per_class(i, k):
        row = [scale * (own(c) if j == k else c) for j, c in enumerate(cosine[i])]
        return log_sum_exp(row) - row[k]

    return mean_over_classes(per_class, target, len(cosine), cosine.shape[1])


# --- losses of logits ------------------------------------------------------------------------------------------------


def focal(outputs, target, loss, gamma=2.0, alpha=None):
    logits = outputs.logits
    factor = alpha if isinstance(alpha, (list, tuple)) else [1.0 if alpha is None else alpha] * logits.shape[1]

    def per_class(i, k):
        log_p = logits[i][k] - log_sum_exp(logits[i])
        return -factor[k] * (1 - log_p.exp()) ** gamma * log_p

    return mean_over_classes(per_class, target, *logits.shape)


def complement(logits, target, divisor='paper'):
    """(1 / (N (K - 1))) sum_n sum_{j != y} q log q, q = p / (1 - p_y)."""
    n, num_classes = logits.shape
    total = 0
    for i, y in enumerate(target.tolist()):
        p = softmax(logits[i])
        for j in range(num_classes):
            if j != y:
                q = p[j] / (1 - p[y])
                total = total + q * q.log()
    return total / (n * {'paper': num_classes - 1, 'code': num_classes}[divisor])


def cot(outputs, target, loss, mode='alternate', divisor='paper', smoothing=0.0, step=0):
    if mode == 'sum':
        return ce(outputs.logits, target, smoothing) + complement(outputs.logits, target, divisor)
    if step % 2 == 0:
        return ce(outputs.logits, target, smoothing)
    return complement(outputs.logits, target, divisor)


def mc(outputs, target, loss, num_channels=None, discriminality_weight=1.5, diversity_weight=20.0):
    """The mask is random: of all masks that drop half of each class's channels, the one that the loss used."""
    maps, logits = outputs.feature_map, outputs.logits
    n, num_classes = logits.shape
    xi = maps.shape[1] // num_classes
    locations = range(maps.shape[2] * maps.shape[3])
    flat = maps.reshape(n, num_classes, xi, -1)
    diversity = 0
    for i, k in itertools.product(range(n), range(num_classes)):
        soft = [softmax(channel) for channel in flat[i][k]]
        diversity = diversity + sum(largest([row[s] for row in soft]) for s in locations) / num_classes / n
    rest = ce(logits, target) + diversity_weight * (1 - diversity / xi)

    kept_sets = list(itertools.combinations(range(xi), xi - xi // 2))
    pooled = {
        (i, k, kept): sum(largest([flat[i][k][j][s] for j in kept]) for s in locations) / len(locations)
        for i, k, kept in itertools.product(range(n), range(num_classes), kept_sets)
    }
    numbers = {key: number(value) for key, value in pooled.items()}
    y = weights(target, num_classes)

    def rows(table, mask):
        return [[table[i, k, mask[k]] for k in range(num_classes)] for i in range(n)]

    with torch.no_grad():
        seen = (copy.deepcopy(loss)(outputs, target) - rest).item()
    masks = itertools.product(kept_sets, repeat=num_classes)
    nearest = min(masks, key=lambda mask: abs(discriminality_weight * plain_ce(rows(numbers, mask), y) - seen))
    return rest + discriminality_weight * ce_rows(rows(pooled, nearest), y)


def largest(values):
    return max(values, key=number)


def plain_ce(rows, classes):
    """ce_rows for plain floats."""
    total = 0.0
    for row, weight in zip(rows, classes, strict=True):
        normaliser = math.log(sum(math.exp(x) for x in row))
        total += sum(w * (normaliser - z) for w, z in zip(weight, row, strict=True))
    return total / len(rows)


def cc(outputs, target, loss, weight=1.0, eps=1e-8, smoothing=0.0):
    """The N x N form: all pairs i < j."""
    value = ce(outputs.logits, target, smoothing)
    rows = weights(target, outputs.logits.shape[1])
    if sum(any(row[k] for row in rows) for k in range(len(rows[0]))) < 2:
        return value  # a single class: no term
    return value + weight * pair_ratio(outputs.attention, rows, eps)


def pair_ratio(attention, rows, eps):
    """Sum of <y_i, y_j> d_ij over the sum of (1 - <y_i, y_j>) d_ij plus eps, over i < j."""
    intra = inter = 0 * attention.sum()
    for i, j in itertools.combinations(range(len(attention)), 2):
        distance = sum((a - b) ** 2 for a, b in zip(attention[i], attention[j], strict=True))
        same = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        intra = intra + same * distance
        inter = inter + (1 - same) * distance
    return intra / (inter + eps)


def center(outputs, target, loss, weight=0.008, alpha=0.5, reduction='mean', smoothing=0.0):
    centers = loss.centers.detach().double()
    features = outputs.features

    def per_class(i, k):
        return sum((x - c) ** 2 for x, c in zip(features[i], centers[k], strict=True))

    squares = mean_over_classes(per_class, target, len(features), len(centers))
    if reduction == 'sum':
        squares = squares * len(features)
    return ce(outputs.logits, target, smoothing) + weight / 2 * squares


def moved_centers(centers, features, target, alpha=0.5):
    """Centres after one step: dc_j = sum_{y_n = j} (c_j - f_n) / (1 + n_j); c_j <- c_j - alpha dc_j."""
    moved = centers.clone()
    for j in range(len(centers)):
        members = [features[n] for n in range(len(features)) if int(target[n]) == j]
        if members:
            step = sum(centers[j] - f for f in members) / (1 + len(members))
            moved[j] = centers[j] - alpha * step
    return moved


# --- losses of cosines with learnt class vectors ---------------------------------------------------------------------


def annealing(iteration, base=1000.0, gamma=0.12, power=1.0, lowest=5.0):
    """lambda of A-Softmax."""
    return max(lowest, base * (1 + gamma * iteration) ** -power)


def psi(cosine, margin):
    """(-1)^k cos(m theta) - 2 k on theta in [k pi / m, (k + 1) pi / m]."""
    theta = torch.acos(cosine)
    k = min(int(margin * number(theta) / math.pi), margin - 1)
    return (-1) ** k * torch.cos(margin * theta) - 2 * k


def asoftmax(
    outputs,
    target,
    loss,
    margin=4,
    lambda_base=1000.0,
    lambda_gamma=0.12,
    lambda_power=1.0,
    lambda_min=5.0,
    step=0,
):
    """``step`` optimizer steps have been taken, so this is iteration step + 1."""
    cosine = outputs.cosine
    lam = annealing(step + 1, lambda_base, lambda_gamma, lambda_power, lambda_min)

    def per_class(i, k):
        length = norm(outputs.features[i])
        row = [length * c for c in cosine[i]]
        row[k] = length * (lam * cosine[i][k] + psi(cosine[i][k], margin)) / (1 + lam)
        return log_sum_exp(row) - row[k]

    return mean_over_classes(per_class, target, *cosine.shape)


def norm_logits(outputs):
    return [[norm(f) * c for c in row] for f, row in zip(outputs.features, outputs.cosine, strict=True)]


def ical(outputs, target, loss, weight=5.0):
    num_classes = len(outputs.weight)
    pairs = sum(dot(a, b) for a in outputs.weight for b in outputs.weight)
    classes = weights(target, num_classes)
    return ce_rows(norm_logits(outputs), classes) + weight / num_classes**2 * pairs


def fical(outputs, target, loss, weight=5.0, exponent=1.0, eps=1e-8, confusion='soft', normalize='weights', **_):
    rows, w = norm_logits(outputs), outputs.weight
    num_classes = len(w)
    y = weights(target, num_classes)
    rates = confusion_rates([[number(z) for z in row] for row in rows], y, confusion)
    total = share = 0
    for i, j in itertools.permutations(range(num_classes), 2):
        s = ((rates[i][j] + rates[j][i]) / 2) ** exponent
        total = total + s * dot(w[i], w[j])
        share = share + s
    divisor = max(share, eps) if normalize == 'weights' else num_classes**2
    return ce_rows(rows, y) + weight * total / divisor


def confusion_rates(logits, y, confusion):
    """R_ij: of the samples of class i in the batch, the mean share that is given to class j. Plain floats."""
    num_classes = len(y[0])
    rates = [[0.0] * num_classes for _ in range(num_classes)]
    for i in range(num_classes):
        count = sum(row[i] for row in y)
        for z, row in zip(logits, y, strict=True):
            if confusion == 'hard':
                given = [float(j == max(range(num_classes), key=z.__getitem__)) for j in range(num_classes)]
            else:
                given = [math.exp(x - max(z)) for x in z]
            for j in range(num_classes):
                rates[i][j] += row[i] * given[j] / sum(given) / count if count else 0.0
    return rates


def amsoftmax(outputs, target, loss, scale=30.0, margin=0.35):
    return margin_softmax(outputs.cosine, target, scale, lambda c: c - margin)


def arcface(outputs, target, loss, scale=64.0, margin=0.5, threshold=True):
    def own(c):
        if threshold and number(c) <= math.cos(math.pi - margin):
            return c - margin * math.sin(margin)
        return torch.cos(torch.acos(c) + margin)

    return margin_softmax(outputs.cosine, target, scale, own)


def cm(outputs, target, loss, scale=64.0, m1=1.0, m2=0.3, m3=0.2):
    def own(c):
        if m1 * math.acos(number(c)) + m2 >= math.pi:
            assert m1 == 1, 'no source states how the curve goes on beyond this angle'
            return c - m2 * math.sin(m2) - m3
        return torch.cos(m1 * torch.acos(c) + m2) - m3

    return margin_softmax(outputs.cosine, target, scale, own)


# --- losses of features and fixed centroids --------------------------------------------------------------------------


def cos_to(outputs, i, k):
    return dot(outputs.features[i], outputs.centroids[k]) / norm(outputs.features[i])


def pedcc(outputs, target, loss, scale=7.5, margin=0.35, weight=1.0, root=1.0, reduction='mean'):
    n, num_classes = len(outputs.features), len(outputs.centroids)
    cosine = torch.stack([torch.stack([cos_to(outputs, i, k) for k in range(num_classes)]) for i in range(n)])

    def per_class(i, k):
        unit = [x / norm(outputs.features[i]) for x in outputs.features[i]]
        return sum((x - a) ** 2 for x, a in zip(unit, outputs.centroids[k], strict=True))

    mse = mean_over_classes(per_class, target, n, num_classes) * (n if reduction == 'sum' else 1)
    return margin_softmax(cosine, target, scale, lambda c: c - margin) + weight * mse ** (1 / root)


def cosine(outputs, target, loss):
    return mean_over_classes(
        lambda i, k: (1 - cos_to(outputs, i, k)) ** 2, target, len(outputs.features), len(outputs.centroids)
    )


def nac(outputs, target, loss, delta=0.05, denominator='root', **_):
    """``delta`` is the one in force; it is 0.05 in the first epoch."""

    def per_class(i, k):
        f = outputs.features[i]
        length = norm(f)
        below = length + delta if denominator == 'sum' else (length**2 + delta**2).sqrt()
        return (1 - dot(f, outputs.centroids[k]) / below) ** 2

    return mean_over_classes(per_class, target, len(outputs.features), len(outputs.centroids))


def self_correlation(features, centroids, target):
    """Rows X = f / |f| - a_y; R = X'X / (N - 1); (1 / (D - 1)) sum_{i != j} R_ij^2. 0 for a single sample."""
    n, d = features.shape
    if n < 2:
        return 0 * features.sum()
    y = weights(target, len(centroids))
    x = []
    for i in range(n):
        own = [sum(w * a[c] for w, a in zip(y[i], centroids, strict=True)) for c in range(d)]
        x.append([f / norm(features[i]) - a for f, a in zip(features[i], own, strict=True)])
    total = 0
    for i, j in itertools.permutations(range(d), 2):
        total = total + (sum(row[i] * row[j] for row in x) / (n - 1)) ** 2
    return total / (d - 1)


def pod(outputs, target, loss, weight=1.0, **options):
    sc = self_correlation(outputs.features, outputs.centroids, target)
    return nac(outputs, target, loss, **options) + weight * sc


REFERENCES = {
    'amsoftmax': amsoftmax,
    'arcface': arcface,
    'asoftmax': asoftmax,
    'cc': cc,
    'center': center,
    'cm': cm,
    'cosine': cosine,
    'cot': cot,
    'fical': fical,
    'focal': focal,
    'ical': ical,
    'mc': mc,
    'nac': nac,
    'pedcc': pedcc,
    'pod': pod,
}
