"""Several adapter files of one base, fused into one model."""

import os
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral._internal.checks import check_number
from keras_spectral._internal.checks import check_path
from keras_spectral._internal.layer_tools import own_variables
from keras_spectral.kernels import kernel_view
from keras_spectral.layers import SpectralDense
from keras_spectral.model.contexts import merged
from keras_spectral.model.hosts import adapter_places
from keras_spectral.model.hosts import require_adapters
from keras_spectral.model.hosts import require_plain
from keras_spectral.model.merge import unwrap_model
from keras_spectral.model.paths import places
from keras_spectral.saving.adapter_file import load_adapters
from keras_spectral.saving.applying import apply_adapters
from keras_spectral.saving.checksum import check_base_values
from keras_spectral.saving.naming import entry_slot
from keras_spectral.saving.naming import head_slot
from keras_spectral.saving.reading import chosen
from keras_spectral.saving.reading import read_adapters

_SAME = 1e-3  # relative difference of factors of one base
_SAME_DIRECTION = 0.99


def fuse_adapters(
    model: keras.Model,
    files: Sequence[str | os.PathLike],
    weights: Sequence[float] | None = None,
    method: str = "columns",
) -> keras.Model:
    """Fuses adapters that were trained apart on one base.

    `method="columns"`, for SpectralDense "additive": the column updates of
    all files are added on one singular value decomposition,
    `dU = sum w_i dU_i`, `dV = sum w_i dV_i` and, with `shift_values`,
    `dS = sum w_i dS_i`, each at the columns that its file trained. The model
    is then wrapped with one SpectralDense a layer. On disjoint columns, with
    weights of 1, each keeps its own directions.

    `method="average"`, for every adapter that merges (FedAvg): each adapted
    kernel becomes `sum w_i K_i / sum w_i`, in a plain model without
    adapters. A file without an adapter at a layer counts with the base's
    kernel there.

    Layers that trained beside the adapters (heads) become the average in
    both, with weights `w_i / sum w_i`.

    Source: Zhang and Pilanci 2024, arXiv 2405.13952, section 4.2, and for dS
    their code (`adapter_fusion/spectral/spectral_fusion.py`); averaging:
    McMahan et al. 2017, arXiv 1602.05629.

    Args:
        model: The base that all were trained on, without adapters.
        files: Adapter files of `save_adapters`.
        weights: One number for each file. Defaults to 1 for each.
        method: `"columns"` or `"average"`.

    Returns:
        The model.

    Raises:
        ValueError: Fewer than one file, bad weights, files of another base
            or of methods that do not fuse so. The model is then as it was.
        FileNotFoundError: There is no such file.
    """
    require_plain(model)
    check_choice(method, "method", ("columns", "average"))
    weights = _check_weights(files, weights)
    contents = [_read(file) for file in files]
    heads = [metadata["trainable"] for _, metadata in contents]
    for file, (_, metadata), names in zip(files, contents, heads):
        if metadata["base"] != contents[0][1]["base"] or names != heads[0]:
            raise ValueError(
                f"{file} and {files[0]} were saved from different models or "
                "with different trained layers. Expected adapters of one base."
            )
    for file, content in zip(files, contents):
        _check_base(model, content, file)
    if method == "average":
        keys = [head["path"] for head in heads[0]]
        return _average(model, files, weights, keys)
    fused = _fused_columns(files, contents, weights)
    return apply_adapters(model, *fused, " and ".join(map(str, files)))


def _read(file):
    """Reads a file of one adapter, under the name "default"."""
    return chosen(*read_adapters(file), "default", file)


def _check_weights(files, weights):
    several = isinstance(files, Sequence) and not isinstance(files, str)
    if not several or not len(files):
        raise ValueError(
            f"Received files={files!r}. Expected a list of adapter files."
        )
    for file in files:
        check_path(file, "files")
    if weights is None:
        weights = [1.0] * len(files)
    if not isinstance(weights, Sequence | np.ndarray):
        raise ValueError(
            f"Received weights={weights!r}. Expected a list of numbers."
        )
    weights = list(weights)
    for weight in weights:
        check_number(weight, "weights")
    if len(weights) != len(files) or not sum(weights) > 0:
        raise ValueError(
            f"Received weights={weights} for {len(files)} files. Expected as "
            "many numbers, with a sum above zero."
        )
    return weights


