"""Smaller models: factorised layers, rank allocation, weight transfer."""

from keras_spectral.compression import schemes
from keras_spectral.compression.compress import compress_model
from keras_spectral.compression.distill import distiller
from keras_spectral.compression.dlrt import dlrt
from keras_spectral.compression.dlrt import finalize_dlrt
from keras_spectral.compression.learn import learn_compression
from keras_spectral.compression.masks import keep_zeros
from keras_spectral.compression.nested import finalize_ranks
from keras_spectral.compression.nested import nest_ranks
from keras_spectral.compression.nested import set_rank
from keras_spectral.compression.prune import prune_model
from keras_spectral.compression.quantized import cluster_weights
from keras_spectral.compression.quantized import fake_quantize
from keras_spectral.compression.quantized import finalize_quantized
from keras_spectral.compression.report import CompressionReport
from keras_spectral.compression.report import compression_report
from keras_spectral.compression.sensitivity import sensitivity_scan
from keras_spectral.compression.transfer import finalize_transfer
from keras_spectral.kernels import LowRank
from keras_spectral.search.ranks import search_rank

__all__ = [
    "CompressionReport",
    "LowRank",
    "cluster_weights",
    "compress_model",
    "compression_report",
    "distiller",
    "dlrt",
    "fake_quantize",
    "finalize_dlrt",
    "finalize_quantized",
    "finalize_ranks",
    "finalize_transfer",
    "keep_zeros",
    "learn_compression",
    "nest_ranks",
    "prune_model",
    "schemes",
    "search_rank",
    "sensitivity_scan",
    "set_rank",
]
