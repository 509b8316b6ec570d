import keras
import numpy as np
import pytest
from keras import ops

import keras_spectral as ks
from keras_spectral.layers.allocation import RankAllocation
from keras_spectral.layers.allocation import Schedule
from keras_spectral.optimizers import IVON

pytestmark = pytest.mark.compiled

ON_TORCH = keras.backend.backend() == "torch"


def _numpy(x):
    return ops.convert_to_numpy(x)


def _model(rank=4):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh", name="first"),
            keras.layers.Dense(5, name="second"),
        ]
    )
    ks.wrap_model(
        model, "adalora", target=["first", "second"], rank=rank, seed=1
    )
    return model


def _data(count=32):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(count, 6)).astype("float32")
    return x, rng.normal(size=(count, 5)).astype("float32")


def _oracle(weights, gradients, schedule, b1, b2):
    """One layer list after the other; masks E and returns (budget, kept)."""
    ipt = [[np.zeros_like(w) for w in three] for three in weights]
    unc = [[np.zeros_like(w) for w in three] for three in weights]
    kept = None
    for t, step in enumerate(gradients, 1):
        weights = yield  # the weights after the update
        if t < schedule.total - schedule.final:
            for layer, (ws, gs) in enumerate(zip(weights, step)):
                for i, (w, g) in enumerate(zip(ws, gs)):
                    now = np.abs(w * g)
                    old = ipt[layer][i]
                    ipt[layer][i] = b1 * old + (1 - b1) * now
                    gap = np.abs(now - ipt[layer][i])
                    unc[layer][i] = b2 * unc[layer][i] + (1 - b2) * gap
        length = schedule.total - schedule.final - schedule.warmup
        if t <= schedule.warmup:
            budget, mask = schedule.start, False
        elif t >= schedule.total - schedule.final:
            budget, mask = schedule.end, t == schedule.total - schedule.final
        else:
            share = (1 - (t - schedule.warmup) / length) ** 3
            budget = int((schedule.start - schedule.end) * share + schedule.end)
            mask = t % schedule.interval == 0
        if mask:
            scores = []
            for (e, a, b), (ue, ua, ub) in zip(ipt, unc):
                score = e * ue + (a * ua).mean(axis=0) + (b * ub).mean(axis=1)
                scores.append(score)
            flat = np.concatenate(scores)
            cut = schedule.start - budget
            limit = np.sort(flat)[cut - 1] if cut else -np.inf
            kept = [score > limit for score in scores]
        final = t > schedule.total - schedule.final
        yield budget, [k.copy() for k in kept] if mask or final else None


@pytest.mark.parametrize("b_end", [3, 8])
def test_equals_the_algorithm_step_by_step(b_end):
    model = _model()
    adapters = model.layers
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    schedule = Schedule(2, 4, 3, 16, 8, b_end)
    allocation = RankAllocation(optimizer, adapters, schedule)
    rng = np.random.default_rng(3)
    triples = [(x.lora_e, x.lora_a, x.lora_b) for x in adapters]
    gradients = [
        [[rng.normal(size=w.shape) for w in three] for three in triples]
        for _ in range(16)
    ]
    oracle = _oracle(
        [[_numpy(w) for w in three] for three in triples],
        gradients,
        schedule,
        0.85,
        0.85,
    )
    next(oracle)
    budgets = []
    for t, step in enumerate(gradients, 1):
        for three in triples:
            for w in three:
                w.assign(rng.normal(size=w.shape))
        values = [[np.float64(_numpy(w)) for w in three] for three in triples]
        flat = [w for three in triples for w in three]
        given = [
            ops.convert_to_tensor(g.astype("float32"))
            for three in step
            for g in three
        ]
        allocation(given, flat)
        budget, kept = oracle.send(values)
        if t < 16:
            next(oracle)
        got = schedule.budget(ops.convert_to_tensor(t, "int32"))
        assert int(_numpy(got)) == budget
        budgets.append(budget)
        for layer, (e, _, _) in enumerate(triples):
            expected = values[layer][0]
            if kept is not None:
                expected = expected * kept[layer]
            np.testing.assert_allclose(_numpy(e), expected, rtol=1e-6)
        if kept is not None:
            assert allocation.ranks() == [int(k.sum()) for k in kept]
            assert sum(allocation.ranks()) == budget
    assert budgets[0] == 8 and budgets[-1] == b_end


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clipnorm": 0.1},
        {"global_clipnorm": 0.1},
        {"gradient_accumulation_steps": 2},
        {"weight_decay": 0.01},
    ],
)
def test_within_fit(options):
    model = _model()
    model.compile(keras.optimizers.Adam(0.02, **options), "mse")
    optimizer = model.optimizer
    plain = type(optimizer)
    budget = ks.callbacks.RankBudget(1.5, warmup=2, final=0.25, interval=2)
    history = model.fit(
        *_data(), batch_size=4, epochs=4, verbose=0, callbacks=[budget]
    ).history
    assert history["rank_budget"][-1] == 3
    assert sum(budget.ranks[-1].values()) == 3
    assert history["rank/first"] == [ranks["first"] for ranks in budget.ranks]
    assert {x.name: x.active_rank() for x in model.layers} == budget.ranks[-1]
    assert type(optimizer) is plain
    names = [v.name for v in optimizer.variables]
    assert not any("rank_" in n or "importance" in n for n in names)
    assert history["loss"][-1] < history["loss"][0]
    model.fit(*_data(), batch_size=4, verbose=0)  # goes on without it


