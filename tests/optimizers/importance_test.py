import math

import numpy as np
import pytest
from keras import ops

from keras_spectral.layers import importance

rng = np.random.default_rng(0)
MEAN, DEVIATION = rng.normal(size=50), np.exp(rng.normal(size=50))


def _numpy(function, *arrays):
    tensors = [ops.convert_to_tensor(a.astype("float32")) for a in arrays]
    return ops.convert_to_numpy(function(*tensors))


def _abs_moments(mean, deviation):
    """Mean and deviation of |t|, by the definition, in float64."""
    z = mean / (deviation * math.sqrt(2))
    expected = mean * np.vectorize(math.erf)(z)
    expected += deviation * math.sqrt(2 / math.pi) * np.exp(-(z**2))
    return expected, np.sqrt(mean**2 + deviation**2 - expected**2)


@pytest.mark.parametrize(
    ("name", "oracle"),
    [
        ("sensitivity", lambda m, s: m * s),
        ("snr", lambda m, s: np.abs(m) / s),
        ("magnitude", lambda m, s: np.abs(m)),
        ("precision", lambda m, s: 1 / s),
        ("snr_abs", lambda m, s: np.divide(*_abs_moments(m, s))),
    ],
)
def test_each_is_its_formula(name, oracle):
    got = _numpy(getattr(importance, name), MEAN, DEVIATION)
    np.testing.assert_allclose(got, oracle(MEAN, DEVIATION), rtol=1e-5)


def test_snr_abs_at_its_ends():
    means = np.array([0.0, 3.0, 10.0, 30.0, 100.0, 1e4])
    got = _numpy(importance.snr_abs, means, np.ones(6))
    np.testing.assert_allclose(got[0], 1.323608, rtol=1e-5)
    exact = np.divide(*_abs_moments(means[1:3], np.ones(2)))
    np.testing.assert_allclose(got[1:3], exact, rtol=1e-5)
    np.testing.assert_allclose(got[3:], means[3:], rtol=1e-5)
