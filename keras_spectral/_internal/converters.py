"""KerasHub's converters of Hugging Face checkpoints."""

import inspect
from types import ModuleType


def converter_of(kind: type) -> ModuleType:
    """The module that converts checkpoints of a class of backbones.

    Raises:
        ImportError: KerasHub is not installed.
        ValueError: It has no converter for the class.
    """
    try:
        from keras_hub.src.utils.transformers import preset_loader
    except ImportError as error:
        raise ImportError(
            "KerasHub knows the names that layers have in Hugging Face's "
            'models. Expected it to be installed: `pip install "keras-hub"`.'
        ) from error

    found = {
        module.backbone_cls: module
        for module in reversed(list(vars(preset_loader).values()))
        if inspect.ismodule(module) and hasattr(module, "backbone_cls")
    }
    for base in kind.__mro__:
        if base in found:
            return found[base]
    known = ", ".join(sorted(k.__name__ for k in found))
    raise ValueError(
        f"Received a {kind.__name__}. KerasHub has no converter from Hugging "
        "Face for it, so the names of its layers there are not known. "
        f"Expected a task or backbone of one of: {known}."
    )
