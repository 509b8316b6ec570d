"""Parameter-efficient fine-tuning and compression for Keras 3."""

from keras_spectral import blocks
from keras_spectral import callbacks
from keras_spectral import optimizers
from keras_spectral import plots
from keras_spectral._internal.layouts import adapter_layout
from keras_spectral.backbones import SoftPrompt
from keras_spectral.blocks import RED
from keras_spectral.blocks import BottleneckAdapter
from keras_spectral.blocks import PrefixTuning
from keras_spectral.blocks import UniPELTBlock
from keras_spectral.compression import LowRank
from keras_spectral.compression import cluster_weights
from keras_spectral.compression import compress_model
from keras_spectral.compression import compression_report
from keras_spectral.compression import distiller
from keras_spectral.compression import dlrt
from keras_spectral.compression import fake_quantize
from keras_spectral.compression import finalize_dlrt
from keras_spectral.compression import finalize_quantized
from keras_spectral.compression import finalize_ranks
from keras_spectral.compression import finalize_transfer
from keras_spectral.compression import keep_zeros
from keras_spectral.compression import learn_compression
from keras_spectral.compression import nest_ranks
from keras_spectral.compression import prune_model
from keras_spectral.compression import schemes
from keras_spectral.compression import search_rank
from keras_spectral.compression import sensitivity_scan
from keras_spectral.compression import set_rank
from keras_spectral.exchange import load_keras_lora
from keras_spectral.exchange import load_peft
from keras_spectral.exchange import save_peft
from keras_spectral.layers import IA3
from keras_spectral.layers import SSF
from keras_spectral.layers import AdaLoRADense
from keras_spectral.layers import AdapterLayer
from keras_spectral.layers import BitFit
from keras_spectral.layers import BOFTDense
from keras_spectral.layers import ConditionalSpectralDense
from keras_spectral.layers import ConvLoRA
from keras_spectral.layers import DecayingLoRA
from keras_spectral.layers import DeepLoRADense
from keras_spectral.layers import DoRADense
from keras_spectral.layers import DyLoRADense
from keras_spectral.layers import GatedSpectralDense
from keras_spectral.layers import GLoRADense
from keras_spectral.layers import KernelAdapter
from keras_spectral.layers import LiDBDense
from keras_spectral.layers import LoHaDense
from keras_spectral.layers import LoKrDense
from keras_spectral.layers import LoRADense
from keras_spectral.layers import LoRAExperts
from keras_spectral.layers import LoRAFADense
from keras_spectral.layers import LoRARecurrent
from keras_spectral.layers import OFTDense
from keras_spectral.layers import OrthogonalAdaptation
from keras_spectral.layers import SpectralDense
from keras_spectral.layers import TunedNorm
from keras_spectral.layers import VeRADense
from keras_spectral.layers.adapter import register_method
from keras_spectral.library.combine import combine_adapters
from keras_spectral.model.calibrate import calibrate
from keras_spectral.model.catalog import list_targets
from keras_spectral.model.catalog import methods
from keras_spectral.model.contexts import adapters_alone
from keras_spectral.model.contexts import adapters_disabled
from keras_spectral.model.contexts import merged
from keras_spectral.model.contexts import unwrapped
from keras_spectral.model.convert import compact_ranks
from keras_spectral.model.convert import freeze_gates
from keras_spectral.model.convert import to_lora
from keras_spectral.model.gradients import kernel_gradients
from keras_spectral.model.merge import merge_model
from keras_spectral.model.merge import unwrap_model
from keras_spectral.model.names import adapter_names
from keras_spectral.model.names import delete_adapter
from keras_spectral.model.names import mixed_batch
from keras_spectral.model.names import rename_adapter
from keras_spectral.model.names import set_adapters
from keras_spectral.model.quantize import quantize_with_lora
from keras_spectral.model.summary import adapter_summary
from keras_spectral.model.wrap import wrap_model
from keras_spectral.saving import fuse_adapters
from keras_spectral.saving import load_adapters
from keras_spectral.saving import save_adapters
from keras_spectral.search.gates import tune_gates
from keras_spectral.search.glora import finalize_glora
from keras_spectral.search.glora import search_glora
from keras_spectral.search.layers import choose_layers
from keras_spectral.search.parts import collect_gates
from keras_spectral.search.parts import prune_parts
from keras_spectral.search.parts import search_parts

__version__ = "0.2.0"

__all__ = [
    "IA3",
    "RED",
    "SSF",
    "AdaLoRADense",
    "AdapterLayer",
    "BOFTDense",
    "BitFit",
    "BottleneckAdapter",
    "ConditionalSpectralDense",
    "ConvLoRA",
    "DecayingLoRA",
    "DeepLoRADense",
    "DoRADense",
    "DyLoRADense",
    "GLoRADense",
    "GatedSpectralDense",
    "KernelAdapter",
    "LiDBDense",
    "LoHaDense",
    "LoKrDense",
    "LoRADense",
    "LoRAExperts",
    "LoRAFADense",
    "LoRARecurrent",
    "LowRank",
    "OFTDense",
    "OrthogonalAdaptation",
    "PrefixTuning",
    "SoftPrompt",
    "SpectralDense",
    "TunedNorm",
    "UniPELTBlock",
    "VeRADense",
    "adapter_layout",
    "adapter_names",
    "adapter_summary",
    "adapters_alone",
    "adapters_disabled",
    "blocks",
    "calibrate",
    "callbacks",
    "choose_layers",
    "cluster_weights",
    "collect_gates",
    "combine_adapters",
    "compact_ranks",
    "compress_model",
    "compression_report",
    "delete_adapter",
    "distiller",
    "dlrt",
    "fake_quantize",
    "finalize_dlrt",
    "finalize_glora",
    "finalize_quantized",
    "finalize_ranks",
    "finalize_transfer",
    "freeze_gates",
    "fuse_adapters",
    "keep_zeros",
    "kernel_gradients",
    "learn_compression",
    "list_targets",
    "load_adapters",
    "load_keras_lora",
    "load_peft",
    "merge_model",
    "merged",
    "methods",
    "mixed_batch",
    "nest_ranks",
    "optimizers",
    "plots",
    "prune_model",
    "prune_parts",
    "quantize_with_lora",
    "register_method",
    "rename_adapter",
    "save_adapters",
    "save_peft",
    "schemes",
    "search_glora",
    "search_parts",
    "search_rank",
    "sensitivity_scan",
    "set_adapters",
    "set_rank",
    "to_lora",
    "tune_gates",
    "unwrap_model",
    "unwrapped",
    "wrap_model",
]
