"""The paths of GLoRA: of what kind each of its parts is."""

from keras import ops

from keras_spectral._internal.checks import check_choice
from keras_spectral.kernels.view import KernelView

_OF_KERNEL = ("lora", "vector", "scalar", "none")
_OF_BIAS = ("vector", "scalar", "none")
# What each part can be, the largest first: 432 paths.
KINDS = {
    "a": _OF_KERNEL,
    "b": _OF_KERNEL,
    "c": ("lora", "vector", "none"),
    "d": _OF_BIAS,
    "e": _OF_BIAS,
}


def masked_sum(chosen, down, up):
    """The part of the kind whose share is 1, the others' being 0."""
    total = chosen["vector"] * up[:1]
    if "scalar" in chosen:
        total = total + chosen["scalar"] * up[:1, :1]
    if "lora" in chosen:
        total = total + ops.matmul(down, chosen["lora"] * up)
    return total


def shapes_of(
    path: dict[str, str], rank: int, view: KernelView
) -> dict[str, tuple[int, int]]:
    """The shapes of what trains on a path, by the weights' names.

    Without a bias there is no D.
    """
    found = {}
    n_in, n_out = view.n_in, view.n_out
    for part, kind in path.items():
        rows = n_in if part in "ab" else 1
        columns = n_in if part == "c" else n_out
        if kind == "lora":
            found[f"{part}_down"] = rows, rank
        shapes = {"lora": (rank, columns), "vector": (1, columns)}
        if kind != "none" and (part != "d" or view.bias_of() is not None):
            found[f"{part}_up"] = shapes.get(kind, (1, 1))
    return found


def checked_path(parts: dict[str, str]) -> dict[str, str]:
    """A kind for each part; a ValueError for what is no part or no kind."""
    if not isinstance(parts, dict) or not parts.keys() <= KINDS.keys():
        raise ValueError(
            f"Received parts={parts!r}. Expected a dictionary of kinds for "
            f"some of {list(KINDS)}, such as {{'a': 'vector', 'c': 'none'}}."
        )
    return {
        part: check_choice(parts.get(part, kinds[0]), f"parts[{part!r}]", kinds)
        for part, kinds in KINDS.items()
    }


def numbers_of(parts: dict[str, str]) -> list[int]:
    """The same as the numbers of kinds, which a variable can hold."""
    return [KINDS[p].index(kind) for p, kind in checked_path(parts).items()]
