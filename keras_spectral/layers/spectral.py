"""SpectralDense: training in a kernel's singular directions."""

import keras
from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_flag
from keras_spectral._internal.checks import check_rank
from keras_spectral._internal.checks import is_whole
from keras_spectral._internal.linalg import cayley
from keras_spectral.kernels.spectra import Triplets
from keras_spectral.layers.adapter import register_method
from keras_spectral.layers.budgeted import Budgeted
from keras_spectral.layers.kernel_adapter import KernelAdapter

_DEFAULT_RANK = 8


@register_method("spectral")
class SpectralDense(Budgeted, KernelAdapter):
    """Spectral adapter: moves singular vectors or values of the kernel.

    With the kernel's thin SVD `K = U diag(S) V^T`, the chosen triplets
    U1 (n_in x r), S1 (r), V1 (n_out x r), and the others U2, S2, V2:

    - `mode="additive"`: `K' = (U1 + dU) diag(S1) (V1 + dV)^T + U2 S2 V2^T`.
      dU (n_in x r) and dV (n_out x r) start at zero; `r (n_in + n_out)`
      weights, an update of rank up to 2r. As many weights as LoRA, and it
      starts in the directions that the kernel uses most. With
      `shift_values` it has `diag(S1 + dS)`: r weights more, from zero on.
      With `adaptive` dU, dV and dS are times a trained mask m (r), ones at
      the start: `RankBudget` shares directions out among layers by setting
      numbers of it to zero, and `compact_ranks` drops these.
    - `mode="rotate"`: `K' = [U1 Q(a), U2] diag(c S1, S2) [V1 Q(b), V2]^T`,
      where Q is the Cayley map. a, b (r x r) start at zero, c (r) at one;
      `2 r^2 + r` weights, whatever the layer's size.
    - `mode="values"` (SVDiff): `K' = U diag(relu(S + d)) V^T`; d (r) starts
      at zero; r weights, one for each singular value.

    All run as `base(x)` plus thin products of x; no kernel is rebuilt. U1,
    S1 and V1 are kept as frozen weights and saved with the adapter, because
    trained numbers mean nothing without them. In a grouped convolution K is
    block diagonal, and stays so: what an update puts outside of the blocks
    is left out.

    Start with a learning rate of 0.001 in "additive", 0.01 in "rotate" and 0.1
    in "values", the highest tried (Adam; `benchmarks/study.py`).

    Source: additive and rotate: Zhang and Pilanci 2024, arXiv 2405.13952,
    section 3; the shift dS is not in their text: their code trains and adds
    it for fusion (`adapter_fusion/spectral` in pilancilab/spectral_adapter);
    values: Han et al. 2023, arXiv 2303.11305, section 3.2.

    Args:
        layer: The base layer: any kind that LoRADense takes.
        rank: How many triplets. Defaults to the length of `columns` if that
            is a list, else to 8, for `mode="values"` to all.
        mode: `"additive"`, `"rotate"` or `"values"`.
        columns: Which triplets, largest singular value first: a number, the
            first of `rank` consecutive ones, or a list of numbers. Adapters
            on disjoint columns can be fused without loss (`fuse_adapters`).
        shift_values: Whether `mode="additive"` also trains a shift of S1.
        adaptive: Whether `mode="additive"` has a mask for a RankBudget.
        **kwargs: Keras layer arguments (`name`, `dtype`, `trainable`).

    Call arguments:
        inputs: What the base takes.
        training: Boolean; changes nothing here.

    Input shape: the base's. Output shape: the base's.

    Raises:
        ValueError: A bad option; a column beyond min(n_in, n_out); a base
            that no view covers.

    Example:

    >>> layer = SpectralDense(keras.layers.Dense(64), rank=4, mode="rotate")
    >>> outputs = layer(keras.ops.ones((2, 32)))
    >>> [tuple(w.shape) for w in layer.trainable_weights]
    [(4, 4), (4, 4), (4,)]
    """

    trains = "changes of the kernel's singular vectors or values"

    def __init__(
        self,
        layer: keras.layers.Layer,
        rank: int | None = None,
        mode: str = "additive",
        columns: int | list[int] = 0,
        shift_values: bool = False,
        adaptive: bool = False,
        **kwargs,
    ):
        super().__init__(layer, **kwargs)
        check_choice(mode, "mode", ("additive", "rotate", "values"))
        self.shift_values = check_flag(shift_values, "shift_values")
        if shift_values and mode != "additive":
            raise ValueError(
                f"Received shift_values=True with mode={mode!r}. Expected "
                "mode='additive': the other modes train singular values "
                "anyway."
            )
        self.adaptive = check_flag(adaptive, "adaptive")
        if adaptive and mode != "additive":
            raise ValueError(
                f"Received adaptive=True with mode={mode!r}. Expected "
                "mode='additive': a rotation has no directions of its own."
            )
        if rank is not None:
            rank = check_rank(rank)
        self.rank = rank
        self.mode = mode
        self.columns = _check_columns(columns, rank)

    @property
    def is_low_rank(self):
        return self.mode != "values"

    def triplets_needed(self, view):
        return max(self._column_list(view)) + 1

    def build_adapter(self):
        columns = self._column_list(self.view)
        self.rank = len(columns)
        add_triplets(self, columns)
        shapes = {
            "additive": {"delta_u": self.u.shape, "delta_v": self.v.shape},
            "rotate": {
                "angles_u": (self.rank, self.rank),
                "angles_v": (self.rank, self.rank),
                "stretch": (self.rank,),
            },
            "values": {"delta_s": (self.rank,)},
        }
        if self.shift_values:
            shapes["additive"]["delta_s"] = (self.rank,)
        for name, shape in shapes[self.mode].items():
            start = "ones" if name == "stretch" else "zeros"
            variable = self.add_weight(
                name=name, shape=shape, initializer=start
            )
            setattr(self, name, variable)
        if self.adaptive:
            self.mask = self.add_weight(
                name="mask", shape=(self.rank,), initializer="ones"
            )

    @property
    def has_budget(self):
        return self.adaptive

    def direction_weights(self):
        return self.mask, [(self.delta_u, 0), (self.delta_v, 0)]

    def with_directions(self, numbers):
        """A layer with some of the directions, masks folded in, and its fill.

        Args:
            numbers: Which of them, an array.
        """
        columns = [self.column_list[n] for n in numbers]
        new = SpectralDense(
            self.layer, columns=columns, shift_values=self.shift_values
        )
        known = self.view.n_in, self.view.n_out
        count = max(columns) + 1
        new.give_triplets(
            Triplets(
                ops.zeros((known[0], count)),
                ops.zeros((count,)),
                ops.zeros((known[1], count)),
            )
        )

        def fill():
            for name in ("u", "s", "v"):
                value = ops.convert_to_tensor(getattr(self, name))
                getattr(new, name).assign(ops.take(value, numbers, axis=-1))
            for name, change in self._changes().items():
                getattr(new, name).assign(ops.take(change, numbers, axis=-1))

        return new, fill

    def _changes(self):
        """The trained changes of directions, masks in them."""
        names = ["delta_u", "delta_v", *["delta_s"] * self.shift_values]
        found = {n: ops.convert_to_tensor(getattr(self, n)) for n in names}
        if not self.adaptive:
            return found
        return {name: change * self.mask for name, change in found.items()}

    def factors(self):
        if self.mode == "values":
            change = ops.relu(self.s + self.delta_s) - self.s
            return self.u, change[:, None] * ops.transpose(self.v)
        if self.mode == "rotate":
            angles = map(self.unless_off, (self.angles_u, self.angles_v))
            turn_u, turn_v = map(cayley, angles)
            stretched = turn_u * (self.stretch * self.s)
            core = ops.matmul(stretched, ops.transpose(turn_v))
            core = core - ops.diag(self.s)
            return self.u, ops.matmul(core, ops.transpose(self.v))
        changes = self._changes()
        delta_u, delta_v = changes["delta_u"], changes["delta_v"]
        if self.shift_values:
            # The same with S1 + dS, and x U1 dS V1^T beside it.
            delta_s = changes["delta_s"]
            s = self.s + delta_s
            a = ops.concatenate([self.u, delta_u * s], axis=1)
            first = self.v * delta_s + delta_v * s
            b = ops.concatenate([first, self.v + delta_v], axis=1)
            return a, ops.transpose(b)
        # x U1 S1 dV^T + x dU S1 (V1 + dV)^T
        a = ops.concatenate([self.u * self.s, delta_u * self.s], axis=1)
        b = ops.concatenate([delta_v, self.v + delta_v], axis=1)
        return a, ops.transpose(b)

    def _column_list(self, view):
        if isinstance(self.columns, list):
            columns = self.columns
        else:
            rank = self.rank or _DEFAULT_RANK
            if self.rank is None and self.mode == "values":
                rank = min(view.n_in, view.n_out) - self.columns
            columns = range(self.columns, self.columns + rank)
        check_columns_exist(self, view, columns)
        return list(columns)