@pytest.mark.skipif(ON_TORCH, reason="Keras has it not on PyTorch")
def test_several_steps_in_one_execution():
    ranks = []
    for steps in (1, 4):
        model = _model()
        model.compile(
            keras.optimizers.SGD(0.05), "mse", steps_per_execution=steps
        )
        budget = ks.callbacks.RankBudget(1.5, warmup=2, final=4, interval=2)
        model.fit(
            *_data(),
            batch_size=4,
            epochs=2,
            verbose=0,
            shuffle=False,
            callbacks=[budget],
        )
        ranks.append(budget.ranks)
    assert ranks[0] == ranks[1]


class _Stop(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise KeyboardInterrupt


def test_survives_an_interruption(tmp_path):
    results = []
    for interrupted in (False, True):
        model = _model()
        model.compile(keras.optimizers.Adam(0.02), "mse")
        for stops in [True, False] if interrupted else [False]:
            budget = ks.callbacks.RankBudget(1.5, warmup=3, final=8, interval=2)
            backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
            callbacks = [budget, *([backup] if interrupted else [])]
            callbacks += [_Stop()] if stops else []
            try:
                model.fit(
                    *_data(),
                    batch_size=4,
                    epochs=4,
                    shuffle=False,
                    verbose=0,
                    callbacks=callbacks,
                )
            except KeyboardInterrupt:
                continue
        results.append([_numpy(x.lora_e) for x in model.layers])
    for straight, resumed in zip(*results):
        np.testing.assert_allclose(resumed, straight, atol=1e-6)


def test_sensitivity_takes_the_means_of_ivon():
    model = _model()
    optimizer = IVON(0.05, ess=100, seed=0)
    optimizer.build(model.trainable_variables)
    allocation = RankAllocation(
        optimizer, model.layers, Schedule(2, 4, 3, 16, 8, 3)
    )
    factor = model.layers[0].lora_a
    mean, deviation = optimizer.posterior(factor)
    assert np.abs(_numpy(factor) - mean).max() > deviation.mean()
    allocation([ops.ones(factor.shape)], [factor])
    average, _ = allocation.averages[id(factor)]
    np.testing.assert_allclose(_numpy(average), 0.15 * np.abs(mean), rtol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("criterion", ["snr", "mean", "precision", "snr_abs"])
def test_bayesian_criteria_with_ivon(criterion):
    model = _model()
    model.compile(IVON(0.05, ess=100, seed=0), "mse")
    budget = ks.callbacks.RankBudget(
        1.5, criterion, warmup=2, final=0.25, interval=2
    )
    model.fit(
        *_data(),
        batch_size=4,
        epochs=4,
        verbose=0,
        callbacks=[budget, ks.callbacks.MeanWeights()],
    )
    # MeanWeights puts the means in, of which those off are zero.
    active = {x.name: x.active_rank() for x in model.layers}
    assert sum(active.values()) == 3
    assert active == budget.ranks[-1]


def test_all_stay_where_the_target_is_the_start():
    model = _model(rank=3)
    model.compile("adam", "mse")
    budget = ks.callbacks.RankBudget(3, warmup=1, final=1, interval=1)
    model.fit(*_data(), batch_size=4, verbose=0, callbacks=[budget])
    assert budget.ranks == [{"first": 3, "second": 3}]


def test_compact_at_the_end():
    model = _model()
    model.compile(keras.optimizers.Adam(0.02), "mse")
    budget = ks.callbacks.RankBudget(
        1, warmup=1, final=2, interval=1, compact=True
    )
    model.fit(*_data(), batch_size=4, verbose=0, callbacks=[budget])
    kinds = {type(layer).__name__ for layer in model.layers}
    assert kinds <= {"LoRADense", "Dense"} and "LoRADense" in kinds
    ranks = [getattr(layer, "rank", 0) for layer in model.layers]
    assert sum(ranks) == 2


def test_warns_if_it_never_ran():
    model = _model()
    model.compile("adam", "mse")
    budget = ks.callbacks.RankBudget(1, warmup=50, final=10, total_steps=100)
    with pytest.warns(UserWarning, match="took no triplet away: 8 steps"):
        model.fit(*_data(), batch_size=4, verbose=0, callbacks=[budget])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": 5}, "target of 10 triplets"),
        ({"target_rank": 0.1}, "target of 0 triplets"),
        ({"target_rank": 1, "warmup": 0.6, "final": 0.5}, "steps in between"),
        ({"target_rank": 1, "warmup": 8}, "steps in between"),
        ({"target_rank": 1, "criterion": "snr"}, "Expected IVON"),
    ],
)
def test_impossible_schedules_raise(options, message):
    model = _model()
    model.compile("adam", "mse")
    plain = type(model.optimizer)
    budget = ks.callbacks.RankBudget(**options)
    with pytest.raises(ValueError, match=message):
        model.fit(*_data(), batch_size=4, verbose=0, callbacks=[budget])
    assert type(model.optimizer) is plain


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_rank": 0}, "target_rank=0"),
        ({"target_rank": np.nan}, "target_rank=nan"),
        ({"target_rank": np.inf}, "target_rank=inf"),
        ({"target_rank": True}, "target_rank=True"),
        ({"criterion": "size"}, "criterion='size'"),
        ({"warmup": 2.5}, "warmup=2.5"),
        ({"warmup": True}, "warmup=True"),
        ({"final": 1.0}, "final=1.0"),
        ({"final": -1}, "final=-1"),
        ({"interval": 2.5}, "interval=2.5"),
        ({"interval": 0}, "interval=0"),
        ({"interval": True}, "interval=True"),
        ({"total_steps": 10.0}, "total_steps=10.0"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"beta_1": 1}, "beta_1=1"),
        ({"beta_2": -0.1}, "beta_2=-0.1"),
        ({"compact": "no"}, "compact='no'"),
    ],
)
def test_bad_options_raise(options, message):
    with pytest.raises(ValueError, match=message):
        ks.callbacks.RankBudget(**{"target_rank": 1, **options})


