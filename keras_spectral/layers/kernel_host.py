"""The host of one linear layer: runs it with its members' changes."""

import keras
from keras import ops

from keras_spectral._internal.checks import is_small
from keras_spectral._internal.linalg import all_finite
from keras_spectral._internal.twin import without_ending
from keras_spectral.kernels.view import wide_dtype
from keras_spectral.layers.host import Host


class KernelHost(Host):
    """Runs a linear layer with the changes of its members.

    `y = finish(base(x) + sum of strength_n change_n(x, base(x)))` with the
    base up to its activation, and for its matrix `K + sum of strength_n
    (K'_n - K)`. Changes enter before the base's activation; their order does
    not matter.
    """

    def __init__(self, layer: keras.layers.Layer, **kwargs):
        super().__init__(layer, **kwargs)
        # What a `RematScope` asked of the base holds for the whole: the base
        # alone, without its activation, has little to compute again.
        mode = layer._remat_mode
        if mode is not None and mode.mode != "activations":
            self._remat_mode = mode

    def call(self, inputs, training=None, mask=None, **kwargs):
        members = [m for m in self.members() if not m.left_out(training)]
        before = [m for m in members if m.changes_inputs]
        # One run with a changed kernel, unless it has to see other inputs.
        whole = not before and not getattr(self.view, "quantized", False)
        formed = [
            m
            for m in members
            if m.forms_kernel and whole and m.batch_rows is None
        ]
        changed = inputs
        for member in before:
            change = member.weighed(member.input_change(inputs))
            changed = changed + ops.cast(change, inputs.dtype)
        base = self._base(formed, training)
        outputs = plain = self.run_base(base, changed, **kwargs)
        for member in formed:
            outputs = member.shifted(outputs, training)
        if (before or formed) and any(m.needs_outputs for m in members):
            plain = self.run_base(self._base(), inputs, **kwargs)
        thin = [m for m in members if m.can_join(training)]
        if thin:
            pair = joined(m.pair_of_step(training) for m in thin)
            outputs = self.view.add(outputs, inputs, *pair, **kwargs)
        for member in members:
            if member not in before + formed + thin:
                outputs = member.added(
                    outputs, inputs, plain, training, mask, **kwargs
                )
        return self._finish(outputs, **kwargs)

    def compute_output_spec(self, inputs, mask=None, **kwargs):
        return super().compute_output_spec(inputs, **kwargs)

    def _base(self, formed=(), training=None):
        """The base without activation, some changes in its kernel."""
        if not formed:
            plain = self.view is None
            return without_ending(self.layer) if plain else self.view.bare()
        changes = [m.kernel_change_of_step(training) for m in formed]
        change = sum(m.amount_of(c) for m, c in zip(formed, changes))
        return self.view.with_change(change)

    def _finish(self, outputs, reverse=False):
        """Applies what the base does to its outputs after its kernel."""
        cap = getattr(self.layer, "logit_soft_cap", None)
        if reverse and cap is not None:
            outputs = ops.tanh(outputs / cap) * cap
        activation = getattr(self.layer, "activation", None)
        if activation is None:
            return outputs
        mode = self.layer._remat_mode
        if mode is not None and mode.mode == "activations":
            activation = keras.remat(activation)
        return activation(outputs)

    def merged_matrix(self, members=None):
        """Kernel plus changes as a float32 matrix (n_in x n_out).

        Args:
            members: Those that count; all by default.

        Raises:
            ValueError: It holds a NaN or an infinity, the base is quantised,
                or a member is switched off or cannot be merged.
        """
        return whole([rows for rows, _ in self.merged_rows(members)])

    def merged_rows(self, members=None):
        """`merged_matrix`, some rows after the others.

        So only a part of the kernel is in float32 at any time, and is still
        in the processor's cache where it is read again.

        Yields:
            Rows, and what changes add to them.
        """
        members = self.members() if members is None else members
        for member in members:
            member.check_mergeable()
            member.check_active()
        self.view.check_assignable()
        changes = _Changes(members)
        for place, rows in self.view.row_blocks():
            change = ops.cast(changes.rows(place), rows.dtype)
            rows = rows + change
            if not all_finite(rows):
                raise ValueError(
                    f"The merged kernel of layer '{self.name}' holds NaN or "
                    "infinite values, so nothing was merged. The training "
                    "probably diverged: load an earlier adapter file."
                )
            yield rows, change

    def check_merge(self, members=None):
        members = self.members() if members is None else members
        if all(m.only_bias for m in members):
            super().check_merge(members)
        else:
            self.merged_bias(members)
            for _ in self.merged_rows(members):
                pass

    def merged_values(self, members=None):
        """As of all hosts; what is lost is measured by Frobenius norms."""
        members = self.members() if members is None else members
        values, loss = [], 0.0
        if all(m.only_bias for m in members):
            for member in members:
                member.check_active()
        else:
            matrix, loss = self._rounded(members)
            values.append((self.view.variable(), self.view.kernel(matrix)))
        bias = self.merged_bias(members)
        if bias is not None:
            variable = self._bias()
            values.append((variable, ops.cast(bias, variable.dtype)))
        return values, loss

    def _rounded(self, members):
        """The merged matrix in the kernel's dtype, and what that loses."""
        dtype = self.view.variable().dtype
        merged, lost, size = [], 0.0, 0.0
        for rows, change in self.merged_rows(members):
            merged.append(ops.cast(rows, dtype))
            if is_small(dtype):
                rest = ops.cast(merged[-1], rows.dtype) - rows
                lost = lost + ops.sum(ops.square(rest))
                size = size + ops.sum(ops.square(change))
        if is_small(dtype):
            lost = ops.sqrt(lost / ops.maximum(size, 1e-30))
            lost = float(ops.convert_to_numpy(lost))
        return whole(merged), lost

    def merged_bias(self, members=None):
        """Bias plus changes, in 32 bits or more; None where there are none."""
        members = self.members() if members is None else members
        changes = [(m, m.bias_change()) for m in members]
        changes = [
            ops.cast(m.adapter_strength, c.dtype) * c
            for m, c in changes
            if c is not None
        ]
        if not changes:
            return None
        bias = self._bias()
        total = ops.cast(bias, wide_dtype(bias.dtype))
        return total + ops.cast(sum(changes), total.dtype)

    def _bias(self):
        """The variable that holds the base's bias, or a norm's shift."""
        bias = getattr(self.layer, "bias", None)
        return self.layer.beta if bias is None else bias

    def forwarded(self, base, name):
        view = vars(self).get("view")
        if view is None or view.kernel_name is None:
            return getattr(base, name)
        if name in (view.kernel_name, f"_{view.kernel_name}"):
            matrix = view.matrix()
            total = ops.cast(_total(self.members()), matrix.dtype)
            return view.kernel(matrix + total)
        return getattr(base, name)


