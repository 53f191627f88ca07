"""Each method in a few lines of float64 numpy, after its paper or mergekit's definition: slow, obvious, separate.

Every oracle takes (base or None, experts, weights, options) and whole tensors, and shares nothing with the package.
"""

import numpy as np


def linear(base, experts, weight, normalize=True):
    total = sum(w * x for w, x in zip(weight, experts, strict=True))
    return total / sum(weight) if normalize else total


def passthrough(base, experts, scale=1.0):
    return scale * experts[0]


def _arc(u, v, t, straight):
    cosine = np.clip((u * v).sum() / max(np.linalg.norm(u) * np.linalg.norm(v), 1e-30), -1, 1)
    if straight(cosine):
        return (1 - t) * u + t * v
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * u + np.sin(t * theta) * v) / np.sin(theta)


def slerp(base, experts, t):
    return _arc(base, experts[0], t, lambda c: abs(c) > 0.9995)


def nuslerp(base, experts, weight, nuslerp_flatten=True, nuslerp_row_wise=False):
    t = weight[1] / (weight[0] + weight[1])
    origin = 0 if base is None else base
    u, v = experts[0] - origin, experts[1] - origin

    def arc(a, b):
        return _arc(a, b, t, lambda c: 1 - c * c <= 1e-16)

    if nuslerp_flatten or u.ndim < 2:
        return origin + arc(u, v)
    if nuslerp_row_wise:
        return origin + np.stack([arc(a, b) for a, b in zip(u.T, v.T, strict=True)], 1)
    return origin + np.stack([arc(a, b) for a, b in zip(u, v, strict=True)])


def model_stock(base, experts, filter_wise=False):
    if filter_wise and base.ndim > 1:
        rows = [model_stock(b, [e[i] for e in experts]) for i, b in enumerate(base)]
        return np.stack(rows)
    deltas = [e - base for e in experts]
    cosines = [
        (a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)) for i, a in enumerate(deltas) for b in deltas[i + 1 :]
    ]
    c, n = np.mean(cosines), len(experts)
    t = n * c / (1 + (n - 1) * c)
    return t * sum(experts) / n + (1 - t) * base


def _descending(delta):
    """Places by falling magnitude, equal ones by index."""
    return np.argsort(-np.abs(delta.reshape(-1)), kind="stable")


def _mask(delta, first, last):
    mask = np.zeros(delta.size)
    mask[_descending(delta)[first:last]] = 1
    return mask.reshape(delta.shape)


def largest(delta, density):
    if density >= 1:
        return np.ones_like(delta)
    return _mask(delta, 0, max(1, int(density * delta.size)) if density > 0 else 0)


def crumbs(delta, density, gamma):
    if density >= 1:
        return np.ones_like(delta)
    n, kept, top = delta.size, int(density * delta.size), int(gamma * delta.size)
    smallest = max(0, n - kept - top)
    return _mask(delta, n - smallest - kept, n - smallest)


def vectors(base, experts, weight, masks, lambda_=1.0, normalize=False, rescale=False, elect=False):
    """The task-vector family, given masks."""
    votes = []
    for expert, mask in zip(experts, masks, strict=True):
        delta = expert - base
        kept = delta * mask
        if rescale and np.abs(kept).sum() > 1e-7:
            kept = kept * np.abs(delta).sum() / np.abs(kept).sum()
        votes.append(kept)
    votes = np.stack([w * v for w, v in zip(weight, votes, strict=True)])
    weights = np.asarray(weight).reshape(-1, *[1] * base.ndim)
    if elect:
        majority = np.where(votes.sum(0) >= 0, 1, -1)
        agree = np.sign(votes) == majority
        total, divisor = (votes * agree).sum(0), (weights * agree).sum(0)
        divisor = np.where(divisor == 0, 1, divisor)
    else:
        total, divisor = votes.sum(0), weights.sum()
    return base + lambda_ * (total / divisor if normalize else total)


def philox(counter, key):
    """Philox4x32-10, Salmon et al. 2011."""
    c, k = [int(x) for x in counter], [int(x) for x in key]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 & 0xFFFFFFFF, (p0 >> 32) ^ c[3] ^ k[1], p0 & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def random_words(shape, seed, tensor_id, expert):
    numel = int(np.prod(shape))
    words = [
        w
        for q in range(-(-numel // 4))
        for w in philox((q & 0xFFFFFFFF, q >> 32, tensor_id, expert), (seed & 0xFFFFFFFF, seed >> 32))
    ]
    return np.array(words[:numel]).reshape(shape)


def dropped(shape, density, seed, tensor_id, expert):
    """DARE's mask, element by element."""
    return (random_words(shape, seed, tensor_id, expert) < round(density * 2**32)).astype(float)


def dropped_by_rank(delta, density, epsilon, seed, tensor_id, expert):
    """DELLA's mask."""
    ranks = np.argsort(np.argsort(np.abs(delta), axis=-1, kind="stable"), axis=-1)
    chances = density - epsilon + 2 * epsilon * ranks / (delta.shape[-1] - 1)
    return (random_words(delta.shape, seed, tensor_id, expert) < chances * 2**32).astype(float)
