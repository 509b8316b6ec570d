"""Training a compressed model towards the one it was made from."""

import keras
from keras import ops

from keras_spectral._internal.checks import check_number


def distiller(
    small: keras.Model,
    original: keras.Model,
    temperature: float = 2.0,
    label_weight: float = 0.5,
) -> "Distiller":
    """A model whose `fit` teaches a compressed model its original's outputs.

    The loss is `label_weight` times that of `compile` and the rest times
    `T^2 KL(softmax(z / T) || softmax(z' / T))`, with the logits z of the
    original and z' of the compressed model, at temperature T, and what the
    compressed model's own layers add. Compile it, fit and evaluate it as any
    model; the compressed one is trained in place. Sample weights, class
    weights and masks count in both parts. With `label_weight=0` it needs
    neither labels nor a loss: `compile("adam")`, `fit(x)`.

    Source: Hinton et al. 2015, arXiv 1503.02531.

    Args:
        small: What `compress_model` returned, with one output, of logits.
        original: The model it was made from. It stays as it is, its
            `trainable` flags too.
        temperature: T, above 0; a higher one softens the original's outputs.
        label_weight: Weight of the labels' own loss, 0 to below 1.

    Returns:
        A model with the attributes `small` and `original`, whose logs have
        `loss`, `distillation_loss` and, with labels, `label_loss`.

    Raises:
        ValueError: A bad option; both are one model, or train weights that
            they share; outputs of other shapes, or several. In `fit`: no
            labels, or no loss, where they count.

    Example:

    >>> import keras_spectral as ks
    >>> model = keras.Sequential(
    ...     [keras.Input((32,)), keras.layers.Dense(32, name="hidden"),
    ...      keras.layers.Dense(4, name="logits")]
    ... )
    >>> small = ks.compress_model(model, 0.5, recover="train")
    >>> teacher = distiller(small, model)
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> teacher.compile("adam", loss)
    >>> data = keras.ops.ones((8, 32)), keras.ops.ones((8,), "int32")
    >>> history = teacher.fit(*data, verbose=0)
    """
    return Distiller(small, original, temperature, label_weight)


@keras.saving.register_keras_serializable("keras_spectral")
class Distiller(keras.Model):
    """The model that `distiller` makes; see there."""

    def __init__(
        self,
        small: keras.Model,
        original: keras.Model,
        temperature: float = 2.0,
        label_weight: float = 0.5,
        **kwargs,
    ):
        super().__init__(**{"name": "distiller", **kwargs})
        check_number(temperature, "temperature", 1e-6)
        check_number(label_weight, "label_weight", 0, 1)
        _check_pair(small, original)
        self.small = small
        self.original = original
        self.temperature = temperature
        self.label_weight = label_weight
        self.divergence = Divergence(temperature)
        self.distillation_tracker = keras.metrics.Mean("distillation_loss")
        if label_weight:
            self.label_tracker = keras.metrics.Mean("label_loss")

    def build(self, input_shape=None):
        self.built = True

    def call(self, inputs, training=None):
        outputs = self.small(inputs, training=training)
        _check_output(self.small, outputs)
        return outputs

    def fit(self, x=None, y=None, *args, **kwargs):
        self._check_data(x, y)
        return super().fit(x, y, *args, **kwargs)

    def evaluate(self, x=None, y=None, *args, **kwargs):
        self._check_data(x, y)
        return super().evaluate(x, y, *args, **kwargs)

    @property
    def trainable_variables(self):
        return self.small.trainable_variables

    @property
    def non_trainable_variables(self):
        trained = {id(v) for v in self.trainable_variables}
        return [v for v in self.variables if id(v) not in trained]

    @property
    def trainable_weights(self):
        return self.small.trainable_weights

    @property
    def non_trainable_weights(self):
        trained = {id(v) for v in self.trainable_weights}
        return [v for v in self.weights if id(v) not in trained]

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        own = sum(ops.sum(loss) for loss in self.losses)
        labels = 0.0
        if self.label_weight:
            if y is None:  # of a data set
                self._refuse("data without labels")
            labels = super().compute_loss(x, y, y_pred, sample_weight, training)
            labels = labels - own
            self.label_tracker.update_state(labels)
        wanted = ops.stop_gradient(self.original(x, training=False))
        distilled = self.divergence(wanted, y_pred, sample_weight)
        self.distillation_tracker.update_state(distilled)
        weight = self.label_weight
        return weight * labels + (1 - weight) * distilled + own

    def _check_data(self, x, y):
        """Before Keras begins: on JAX an error in a step costs the weights."""
        if not self.label_weight:
            return
        if self.loss is None:
            self._refuse("no loss in `compile`")
        arrays = all(hasattr(leaf, "shape") for leaf in keras.tree.flatten(x))
        if y is None and x is not None and arrays:
            self._refuse("data without labels")

    def _refuse(self, received):
        raise ValueError(
            f"Received {received}, with label_weight={self.label_weight}. "
            "Expected labels and their loss, or "
            "distiller(..., label_weight=0), which needs neither."
        )

    def get_config(self):
        save = keras.saving.serialize_keras_object
        return {
            "name": self.name,
            "small": save(self.small),
            "original": save(self.original),
            "temperature": self.temperature,
            "label_weight": self.label_weight,
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        load = keras.saving.deserialize_keras_object
        models = {n: load(config[n]) for n in ("small", "original")}
        return cls(**{**config, **models})


class Divergence(keras.losses.Loss):
    """`T^2 KL(softmax(y_true / T) || softmax(y_pred / T))` of logits."""

    def __init__(self, temperature):
        super().__init__(name="divergence")
        self.temperature = temperature

    def call(self, y_true, y_pred):
        wanted = ops.log_softmax(y_true / self.temperature)
        got = ops.log_softmax(y_pred / self.temperature)
        gaps = ops.exp(wanted) * (wanted - got)
        return self.temperature**2 * ops.sum(gaps, axis=-1)


def _check_pair(small, original):
    for model in (small, original):
        if not isinstance(model, keras.Model):
            raise ValueError(
                f"Received a {type(model).__name__}. Expected two Keras "
                "models, the compressed one and its original."
            )
    kept = {id(v) for v in original.variables}
    shared = [v.path for v in small.trainable_variables if id(v) in kept]
    if small is original or shared:
        raise ValueError(
            "Received models that train weights they share"
            f" ({', '.join(shared[:4])}). Expected a compressed model with "
            "weights of its own, such as `compress_model` returns."
        )
    shapes = [_output_shape(model) for model in (small, original)]
    if None not in shapes and shapes[0] != shapes[1]:
        raise ValueError(
            f"The outputs have shapes {shapes[0]} and {shapes[1]}. Expected "
            "the same logits of both models."
        )


def _output_shape(model):
    """The shape of a model's one output, None where it is not known yet."""
    outputs = getattr(model, "outputs", None)
    if not outputs:
        return None
    _check_output(model, outputs[0] if len(outputs) == 1 else outputs)
    return tuple(outputs[0].shape)


def _check_output(model, output):
    if not hasattr(output, "shape"):
        raise ValueError(
            f"Model '{model.name}' returns a {type(output).__name__}. Expected "
            "one tensor of logits; keras.Model(model.inputs, output) is a "
            "model with a single output."
        )
