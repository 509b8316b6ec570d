"""What pairs are fitted to, against least squares in numpy."""

import dataclasses

import keras
import layer_cases
import numpy as np
import pytest
from keras import ops

from keras_spectral._internal import linalg
from keras_spectral.compression import fit as fits
from keras_spectral.compression.fit import Fit
from keras_spectral.compression.fit import compensable
from keras_spectral.compression.fit import joined
from keras_spectral.compression.fit import part_rows
from keras_spectral.compression.pairs import fitted_pair
from keras_spectral.compression.spectrum import Choice
from keras_spectral.kernels import kernel_view
from keras_spectral.layers.moments import Moments

RNG = np.random.default_rng(0)
LINEAR = layer_cases.DENSE + layer_cases.EINSUM + layer_cases.CONV
CASES = pytest.mark.parametrize(
    "case",
    layer_cases.on_this_backend(LINEAR + layer_cases.GROUPED),
    ids=lambda case: case.name,
)


def _numpy(x):
    return np.float64(ops.convert_to_numpy(x))


def _view(case):
    keras.utils.set_random_seed(0)
    layer = case.make()
    layer(case.inputs())
    if getattr(layer, "bias", None) is not None:
        layer.bias.assign(RNG.normal(size=layer.bias.shape))
    return kernel_view(layer)


def _rows(view, count=400, shift=1.0):
    """Correlated rows whose mean is not 0."""
    mix = RNG.normal(size=(view.n_in, view.n_in))
    return RNG.normal(size=(count, view.n_in)) @ mix + shift


def _moments(rows):
    return Moments(len(rows), rows.mean(axis=0), rows.T @ rows / len(rows))


def _best(rows, wanted, rank):
    """The kernel of a rank whose outputs are nearest, by reduced regression."""
    kernel = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    _, _, vt = np.linalg.svd(rows @ kernel, full_matrices=False)
    return kernel @ vt[:rank].T @ vt[:rank]


@pytest.fixture
def undamped(monkeypatch):
    monkeypatch.setattr(fits, "_DAMPING", 1e-9)


