"""WithRates: an optimizer whose variables have rates of their own."""

import keras

from keras_spectral._internal.rates import at_rates
from keras_spectral._internal.rates import check_inner
from keras_spectral._internal.rates import check_rates
from keras_spectral._internal.rates import factors_of
from keras_spectral.optimizers.ivon import IVON

_OPTIONS = (
    "weight_decay clipnorm global_clipnorm clipvalue use_ema ema_momentum "
    "ema_overwrite_frequency loss_scale_factor gradient_accumulation_steps"
).split()


@keras.saving.register_keras_serializable("keras_spectral")
class WithRates(keras.optimizers.Optimizer):
    """Gives each variable a learning rate of its own.

    The rate of a variable is that of the optimizer, now, times the factor c
    of the first regex in `rates` that matches its whole path; 1 if none does:

        w  <-  w (1 - c lr wd)          decoupled weight decay wd, if any
        w  <-  update(w, gradient, c lr)

    So decay, like AdamW's, is slower or faster by the same factor. At c = 0 a
    variable stands still (of IVON, its mean). All else (schedules, clipping by
    the norm of all gradients, accumulation, averages) is as without factors.

    LoRA+ is `{".*lora_b": 16}`: B's rate is 16 times that of A, which suits
    wide models; its authors' code gives A and B of an Embedding the rate 1e-6,
    that is a factor of `1e-6 / learning_rate`. Layer-wise decay is a factor
    for each layer; LoRA-FA's frozen A is `{".*lora_a": 0}`.

    The work is done by `inner_optimizer`, whose `learning_rate` and options
    (`clipnorm`, ...) are read and set through. Factors are fixed from `build`
    on. A LossScaleOptimizer (`mixed_float16`) belongs around it.

    Source: LoRA+, Hayou et al. 2024, arXiv 2402.12354.

    Args:
        optimizer: A Keras optimizer, or its name or configuration.
        rates: Dictionary of regexes and factors, finite numbers of at least 0.
            `variable.path` is what a regex has to match.
        name: String, the name of the optimizer.

    Raises:
        ValueError: A bad option; an optimizer that is itself around others.
            In `build`, which the first `fit` calls: a regex that matches no
            variable that trains.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((4,)), keras.layers.Dense(3, name="hidden")])
    >>> model = ks.wrap_model(model, "lora", target="hidden", rank=2)
    >>> adam = keras.optimizers.AdamW(1e-3)
    >>> model.compile(ks.optimizers.WithRates(adam, {".*lora_b": 16}), "mse")
    >>> model.optimizer.build(model.trainable_variables)
    >>> {v.name: model.optimizer.factor(v) for v in model.trainable_variables}
    {'lora_a': 1, 'lora_b': 16}

    Each layer at 0.9 times the rate of the one above it:

    >>> rates = {f".*{layer.name}/.*": 0.9**depth
    ...          for depth, layer in enumerate(reversed(model.layers))}
    >>> model.compile(ks.optimizers.WithRates("adam", rates), "mse")
    """

    def __init__(
        self,
        optimizer: str | dict | keras.optimizers.Optimizer,
        rates: dict[str, float],
        name: str = "with_rates",
    ):
        inner, rates = check_inner(optimizer), check_rates(rates)
        super().__init__(0.0, name=name)
        self.inner_optimizer = inner
        self.rates = rates
        self._factors = {}

    @property
    def variables(self):
        return self.inner_optimizer.variables

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    def build(self, variables):
        if self.built:
            return
        inner = self.inner_optimizer
        variables = inner._trainable_variables if inner.built else variables
        factors = factors_of(variables, self.rates)
        if not inner.built:
            inner.build(variables)
        keys = map(self._var_key, variables)
        self._factors = dict(zip(keys, factors))
        self.built = True

    def factor(self, variable: keras.Variable) -> float:
        """The factor of a variable's rate.

        Raises:
            ValueError: The optimizer is not built for that variable.
        """
        key = self._var_key(variable)
        if key not in self._factors:
            raise ValueError(
                f"Received {variable!r}. Expected a variable that the "
                "optimizer is built for: call `fit`, or "
                "`optimizer.build(variables)`."
            )
        return self._factors[key]

    def apply(self, grads, trainable_variables=None):
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            self.build(trainable_variables)
        with self._at_rates():
            self.inner_optimizer.apply(grads, trainable_variables)

    def stateless_apply(self, optimizer_variables, grads, trainable_variables):
        with self._at_rates():
            return self.inner_optimizer.stateless_apply(
                optimizer_variables, grads, trainable_variables
            )

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights):
        self.inner_optimizer.set_weights(weights)

    def save_own_variables(self, store):
        """Nothing: files hold the inner optimizer beside this one."""

    def load_own_variables(self, store):
        """Nothing, as above."""

    def get_config(self):
        inner = keras.saving.serialize_keras_object(self.inner_optimizer)
        rates = dict(self.rates)
        return {"name": self.name, "optimizer": inner, "rates": rates}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        inner = keras.saving.deserialize_keras_object(
            config["optimizer"], custom_objects=custom_objects
        )
        return cls(**{**config, "optimizer": inner})

    def _at_rates(self):
        inner = self.inner_optimizer
        if not self.built and inner.built:
            self.build(inner._trainable_variables)
        # IVON draws new samples also where the mean stays.
        frozen = not isinstance(inner, IVON)
        return at_rates(inner, self.factor, frozen)


def _of_the_inner(name):
    """An option that is read and set where it acts."""

    def write(self, value):
        if "inner_optimizer" in vars(self):  # not yet in Keras's `__init__`
            setattr(self.inner_optimizer, name, value)

    return property(lambda self: getattr(self.inner_optimizer, name), write)


for _name in _OPTIONS:
    setattr(WithRates, _name, _of_the_inner(_name))
