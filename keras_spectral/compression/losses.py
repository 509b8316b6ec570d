"""How much a model's outputs hang on what each of its layers gives."""

import dataclasses
import math
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import gradient_function
from keras_spectral._backend import to_numpy
from keras_spectral._backend import without_gradients
from keras_spectral._internal.intercept import intercepted
from keras_spectral.compression.fit import Fit
from keras_spectral.compression.spectrum import Spectrum
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.model.calibrate import padding_of
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import subject

_EXAMPLES, _AT_ONCE = 64, 8  # a backward pass needs the memory of training


def with_prices(
    model: keras.Model,
    chosen: Sequence[Place],
    fits: Sequence[Fit],
    spectra: Sequence[Spectrum],
    data: Iterable[tuple],
) -> list[Spectrum]:
    """Spectra that know what one dropped square costs the whole model.

    The loss is `|y - y'|^2 / |y|^2` of the model's outputs y, a mean over
    several of them, without masked tokens. A small change d of a layer's
    outputs costs `|J d|^2 / |y|^2` with the Jacobian J. Its mean square comes
    from the gradients `J^T u / |y|` of random directions u, which are normal
    (Hutchinson 1989). So each square that is dropped of `L^T K` (see `Fit`)
    costs the sum of the gradient's squares over the rows, their mean over
    what one row makes.

    Args:
        model: The model as it was, which is not changed.
        chosen: Places in it.
        fits: What their pairs are fitted to.
        spectra: Theirs.
        data: Batches of inputs; the first 64 examples count.

    Raises:
        ValueError: The outputs have no gradients, or such as are not finite.
    """
    layers = [subject(place.layer) for place in chosen]
    views = {layer: kernel_view(layer) for layer in layers}
    squares = dict.fromkeys(layers, 0.0)
    known: dict[str, _Gradients] = {}
    rng = np.random.default_rng(0)
    with LateProgress("measuring gradients", None) as progress:
        for batch in _few(data):
            shapes = keras.tree.map_structure(lambda x: tuple(x.shape), batch)
            gradients = known.setdefault(str(shapes), _Gradients(model, views))
            for layer, square in gradients.squares(batch, rng):
                squares[layer] += square
            progress.advance(1)
    _check(model, squares)
    found = []
    for layer, fit, spectrum in zip(layers, fits, spectra):
        rows = 1 if fit.moments is not None else fit.view.n_in  # of a table
        found.append(dataclasses.replace(spectrum, price=squares[layer] / rows))
    return found


def _check(model, squares):
    found = list(squares.values())
    if np.isfinite(found).all() and max(found) > 0:
        return
    bad = "0 for all layers" if np.isfinite(found).all() else "not finite"
    raise ValueError(
        f"method='sensitivity': gradients of the outputs of model "
        f"'{model.name}' are {bad}. Expected outputs of floats that depend "
        "smoothly on what layers give; or use method='uniform'."
    )


class _Gradients:
    """The gradients of a model's outputs by those of layers, for one shape."""

    def __init__(self, model, views):
        self.model, self.views = model, views
        self.deltas: list[tuple] = []
        self.compute = None

    def squares(self, batch, rng) -> Iterator[tuple]:
        """Layers and the sums of squares of one call's gradients.

        A sum over the rows, a mean over what one row makes.
        """
        batch = keras.tree.map_structure(ops.convert_to_tensor, batch)
        with without_gradients():
            outputs = self._run(batch, None if self.compute else self._note)
        if not _floats(keras.tree.flatten(outputs)):
            return
        if self.compute is None:
            variables = [delta for _, _, delta in self.deltas]
            self.compute = gradient_function(self._loss, variables)
        found = self.compute(batch, _directions(outputs, batch, rng))
        for (layer, share, _), gradient in zip(self.deltas, found):
            square = np.square(np.float64(to_numpy(gradient)))
            yield layer, share * float(square.sum())

    def _note(self, layer, inputs, outputs):
        """Keeps something to add to the outputs, by which to derive."""
        dtype = keras.backend.standardize_dtype(outputs.dtype)
        delta = keras.Variable(ops.zeros_like(outputs), dtype=dtype)
        rows = self.views[layer].positions(inputs.shape) * inputs.shape[0]
        share = rows / math.prod(outputs.shape)
        self.deltas.append((layer, share, delta))
        return outputs

    def _loss(self, batch, directions):
        deltas = iter(self.deltas)

        def moved(layer, inputs, outputs):
            return outputs + ops.convert_to_tensor(next(deltas)[-1])

        outputs = keras.tree.flatten(self._run(batch, moved))
        pairs = zip(_floats(outputs), directions)
        return sum(ops.sum(ops.cast(y, "float32") * u) for y, u in pairs)

    def _run(self, batch, change):
        def handler(layer):
            def handle(call, inputs, *args, **kwargs):
                outputs = call(inputs, *args, **kwargs)
                if kwargs.get("reverse"):
                    return outputs
                return change(layer, inputs, outputs)

            return handle

        layers = self.views if change is not None else ()
        with intercepted({layer: handler(layer) for layer in layers}):
            return self.model(batch, training=False)


def _few(data):
    """Inputs, some examples at a time."""
    left = _EXAMPLES
    for batch, *_ in data:
        parts = [x for x in keras.tree.flatten(batch) if hasattr(x, "shape")]
        for start in range(0, len(parts[0]), _AT_ONCE):
            if left <= 0:
                return
            rows = slice(start, start + _AT_ONCE)
            yield keras.tree.map_structure(lambda x, r=rows: x[r], batch)
            left -= _AT_ONCE


def _directions(outputs, batch, rng):
    """`u / |y|` of each output y of floats; 0 where tokens are masked."""
    mask, found = padding_of(batch), []
    outputs = [to_numpy(y) for y in _floats(keras.tree.flatten(outputs))]
    for y in outputs:
        kept = np.ones(y.shape)
        if mask is not None and y.shape[:2] == tuple(mask.shape):
            kept *= _expanded(ops.convert_to_numpy(mask), y.ndim)
        # Of the size of 1, as half-precision gradients may become too small.
        size = np.sqrt(np.mean((np.float64(y) * kept) ** 2))
        size *= np.sqrt(len(outputs) * y.size)
        u = rng.normal(size=y.shape) * kept / max(size, 1e-30)
        found.append(ops.convert_to_tensor(u, "float32"))
    return found


def _floats(outputs):
    kinds = ("float", "bfloat")
    return [
        y
        for y in outputs
        if keras.backend.standardize_dtype(y.dtype).startswith(kinds)
    ]


def _expanded(mask, ndim):
    mask = np.float64(mask)
    return mask.reshape(*mask.shape, *[1] * (ndim - mask.ndim))
