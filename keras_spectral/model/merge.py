"""Takes adapters off: dropped, or folded into the layers that they adapt."""

import warnings

import keras

from keras_spectral._backend import without_gradients
from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import is_small
from keras_spectral._internal.layer_tools import own_variables
from keras_spectral._internal.snapshot import Snapshot
from keras_spectral._internal.snapshot import all_or_nothing
from keras_spectral._internal.snapshot import finish
from keras_spectral.kernels import kernel_view
from keras_spectral.kernels.spectra import LateProgress
from keras_spectral.layers.host import Host
from keras_spectral.layers.kernel_host import KernelHost
from keras_spectral.layers.member import set_all_strengths
from keras_spectral.layers.trained_copy import TrainedCopy
from keras_spectral.model.hosts import Names
from keras_spectral.model.hosts import hosts
from keras_spectral.model.hosts import members
from keras_spectral.model.hosts import put
from keras_spectral.model.hosts import require_names
from keras_spectral.model.hosts import take_off
from keras_spectral.model.paths import Place
from keras_spectral.model.paths import places

_LOST = 0.01  # share of a change that merging may lose without a word


def unwrap_model(model: keras.Model, *, adapter: Names = None) -> keras.Model:
    """Drops adapters: the very same base layers are back, unchanged.

    Args:
        model: A wrapped model.
        adapter: The name of the adapter to drop, or several; all by default.

    Returns:
        The model; without any adapter left with the `trainable` flags and
        the heads it had before it was wrapped.

    Raises:
        ValueError: The model has no adapters, or none of that name.
    """
    names = require_names(model, adapter)
    with all_or_nothing() as snapshot:
        take_off(model, snapshot, names)
    return model


def merge_model(
    model: keras.Model, *, adapter: Names = None, dtype: str | None = None
) -> keras.Model:
    """Folds adapters into their base kernels: plain Keras layers again.

    Outputs stay what they were, and what trained beside the adapters becomes
    the model's own. A 16-bit kernel rounds what it gains: a warning says
    where that loses more than 1 % of the change. It takes as much memory as
    one kernel. An interruption waits until the last kernel is written. If
    the memory ends in between, the adapters come back with equal outputs.

    Args:
        model: A wrapped model.
        adapter: The name of the adapter to fold in, or several, at their
            strengths; the others stay, on the merged kernels. By default all
            that are active are folded in and the others dropped.
        dtype: `"float32"` gives adapted layers of 16 bits a kernel that
            rounds nothing; they then compute in it as well. Not with
            `adapter`.

    Returns:
        The model, with the `trainable` flags it had before it was wrapped.

    Raises:
        ValueError: The model has no adapters, none is active or one that is
            named is not, one of them cannot be merged or stays and was made
            for the unmerged kernel, or a merged kernel would hold NaN or
            infinities. Nothing has changed then.
    """
    names = require_names(model, adapter)
    check_choice(dtype, "dtype", (None, "float32", "float64"))
    if dtype is not None and adapter is not None:
        raise ValueError(
            f"Received dtype={dtype!r} with adapter={adapter!r}. Expected one "
            "of them: a layer that keeps other adapters keeps its dtype."
        )
    with all_or_nothing() as snapshot, without_gradients():
        folds = to_fold(model, adapter)
        wide = {}
        for place, chosen in list(folds) if dtype is not None else ():
            host, layer = place.layer, place.layer.layer
            kernel = isinstance(host, KernelHost) and not all(
                m.only_bias for m in chosen
            )
            if kernel and is_small(layer.variable_dtype):
                wide[layer] = _widened(host, dtype, chosen)
                folds.remove((place, chosen))
        with LateProgress("merging kernels", 2 * len(folds)) as progress:
            for place, chosen in folds:
                place.layer.check_merge(chosen)
                progress.advance(1)
            take_off(model, snapshot, names if adapter is not None else None)
            put(model, wide, snapshot)
            writing = _Writing(folds, snapshot, progress)
            try:
                finish(writing.go_on)
            except Exception as error:
                writing.give_back()
                error.add_note(
                    "The adapters are back. Where kernels have taken them in "
                    "already they are off, so that outputs are as before."
                )
                raise
    if not wide:
        warn_of_rounding(writing.losses)
    return model


