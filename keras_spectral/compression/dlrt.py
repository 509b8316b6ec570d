"""Dynamical low-rank training: kernels that are thin from the first step."""

import keras
from keras import ops

from keras_spectral._backend import number_in
from keras_spectral._backend import on_state
from keras_spectral._backend import value_and_gradients
from keras_spectral._backend import without_gradients
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral.compression.choice import chosen_places
from keras_spectral.compression.dynamic_layer import DynamicLowRank
from keras_spectral.compression.pairs import low_rank_layer
from keras_spectral.compression.saved import copy_model
from keras_spectral.compression.saved import ordered_layers
from keras_spectral.compression.saved import plain_config
from keras_spectral.compression.saved import put_low_rank
from keras_spectral.kernels import kernel_view
from keras_spectral.model.hosts import put
from keras_spectral.model.select import Target


def dlrt(
    model: keras.Model,
    rank: int,
    theta: float | None = None,
    *,
    rate: float | None = None,
    target: Target | None = None,
    exclude: Target | None = None,
) -> "DLRT":
    """A model whose `fit` trains kernels as `U S V^T` of a small rank.

    No step leaves the matrices of that rank, so that nothing is lost by a
    truncation at the end. A step on one batch has two passes. With G the
    gradient by the kernel K and h the learning rate the first one gives

        K1 = U S - h G V,    L1 = V S^T - h G^T U,
        Uh = orth[K1 | U],   Vh = orth[L1 | V],
        Sh = (Uh^T U) S (V^T Vh),

    which is the same kernel in bases of twice the rank, and the second one

        Sh <- Sh - h Uh^T G(Uh Sh Vh^T) Vh = P D Q^T,
        U = Uh P1,  S = D1,  V = Vh Q1,

    cut to the least rank whose tail has at most `theta |D|`. With
    `theta=None` the rank is fixed, `Uh = orth(K1)`, `Vh = orth(L1)`, and
    nothing is cut. Ranks are numbers in variables: nothing is compiled again.

    Factors take plain gradient steps, whatever the optimizer, because bases
    turn in each step and momenta would belong to those of before. The
    optimizer steps everything else (biases, norms, other kernels) in the
    second pass; clipping, decay and momenta are for these alone. Statistics
    of batch norms are updated in both passes, and kernels' regularizers do
    not count. Layers that are frozen in the model keep the kernels that they
    start with.

    Source: Schotthoefer et al. 2022, arXiv 2205.13571.

    Args:
        model: A built model, trained or not; it stays as it is. Kernels
            start as their truncated SVD.
        rank: The largest rank, and the one at the start; where a kernel's is
            smaller, that.
        theta: The share of the norm that a step may cut, above 0 and below
            1; None for a fixed rank.
        rate: h of the factors; by default the optimizer's. A rate that suits
            Adam is small for their plain steps.
        target: Which layers, as for `wrap_model`. Defaults to all that can
            be factorised but embeddings.
        exclude: Which layers not; the same forms.

    Returns:
        A model to compile and to fit, with `ranks()`. `finalize_dlrt` makes
        a plain one of it.

    Raises:
        ValueError: A bad option; what `compress_model` refuses; a
            convolution with groups.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((32,)), keras.layers.Dense(32, name="hidden")]
    ... )
    >>> trainer = ks.dlrt(model, rank=8, theta=0.1)
    >>> trainer.compile(keras.optimizers.SGD(0.05), "mse")
    >>> data = keras.ops.ones((8, 32)), keras.ops.ones((8, 32))
    >>> history = trainer.fit(*data, verbose=0)
    >>> small = ks.finalize_dlrt(trainer)
    >>> type(small.get_layer("hidden")).__name__
    'LowRank'
    """
    check_rank(rank)
    if theta is not None and not check_number(theta, "theta", 0, 1):
        raise ValueError(
            "Received theta=0, with which every rank grows to its largest. "
            "Expected a number above 0, such as 0.1, or None for a fixed rank."
        )
    if rate is not None:
        check_number(rate, "rate", 0)
    chosen = chosen_places(model, target, exclude, False)
    for place in chosen:
        if kernel_view(place.layer).groups > 1:
            raise ValueError(
                f"'{place.path}' is a convolution with groups, whose kernel "
                "is no single matrix. Expected one without: exclude it."
            )
    order = {id(x): i for i, x in enumerate(ordered_layers(model))}
    copy = copy_model(model)
    copies = ordered_layers(copy)
    swaps = {}
    for place in chosen:
        layer = copies[order[id(place.layer)]]
        most = min(rank, kernel_view(layer).max_rank)
        swaps[layer] = DynamicLowRank(layer, most, theta is not None)
        swaps[layer].build(layer.get_build_config()["input_shape"])
    with all_or_nothing() as snapshot:
        put(copy, swaps, snapshot)
    return DLRT(copy, theta, rate)