def check_columns_exist(adapter, view, columns):
    """Raises if the kernel has fewer singular values than asked for."""
    known = min(view.n_in, view.n_out)
    # A range may be too long to look through.
    last = columns[-1:] if isinstance(columns, range) else columns
    if not columns or max(last) >= known:
        options = adapter.options()
        raise ValueError(
            f"Received {options} for layer '{adapter.name}', whose kernel is "
            f"{view.n_in} x {view.n_out} and so has {known} singular values. "
            f"Expected columns 0 to {known - 1}; give this layer its own "
            "options with `overrides`, or exclude it."
        )


def add_triplets(adapter, columns):
    """Gives the adapter frozen singular triplets of its base: `u`, `s`, `v`.

    `column_list` says which they are.
    """
    adapter.column_list = tuple(columns)
    count, view = len(adapter.column_list), adapter.view
    shapes = {"u": (view.n_in, count), "s": (count,), "v": (view.n_out, count)}
    starts = adapter.from_triplets(
        max(columns) + 1,
        lambda u, s, v: ops.take(u, columns, axis=-1),
        lambda u, s, v: ops.take(s, columns, axis=-1),
        lambda u, s, v: ops.take(v, columns, axis=-1),
    )
    for (name, shape), start in zip(shapes.items(), starts):
        variable = adapter.add_weight(
            name=name, shape=shape, initializer=start, trainable=False
        )
        setattr(adapter, name, variable)


def _check_columns(columns, rank):
    if _is_column(columns):
        return int(columns)
    if isinstance(columns, list | tuple | range):
        whole = [int(c) for c in columns if _is_column(c)]
        distinct = len(set(whole)) == len(columns) > 0
        if distinct and rank in (None, len(whole)):
            return whole
    raise ValueError(
        f"Received columns={columns!r} with rank={rank!r}. Expected a whole "
        "number of at least 0, or a list of different ones, as many as `rank` "
        "where that is given."
    )


def _is_column(value):
    return is_whole(value) and value >= 0