@pytest.mark.skipif(
    not hasattr(keras.optimizers, "MultiOptimizer"),
    reason="this Keras has no MultiOptimizer",
)
def test_many_optimizers_are_refused():
    model = _model()
    table = keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1))
    model.compile(keras.optimizers.MultiOptimizer(table), "mse")
    with pytest.raises(ValueError, match="one optimizer for all"):
        model.fit(*_data(), verbose=0, callbacks=[ks.callbacks.RankBudget(1)])


SPECTRAL = {
    "spectral": {"rank": 4, "adaptive": True, "shift_values": True},
    "gated_spectral": {"directions": 4, "l1": 0.0},
}


@pytest.mark.parametrize("method", SPECTRAL)
def test_singular_directions_have_a_budget(method):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,)),
            keras.layers.Dense(8, "tanh", name="first"),
            keras.layers.Dense(5, name="second"),
        ]
    )
    ks.wrap_model(model, method, target=["first", "second"], **SPECTRAL[method])
    model.compile(keras.optimizers.Adam(0.05), "mse")
    budget = ks.callbacks.RankBudget(1.5, warmup=2, final=4, interval=2)
    x, y = _data()
    history = model.fit(
        x, y, batch_size=16, epochs=8, verbose=0, callbacks=[budget]
    ).history
    assert history["rank_budget"][0] == 8 and history["rank_budget"][-1] == 3
    ranks = budget.ranks[-1]
    assert sum(ranks.values()) == 3
    assert [m.active_rank() for m in model.layers] == list(ranks.values())
    outputs = _numpy(model(x))
    assert ks.compact_ranks(model) == ranks
    np.testing.assert_allclose(_numpy(model(x)), outputs, atol=1e-5)
    left = [layer for layer in model.layers if hasattr(layer, "adapter_name")]
    expected = ks.SpectralDense if method == "spectral" else ks.LoRADense
    assert all(type(layer) is expected for layer in left)
    assert [layer.rank for layer in left] == [n for n in ranks.values() if n]
    model.fit(x, y, verbose=0)


def test_without_directions_there_is_no_budget():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(5)])
    ks.wrap_model(model, "spectral", "all", rank=2)
    model.compile("adam", "mse")
    x, y = _data()
    with pytest.raises(ValueError, match="'spectral' and adaptive=True"):
        model.fit(x, y, verbose=0, callbacks=[ks.callbacks.RankBudget(1)])
