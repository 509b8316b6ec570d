"""UniPELTBlock: LoRA, prefix and bottleneck of a block behind gates."""

import keras
from keras import ops

from keras_spectral._backend import number_in
from keras_spectral._backend import over_replicas
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import check_whole
from keras_spectral._internal.checks import derived_seed
from keras_spectral._internal.twin import Detour
from keras_spectral.blocks.block_adapter import BlockAdapter
from keras_spectral.blocks.bottleneck import Bottleneck
from keras_spectral.blocks.gates import GATES
from keras_spectral.blocks.gates import absolute
from keras_spectral.blocks.gates import entropy
from keras_spectral.blocks.low_rank import LowRankPart
from keras_spectral.blocks.prefix import Prefix
from keras_spectral.layers.adapter import register_method

LOW_GATE = 0.05  # a part whose mean gate stays below is of no use


@register_method("unipelt")
class UniPELTBlock(BlockAdapter):
    """LoRA, prefix and bottleneck adapter in one block, each behind a gate.

    - LoRA on query and value: `y = base(x) + g x A B`, B zero at the start;
    - prefix: `attention(Q, [g P_k; K], [g P_v; V])`;
    - adapter: `LN(ffn(a) + a + g up(relu(down(z))))`, a the feed-forward
      net's residual input, `z = LN(ffn(a) + a)` by the block's own norm (a
      pre-LN block has none, neither in z nor at its end), up zero at the
      start.

    The gates g, one number for each example, are by `gate`:

    - `"sigmoid"` (the paper): `g = mean over tokens of sigmoid(h w + c)` with
      h the part's own input; query and value have a gate each;
    - `"softmax"`: shares of the three parts that sum to 1,
      `softmax(Dense(Dense(mean over tokens of the block's input, 64, relu))
      / temperature)`, held equal for the first `warmup_steps`;
    - `"gumbel"`: each part is on or off for all examples, by a trained logit;
      for `search_parts`.

    Means are over tokens that the padding mask lets through. `penalty` times
    `sparsity` joins the loss: `"entropy"` (-sum g log g), `"l1"` (sum |g|)
    or `"latency"` (gumbel: the sum of the parts' probabilities, each times
    its share of the work). In cached generation gates see only the tokens of
    one call: all of the prompt, then one by one.

    It cannot be merged: only LoRA could be, and its gate differs from
    example to example.

    Start with a learning rate of 0.003 (Adam; `benchmarks/study.py`).

    Source: Mao et al. 2022, arXiv 2110.07577, section 3; the softmax
    shares and the search are of this project.

    Args:
        layer: The block.
        lora: Rank of LoRA on query and value; 0 leaves the part out.
        prefix: Length of the prefix; 0 leaves it out.
        bottleneck: Width of the adapter; 0 leaves it out, None is a 16th of
            the block's width.
        prefix_hidden: Units of the net that computes the prefix, or None.
        gate: `"sigmoid"`, `"softmax"` or `"gumbel"`.
        temperature: Softness of "softmax" and "gumbel", above 0.
        sparsity: Weight of the penalty. Defaults to 1e-4 for "softmax", else
            0.
        penalty: `"entropy"`, `"l1"` or `"latency"`.
        warmup_steps: Training steps of equal shares ("softmax").
        init_stddev: Deviation of the gates' starts.
        mask_padding: False lets gates see padding as well, as the authors do.
        seed: Integer seed of the starts.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the block takes; further arguments go to the block.
        training: Boolean, whether steps are counted and penalties added.

    Input shape: the block's. Output shape: the block's.

    Raises:
        ValueError: A bad option; no part at all; a block of unknown kind or
            without the pieces that a part needs; merging.

    Example:

    >>> block = keras.layers.MultiHeadAttention(2, 4, name="attention")
    >>> x = keras.ops.ones((2, 3, 8))
    >>> outputs = block(x, x)
    >>> layer = UniPELTBlock(block, lora=2, prefix=4, bottleneck=0)
    >>> outputs = layer(x, x)
    >>> sorted(layer.gate_values)
    ['lora_query', 'lora_value', 'prefix']
    """

    trains = "LoRA, prefix and bottleneck of a block, and their gates"

    def __init__(
        self,
        layer: keras.layers.Layer,
        lora: int = 8,
        prefix: int = 10,
        bottleneck: int | None = None,
        prefix_hidden: int | None = None,
        gate: str = "sigmoid",
        temperature: float = 1.0,
        sparsity: float | None = None,
        penalty: str = "entropy",
        warmup_steps: int = 500,
        init_stddev: float = 0.02,
        mask_padding: bool = True,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        lora = check_whole(lora, "lora")
        prefix = check_whole(prefix, "prefix")
        if bottleneck is not None:
            bottleneck = check_whole(bottleneck, "bottleneck")
        if prefix_hidden is not None:
            prefix_hidden = check_rank(prefix_hidden, "prefix_hidden")
        if not lora and not prefix and bottleneck == 0:
            raise ValueError(
                "Received lora=0, prefix=0, bottleneck=0. Expected at least "
                "one part."
            )
        check_choice(gate, "gate", tuple(GATES))
        check_choice(penalty, "penalty", ("entropy", "l1", "latency"))
        if sparsity is not None:
            sparsity = check_number(sparsity, "sparsity", 0)
        if (penalty == "latency") != (gate == "gumbel") and sparsity:
            raise ValueError(
                f"Received gate={gate!r} with penalty={penalty!r}. Expected "
                "'latency' with 'gumbel' gates, 'entropy' or 'l1' with others."
            )
        self.lora = lora
        self.prefix = prefix
        self.bottleneck = bottleneck
        self.prefix_hidden = prefix_hidden
        self.gate = gate
        self.temperature = check_number(temperature, "temperature", 1e-6)
        self.sparsity = sparsity
        self.penalty = penalty
        self.warmup_steps = check_whole(warmup_steps, "warmup_steps")
        self.init_stddev = check_number(init_stddev, "init_stddev", 0)
        self.mask_padding = check_flag(mask_padding, "mask_padding")
        self.seed = check_seed(seed)
        self.seed_generator = keras.random.SeedGenerator(
            derived_seed(seed, "noise")
        )

    def build_adapter(self):
        view, seed = self.view, self.seed
        sizes = {}
        self.pairs = {}
        for part in ("query", "value") if self.lora else ():
            pair = LowRankPart(self, f"lora_{part}", part, self.lora, seed)
            self.pairs[f"lora_{part}"] = pair
            sizes[f"lora_{part}"] = pair.view.n_in
        self.rows = self.net = None
        if self.prefix:
            self.rows = Prefix(
                self, "prefix", self.prefix, self.prefix_hidden, seed
            )
            sizes["prefix"] = view.linear("query").n_in
        if self.bottleneck != 0:
            size = self.bottleneck or max(1, view.width // 16)
            view.slot("last")  # raises where there is none
            self.net = Bottleneck(self, "adapter", size, seed=seed)
            sizes["adapter"] = view.width
        if self.gate != "sigmoid":
            sizes = {name.split("_")[0]: size for name, size in sizes.items()}
        self.gates = GATES[self.gate](self, sizes)
        self.gate_names = list(sizes)
        self.collected = None  # a list, while `collect_gates` runs
        self._add_records(len(sizes))

    def _add_records(self, count):
        """Records of the gates: the last call's, and since `reset_gates`."""
        for name, shape in (
            ("last_gates", (2, count)),
            ("gate_sums", (2, count)),
            ("gate_examples", ()),
            ("low_steps", (count,)),
            ("step", ()),
        ):
            variable = self.add_weight(
                name=name, shape=shape, initializer="zeros", trainable=False
            )
            setattr(self, name, variable)

    def begin(self, run):
        if not self.mask_padding:
            run.padding = None
        if run.training:
            self.step.assign_add(1.0)
        run.attended = run.inputs
        run.gates = self.gates.begin(run)

    def detours(self, run) -> list[Detour]:
        def strength(name):
            return lambda z: self._switched(self._gate(name, z, run))

        found = []
        for name, pair in self.pairs.items():
            found += pair.detours(strength(name))
        if self.rows is not None:
            found += self.rows.detours(
                self.view,
                lambda: self._gate("prefix", run.attended, run),
                lambda: self._shown(run),
            )
        if self.net is not None:
            found += self.net.around_norm(self.view.norm, strength("adapter"))
        if self.view.kind.attention:
            found.append((self.view.slot("attention"), _seen_by(run)))
        return found

    def end(self, outputs, run):
        if self.net is not None and self.view.norm is None:
            outputs = self.net.at_end(
                outputs,
                lambda z: self._switched(self._gate("adapter", z, run)),
            )
        gates = ops.stack([run.gates[name] for name in self.gate_names], axis=1)
        if run.training:
            self._add_penalty(gates)
        gates = ops.stop_gradient(gates)
        self._record(gates, run.training)
        if self.collected is not None:
            self.collected.append(gates)
        return outputs

    def _gate(self, name, z, run):
        """The gate (batch,) of a part, kept in `run.gates`."""
        key = name if self.gate == "sigmoid" else name.split("_")[0]
        if key not in run.gates:
            run.gates[key] = self.gates.gate(key, z, run)
        return run.gates[key]

    def _switched(self, gate):
        """A gate times the scale; zero when switched off, even of NaN."""
        on = ops.not_equal(self.amount, 0.0)
        return ops.where(on, gate * self.amount, 0.0)

    def _shown(self, run):
        """Not zero where the prefix is there."""
        if self.gate != "gumbel":
            return self.amount
        return self._switched(run.gates["prefix"])

    def _add_penalty(self, gates):
        weight = self.sparsity
        if weight is None:
            weight = 1e-4 if self.gate == "softmax" else 0.0
        if not weight:
            return
        if self.penalty == "latency":
            size = ops.sum(self.gates.probabilities() * self._costs())
        else:
            size = {"entropy": entropy, "l1": absolute}[self.penalty](gates)
        self.add_loss(weight * size)

    @property
    def parts(self) -> dict[str, int]:
        """The parts there are, and how many numbers each multiplies by."""
        sizes = {}
        if self.pairs:
            pairs = [pair.view for pair in self.pairs.values()]
            sizes["lora"] = self.lora * sum(v.n_in + v.n_out for v in pairs)
        if self.rows is not None:
            sizes["prefix"] = self.prefix * sum(self.rows.sizes)
        if self.net is not None:
            sizes["adapter"] = 2 * self.view.width * self.net.size
        return sizes

    def _costs(self):
        """The parts' shares of the work that they add for one token."""
        sizes = list(self.parts.values())
        return ops.convert_to_tensor([s / sum(sizes) for s in sizes], "float32")

    def _record(self, gates, training):
        on = ops.not_equal(self.adapter_strength, 0)
        sums = [ops.sum(gates, axis=0), ops.sum(ops.square(gates), axis=0)]
        examples = ops.cast(ops.shape(gates)[0], "float32")
        sums, examples = over_replicas([ops.stack(sums), examples])
        mean = sums[0] / examples
        (spread,) = over_replicas([ops.sum(ops.square(gates - mean), axis=0)])
        last = ops.stack([mean, ops.sqrt(spread / examples)])
        before = ops.convert_to_tensor(self.last_gates)
        self.last_gates.assign(ops.where(on, last, before))
        self.gate_sums.assign_add(ops.where(on, sums, 0.0))
        self.gate_examples.assign_add(ops.where(on, examples, 0.0))
        if training:
            low = ops.cast(mean < LOW_GATE, "float32")
            self.low_steps.assign(low * (self.low_steps + 1))

    @property
    def gate_values(self) -> dict[str, tuple[float, float]]:
        """Mean and deviation of each gate over the last call's examples."""
        means, deviations = ops.convert_to_numpy(self.last_gates).tolist()
        return dict(zip(self.gate_names, zip(means, deviations)))

    def gate_statistics(self) -> dict[str, tuple[float, float]]:
        """Mean and deviation of each gate since `reset_gates`."""
        count = max(number_in(self.gate_examples), 1.0)
        means, squares = ops.convert_to_numpy(self.gate_sums) / count
        deviations = (squares - means**2).clip(0) ** 0.5
        pairs = zip(means.tolist(), deviations.tolist())
        return dict(zip(self.gate_names, pairs))

    def reset_gates(self) -> None:
        """Forgets what the gates were."""
        self.gate_sums.assign(ops.zeros(self.gate_sums.shape))
        self.gate_examples.assign(0.0)


def _seen_by(run):
    def see(original, *args, **kwargs):
        run.attended = (*args, *kwargs.values())[0]
        return original(*args, **kwargs)

    return see