def joined(pairs):
    """One pair whose product is the sum of the products of pairs.

    What is off then costs a few columns of a product, and several that are on
    no more than one. A branch in the graph (`ops.cond`) costs less in large
    steps on a CPU, but more in small ones, and makes a GPU wait.
    """
    many_a, many_b = zip(*pairs)
    if len(many_a) == 1:
        return many_a[0], many_b[0]
    return ops.concatenate(many_a, axis=-1), ops.concatenate(many_b, axis=-2)


def whole(blocks):
    """Blocks of rows as one matrix."""
    return blocks[0] if len(blocks) == 1 else ops.concatenate(blocks)


class _Changes:
    """What members add to a kernel, at their strengths, by its rows."""

    def __init__(self, members):
        members = [m for m in members if not m.only_bias]
        thin = [m for m in members if m.is_plain_pair]
        self.pair = joined(m.strong_pair() for m in thin) if thin else None
        self.total = _total([m for m in members if m not in thin])

    def rows(self, place):
        """The change (rows x n_out) of the rows of a slice."""
        if self.pair is None:
            return self.total[place]
        change = ops.matmul(self.pair[0][place], self.pair[1])
        return change if self.total is None else change + self.total[place]


def _total(members):
    """The sum of what the members add to the kernel, at their strengths."""
    total = None
    for member in members:
        delta = member.delta_matrix()
        on = ops.not_equal(member.adapter_strength, 0)
        strength = ops.cast(member.adapter_strength, delta.dtype)
        delta = ops.where(on, strength * delta, ops.zeros_like(delta))
        total = delta if total is None else total + delta
    return total
