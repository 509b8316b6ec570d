import keras
import numpy as np
import pytest
from keras import ops

from keras_spectral._internal.rates import at_rates
from keras_spectral._internal.rates import check_rates
from keras_spectral._internal.rates import factors_of

PUT = ("update_step", "_parallel_update_step", "_apply_weight_decay")
PUT += ("_get_current_learning_rate", "_at_rates")


def _optimizer(variables):
    optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
    optimizer.build(variables)
    return optimizer


def _variables(*names):
    return [keras.Variable(np.ones(2, "float32"), name=name) for name in names]


def test_the_first_regex_that_matches_a_whole_path_counts():
    variables = _variables("lora_a", "lora_b", "lora_b2")
    rates = check_rates({".*b2": 0.5, ".*b.*": np.float32(4), "lora_a2?": 0})
    assert factors_of(variables, rates) == [0, 4, 0.5]
    assert factors_of(variables, {"lora_b": 4}) == [1, 4, 1]
    with pytest.raises(ValueError, match="'.*b3', which matches no variable"):
        factors_of(variables, {".*b3": 4})
    with pytest.raises(ValueError, match="Variables here: none."):
        factors_of([], {".*": 4})


def test_rates_hold_within_and_only_once():
    a, b = variables = _variables("a", "b")
    optimizer = _optimizer(variables)
    factors = {id(a): 1, id(b): 2}
    # TensorFlow's updates get its own variables.
    factors |= {optimizer._var_key(a): 1, optimizer._var_key(b): 2}

    def factor(variable):
        return factors[optimizer._var_key(variable)]

    ones = [ops.ones(2), ops.ones(2)]
    with at_rates(optimizer, factor), at_rates(optimizer, factor):
        optimizer.apply(ones, variables)
    for variable, rate in ((a, 0.1), (b, 0.2)):
        expected = 1 - 0.5 * rate - rate
        value = ops.convert_to_numpy(variable)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert not set(vars(optimizer)) & set(PUT)
    assert float(optimizer.learning_rate) == np.float32(0.1)


@pytest.mark.parametrize("frozen", [True, False])
def test_factor_0_may_leave_a_variable_out_of_updates(frozen):
    variables = _variables("a")
    optimizer = _optimizer(variables)
    infinite = [np.inf * ops.ones(2)]
    with at_rates(optimizer, lambda variable: 0, frozen):
        optimizer.apply(infinite, variables)
    value = ops.convert_to_numpy(variables[0])
    assert np.isfinite(value).all() == frozen


def test_after_an_error_all_is_as_before():
    variables = _variables("a")
    optimizer = _optimizer(variables)
    with pytest.raises(RuntimeError, match="stop"):
        with at_rates(optimizer, lambda variable: 2):
            raise RuntimeError("stop")
    assert not set(vars(optimizer)) & set(PUT)
