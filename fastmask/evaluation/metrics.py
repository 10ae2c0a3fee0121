"""Distances between two sets of features, of generated and of reference images.

All take features of shape (N, D), one row per image, and compute in float64.
"""

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

_BLOCK = 512  # rows of a distance matrix at a time; beside 60,000 columns they take 250 MB


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of features.

    Attributes:
        mean: float64, shape (D,).
        cov: unbiased covariance, float64, shape (D, D).
        count: number of rows that it was fitted to; 0 if unknown.
    """

    mean: Tensor
    cov: Tensor
    count: int = 0

    @classmethod
    def of(cls, features: Tensor) -> "Gaussian":
        """Return the Gaussian of features of shape (N, D); a ValueError for fewer than two rows."""
        if len(features) < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {len(features)}")
        rows = features.double()
        mean = rows.mean(0)
        centred = rows - mean
        return cls(mean, centred.T @ centred / (len(rows) - 1), len(rows))

    @functools.cached_property
    def root(self) -> Tensor:
        """Symmetric root of the covariance, (D, D); negative eigenvalues are rounding errors."""
        values, vectors = torch.linalg.eigh(self.cov)
        root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
        return root


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the Frechet distance of two Gaussians (arXiv 1706.08500, eq. 6), which is FID for Inception's features.

    |mean_a - mean_b|^2 + trace(cov_a + cov_b - 2 (cov_a cov_b)^(1/2))

    Raises:
        ValueError: features of different size.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of {len(a.mean)} and of {len(b.mean)} values cannot be compared")
    # (cov_a cov_b)^(1/2) has the trace of the symmetric (cov_b^(1/2) cov_a cov_b^(1/2))^(1/2).
    trace_of_root = torch.linalg.eigvalsh(b.root @ a.cov @ b.root).clamp(min=0).sqrt().sum()
    shift = a.mean - b.mean
    return max(0.0, float(shift @ shift + a.cov.trace() + b.cov.trace() - 2 * trace_of_root))


def frechet_bias(features: Tensor, reference: Gaussian, *, seed: int = 0) -> float:
    """Return the expected excess of the Frechet distance of N features over that of infinitely many.

    The distance of n samples is d + c / n to first order (arXiv 1911.07023, section 3), so the excess c / N is the
    difference between the distance of N / 2 samples, averaged over two halves, and that of N. The halves are drawn at
    random: where classes come in turn, every second sample is of every second class.

    Args:
        features: shape (N, D), at least 4 rows.
        reference: Gaussian of the reference features.
        seed: seed of the halves.
    """
    whole = frechet_distance(Gaussian.of(features), reference)
    halves = [frechet_distance(Gaussian.of(half), reference) for half in _shuffled(features, seed).tensor_split(2)]
    return sum(halves) / 2 - whole


def extrapolated_frechet(features: Tensor, reference: Gaussian, *, points: int = 15, seed: int = 0) -> float:
    """Return the Frechet distance extrapolated to infinitely many samples (arXiv 1911.07023, section 4.1).

    A line in 1 / n is fitted to the distances of subsets of n samples, from a tenth of them to all; each is the mean
    over as many disjoint subsets as there are.

    Args:
        features: shape (N, D), at least 20 rows.
        reference: Gaussian of the reference features.
        points: number of sizes.
        seed: seed of the subsets.
    """
    if len(features) < 20:
        raise ValueError(f"the extrapolation needs at least 20 images, not {len(features)}")
    shuffled = _shuffled(features, seed)
    sizes = np.linspace(max(2, len(features) // 10), len(features), points).astype(int)
    distances = []
    for size in sizes:
        subsets = [part for part in torch.split(shuffled, int(size)) if len(part) == size]
        distances.append(np.mean([frechet_distance(Gaussian.of(part), reference) for part in subsets]))
    _, intercept = np.polyfit(1 / sizes, distances, 1)
    return float(intercept)


def _shuffled(rows: Tensor, seed: int) -> Tensor:
    return rows[torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))]


def inception_score(logits: Tensor, *, splits: int = 10) -> float:
    """Return exp E KL(p(class | image) || p(class)), the mean of consecutive splits (arXiv 1606.03498, section 4).

    Args:
        logits: shape (N, classes); without the bias of the last layer, as in the original evaluation.
        splits: number of splits, each of which has its own p(class); fewer for fewer images.
    """
    scores = []
    for part in logits.double().chunk(min(splits, len(logits))):
        log_p = part.log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(len(part))
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())


def kernel_distance(a: Tensor, b: Tensor, *, subsets: int = 100, size: int = 1000, seed: int = 0) -> float:
    """Return the squared MMD with the kernel (x y / D + 1)^3, which is KID for Inception's features.

    The mean of the unbiased estimates of random subsets (arXiv 1801.01401, section 4).

    Args:
        a: shape (N, D).
        b: shape (M, D).
        subsets: number of subsets.
        size: number of rows of each; all rows of a smaller set.
        seed: seed of the subsets.
    """
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError("the kernel distance needs at least 2 images on each side")
    generator = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        x, y = (rows[torch.from_numpy(generator.choice(len(rows), size, replace=False))].double() for rows in (a, b))
        xx, yy, xy = (((left @ right.T) / x.shape[1] + 1) ** 3 for left, right in ((x, x), (y, y), (x, y)))
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (size * (size - 1))
        estimates.append(within - 2 * xy.mean())
    return float(torch.stack(estimates).mean())


def manifold_metrics(generated: Tensor, reference: Tensor, *, k: int = 3, k_density: int = 5) -> dict[str, float]:
    """Return precision and recall (arXiv 1904.06991, eq. 2), density and coverage (arXiv 2002.09797, eq. 5 and 6).

    A set's manifold is the union of balls around its points, with the distance to the k-th nearest neighbour as radius.

    Args:
        generated: shape (N, D), more than ``k_density`` rows.
        reference: shape (M, D), more than ``k_density`` rows.
        k: neighbours for precision and recall.
        k_density: neighbours for density and coverage.

    Returns:
        `precision`: fraction of generated images in the reference manifold. `recall`: fraction of reference images in
        the generated manifold. `density`: mean number of reference balls around a generated image, over k; about 1 for
        two sets of one distribution. `coverage`: fraction of reference balls with a generated image inside.
    """
    fewest = min(len(generated), len(reference))
    if fewest <= max(k, k_density):
        raise ValueError(f"precision and recall need more than {max(k, k_density)} images on each side, not {fewest}")
    radius = _neighbour_distance(reference, k)
    radius_density = _neighbour_distance(reference, k_density)
    radius_generated = _neighbour_distance(generated, k)
    inside = count = 0
    nearest = torch.full((len(reference),), torch.inf, dtype=torch.float64, device=reference.device)
    is_recalled = torch.zeros(len(reference), dtype=torch.bool, device=reference.device)
    for rows, distances in _distances(generated, reference):
        inside += int((distances <= radius).any(1).sum())
        count += int((distances <= radius_density).sum())
        nearest = torch.minimum(nearest, distances.amin(0))
        is_recalled |= (distances <= radius_generated[rows, None]).any(0)
    return {
        "precision": inside / len(generated),
        "recall": int(is_recalled.sum()) / len(reference),
        "density": count / (k_density * len(generated)),
        "coverage": int((nearest <= radius_density).sum()) / len(reference),
    }


def nearest_distance(a: Tensor, b: Tensor) -> float:
    """Return the mean distance of the rows of ``a`` to their nearest rows of ``b``."""
    return float(torch.cat([distances.amin(1) for _, distances in _distances(a, b)]).mean())


def _neighbour_distance(rows: Tensor, k: int) -> Tensor:
    """Return the distance of each row to its k-th nearest other row, (N,)."""
    return torch.cat([distances.kthvalue(k + 1, 1).values for _, distances in _distances(rows, rows)])


def _distances(a: Tensor, b: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the rows of ``a``, and their Euclidean distances to all rows of ``b``."""
    centre = b.double().mean(0)  # less cancellation
    a, b = a.double() - centre, b.double() - centre
    for start in range(0, len(a), _BLOCK):
        rows = slice(start, min(start + _BLOCK, len(a)))
        yield rows, torch.cdist(a[rows], b)
