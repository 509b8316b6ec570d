"""What a pair of layers in a kernel's place would be, and cost."""

import math

import keras


class Replaceable:
    """Mixed into views: the kernel's size and work, and those of a pair."""

    @property
    def num_weights(self) -> int:
        """Numbers in the kernel itself."""
        return math.prod(self.variable().shape)

    def pair_weights(self, rank, slices=1) -> int:
        """Numbers in a pair of layers that does the kernel's work."""
        return rank * (self.n_in + slices * self.n_out)

    def flops(self, input_shape, rank=None, slices=1) -> int:
        """Operations of the kernel, or of a pair, for one example.

        A multiplication and an addition are two. Sizes that are not known,
        as those of sequences, count as 1.

        Args:
            input_shape: The layer's, with the batch first.
            rank: That of the pair; None for the kernel itself.
            slices: Those of the pair.
        """
        weights = self.num_weights
        if rank is not None:
            weights = self.pair_weights(rank, slices)
        return 2 * weights * self.positions(input_shape)

    def positions(self, input_shape) -> int:
        """How often one example uses each number of the kernel."""
        return math.prod(size or 1 for size in input_shape[1:-1])

    def input_shape(self) -> tuple | None:
        """The shape that the layer was built for, batch first, if known."""
        return (self.layer.get_build_config() or {}).get("input_shape")

    def slicings(self) -> list[int]:
        """Into how many equal slices the layer's input can be cut."""
        return [1]

    def parts(self, matrix, slices=1):
        """The matrices that a pair of layers factors apart.

        Args:
            matrix: Tensor (n_in, n_out).
            slices: One of `slicings`: how many slices of the input have a
                pair of their own.

        Returns:
            A tensor (parts, rows, columns).
        """
        return matrix[None]

    def thin_layers(self, rank, slices=1) -> list[keras.layers.Layer]:
        """Two plain Keras layers, unbuilt, one after the other.

        Together they do what this layer does with a kernel of that rank; the
        second has its bias and activation.
        """
        raise NotImplementedError

    def copy_rest(self, layer: keras.layers.Layer) -> None:
        """Gives a new layer of the same class, but for its number of codes,
        the weights beside the kernel and the bias that this one has."""

    def _options(self, *names):
        """Constructor arguments of the layer's own, by name."""
        return {name: getattr(self.layer, name) for name in names}

    def _output_options(self):
        """The options that the second of two thin layers takes over."""
        shared = self._options("bias_regularizer", "bias_constraint")
        shared |= self._options("activation", "activity_regularizer")
        return {**shared, "dtype": self.layer.dtype_policy, "name": "up"}

    def _code_options(self):
        """The options that the first of two thin layers takes over."""
        return {"dtype": self.layer.dtype_policy, "name": "down"}
