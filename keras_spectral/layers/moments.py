"""Moments: what is known of a layer's inputs."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Moments:
    """The first two moments of the rows that a kernel multiplies.

    Attributes:
        count: How many rows were seen.
        mean: Their mean (n_in,).
        second: The mean of x^T x, (n_in, n_in); of a layer with very many
            inputs its diagonal (n_in,).
    """

    count: int
    mean: np.ndarray
    second: np.ndarray

    @property
    def whole(self) -> bool:
        """Whether `second` is a matrix."""
        return self.second.ndim == 2

    def matrix(self) -> np.ndarray:
        """`second` as a matrix (n_in, n_in), in float64."""
        second = np.float64(self.second)
        return second if self.whole else np.diag(second)

    def components(self) -> tuple[np.ndarray, np.ndarray]:
        """Principal components of the centred rows.

        Returns:
            Variances (n_in,), the largest first, and directions (n_in, n_in),
            one a column. Of a diagonal the directions are unit vectors.
        """
        mean = np.float64(self.mean)
        values, vectors = np.linalg.eigh(self.matrix() - np.outer(mean, mean))
        return np.maximum(values[::-1], 0), vectors[:, ::-1]
