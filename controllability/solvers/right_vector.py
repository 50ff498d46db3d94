"""The free right vector: ΔW = δ aᵀ is exact at z for every a with aᵀz = 1.  Which one disturbs others least?  (theory 7; new)"""

from controllability.arrays import Array, arithmetic

CALM = 0.1  # weight of ‖a‖², by which noise in z itself is magnified, beside what the other inputs feel


def right_vector(z: Array, others: Array) -> Array:
    """a (N, in) with aᵀz = 1 that minimises mean_j (aᵀk_j)²/‖k_j‖² + 0.1·‖a‖², for z (N, in) and k_j the rows of ``others`` (N, T, in).

    Each other input counts relative to its own size; rows of zeros take no part.  ‖a‖‖z‖ stays below √11: without others a = z/‖z‖².

    >>> import numpy as np
    >>> z, k = np.array([[1.0, 1.0]]), np.array([[[1.0, 0.0]]])
    >>> a = right_vector(z, k)
    >>> bool(np.isclose((a * z).sum(), 1)), bool(abs((a * k[0]).sum()) < 0.1 < abs((z / 2 * k[0]).sum()))
    (True, True)
    """
    xp = arithmetic(z)
    size = xp.largest(z)
    z = z / size  # without squaring a number that is too large or too small to be squared
    k = others / xp.or_one(xp.largest(others))
    norms = xp.sum(k * k)
    k = k / xp.or_one(xp.sqrt(norms))
    weight = CALM * xp.or_one(((norms != 0) + 0 * norms).sum(-2)[..., None, :])  # in the numbers' own dtype
    kz, kk = xp.matmul(k, z[..., None]), xp.matmul(k, k.swapaxes(-1, -2))
    a = z - xp.matmul(k.swapaxes(-1, -2), xp.solve(kk + weight * xp.identity(k.shape[-2], kk), kz))[..., 0]
    return a / (xp.sum(a * z) * size)
