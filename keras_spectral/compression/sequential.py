"""Layer after layer, each fitted to the inputs that the smaller model gives.

The copy of the model is run on every batch twice over: in the first half of
the rows layers do what they did, in the second half those that have a pair
already use it. So a layer meets its inputs X of the whole model and X' of the
compressed one side by side.
"""

import collections
import dataclasses

import keras
import numpy as np
from keras import ops

from keras_spectral._backend import to_numpy
from keras_spectral._backend import without_gradients
from keras_spectral._internal.intercept import intercepted
from keras_spectral._internal.intercept import without_casts
from keras_spectral.compression.fit import Fit
from keras_spectral.compression.pairs import Pair
from keras_spectral.compression.pairs import fitted_pair
from keras_spectral.compression.spectrum import Choice
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.layers.moments import Moments
from keras_spectral.model.calibrate import counted_rows
from keras_spectral.model.calibrate import padding_of


def sequential_pairs(
    model: keras.Model,
    plan: dict[keras.layers.Layer, tuple[Fit, Choice]],
    data: list[tuple],
) -> dict[keras.layers.Layer, Pair]:
    """The pairs of layers, fitted in the order in which the model runs them.

    Each group of layers with the same input takes one pass over the data, up
    to these layers; a single batch is run through once for all of them. Two
    matrices n_in x n_in are kept for each layer of a group.

    Args:
        model: A copy of the model, with its own layers in place.
        plan: `{layer: (fit on the whole model's inputs, rank)}`.
        data: Tuples that begin with a batch of inputs.

    Raises:
        ValueError: Examples of a batch are not the rows of a layer's inputs.
    """
    batches = [_twice(batch) for batch, *_ in data]
    members = {
        layer: _Member(*entry)
        for layer, entry in plan.items()
        if entry[0].moments is not None
    }
    groups = _groups(model, members, _twice(data[0][0], few=2))
    once = [member for group in groups for member in group]
    for layer, entry in plan.items():
        if members.get(layer) not in once:
            members[layer] = _Member(*entry)
            members[layer].pair = fitted_pair(*entry)
    handlers = {layer: member.handle for layer, member in members.items()}
    with intercepted(handlers), without_gradients():
        with LateProgress("fitting layers", len(once)) as progress:
            if len(batches) == 1:
                for member in once:
                    member.state = "solves"
                _run(model, batches[0], once)
                groups = []
            for group in groups:
                for member in group:
                    member.state = "sees"
                group[-1].state = "ends"
                for batch in batches:
                    _run(model, batch, group)
                for member in group:
                    member.solve()
                progress.advance(len(group))
    return {layer: member.pair for layer, member in members.items()}


class _Member:
    """A layer whose pair is to be found."""

    def __init__(self, fit: Fit, choice: Choice):
        self.fit, self.choice = fit, choice
        self.pair: Pair | None = None
        self.state = "waits"
        self.padding = None
        self.count, self.sums = 0, None

    def handle(self, call, inputs, *args, **kwargs):
        if self.pair is None and self.state != "waits":
            self.see(inputs)
            if self.state == "ends":
                raise _Stop
            if self.state == "solves":
                self.solve()
        if self.pair is None:
            return call(inputs, *args, **kwargs)
        half = inputs.shape[0] // 2
        whole = call(inputs[:half], *args, **kwargs)
        return ops.concatenate([whole, self.pair.layer(inputs[half:])])

    def see(self, inputs):
        rows = counted_rows(self.fit.view, inputs, self.padding)
        count = int(rows.shape[0]) // 2
        if not count:
            return
        before, after = rows[:count], rows[count:]
        sums = [ops.sum(after, axis=0)]
        if self.fit.moments.whole:
            turned = ops.transpose(after)
            sums += [ops.matmul(turned, x) for x in (after, before)]
        else:
            sums += [ops.sum(after * x, axis=0) for x in (after, before)]
        sums = [np.float64(ops.convert_to_numpy(x)) for x in sums]
        if self.sums is not None:
            sums = [old + new for old, new in zip(self.sums, sums)]
        self.count, self.sums = self.count + count, sums

    def solve(self):
        mean, second, cross = (x / self.count for x in self.sums)
        fit = dataclasses.replace(
            self.fit,
            moments=Moments(self.count, mean, second),
            original=self.fit.moments,
            cross=cross,
        )
        self.sums = None
        with without_casts():  # of the layer that is running
            self.pair = fitted_pair(fit, self.choice)


class _Stop(BaseException):
    """The layers that this pass is for have seen their inputs.

    Keras adds notes to exceptions that are no `BaseException` only.
    """


def _run(model, batch, members):
    for member in members:
        member.padding = padding_of(batch)
    try:
        model(batch, training=False)
    except _Stop:
        pass


def _twice(batch, few=None):
    """Its examples, or the first few of them, and then the same again."""

    def twice(x):
        return ops.concatenate([x[:few]] * 2) if hasattr(x, "shape") else x

    return keras.tree.map_structure(twice, batch)


def _groups(model, members, batch):
    """Lists of layers that are called once, on one input, in their order."""
    calls, order, last = collections.Counter(), [], []

    def noting(member):
        def handle(call, inputs, *args, **kwargs):
            _check_halves(member.fit.view, inputs)
            calls[member] += 1
            if not last or inputs is not last[0]:
                order.append([])
            last[:] = [inputs]
            order[-1].append(member)
            return call(inputs, *args, **kwargs)

        return handle

    handlers = {layer: noting(member) for layer, member in members.items()}
    with intercepted(handlers), without_gradients():
        model(batch, training=False)
    order = [[m for m in group if calls[m] == 1] for group in order]
    return [group for group in order if group]


def _check_halves(view, inputs):
    """Raises unless a batch taken twice is two equal halves of the rows."""
    rows = to_numpy(view.input_rows(inputs))
    first, second = np.split(rows[: len(rows) // 2 * 2], 2)
    gap, size = np.linalg.norm(first - second), np.linalg.norm(first)
    if len(rows) % 2 or not gap <= 1e-2 * max(size, 1e-30):
        raise ValueError(
            f"Layer {view.label} is given inputs of shape "
            f"{tuple(inputs.shape)} in which the examples of a batch are not "
            "one after the other, or see each other. Expected the batch as "
            "first axis: use sequential=False, or `exclude` the layer."
        )
