"""Experts with falling spectra, and experts whose task vectors are nothing, equal, or of one direction."""

import numpy as np

DEFICIENT = ("zero", "equal", "rank one", "all zero", "opposite")


def material(shape, sizes, seed=0):
    """A base and experts that share some directions; `sizes` are the task vectors' largest singular values."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.05, shape).astype(np.float32)
    shared = rng.normal(size=shape)
    found = []
    for size in sizes:
        u, _, v = np.linalg.svd(rng.normal(size=shape) + 0.4 * shared, full_matrices=False)
        found.append((base + size * (u * 0.9 ** np.arange(len(v))) @ v).astype(np.float32))
    return base, found


def deficient(kind, base, experts):
    """Experts of one of the kinds in DEFICIENT, near a base of 20 x 33."""
    thin = (base + np.outer(np.arange(20), np.ones(33)) * 1e-3).astype(np.float32)
    return {
        "zero": [*experts, base],
        "equal": [experts[0]] * 3,
        "rank one": [thin, thin, experts[0]],
        "all zero": [base] * 3,
        "opposite": [experts[0], 2 * base - experts[0]],
    }[kind]


def check_small(kind, mine, base, experts):
    """What a merge adds to the base is finite, no longer than a few task vectors, and nothing where they are."""
    assert np.isfinite(mine).all()
    assert np.linalg.norm(mine) < 5 * max(np.linalg.norm(each - base) for each in experts) + 1e-30
    if kind == "all zero":
        assert not mine.any()