def _fused_columns(files, contents, weights):
    """Tensors and metadata of the file that holds the sum of updates."""
    tensors: dict[str, np.ndarray] = {}
    columns: dict[str, dict[int, tuple]] = {}
    shifted = set()  # where a file has a shift of S
    for file, (given, metadata), weight in zip(files, contents, weights):
        for entry in metadata["adapters"]:
            key, options = entry_slot(entry), entry["options"]
            if (entry["method"], options.get("mode")) != (
                SpectralDense.method,
                "additive",
            ):
                raise ValueError(
                    f"{file} has method {entry['method']!r} "
                    f"(mode {options.get('mode')!r}) at '{entry['path']}'. "
                    "Expected SpectralDense in mode 'additive'; other adapters "
                    "fuse with method='average'."
                )
            parts = [
                _tensor(given, f"{key}/{name}", file)
                for name in ("u", "s", "v", "delta_u", "delta_v")
            ]
            if options.get("shift_values"):
                shifted.add(key)
                parts.append(_tensor(given, f"{key}/delta_s", file))
            else:
                parts.append(np.zeros_like(parts[1]))
            if options.get("adaptive"):
                mask = _tensor(given, f"{key}/mask", file)
                parts = [*parts[:3], *(part * mask for part in parts[3:])]
            listed = _column_list(options)
            try:
                _add_columns(columns.setdefault(key, {}), listed, parts, weight)
            except ValueError as error:
                raise ValueError(
                    f"{file}, at '{entry['path']}': {error}"
                ) from error
        share = weight / sum(weights)
        heads = [head_slot(head) for head in metadata["trainable"]]
        for name in given:
            if name.rsplit("/", 1)[0] in heads:
                tensors[name] = tensors.get(name, 0) + share * given[name]
    entries = []
    for key, found in columns.items():
        order = sorted(found)
        names = ("u", "s", "v", "delta_u", "delta_v", "delta_s")
        for name, values in zip(names, zip(*(found[c] for c in order))):
            if name != "delta_s" or key in shifted:
                tensors[f"{key}/{name}"] = np.stack(values, axis=-1)
        tensors[f"{key}/scale"] = np.float32(1.0)
        options = {"rank": len(order), "mode": "additive", "columns": order}
        options["shift_values"] = key in shifted
        path, adapter, name = key.rsplit("/", 2)
        entry = {"path": path, "adapter": adapter, "method": name}
        entries.append({**entry, "options": options})
    metadata = {**contents[0][1], "adapters": entries}
    metadata.pop("values", None)  # each file's were looked at
    tensors = {k: np.asarray(v, "float32") for k, v in tensors.items()}
    return tensors, metadata


def _column_list(options):
    columns = options["columns"]
    if isinstance(columns, list):
        return columns
    return list(range(columns, columns + options["rank"]))


def _add_columns(found, columns, parts, weight):
    u, s, v, *changes = parts
    for i, column in enumerate(columns):
        change = [weight * values[..., i] for values in changes]
        if column in found:
            # Another run may have found the same direction with other signs.
            old = found[column]
            overlap = np.sum(old[0] * u[:, i])
            if abs(overlap) < _SAME_DIRECTION:
                raise ValueError(
                    f"singular direction {column} is not that of the files "
                    f"before (overlap {abs(overlap):.3f}). Expected the same, "
                    "or other columns: where singular values are close, "
                    "directions are only equal in factors from one `svd_cache`."
                )
            # A shift of S has none: U and V turn together.
            signs = (np.sign(overlap), np.sign(overlap), 1.0)
            parts_now = zip(old[3:], signs, change)
            change = [before + sign * more for before, sign, more in parts_now]
            found[column] = (*old[:3], *change)
        else:
            found[column] = (u[:, i], s[i], v[:, i], *change)


def _tensor(tensors, name, file):
    if name not in tensors:
        raise ValueError(f"{file} lacks the tensor '{name}'.")
    return tensors[name]


def _check_base(model, content, file):
    """Refuses a file of another base.

    Files of version 0.1 hold no numbers of it; there singular triplets belong
    to a kernel if K^T U = V S.
    """
    tensors, metadata = content
    if "values" in metadata:
        doubt = check_base_values(places(model), metadata, set(tensors), file)
        if doubt is not None:
            raise ValueError(doubt)
        return
    by_key = {place.key: place for place in places(model)}
    for entry in metadata["adapters"]:
        key = entry["path"]
        names = [f"{entry_slot(entry)}/{name}" for name in ("u", "s", "v")]
        if key not in by_key or not all(name in tensors for name in names):
            continue  # not spectral; loading says what is wrong with it
        u, s, v = (tensors[name] for name in names)
        matrix = kernel_view(by_key[key].layer).matrix()
        got = ops.convert_to_numpy(ops.matmul(ops.transpose(matrix), u))
        if np.abs(got - v * s).max() > _SAME * np.abs(s).max():
            raise ValueError(
                f"{file} was trained on another base: its singular directions "
                f"at '{key}' are not those of model '{model.name}'. Load the "
                "base's own weights into the model first."
            )


def _average(model, files, weights, heads):
    """Loads one file after the other and adds up what they change."""
    totals: dict[int, tuple] = {}  # a weight, its start, its changes

    def watch(layers):
        for variable in (v for layer in layers for v in own_variables(layer)):
            entry = (variable, ops.copy(variable), [])
            totals.setdefault(id(variable), entry)

    watch(place.layer for place in places(model) if place.key in heads)
    try:
        for file, weight in zip(files, weights):
            load_adapters(model, file)
            watch(adapter.layer for adapter in require_adapters(model))
            with merged(model):
                for variable, start, changes in totals.values():
                    changes.append((variable - start) * weight)
            unwrap_model(model)
    except Exception:
        if adapter_places(model):
            unwrap_model(model)
        for variable, start, _ in totals.values():
            variable.assign(start)
        raise
    for variable, start, changes in totals.values():
        variable.assign(start + sum(changes) / sum(weights))
    return model
