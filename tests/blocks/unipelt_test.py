import block_cases
import keras
import numpy as np
import pytest
from block_cases import HEADS
from block_cases import TOKENS
from block_cases import WIDTH
from block_cases import net_size
from keras import ops
from variants import BlockVariant

import keras_spectral as ks

PARTS = {"lora": 2, "prefix": 3, "bottleneck": 2}
_SIZE = 2 * 2 * 2 * WIDTH + 3 * 2 * WIDTH + net_size(2)
VARIANTS = [
    BlockVariant(
        ks.UniPELTBlock,
        "sigmoid",
        {**PARTS, "sparsity": 0.01, "penalty": "l1"},
        _SIZE + 4 * (WIDTH + 1),
        starts_as_base=False,
    ),
    BlockVariant(
        ks.UniPELTBlock,
        "softmax",
        {**PARTS, "gate": "softmax", "warmup_steps": 0},
        _SIZE + 64 * (WIDTH + 1) + 3 * 65,
        starts_as_base=False,
    ),
    BlockVariant(
        ks.UniPELTBlock,
        "gumbel",
        {**PARTS, "gate": "gumbel", "sparsity": 0.1, "penalty": "latency"},
        _SIZE + 3,
        starts_as_base=False,
    ),
    BlockVariant(
        ks.UniPELTBlock,
        "no_prefix",
        {**PARTS, "prefix": 0, "mask_padding": False},
        _SIZE - 6 * WIDTH + 3 * (WIDTH + 1),
    ),
]


def _numpy(x):
    return ops.convert_to_numpy(x)


def _unipelt(**options):
    """One block with hand-set weights, and its inputs."""
    keras.utils.set_random_seed(0)
    layer = ks.UniPELTBlock(block_cases.Block(), **{**PARTS, **options})
    given = block_cases.inputs()
    layer(given["x"], padding_mask=given["mask"])
    rng = np.random.default_rng(3)
    for weight in layer.weights:
        if weight.name not in ("scale", "step") and weight.trainable:
            weight.assign(rng.normal(0, 0.5, weight.shape))
    for weight in layer.layer.weights:
        weight.assign(rng.normal(0, 0.5, weight.shape))
    return layer, given


def _softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _oracle(layer, x, mask, gates_seen=None):
    """The whole block in float64, one example after the other."""
    own = {w.name: np.float64(_numpy(w)) for w in layer.weights}
    base = {
        f"{w.path.split('/')[-2]}/{w.name}": np.float64(_numpy(w))
        for w in layer.layer.weights
    }
    outputs = []
    for example, counts in zip(np.float64(x), mask.astype(bool)):
        seen = counts if layer.mask_padding else np.ones(len(x[0]), bool)
        gate = _gates(layer, own, example, seen)
        attended = _attention(base, own, gate, example, counts)
        y = _norm(base, "norm", example + attended)
        inner = np.maximum(y @ base["inner/kernel"] + base["inner/bias"], 0)
        total = y + inner @ base["outer/kernel"] + base["outer/bias"]
        if layer.bottleneck != 0:
            z = _norm(base, "last_norm", total)
            down = z @ own["adapter_down_kernel"] + own["adapter_down_bias"]
            up = np.maximum(down, 0) @ own["adapter_up_kernel"]
            more = up + own["adapter_up_bias"]
            total = total + gate("adapter", z) * more
        outputs.append(_norm(base, "last_norm", total))
        if gates_seen is not None:
            gates_seen.append({n: gate(n, None) for n in layer.gate_names})
    return np.stack(outputs)


def _gates(layer, own, example, seen):
    """A function (part, its input) -> number."""
    known = {}
    if layer.gate == "softmax":
        mean = example[seen].mean(axis=0)
        hidden = mean @ own["gate_hidden_kernel"] + own["gate_hidden_bias"]
        logits = np.maximum(hidden, 0) @ own["gate_logits_kernel"]
        logits = (logits + own["gate_logits_bias"]) / layer.temperature
        warm = own["step"] > layer.warmup_steps
        shares = _softmax(logits) if warm else np.ones(3) / 3
        known = dict(zip(layer.gate_names, shares))
    elif layer.gate == "gumbel":
        known = dict(zip(layer.gate_names, own["gate_logits"] > 0))

    def gate(name, z):
        key = name if layer.gate == "sigmoid" else name.split("_")[0]
        if key not in known:
            kernel, bias = own[f"gate_{key}_kernel"], own[f"gate_{key}_bias"]
            known[key] = _sigmoid(z @ kernel + bias)[seen].mean()
        return float(known[key])

    return gate