class _Writing:
    """Folds members into their bases, one layer after the other.

    Kernels are too large to keep copies of all, so nothing of it can be
    undone. What was interrupted goes on where it was.
    """

    def __init__(self, folds, snapshot, progress):
        self.left = list(folds)
        self.snapshot = snapshot
        self.progress = progress
        self.ready = {}  # new values of the layer that is being written
        self.done = []
        self.losses = {}

    def go_on(self):
        """Writes what is left; it can be called again at any moment."""
        while self.left:
            place, chosen = self.left[-1]
            if place.path not in self.ready:
                self.ready.clear()
                self.ready[place.path] = place.layer.merged_values(chosen)
            values, self.losses[place.path] = self.ready[place.path]
            for variable, value in values:
                variable.assign(value)
            self.done += [m for m in chosen if m not in self.done]
            self.left.pop()
            self.progress.advance(1)
        self.snapshot.forget()

    def give_back(self):
        """The adapters as they were, off where they are in the kernels."""
        self.snapshot.restore()
        set_all_strengths([(member, 0.0) for member in self.done])
        self.snapshot.forget()


def to_fold(
    model: keras.Model, adapter: Names = None, alone: bool = False
) -> list[tuple[Place, list]]:
    """The hosts whose members are folded in, with these members.

    Args:
        model: A wrapped model.
        adapter: The names of what is folded in; by default all that is
            active.
        alone: Whether the others are going to be left out.
    """
    names = require_names(model, adapter)
    found = members(model)
    if adapter is not None:
        _check_active(found, names)
        if not alone:
            _check_staying(model, names)
    elif not any(member.current_strength() for member in found):
        found[0].check_active()
    folds = []
    for place in places(model):
        if isinstance(place.layer, Host):
            chosen = _active(place.layer, names)
            if chosen:
                folds.append((place, chosen))
    for place, chosen in folds:
        if not isinstance(place.layer, TrainedCopy):
            for member in chosen:
                member.check_mergeable()
    return folds


def fold_all(
    model: keras.Model, snapshot: Snapshot, adapter: Names = None
) -> dict[str, float]:
    """Writes what adapters and trained copies add into their bases.

    Args:
        model: A wrapped model, whose other members are going to be left out.
        snapshot: Keeps what is changed.
        adapter: As in `to_fold`.

    Returns:
        For each adapter's path the share of the change that was lost.
    """
    losses = {}
    folds = to_fold(model, adapter, alone=True)
    progress = LateProgress("merging kernels", len(folds))
    with without_gradients(), progress:
        for place, chosen in folds:
            # Copies first: they stay, and what is made for a moment behind
            # them leaves no holes in the memory.
            host = place.layer
            copied = isinstance(host, TrainedCopy)
            snapshot.keep_values(
                own_variables(host.layer) if copied else host.layer.weights
            )
            losses[place.path] = host.merge(chosen)
            progress.advance(1)
    return losses


def warn_of_rounding(losses: dict[str, float]) -> None:
    """Warns of changes that a kernel of few bits could not take."""
    lost = {path: loss for path, loss in losses.items() if loss > _LOST}
    if lost:
        worst = max(lost, key=lost.get)
        warnings.warn(
            f"Rounding to the kernels' 16 bits lost {100 * lost[worst]:.0f} % "
            f"of the correction at '{worst}', and more than {100 * _LOST:.0f} "
            f"% in {len(lost)} of {len(losses)} layers. Keep the adapters, or "
            "use `merge_model(model, dtype='float32')`.",
            stacklevel=3,
        )


def _active(host, names):
    """The members of some names that are on."""
    return [
        m
        for m in host.members()
        if m.adapter_name in names and m.current_strength()
    ]


def _check_active(found, names):
    """Raises unless each of the names is on."""
    for name in names:
        mine = [member for member in found if member.adapter_name == name]
        if not any(member.current_strength() for member in mine):
            mine[0].check_active()


def _check_staying(model, names):
    """Raises if what stays was made for the kernel as it was."""
    for host in hosts(model):
        staying = [m for m in host.members() if m.adapter_name not in names]
        tied = [m for m in staying if getattr(m, "reads_kernel", False)]
        if tied and len(staying) < len(host.members()):
            raise ValueError(
                f"Adapter '{tied[0].adapter_name}' of layer '{host.name}' "
                f"({type(tied[0]).__name__}) was made for the kernel as it is "
                f"and would stay while {names} is folded in. Expected adapters "
                "that add to any kernel: drop it first, or merge all."
            )


def _widened(host, dtype, members):
    """A host's layer in another dtype, with changes folded in."""
    layer = host.layer
    config = {**layer.get_config(), "dtype": dtype}
    wide = type(layer).from_config(config)
    wide.build(layer.get_build_config()["input_shape"])
    for new, old in zip(wide.weights, layer.weights):
        new.assign(keras.ops.cast(old, new.dtype))
    kernel_view(wide).assign(host.merged_matrix(members))
    bias = host.merged_bias(members)
    if bias is not None:
        wide.bias.assign(keras.ops.cast(bias, wide.bias.dtype))
    return wide
