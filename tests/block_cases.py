"""A transformer block of plain Keras layers, and models of it."""

import keras
import numpy as np
from keras import ops

import keras_spectral as ks

WIDTH, HEADS, TOKENS, BATCH = 8, 2, 5, 3


def net_size(size):
    """How many weights a net of two layers and one inner size has."""
    return 2 * WIDTH * size + size + WIDTH


@keras.saving.register_keras_serializable("tests")
class Block(keras.layers.Layer):
    """A BERT block: attention, sum, norm, feed-forward net, sum, norm."""

    def __init__(self, width=WIDTH, heads=HEADS, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.heads = heads
        options = {"dtype": self.dtype_policy}
        layers = keras.layers
        self.attention = layers.MultiHeadAttention(
            heads, width // heads, name="attention", **options
        )
        self.norm = layers.LayerNormalization(name="norm", **options)
        self.inner = layers.Dense(2 * width, "relu", name="inner", **options)
        self.outer = layers.Dense(width, name="outer", **options)
        self.last_norm = layers.LayerNormalization(name="last_norm", **options)

    def build(self, input_shape):
        self.attention.build(input_shape, input_shape)
        self.norm.build(input_shape)
        self.inner.build(input_shape)
        self.outer.build((*input_shape[:-1], 2 * self.width))
        self.last_norm.build(input_shape)

    def call(self, x, padding_mask=None, training=None):
        mask = None
        if padding_mask is not None:
            mask = ops.cast(padding_mask, "bool")[:, None]
        x = self.norm(x + self.attention(x, x, attention_mask=mask))
        return self.last_norm(x + self.outer(self.inner(x)))

    def get_config(self):
        sizes = {"width": self.width, "heads": self.heads}
        return {**super().get_config(), **sizes}


ks.blocks.register_block(
    Block,
    ks.blocks.BlockKind(
        "attention", "inner", "outer", "padding_mask", norm="last_norm"
    ),
)


def inputs():
    """Two inputs by name; rows end in padding."""
    rng = np.random.default_rng(0)
    mask = np.ones((BATCH, TOKENS), "int32")
    mask[1, 3:] = 0
    mask[2, 1:] = 0
    x = rng.normal(size=(BATCH, TOKENS, WIDTH)).astype("float32")
    return {"x": x, "mask": mask}


def model(layers=None, dtype=None):
    """Two blocks, one after the other."""
    keras.utils.set_random_seed(0)
    if layers is None:
        layers = [Block(name=f"block_{i}", dtype=dtype) for i in range(2)]
    x = keras.Input((TOKENS, WIDTH), name="x", dtype="float32")
    mask = keras.Input((TOKENS,), name="mask", dtype="int32")
    outputs = x
    for layer in layers:
        outputs = layer(outputs, padding_mask=mask)
    return keras.Model({"x": x, "mask": mask}, outputs, name="blocks")


@keras.saving.register_keras_serializable("tests")
class Experts(keras.layers.Layer):
    """A bank of two experts that adds up what they give."""

    def build(self, shape):
        self.kernels = self.add_weight(
            shape=(2, shape[-1], shape[-1]), name="kernels"
        )

    def call(self, x):
        flat = ops.reshape(x, (-1, x.shape[-1]))
        found = ops.einsum("th,ehm->etm", flat, self.kernels)
        return ops.reshape(ops.sum(found, axis=0), ops.shape(x))

    def compute_output_shape(self, shape):
        return shape