@pytest.mark.once
@CASES
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("sequential", [False, True])
def test_the_pair_is_the_best_of_its_rank(case, centred, sequential, undamped):
    """On every kind of layer, each block of the diagonal on its own rows."""
    view = _view(case)
    if centred and not compensable(view):
        pytest.skip("no bias that could make up for the mean")
    before = _rows(view)
    after = before + RNG.normal(size=before.shape) if sequential else before
    fit = Fit(view, _moments(after), centred=centred)
    if sequential:
        cross = after.T @ before / len(before)
        fit = dataclasses.replace(fit, original=_moments(before), cross=cross)
    kernel = _numpy(view.matrix())
    mean = np.zeros(view.n_in), np.zeros(view.n_in)
    if centred:
        mean = before.mean(axis=0), after.mean(axis=0)
    rank = max(1, view.max_rank // 2)
    a, b = fit.pair(rank)
    matrix = joined(view, a, b)
    groups = view.groups
    columns = np.arange(view.n_out).reshape(groups, -1)
    expected = np.zeros_like(kernel)
    for rows, own in zip(np.arange(view.n_in).reshape(groups, -1), columns):
        block = np.ix_(rows, own)
        inputs = (after - mean[1])[:, rows]
        between = ((before - mean[0])[:, rows] + inputs) / 2
        expected[block] = _best(inputs, between @ kernel[block], rank)
    np.testing.assert_allclose(matrix, expected, atol=2e-4, rtol=2e-4)
    np.testing.assert_allclose(
        np.linalg.norm(a, axis=-2), np.linalg.norm(b, axis=-1), rtol=1e-3
    )
    left = (before - mean[0]) @ kernel - (after - mean[1]) @ expected
    size = np.linalg.norm((before - mean[0]) @ kernel)
    np.testing.assert_allclose(
        fit.error(expected), np.linalg.norm(left) / size, rtol=1e-3
    )
    if centred:
        bias = _numpy(view.bias_of()).ravel()
        wanted = mean[0] @ kernel - mean[1] @ matrix
        if wanted.size < bias.size:  # a kernel for each of a few letters
            wanted = np.tile(wanted, bias.size // wanted.size)
        got = _numpy(fit.bias(matrix)).ravel() - bias
        np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.once
def test_damping_keeps_directions_that_were_not_seen():
    view = _view(layer_cases.named("dense")[0])
    rows = np.zeros((10, view.n_in))
    rows[:, 0] = RNG.normal(size=10)
    a, b = Fit(view, _moments(rows)).pair(view.max_rank)
    kernel = _numpy(view.matrix())
    np.testing.assert_allclose(a[0] @ b[0], kernel, atol=1e-5)
    lost = np.linalg.norm(rows @ (a[0, :, :1] @ b[0, :1] - kernel))
    assert lost < 1e-2 * np.linalg.norm(rows @ kernel)
    # Where a pair has other inputs, K* stays K in what it does not see.
    fit = Fit(view, _moments(rows), _moments(rows), rows.T @ rows / 10)
    np.testing.assert_allclose(fit.target(), kernel, atol=1e-5)


@pytest.mark.once
def test_scales_of_inputs_do_not_matter():
    """An input that is a hundred times as large, and its row a hundredth."""
    view = _view(layer_cases.named("dense")[0])
    rows, kernel = _rows(view), _numpy(view.matrix())
    scale = np.ones(view.n_in)
    scale[2] = 100
    first = Fit(view, _moments(rows)).pair(2)
    view.assign(kernel / scale[:, None])
    second = Fit(view, _moments(rows * scale)).pair(2)
    products = [a[0] @ b[0] for a, b in (first, second)]
    np.testing.assert_allclose(
        products[1] * scale[:, None], products[0], atol=1e-4
    )


@pytest.mark.once
@pytest.mark.parametrize("centred", [False, True])
def test_a_diagonal_of_the_moments(centred, undamped):
    view = _view(layer_cases.named("dense")[0])
    before = RNG.normal(size=(50, view.n_in)) * np.arange(1, 6) + 1
    after = before * 0.5
    first, second, kernel = _moments(before), _moments(after), view.matrix()
    kernel = _numpy(kernel)

    def diagonal(moments):
        square = np.diag(moments.second)
        return Moments(moments.count, moments.mean, square)

    spread = before.std(axis=0) if centred else np.sqrt(np.diag(first.second))
    _, _, vt = np.linalg.svd(spread[:, None] * kernel)
    expected = kernel @ vt[:2].T @ vt[:2]
    fit = Fit(view, diagonal(first), centred=centred)
    a, b = fit.pair(2)
    np.testing.assert_allclose(a[0] @ b[0], expected, atol=1e-4)
    left = np.linalg.norm(spread[:, None] * (kernel - expected))
    left /= np.linalg.norm(spread[:, None] * kernel)
    np.testing.assert_allclose(fit.error(expected), left, rtol=1e-3)
    fit = Fit(
        view,
        diagonal(second),
        diagonal(first),
        (after * before).mean(axis=0),
        centred,
    )
    np.testing.assert_allclose(fit.target(), 1.5 * kernel, rtol=1e-4)


@pytest.mark.once
@pytest.mark.parametrize("slices", [1, 2, 4])
def test_slices_have_their_own_block(slices, undamped):
    keras.utils.set_random_seed(0)
    layer = keras.layers.Conv2D(6, 3)
    layer(np.ones((1, 5, 5, 4)))
    view = kernel_view(layer)
    rows = _rows(view, shift=0.0)
    fit = Fit(view, _moments(rows))
    a, b = fit.pair(2, slices)
    assert a.shape == (slices, 36 // slices, 2) and len(b) == slices
    kernel, numbers = _numpy(view.matrix()), np.arange(36).reshape(9, 4)
    expected = np.zeros_like(kernel)
    for i, own in enumerate(np.split(numbers, slices, axis=1)):
        own = own.ravel()
        np.testing.assert_array_equal(part_rows(view, slices)[i], own)
        expected[own] = _best(rows[:, own], rows[:, own] @ kernel[own], 2)
    matrix = joined(view, a, b)
    np.testing.assert_allclose(matrix, expected, atol=1e-4)
    values = _numpy(ops.svd(fit.whitened(slices), compute_uv=False))
    assert values.shape == (slices, 6)
    thin = fitted_pair(fit, Choice(2, slices)).layer
    x = RNG.normal(size=(2, 6, 6, 4)).astype("float32")
    got = _numpy(thin(x))
    view.assign(matrix)
    np.testing.assert_allclose(got, _numpy(layer(x)), atol=1e-4)


@pytest.mark.once
def test_no_moments_are_the_plain_svd():
    view = _view(layer_cases.named("conv_2d_groups")[0])
    a, b = Fit(view).pair(2)
    blocks = _numpy(view.blocks(view.matrix()))
    u, s, vt = np.linalg.svd(blocks, full_matrices=False)
    low = (u[..., :2] * s[:, None, :2]) @ vt[:, :2]
    np.testing.assert_allclose(a @ b, low, atol=1e-5)
    np.testing.assert_allclose(
        np.linalg.norm(a, axis=-2), np.linalg.norm(b, axis=-1), rtol=1e-4
    )
    assert fitted_pair(Fit(view), Choice(2)).error is None


@pytest.mark.once
def test_large_means_leave_no_hole():
    """In float32 `C - m m^T` is not positive where means are large."""
    view = _view(layer_cases.named("dense")[0])
    rows = np.float32(1e-3 * RNG.normal(size=(64, view.n_in)) + 100)
    moments = Moments(64, rows.mean(axis=0), rows.T @ rows / np.float32(64))
    a, b = Fit(view, moments, centred=True).pair(view.max_rank)
    assert np.isfinite(a).all() and np.isfinite(b).all()


@pytest.mark.once
def test_which_biases_can_make_up_for_means():
    names = ("dense", "dense_no_bias", "einsum_heads", "conv_transpose")
    found = [compensable(_view(layer_cases.named(n)[0])) for n in names]
    assert found == [True, False, True, False]
    shared = keras.layers.EinsumDense("abc,cde->abde", (3, 2, 4), bias_axes="e")
    shared(np.ones((2, 3, 6)))
    assert not compensable(kernel_view(shared))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_of_singular_values(dtype):
    """Kernels of half precision have no more digits than float32 keeps."""
    keras.utils.set_random_seed(0)
    layer = keras.layers.Dense(24, dtype=dtype)
    layer.build((None, 40))
    fit = Fit(kernel_view(layer))
    wanted = np.linalg.svd(np.float64(fit.kernel()), compute_uv=False)
    got = fit.spectrum()
    assert got.dtype == ("float64" if dtype == "float32" else "float32")
    np.testing.assert_allclose(got[0], wanted, rtol=1e-5)
    a, b = fit.pair(24)
    np.testing.assert_allclose((a @ b)[0], fit.kernel(), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
@pytest.mark.parametrize("seen", [False, True])
def test_vectors_that_are_kept(monkeypatch, dtype, shape, seen):
    """A pair of kept vectors is the same, without another decomposition."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    layer = keras.layers.Dense(shape[1], dtype=dtype)
    layer.build((None, shape[0]))
    moments = _moments(rng.normal(size=(100, shape[0]))) if seen else None
    fit = Fit(kernel_view(layer), moments)
    wanted = np.matmul(*fit.pair(5))
    values = fit.spectrum(keep=True)
    np.testing.assert_allclose(values, fit.spectrum(), rtol=1e-4, atol=1e-5)
    with monkeypatch.context() as patch:
        patch.setattr(linalg, "symmetric_eigen", None)
        pair = fit.pair(5)
    off = 1e-5 if dtype == "float32" else 1e-3
    np.testing.assert_allclose(np.matmul(*pair), wanted, atol=off)
    fit.forget()
    np.testing.assert_allclose(np.matmul(*fit.pair(5)), wanted, atol=1e-6)