def _attention(base, own, gate, x, counts):
    size = WIDTH // HEADS

    def project(name):
        kernel = base[f"{name}/kernel"].reshape(WIDTH, WIDTH)
        y = x @ kernel + base[f"{name}/bias"].reshape(WIDTH)
        if f"lora_{name}_a" in own:
            delta = x @ own[f"lora_{name}_a"] @ own[f"lora_{name}_b"]
            y = y + gate(f"lora_{name}", x) * delta
        return y

    query, key, value = (project(n) for n in ("query", "key", "value"))
    counts = np.append(np.ones(len(own["prefix_rows"]), bool), counts)
    g = gate("prefix", x)
    key = np.concatenate([g * own["prefix_rows"][:, :WIDTH], key])
    value = np.concatenate([g * own["prefix_rows"][:, WIDTH:], value])
    if g == 0:  # whole parts are off
        counts[:3] = False
    heads = []
    for h in range(HEADS):
        part = slice(h * size, (h + 1) * size)
        scores = query[:, part] @ key[:, part].T / np.sqrt(size)
        scores = np.where(counts, scores, -1e30)
        heads.append(_softmax(scores) @ value[:, part])
    kernel = base["attention_output/kernel"].reshape(WIDTH, WIDTH)
    return np.concatenate(heads, 1) @ kernel + base["attention_output/bias"]


def _norm(base, name, x):
    x = x - x.mean(axis=-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-3)
    return x * base[f"{name}/gamma"] + base[f"{name}/beta"]


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, 0),
        ({"mask_padding": False}, 0),
        ({"gate": "softmax", "temperature": 0.5, "warmup_steps": 2}, 2),
        ({"gate": "softmax", "temperature": 0.5, "warmup_steps": 2}, 3),
        ({"gate": "gumbel"}, 0),
    ],
)
def test_equals_its_formula_with_mask_and_padding(options, steps):
    layer, given = _unipelt(**options)
    layer.step.assign(steps)
    seen = []
    expected = _oracle(layer, given["x"], given["mask"], seen)
    got = _numpy(layer(given["x"], padding_mask=given["mask"]))
    np.testing.assert_allclose(got, expected, atol=1e-5)
    for name, (mean, deviation) in layer.gate_values.items():
        values = [gates[name] for gates in seen]
        np.testing.assert_allclose(mean, np.mean(values), atol=1e-5)
        np.testing.assert_allclose(deviation, np.std(values), atol=1e-5)
    assert layer.gate_values.keys() == seen[0].keys()


def test_gates_of_zero_leave_the_base():
    layer, given = _unipelt(prefix=0)
    for name, (kernel, bias) in layer.gates.weights.items():
        kernel.assign(kernel * 0)
        bias.assign(bias * 0 - 1e9)
        assert name in ("lora_query", "lora_value", "adapter")
    mask = given["mask"]
    np.testing.assert_array_equal(
        _numpy(layer(given["x"], padding_mask=mask)),
        _numpy(layer.layer(given["x"], padding_mask=mask)),
    )


def test_parts_that_are_off_have_no_weights():
    layer, _ = _unipelt(lora=0, bottleneck=0)
    assert layer.gate_names == ["prefix"]
    names = {w.name for w in layer.trainable_weights}
    assert names == {"prefix_rows", "gate_prefix_kernel", "gate_prefix_bias"}


def test_softmax_shares_sum_to_one_and_wait():
    layer, given = _unipelt(gate="softmax", warmup_steps=1)
    means = []
    for _ in range(2):
        layer(given["x"], padding_mask=given["mask"], training=True)
        means.append([mean for mean, _ in layer.gate_values.values()])
    np.testing.assert_allclose(means[0], [1 / 3] * 3, rtol=1e-6)
    np.testing.assert_allclose(np.sum(means[1]), 1, rtol=1e-6)
    assert np.ptp(means[1]) > 0.01


