"""GLoRA: scaled and shifted kernels and biases, of a path that is chosen."""

import keras
from keras import ops

from keras_spectral._backend import is_training
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import check_seed
from keras_spectral._internal.checks import derived_seed
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.glora_path import KINDS
from keras_spectral.layers.glora_path import checked_path
from keras_spectral.layers.glora_path import masked_sum
from keras_spectral.layers.glora_path import numbers_of
from keras_spectral.layers.glora_path import shapes_of
from keras_spectral.layers.kernel_adapter import KernelAdapter
from keras_spectral.layers.low_rank_pair import check_fits


@register_method("glora")
class GLoRADense(KernelAdapter):
    """Generalised LoRA: `K' = K + K o A + B`, `b' = b + b o D + E + C K`.

    `o` multiplies number by number. Each of the five parts is of a kind that
    `parts` chooses:

    - A and B (n_in x n_out): `"lora"`, a pair (n_in x rank)(rank x n_out);
      `"vector"`, a row (n_out) for all inputs; `"scalar"`; `"none"`;
    - C (n_in): `"lora"`, a pair (1 x rank)(rank x n_in); `"vector"`; `"none"`;
    - D and E (n_out): `"vector"`, `"scalar"`, `"none"`.

    The second factor of a pair starts at zero, as vectors and scalars do, so
    the adapted layer starts as the base; the first is glorot uniform. Each
    step builds the changed kernel, as A has no thin form, which costs the
    gradient of a whole kernel. Merged it costs nothing.

    With `supernet=True` it holds one set of weights for all 432 paths: a pair
    for each of A, B and C, of whose second factor the first row is the vector
    and the first number the scalar, and a vector for D and E. Each call in
    training draws a kind for each part; other calls use the path that a
    variable holds (`use_path`), which starts as `parts`. `search_glora` finds
    a good path for each layer without training, `finalize_glora` makes them
    fixed.

    A base without a bias has no D. It can run with C and E, and cannot be
    merged then.

    Use it where a LoRA is not enough and a merged layer has to cost nothing:
    few examples, domains far from the base's.

    Start with a learning rate of 0.003 (Adam; `benchmarks/study.py`).

    Source: Chavan et al. 2023, arXiv 2306.07967; products number by number as
    in its authors' code.

    Args:
        layer: The base: any layer with a kernel of its own that runs in one
            direction, with a column for each output.
        rank: Columns of the pairs, 1 to min(n_in, n_out).
        parts: Kinds by the parts' names, `"a"` to `"e"`; those that are left
            out are `"lora"`, of D and E `"vector"`.
        supernet: Whether each step draws a path.
        seed: Integer seed of the starts and of paths.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean, whether a supernet draws a path.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; nothing that trains; a rank above the
            kernel's smaller dimension; a base that no view covers, a LowRank
            pair, a transposed convolution or a ReversibleEmbedding.
            `merge_model` of C or E into a base without a bias, or with one
            whose numbers columns share.

    Example:

    >>> layer = GLoRADense(keras.layers.Dense(6), 2, {"a": "vector"})
    >>> outputs = layer(keras.ops.ones((2, 5)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(1, 6), (5, 2), (2, 6), (1, 2), (2, 5), (1, 6), (1, 6)]
    """

    trains = "a factor and a shift of the kernel, and of the bias"
    one_direction = True
    scales_columns = True
    reads_kernel = True
    forms_kernel = True

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int = 4,
        parts: dict[str, str] | None = None,
        supernet: bool = False,
        seed: int | None = None,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        self.rank = check_rank(rank)
        self.parts = checked_path({} if parts is None else parts)
        self.supernet = check_flag(supernet, "supernet")
        self.seed = check_seed(seed)
        if supernet:
            seed = derived_seed(seed, "paths")
            self.seed_generator = keras.random.SeedGenerator(seed)

    def build_adapter(self):
        path = checked_path({}) if self.supernet else self.parts
        for name, shape in shapes_of(path, self.rank, self.view).items():
            start = "zeros"
            if name.endswith("down"):
                check_fits(self, self.rank)
                seed = derived_seed(self.seed, name)
                start = keras.initializers.GlorotUniform(seed)
            weight = self.add_weight(name=name, shape=shape, initializer=start)
            setattr(self, name, weight)
        if not self._trainable_variables:
            raise ValueError(
                f"Received parts={self.parts} for layer '{self.name}': nothing "
                "would train. Expected a part that is not 'none', besides D of "
                "a layer without a bias."
            )
        if self.supernet:
            self.choice = self.add_weight(
                name="choice",
                shape=(len(KINDS),),
                initializer=keras.initializers.Constant(numbers_of(self.parts)),
                trainable=False,
                dtype="int32",
            )

    def use_path(self, parts: dict[str, str]) -> None:
        """Lets a supernet use a path wherever it does not train."""
        if not self.supernet:
            raise ValueError(
                f"Layer '{self.name}' has the fixed path {self.parts}. "
                "Expected one with `supernet=True`."
            )
        self.choice.assign(numbers_of(parts))

    def path_in_use(self) -> dict[str, str]:
        """The kind of each part, outside of training."""
        if not self.supernet:
            return dict(self.parts)
        numbers = ops.convert_to_numpy(self.choice)
        return {p: KINDS[p][i] for p, i in zip(KINDS, numbers)}

    def kernel_change(self):
        return self.kernel_change_of_step(None)

    def kernel_change_of_step(self, training):
        kernel = self.view.matrix()
        a, b = self._part("a", training), self._part("b", training)
        change = kernel * ops.cast(a, kernel.dtype) + ops.cast(b, kernel.dtype)
        return self.view.from_matrix(change)

    def output_shift(self, outputs, training=None):
        factors, shifts = self._rows(training)
        total, bias = self.view.spread(shifts, outputs), self.view.bias(outputs)
        if bias is not None:
            total = total + bias * self.view.spread(factors, outputs)
        return total

    def bias_change(self):
        if not any(f"{part}_up" in vars(self) for part in "cde"):
            return None
        factors, shifts = self._rows(None)
        change = self.view.on_bias(shifts)
        scaled = self.view.scaled_bias(factors)
        return None if change is None else ops.add(change, scaled)

    def check_mergeable(self):
        path = self.path_in_use()
        kept = [part for part in "ce" if path[part] != "none"]
        if kept and self.view.bias_of() is None:
            raise ValueError(
                f"Layer '{self.name}' has no bias to take the parts {kept} of "
                "its GLoRA. Expected a base with one, or "
                "`parts={'c': 'none', 'e': 'none'}`: keep the adapter, or "
                "exclude such layers."
            )

    def _part(self, part, training):
        """A part as a matrix that broadcasts."""
        down, up = (vars(self).get(f"{part}_{end}") for end in ("down", "up"))
        if up is None:
            return ops.zeros((1, 1))
        up = ops.convert_to_tensor(up)
        if self.supernet:
            return masked_sum(self._chosen(part, training), down, up)
        return up if down is None else ops.matmul(down, up)

    def _chosen(self, part, training):
        """For each kind of a part 1.0 or 0.0: the one that a call uses."""
        number, kinds = self.choice[list(KINDS).index(part)], KINDS[part]
        if is_training(training) and self.trainable:
            seed = self.seed_generator
            number = keras.random.randint((), 0, len(kinds), seed=seed)
        chosen = ops.one_hot(number, len(kinds), dtype="float32")
        return dict(zip(kinds, ops.unstack(chosen)))

    def _rows(self, training):
        """D and `E + C K`, each (n_out)."""
        c, d, e = (self._part(part, training) for part in "cde")
        if "c_up" in vars(self):
            kernel = self.view.matrix()
            e = ops.add(e, ops.matmul(ops.cast(c, kernel.dtype), kernel))
        shape = (1, self.view.n_out)
        return [ops.broadcast_to(row, shape)[0] for row in (d, e)]