@keras.saving.register_keras_serializable("keras_spectral")
class DLRT(keras.Model):
    """The model that `dlrt` makes; see there."""

    def __init__(
        self,
        model: keras.Model,
        theta: float | None = None,
        rate: float | None = None,
        **kwargs,
    ):
        super().__init__(**{"name": "dlrt", **kwargs})
        self.model = model
        self.theta = theta
        self.rate = rate

    def build(self, input_shape=None):
        self.built = True

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)

    def fit(self, *args, **kwargs):
        if isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                "Received a LossScaleOptimizer, which Keras uses for float16. "
                "Expected another one: `dlrt` trains in float32 or bfloat16."
            )
        return super().fit(*args, **kwargs)

    def factorised(self) -> list[DynamicLowRank]:
        """The layers whose factors train."""
        layers = self.model._flatten_layers()
        return [x for x in layers if isinstance(x, DynamicLowRank)]

    def ranks(self) -> dict[str, int]:
        """The rank of each of them now, by name."""
        return {x.name: number_in(x.rank) for x in self.factorised()}

    def train_step(self, *args):
        data = keras.utils.unpack_x_y_sample_weight(args[-1])
        if len(args) == 1:
            with without_gradients():
                return self._step(*data)
        groups = [
            self.trainable_variables,
            self.non_trainable_variables,
            self.optimizer.variables,
            self.metrics_variables,
        ]
        return on_state(lambda: self._step(*data), groups, args[0])

    def _step(self, x, y=None, sample_weight=None):
        layers = [x for x in self.factorised() if x.layer.trainable]
        rate = self.optimizer.learning_rate if self.rate is None else self.rate
        probes = [v for x in layers for v in (x.k_step, x.l_step)]
        loss, y_pred, found = self._pass(x, y, sample_weight, probes, True)
        for layer, k, left in zip(layers, found[::2], found[1::2]):
            layer.step_bases(k, left, rate)
        cores, plain = [layer.s for layer in layers], self.trainable_variables
        _, _, found = self._pass(x, y, sample_weight, [*cores, *plain], False)
        for layer, gradient in zip(layers, found):
            layer.step_core(gradient, rate, self.theta)
        if plain:
            self.optimizer.apply(found[len(cores) :], plain)
        size = ops.shape(keras.tree.flatten(x)[0])[0]
        self._loss_tracker.update_state(loss, sample_weight=size)
        return self.compute_metrics(x, y, y_pred, sample_weight)

    def _pass(self, x, y, sample_weight, variables, probing):
        """Loss, outputs and gradients."""
        layers = self.factorised()

        def run():
            y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred, sample_weight, True)
            return loss, y_pred

        for layer in layers:
            layer.probing = probing
        try:
            others = [*self.variables, *self.metrics_variables]
            return value_and_gradients(run, variables, others)
        finally:
            for layer in layers:
                layer.probing = False

    def get_config(self):
        model = keras.saving.serialize_keras_object(self.model)
        options = {"theta": self.theta, "rate": self.rate}
        return {"name": self.name, "model": model, **options}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        model = keras.saving.deserialize_keras_object(config["model"])
        return cls(**{**config, "model": model})


def finalize_dlrt(model: DLRT) -> keras.Model:
    """The trained model as a plain one, with `LowRank` layers.

    A kernel whose pair would have no fewer weights stays one kernel, of that
    rank. The model inside of `model` becomes this one, and `model` can train
    no more.

    Args:
        model: What `dlrt` returned.

    Raises:
        ValueError: It is something else, or has been finished before.

    Example: see `dlrt`.
    """
    layers = model.factorised() if isinstance(model, DLRT) else []
    if not layers:
        raise ValueError(
            f"Received {model!r}. Expected what `dlrt` returned, not yet "
            "finalized."
        )
    inner, swaps = model.model, {}
    with all_or_nothing() as snapshot:
        put(inner, {x: x.layer for x in layers}, snapshot)
        for layer in layers:
            (a, b), view = layer.pair(), layer.view
            view.variable().trainable = layer.layer.trainable
            if view.pair_weights(a.shape[1]) < view.num_weights:
                swaps[layer.layer] = low_rank_layer(view, a[None], b[None])
                swaps[layer.layer].trainable = layer.layer.trainable
            else:
                view.assign(ops.convert_to_tensor(a @ b))
        if swaps:
            put_low_rank(inner, swaps, plain_config(inner, swaps))
    return inner