@pytest.mark.parametrize(
    ("gate", "penalty"),
    [
        ("sigmoid", "l1"),
        ("softmax", "entropy"),
        ("gumbel", "latency"),
    ],
)
def test_penalties(gate, penalty):
    layer, given = _unipelt(
        gate=gate, penalty=penalty, sparsity=0.5, warmup_steps=0
    )
    layer(given["x"], padding_mask=given["mask"])
    assert not layer.losses
    seen = []
    _oracle(layer, given["x"], given["mask"], seen)
    layer.step.assign(1)
    if gate == "softmax":
        seen = []
        _oracle(layer, given["x"], given["mask"], seen)
    layer(given["x"], padding_mask=given["mask"], training=True)
    gates = np.array([list(gates.values()) for gates in seen])
    if penalty == "l1":
        expected = np.abs(gates).sum(axis=1).mean()
    elif penalty == "entropy":
        expected = -(gates * np.log(gates + 1e-6)).sum(axis=1).mean()
    else:
        logits = _numpy(layer.gates.logits)
        work = np.array([2 * 2 * 2 * WIDTH, 3 * 2 * WIDTH, 2 * 2 * WIDTH])
        expected = (_sigmoid(logits) * work / work.sum()).sum()
    (loss,) = layer.losses
    np.testing.assert_allclose(_numpy(loss), 0.5 * expected, rtol=1e-5)


def test_gumbel_gates_are_drawn_only_while_training():
    layer, given = _unipelt(gate="gumbel", seed=1)
    layer.gates.logits.assign([0.1, -0.1, 0.0])
    call = {"padding_mask": given["mask"]}
    drawn = set()
    for _ in range(12):
        layer(given["x"], training=True, **call)
        values = tuple(mean for mean, _ in layer.gate_values.values())
        assert set(values) <= {0.0, 1.0}
        drawn.add(values)
    assert len(drawn) > 2
    layer(given["x"], **call)
    means = [mean for mean, _ in layer.gate_values.values()]
    assert means == [1.0, 0.0, 0.0]


def test_statistics_and_low_steps():
    layer, given = _unipelt(lora=0)
    kernel, bias = layer.gates.weights["prefix"]
    kernel.assign(kernel * 0)
    bias.assign(bias * 0 - 5)  # a gate of 0.0067
    layer.reset_gates()
    for training in (True, True, False):
        layer(given["x"], padding_mask=given["mask"], training=training)
    np.testing.assert_array_equal(_numpy(layer.low_steps), [2, 0])
    mean, deviation = layer.gate_statistics()["prefix"]
    np.testing.assert_allclose(mean, 0.0066929, rtol=1e-4)
    assert deviation < 1e-4
    assert layer.gate_statistics()["adapter"][1] > 1e-3
    layer.reset_gates()
    assert float(layer.gate_examples) == 0


def test_counts_follow_from_the_options():
    keras.utils.set_random_seed(0)
    model = block_cases.model()
    ks.wrap_model(model, "unipelt", overrides={"block_1": {"lora": 0}})
    sizes = {
        place: {w.name for w in model.get_layer(place).trainable_weights}
        for place in ("block_0", "block_1")
    }
    assert "lora_query_a" in sizes["block_0"] - sizes["block_1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": -1}, "lora=-1"),
        ({"prefix": 2.5}, "prefix=2.5"),
        ({"lora": 0, "prefix": 0, "bottleneck": 0}, "at least one part"),
        ({"gate": "hard"}, "gate='hard'"),
        ({"penalty": "l2"}, "penalty='l2'"),
        ({"penalty": "latency", "sparsity": 0.1}, "gate='sigmoid'"),
        ({"gate": "gumbel", "sparsity": 0.1}, "penalty='entropy'"),
        ({"temperature": 0}, "temperature=0"),
        ({"sparsity": -1}, "sparsity=-1"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_bad_options_raise(options, message):
    block = block_cases.Block()
    with pytest.raises(ValueError, match=message):
        ks.UniPELTBlock(block, **options)


def test_an_attention_layer_has_no_place_for_the_adapter():
    keras.utils.set_random_seed(0)
    x = keras.Input((TOKENS, WIDTH))
    attention = keras.layers.MultiHeadAttention(HEADS, 4, name="attention")
    model = keras.Model(x, attention(x, x))
    given = block_cases.inputs()["x"]
    plain = _numpy(model(given))
    with pytest.raises(ValueError, match="no feed-forward net"):
        ks.wrap_model(model, "unipelt")
    np.testing.assert_array_equal(_numpy(model(given)), plain)
    ks.wrap_model(model, "unipelt", bottleneck=0)
    assert np.abs(_numpy(model(given)) - plain).max() > 1e-6
