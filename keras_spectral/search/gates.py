"""The best temperature and sparsity of gates, by optuna."""

import contextlib
from typing import Any

import keras
from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.evaluate import check_data
from keras_spectral._internal.evaluate import metric_of
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.model.merge import unwrap_model
from keras_spectral.model.wrap import wrap_model
from keras_spectral.search.parts import check_free
from keras_spectral.search.parts import check_ready
from keras_spectral.search.parts import fit


def tune_gates(
    model: keras.Model,
    dataset: Any,
    validation_data: Any,
    metric: str = "accuracy",
    trials: int = 10,
    epochs: int = 1,
    temperature: tuple[float, float] = (0.5, 5.0),
    sparsity: tuple[float, float] = (1e-6, 1e-2),
    mode: str = "max",
    seed: int | None = None,
    **options,
) -> dict[str, float]:
    """Finds temperature and sparsity of "softmax" gates, by optuna.

    Each trial wraps the plain model with "unipelt", trains it and evaluates;
    afterwards the model is plain again, with the weights that it had.

    Args:
        model: A plain model that is compiled.
        dataset: As for `search_parts`.
        validation_data: What `model.evaluate` takes, in the same forms.
        metric: The name of a result of `model.evaluate`.
        trials: How many pairs of values to try.
        epochs: Epochs of each.
        temperature: Smallest and largest, above 0, on a logarithmic scale.
        sparsity: Smallest and largest, above 0, on a logarithmic scale.
        mode: `"max"` if a larger metric is better, `"min"` if a smaller.
        seed: Integer seed of the choices.
        **options: Further options of UniPELTBlock.

    Returns:
        The best "temperature" and "sparsity", and the metric as "value".
        Trials whose metric is NaN do not count.

    Raises:
        ValueError: The model is wrapped or not compiled, no data, no such
            metric or one that is always NaN, or a bad option.
        ImportError: optuna is missing.
    """
    check_choice(mode, "mode", ("max", "min"))
    for name, value in (("trials", trials), ("epochs", epochs)):
        check_rank(value, name)
    _check_range(temperature, "temperature")
    _check_range(sparsity, "sparsity")
    check_seed(seed)
    check_free(options, ("gate",), "search_parts")
    check_ready(model)
    check_data(dataset)
    check_data(validation_data, "validation_data")
    optuna = _optuna()
    study = optuna.create_study(
        direction=f"{mode}imize",
        sampler=optuna.samplers.TPESampler(seed=seed),
    )
    with LateProgress("tuning gates", trials) as progress:

        def trial_value(trial):
            chosen = {
                "temperature": trial.suggest_float(
                    "temperature", *temperature, log=True
                ),
                "sparsity": trial.suggest_float(
                    "sparsity", *sparsity, log=True
                ),
            }
            with _wrapped_for_a_while(model, {**options, **chosen}):
                fit(model, dataset, epochs)
                value = metric_of(model, validation_data, metric)
            progress.advance(1)
            return value

        study.optimize(trial_value, n_trials=trials)
    if not any(trial.value is not None for trial in study.trials):
        raise ValueError(
            f"metric={metric!r} was NaN in each of {trials} trials. Expected a "
            "number: lower the learning rate, or the range of `sparsity`."
        )
    return {**study.best_params, "value": study.best_value}


def _check_range(value, name):
    pair = list(value) if isinstance(value, tuple | list) else []
    numbers = [check_number(x, name) for x in pair]
    if len(numbers) != 2 or not 0 < numbers[0] <= numbers[1]:
        raise ValueError(
            f"Received {name}={value!r}. Expected two numbers above 0, the "
            "smaller one first."
        )


def _optuna():
    try:
        import optuna
    except ImportError as error:
        raise ImportError(
            "Tuning needs optuna: pip install keras-spectral[search]."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def _wrapped_for_a_while(model, options):
    values = [ops.copy(weight) for weight in model.weights]
    weights = list(model.weights)
    wrap_model(model, "unipelt", gate="softmax", **options)
    try:
        yield
    finally:
        unwrap_model(model)
        for weight, value in zip(weights, values):
            weight.assign(value)
