"""Tiny, randomly initialised KerasHub and keras.applications models."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

VOCABULARY = 40
LENGTH = 6


@dataclasses.dataclass(frozen=True)
class HubModel:
    """A tiny model: how to make it, and one batch of two to call it on."""

    name: str
    make: Callable[[], keras.Model]
    inputs: Callable[[], Any]
    backends: tuple[str, ...] = ("tensorflow", "jax", "torch")


def _hub(class_name, **config):
    """A maker of a KerasHub object; makers among the values run first."""

    def make():
        import keras_hub

        home = keras_hub.models
        if not hasattr(home, class_name):
            home = keras_hub.layers
        built = {k: v() if callable(v) else v for k, v in config.items()}
        return getattr(home, class_name)(**built)

    return make


def _task(class_name, backbone, **config):
    return _hub(class_name, backbone=backbone, preprocessor=None, **config)


def _vae():
    from keras_hub.src.models.vae.vae_backbone import VAEBackbone

    return VAEBackbone(
        encoder_num_filters=[32, 32, 32, 32],
        encoder_num_blocks=[1, 1, 1, 1],
        decoder_num_filters=[32, 32, 32, 32],
        decoder_num_blocks=[1, 1, 1, 1],
        sampler_method="mode",
    )


def _rqvae():
    from keras_hub.src.models.rqvae.rqvae_backbone import RQVAEBackbone

    return RQVAEBackbone(
        input_dim=8,
        encoder_layer_dims=[16, 8],
        output_dim=4,
        decoder_layer_dims=[8, 16],
        num_embeddings=8,
        num_quantizers=2,
    )


def _settled(name, make, inputs):
    """A model whose batch norms hold the statistics of its inputs.

    Fresh statistics (mean 0, variance 1) shrink the signal layer by layer
    until no change of a kernel shows in the outputs.
    """

    def make_settled():
        model = make()
        norms = [
            layer
            for layer in model._flatten_layers()
            if isinstance(layer, keras.layers.BatchNormalization)
        ]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 0.0
        model(keras.tree.map_structure(_more_of, inputs()), training=True)
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            # Channels that hardly vary would blow rounding errors up.
            variance = keras.ops.maximum(norm.moving_variance, 1e-2)
            norm.moving_variance.assign(variance)
        return model

    return HubModel(name, make_settled, inputs)


def _more_of(x, count=16):
    """A batch of `count` examples like those of `x`."""
    if not np.issubdtype(x.dtype, np.floating):
        return np.concatenate([x] * (count // len(x)))
    rng = np.random.default_rng(1)
    return rng.uniform(0, x.max(), (count, *x.shape[1:])).astype(x.dtype)


def _text(*names):
    """Token inputs by name; the second row ends in two padding tokens."""

    def inputs():
        rng = np.random.default_rng(0)
        mask = np.ones((2, LENGTH), "int32")
        mask[1, -2:] = 0
        segments = np.tile(np.arange(LENGTH, dtype="int32") // 3, (2, 1))
        fields = {"padding_mask": mask, "segment_ids": segments}
        fields["mask_positions"] = np.array([[1, 3], [0, 2]], "int32")
        fields["response_mask"] = mask * segments
        fields["position_ids"] = np.arange(LENGTH, dtype="int32") * mask
        result = {}
        for name in names:
            kind = name.removeprefix("encoder_").removeprefix("decoder_")
            if name.endswith("token_ids"):
                tokens = rng.integers(1, VOCABULARY, (2, LENGTH), "int32")
                result[name] = tokens * mask
            else:
                result[name] = fields[kind]
        return result

    return inputs


def _images(size, name=None):
    """Uniform images, alone or under a name."""

    def inputs():
        rng = np.random.default_rng(0)
        images = rng.uniform(size=(2, size, size, 3)).astype("float32")
        return {name: images} if name else images

    return inputs


def _floats(**shapes):
    """Uniform floats of the given shapes (batch axis included) by name."""

    def inputs():
        rng = np.random.default_rng(0)
        draw = {k: rng.uniform(size=shape) for k, shape in shapes.items()}
        return {k: v.astype("float32") for k, v in draw.items()}

    return inputs


def _join(*makers, **constants):
    """The union of several named inputs, then constant arrays by name."""

    def inputs():
        result = {}
        for maker in makers:
            result.update(maker())
        for name, value in constants.items():
            result[name] = np.array(value)
        return result

    return inputs


TOKENS = _text("token_ids", "padding_mask")
SEGMENTED = _text("token_ids", "padding_mask", "segment_ids")
SEQ2SEQ = _text(
    "encoder_token_ids",
    "encoder_padding_mask",
    "decoder_token_ids",
    "decoder_padding_mask",
)
MASKED = _text("token_ids", "padding_mask", "mask_positions")
MASKED_SEGMENTED = _text(
    "token_ids", "padding_mask", "segment_ids", "mask_positions"
)
IMAGES = _images(16)
IMAGES_32 = _images(32)
IMAGES_64 = _images(64)
VIDEO = _floats(pixel_values=(2, 2, 16, 16, 3))

# The sizes that most constructors share.
BLOCKS = dict(num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=16)
ENCODER = dict(vocabulary_size=VOCABULARY, **BLOCKS)
DECODER = dict(
    vocabulary_size=VOCABULARY,
    num_layers=2,
    num_query_heads=2,
    num_key_value_heads=1,
    hidden_dim=8,
    intermediate_dim=16,
)
EXPERTS = dict(num_experts=3, top_k=2, moe_intermediate_dim=8)
# Its 64-step Python loop traces slowly, so one model has it.
LINEAR_ATTENTION = dict(
    layer_types=["linear_attention", "full_attention"],
    partial_rotary_factor=0.5,
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=4,
    linear_value_head_dim=4,
)
SMOLLM3 = dict(
    vocabulary_size=VOCABULARY,
    hidden_dim=8,
    intermediate_dim=16,
    num_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    attention_bias=False,
    attention_dropout=0.0,
    rope_layer_enabled_list=[True, False],
    layer_types=["full_attention", "full_attention"],
    mlp_bias=False,
    layer_norm_epsilon=1e-5,
    max_position_embeddings=16,
    rope_theta=10000.0,
    partial_rotary_factor=1.0,
)
T5GEMMA = dict(
    vocabulary_size=VOCABULARY,
    encoder_hidden_dim=8,
    encoder_intermediate_dim=16,
    encoder_num_layers=2,
    encoder_num_attention_heads=2,
    encoder_num_key_value_heads=1,
    encoder_head_dim=4,
    encoder_layer_types=["full_attention", "sliding_attention"],
    decoder_hidden_dim=8,
    decoder_intermediate_dim=16,
    decoder_num_layers=2,
    decoder_num_attention_heads=2,
    decoder_num_key_value_heads=1,
    decoder_head_dim=4,
    decoder_layer_types=["full_attention", "sliding_attention"],
    sliding_window=4,
    cross_attention_hidden_size=8,
)
GEMMA3N = dict(
    text_vocab_size=VOCABULARY,
    text_hidden_size=8,
    num_hidden_layers=2,
    pad_token_id=0,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    intermediate_size=[16, 16],
    hidden_activation="gelu_approximate",
    layer_types=["full_attention", "sliding_attention"],
    sliding_window=4,
    rope_theta=10000.0,
    max_position_embeddings=16,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size_per_layer_input=4,
    altup_num_inputs=2,
    laurel_rank=2,
)
GEMMA3_VISION = dict(
    image_size=16,
    vision_encoder=_hub(
        "Gemma3VisionEncoder",
        image_size=16,
        patch_size=4,
        output_dim=8,
        pool_size=2,
        **BLOCKS,
    ),
)
RESNET = dict(
    # KerasHub insists on 64 filters in the first stack.
    input_conv_filters=[64],
    input_conv_kernel_sizes=[3],
    stackwise_num_filters=[64, 8, 8, 16],
    stackwise_num_blocks=[1, 1, 1, 1],
    stackwise_num_strides=[1, 2, 2, 2],
    block_type="basic_block",
)
MIT = dict(
    image_shape=(32, 32, 3),
    num_layers=2,
    hidden_dims=[8, 16],
    layerwise_depths=[1, 1],
    layerwise_num_heads=[1, 2],
    layerwise_sr_ratios=[2, 1],
    layerwise_patch_sizes=[7, 3],
    layerwise_strides=[4, 2],
    max_drop_path_rate=0.0,
)
HGNET = dict(
    depths=[1, 1],
    embedding_size=8,
    hidden_sizes=[16, 16],
    stem_channels=[3, 8, 8],
    hidden_act="relu",
    use_learnable_affine_block=True,
    stackwise_stage_filters=[(8, 8, 16, 1, 1, 3), (16, 8, 16, 1, 2, 3)],
    apply_downsample=[False, True],
    use_lightweight_conv_block=[False, True],
)
EFFICIENTNET = dict(
    stackwise_width_coefficients=[1.0, 1.0, 1.0],
    stackwise_depth_coefficients=[1.0, 1.0, 1.0],
    stackwise_kernel_sizes=[3, 3, 3],
    stackwise_num_repeats=[1, 1, 1],
    stackwise_input_filters=[8, 8, 8],
    stackwise_output_filters=[8, 8, 16],
    stackwise_expansion_ratios=[1, 2, 2],
    stackwise_squeeze_and_excite_ratios=[0.0, 0.25, 0.25],
    stackwise_strides=[1, 2, 2],
    stackwise_block_types=["fused", "unfused", "v1"],
    stackwise_force_input_filters=[0, 0, 0],
    stackwise_nores_option=[False, False, False],
    num_features=16,
)
MOBILENET = dict(
    stackwise_expansion=[[8, 16], [16]],
    stackwise_num_blocks=[2, 1],
    stackwise_num_filters=[[8, 8], [16]],
    stackwise_kernel_size=[[3, 3], [5]],
    stackwise_num_strides=[[2, 1], [2]],
    stackwise_se_ratio=[[None, None], [0.25]],
    stackwise_activation=[["relu", "relu"], ["hard_swish"]],
    stackwise_padding=[[1, 1], [2]],
    output_num_filters=16,
    depthwise_filters=8,
    depthwise_stride=1,
    depthwise_residual=True,
    last_layer_filter=16,
    input_num_filters=8,
)
MOBILENETV5 = dict(
    stackwise_block_types=[["er"], ["uir", "mqa"]],
    stackwise_num_blocks=[1, 2],
    stackwise_num_filters=[[8], [16, 16]],
    stackwise_strides=[[2], [2, 1]],
    stackwise_act_layers=[["relu"], ["relu", "relu"]],
    stackwise_exp_ratios=[[2.0], [2.0, 1.0]],
    stackwise_se_ratios=[[0.0], [0.0, 0.0]],
    stackwise_dw_kernel_sizes=[[0], [3, 3]],
    stackwise_dw_start_kernel_sizes=[[0], [3, 0]],
    stackwise_dw_end_kernel_sizes=[[0], [0, 0]],
    stackwise_exp_kernel_sizes=[[3], [0, 0]],
    stackwise_pw_kernel_sizes=[[1], [0, 0]],
    stackwise_num_heads=[[0], [0, 2]],
    stackwise_key_dims=[[0], [0, 4]],
    stackwise_value_dims=[[0], [0, 4]],
    stackwise_kv_strides=[[0], [0, 2]],
    stackwise_use_cpe=[[False], [False, False]],
    stem_size=8,
    use_msfa=False,
)
VIT = dict(
    image_shape=(16, 16, 3),
    patch_size=4,
    num_layers=2,
    num_heads=2,
    hidden_dim=8,
    mlp_dim=16,
)
PATCHES = dict(image_shape=(16, 16, 3), patch_size=4, **BLOCKS)
DINOV2 = dict(position_embedding_shape=(16, 16), **PATCHES)
VIT_DET = dict(
    image_shape=(32, 32, 3),
    patch_size=4,
    hidden_size=8,
    num_layers=2,
    intermediate_dim=16,
    num_heads=2,
    global_attention_layer_indices=[1],
    num_output_channels=8,
    window_size=2,
)
TEXT_TOWER = dict(embedding_dim=8, max_sequence_length=LENGTH, **ENCODER)
CLIP_TEXT = _hub("CLIPTextEncoder", intermediate_output_index=0, **TEXT_TOWER)
DFINE = dict(
    backbone=_hub(
        "HGNetV2Backbone", out_features=["stage1", "stage2"], **HGNET
    ),
    decoder_in_channels=[8, 8],
    encoder_hidden_dim=8,
    num_denoising=0,
    num_labels=3,
    hidden_dim=8,
    learn_initial_query=False,
    num_queries=5,
    anchor_image_size=(32, 32),
    feat_strides=[4, 8],
    num_feature_levels=2,
    encoder_in_channels=[16, 16],
    encode_proj_layers=[1],
    num_attention_heads=2,
    encoder_ffn_dim=16,
    num_encoder_layers=1,
    hidden_expansion=0.5,
    depth_multiplier=0.5,
    eval_idx=-1,
    num_decoder_layers=1,
    decoder_attention_heads=2,
    decoder_ffn_dim=16,
    decoder_n_points=[2, 2],
    lqe_hidden_dim=8,
    num_lqe_layers=2,
    out_features=["stage1", "stage2"],
    image_shape=(32, 32, 3),
    seed=0,
)
FLUX = dict(
    input_channels=8,
    hidden_size=16,
    mlp_ratio=2.0,
    num_heads=2,
    depth=1,
    depth_single_blocks=1,
    axes_dim=[4, 2, 2],
    theta=10000,
    use_bias=True,
    guidance_embed=True,
    image_shape=(4, 8),
    text_shape=(3, 8),
    image_ids_shape=(4, 3),
    text_ids_shape=(3, 3),
    y_shape=(8,),
)
FLUX_INPUTS = _floats(
    image=(2, 4, 8),
    image_ids=(2, 4, 3),
    text=(2, 3, 8),
    text_ids=(2, 3, 3),
    y=(2, 8),
    timesteps=(2,),
    guidance=(2,),
)
STABLE_DIFFUSION = dict(
    mmdit_patch_size=2,
    mmdit_hidden_dim=8,
    mmdit_num_layers=2,
    mmdit_num_heads=2,
    mmdit_position_size=8,
    mmdit_qk_norm=None,
    mmdit_dual_attention_indices=None,
    vae=_vae,
    clip_l=CLIP_TEXT,
    clip_g=CLIP_TEXT,
    image_shape=(32, 32, 3),
)
SAM = dict(
    image_encoder=_hub("ViTDetBackbone", **VIT_DET),
    prompt_encoder=_hub(
        "SAMPromptEncoder",
        hidden_size=8,
        image_embedding_size=(8, 8),
        input_image_size=(32, 32),
        mask_in_channels=4,
    ),
    mask_decoder=_hub(
        "SAMMaskDecoder",
        num_layers=1,
        hidden_size=8,
        intermediate_dim=16,
        num_heads=2,
        embedding_dim=8,
        num_multimask_outputs=2,
        iou_head_depth=2,
        iou_head_hidden_dim=8,
    ),
)
SAM_INPUTS = _join(
    _images(32, "images"),
    _floats(
        points=(2, 1, 2),
        labels=(2, 1),
        boxes=(2, 1, 2, 2),
        masks=(2, 1, 32, 32, 1),
    ),
)
SAM3_BLOCK = dict(hidden_dim=8, intermediate_dim=16, num_heads=2)
SAM3 = dict(
    vision_encoder=_hub(
        "SAM3VisionEncoder",
        image_shape=(32, 32, 3),
        patch_size=4,
        num_layers=2,
        fpn_hidden_dim=8,
        fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
        pretrain_image_shape=(32, 32, 3),
        window_size=2,
        global_attn_indexes=[1],
        **SAM3_BLOCK,
    ),
    text_encoder=_hub("SAM3TextEncoder", **TEXT_TOWER),
    geometry_encoder=_hub(
        "SAM3GeometryEncoder", num_layers=1, roi_size=3, **SAM3_BLOCK
    ),
    detr_encoder=_hub("SAM3DetrEncoder", num_layers=1, **SAM3_BLOCK),
    detr_decoder=_hub(
        "SAM3DetrDecoder",
        image_shape=(32, 32, 3),
        patch_size=4,
        num_layers=1,
        num_queries=5,
        **SAM3_BLOCK,
    ),
    mask_decoder=_hub(
        "SAM3MaskDecoder", num_upsampling_stages=3, hidden_dim=8, num_heads=2
    ),
)
SAM3_INPUTS = _join(
    TOKENS,
    _images(32, "pixel_values"),
    _floats(boxes=(2, 1, 5)),
    box_labels=[[1], [0]],
)
BLIP2 = dict(
    vision_encoder=_hub(
        "BLIP2VisionEncoder",
        image_size=16,
        patch_size=4,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
        **BLOCKS,
    ),
    qformer=_hub(
        "BLIP2QFormer",
        num_query_tokens=2,
        vision_dim=8,
        cross_attention_frequency=2,
        dropout=0.0,
        layer_norm_epsilon=1e-6,
        **BLOCKS,
    ),
    language_model=_hub(
        "BLIP2CustomOPT",
        num_query_tokens=2,
        dropout=0.0,
        max_sequence_length=16,
        qformer_hidden_dim=8,
        **ENCODER,
    ),
)
VIDEO_PRISM = dict(
    num_frames=2,
    patch_size=4,
    hidden_dim=8,
    intermediate_dim=16,
    num_heads=2,
    num_spatial_layers=1,
    num_temporal_layers=1,
    num_auxiliary_layers=1,
    image_shape=(16, 16, 3),
)
PALI_GEMMA = dict(
    image_size=16,
    head_dim=4,
    vit_patch_size=4,
    vit_num_heads=2,
    vit_hidden_dim=8,
    vit_num_layers=2,
    vit_intermediate_dim=16,
    **DECODER,
)

TEXT_ENCODERS = [
    HubModel(
        "albert_backbone",
        _hub("AlbertBackbone", embedding_dim=8, **ENCODER),
        SEGMENTED,
    ),
    HubModel("bert_backbone", _hub("BertBackbone", **ENCODER), SEGMENTED),
    HubModel(
        "deberta_v3_backbone",
        _hub("DebertaV3Backbone", bucket_size=4, **ENCODER),
        TOKENS,
    ),
    HubModel(
        "distil_bert_backbone", _hub("DistilBertBackbone", **ENCODER), TOKENS
    ),
    HubModel(
        "electra_backbone",
        _hub(
            "ElectraBackbone", vocab_size=VOCABULARY, embedding_dim=8, **BLOCKS
        ),
        SEGMENTED,
    ),
    HubModel(
        "esm_backbone", _hub("ESM2Backbone", **ENCODER), _text("token_ids")
    ),
    HubModel(
        "f_net_backbone",
        _hub(
            "FNetBackbone",
            vocabulary_size=VOCABULARY,
            num_layers=2,
            hidden_dim=8,
            intermediate_dim=16,
        ),
        _text("token_ids", "segment_ids"),
    ),
    HubModel("roberta_backbone", _hub("RobertaBackbone", **ENCODER), TOKENS),
    HubModel(
        "roformer_v2_backbone",
        _hub("RoformerV2Backbone", head_size=4, **ENCODER),
        _text("token_ids", "segment_ids"),
    ),
    HubModel(
        "xlm_roberta_backbone", _hub("XLMRobertaBackbone", **ENCODER), TOKENS
    ),
    HubModel("xlnet_backbone", _hub("XLNetBackbone", **ENCODER), SEGMENTED),
]

TEXT_DECODERS = [
    HubModel("bloom_backbone", _hub("BloomBackbone", **ENCODER), TOKENS),
    HubModel(
        "falcon_backbone",
        _hub(
            "FalconBackbone",
            vocabulary_size=VOCABULARY,
            num_layers=2,
            num_attention_heads=2,
            hidden_dim=8,
            intermediate_dim=16,
        ),
        TOKENS,
    ),
    HubModel(
        "gemma_backbone", _hub("GemmaBackbone", head_dim=4, **DECODER), TOKENS
    ),
    HubModel(
        "gemma3_backbone",
        _hub("Gemma3Backbone", head_dim=4, image_size=None, **DECODER),
        TOKENS,
    ),
    HubModel("gemma3n_backbone", _hub("Gemma3nBackbone", **GEMMA3N), TOKENS),
    HubModel(
        "gemma4_backbone",
        _hub("Gemma4Backbone", head_dim=4, image_size=None, **DECODER),
        _text("token_ids", "padding_mask", "position_ids"),
    ),
    HubModel("gpt2_backbone", _hub("GPT2Backbone", **ENCODER), TOKENS),
    HubModel(
        "gpt_neo_x_backbone",
        _hub("GPTNeoXBackbone", rotary_percentage=0.5, **ENCODER),
        TOKENS,
    ),
    HubModel(
        "gpt_oss_backbone",
        _hub("GptOssBackbone", num_experts=3, **DECODER),
        TOKENS,
    ),
    HubModel("llama_backbone", _hub("LlamaBackbone", **DECODER), TOKENS),
    HubModel("llama3_backbone", _hub("Llama3Backbone", **DECODER), TOKENS),
    HubModel("mistral_backbone", _hub("MistralBackbone", **DECODER), TOKENS),
    HubModel(
        "mixtral_backbone",
        _hub("MixtralBackbone", num_experts=3, **DECODER),
        TOKENS,
    ),
    HubModel("opt_backbone", _hub("OPTBackbone", **ENCODER), TOKENS),
    HubModel("phi3_backbone", _hub("Phi3Backbone", **DECODER), TOKENS),
    HubModel("qwen_backbone", _hub("QwenBackbone", **DECODER), TOKENS),
    HubModel(
        "qwen_moe_backbone",
        _hub(
            "QwenMoeBackbone",
            shared_expert_intermediate_dim=8,
            **EXPERTS,
            **DECODER,
        ),
        TOKENS,
    ),
    HubModel(
        "qwen3_backbone", _hub("Qwen3Backbone", head_dim=4, **DECODER), TOKENS
    ),
    HubModel(
        "qwen3_moe_backbone",
        _hub("Qwen3MoeBackbone", head_dim=4, **EXPERTS, **DECODER),
        TOKENS,
    ),
    HubModel(
        "qwen3_5_backbone",
        _hub("Qwen3_5Backbone", head_dim=4, **LINEAR_ATTENTION, **DECODER),
        TOKENS,
    ),
    HubModel(
        "qwen3_5_moe_backbone",
        _hub(
            "Qwen3_5MoeBackbone",
            vocabulary_size=VOCABULARY,
            num_layers=2,
            num_query_heads=2,
            num_key_value_heads=1,
            head_dim=4,
            hidden_dim=8,
            shared_expert_intermediate_size=8,
            **EXPERTS,
            layer_types=["full_attention", "full_attention"],
            partial_rotary_factor=0.5,
        ),
        TOKENS,
    ),
    HubModel(
        "rwkv7_backbone",
        _hub(
            "RWKV7Backbone",
            hidden_size=8,
            head_size=4,
            num_layers=2,
            vocabulary_size=VOCABULARY,
            intermediate_dim=16,
            gate_lora=4,
            mv_lora=4,
            aaa_lora=4,
            decay_lora=4,
        ),
        TOKENS,
    ),
    HubModel("smollm3_backbone", _hub("SmolLM3Backbone", **SMOLLM3), TOKENS),
]

SEQUENCE_TO_SEQUENCE = [
    HubModel("bart_backbone", _hub("BartBackbone", **ENCODER), SEQ2SEQ),
    HubModel(
        "edrec_backbone",
        _hub(
            "EdRecBackbone",
            vocab_size=VOCABULARY,
            num_layers_enc=1,
            num_layers_dec=1,
            hidden_dim=8,
            intermediate_dim=16,
            num_heads=2,
        ),
        SEQ2SEQ,
    ),
    HubModel(
        "moonshine_backbone",
        _hub(
            "MoonshineBackbone",
            vocabulary_size=VOCABULARY,
            filter_dim=8,
            encoder_num_layers=1,
            decoder_num_layers=1,
            hidden_dim=8,
            intermediate_dim=16,
            encoder_num_heads=2,
            decoder_num_heads=2,
        ),
        _join(
            _text("decoder_token_ids", "decoder_padding_mask"),
            _floats(encoder_input_values=(2, 1024, 1)),
            encoder_padding_mask=np.int32(np.arange(1024) < [[1024], [800]]),
        ),
    ),
    HubModel("t5_backbone", _hub("T5Backbone", **ENCODER), SEQ2SEQ),
    HubModel("t5gemma_backbone", _hub("T5GemmaBackbone", **T5GEMMA), SEQ2SEQ),
    HubModel("t5gemma2_backbone", _hub("T5Gemma2Backbone", **T5GEMMA), SEQ2SEQ),
    HubModel(
        "whisper_backbone",
        _hub(
            "WhisperBackbone",
            num_mels=8,
            max_encoder_sequence_length=8,
            max_decoder_sequence_length=8,
            **ENCODER,
        ),
        _join(
            _text("decoder_token_ids", "decoder_padding_mask"),
            _floats(encoder_features=(2, 8, 8)),
        ),
    ),
]

VISION = [
    HubModel("vit_backbone", _hub("ViTBackbone", **VIT), IMAGES),
    HubModel("deit_backbone", _hub("DeiTBackbone", **PATCHES), IMAGES),
    HubModel(
        "dinov2_backbone",
        _hub("DINOV2Backbone", **DINOV2),
        _images(16, "images"),
    ),
    HubModel(
        "dinov3_backbone",
        _hub("DINOV3Backbone", **PATCHES),
        _images(16, "pixel_values"),
    ),
    HubModel(
        "swin_transformer_backbone",
        _hub(
            "SwinTransformerBackbone",
            image_shape=(32, 32, 3),
            embed_dim=8,
            depths=[2, 1],
            num_heads=[2, 2],
            window_size=4,
            mlp_ratio=2.0,
        ),
        IMAGES_32,
    ),
    HubModel("vit_det_backbone", _hub("ViTDetBackbone", **VIT_DET), IMAGES_32),
    HubModel("mit_backbone", _hub("MiTBackbone", **MIT), IMAGES_32),
    _settled("resnet_backbone", _hub("ResNetBackbone", **RESNET), IMAGES_32),
    _settled(
        "resnet_v2_backbone",
        _hub(
            "ResNetBackbone",
            use_pre_activation=True,
            **{**RESNET, "block_type": "bottleneck_block"},
        ),
        IMAGES_32,
    ),
    _settled(
        "densenet_backbone",
        _hub("DenseNetBackbone", stackwise_num_repeats=[1, 1], growth_rate=4),
        IMAGES_32,
    ),
    _settled(
        "efficientnet_backbone",
        _hub("EfficientNetBackbone", **EFFICIENTNET),
        IMAGES_32,
    ),
    _settled(
        "mobilenet_backbone",
        _hub("MobileNetBackbone", image_shape=(32, 32, 3), **MOBILENET),
        IMAGES_32,
    ),
    HubModel(
        "mobilenetv5_backbone",
        _hub("MobileNetV5Backbone", image_shape=(32, 32, 3), **MOBILENETV5),
        IMAGES_32,
    ),
    HubModel(
        "vgg_backbone",
        _hub(
            "VGGBackbone",
            stackwise_num_repeats=[1, 2],
            stackwise_num_filters=[8, 16],
            image_shape=(16, 16, 3),
        ),
        IMAGES,
    ),
    _settled(
        "xception_backbone",
        _hub(
            "XceptionBackbone",
            stackwise_conv_filters=[[4, 8], [8, 16]],
            stackwise_pooling=[True, False],
        ),
        IMAGES_32,
    ),
    _settled(
        "cspnet_backbone",
        _hub(
            "CSPNetBackbone",
            stem_filters=8,
            stem_kernel_size=3,
            stem_strides=1,
            stackwise_depth=[1, 1],
            stackwise_strides=[1, 2],
            stackwise_num_filters=[8, 16],
            block_type="bottleneck_block",
            stage_type="csp",
            bottle_ratio=[0.5],
            expand_ratio=[2.0],
            groups=2,
            image_shape=(32, 32, 3),
        ),
        IMAGES_32,
    ),
    _settled("hgnetv2_backbone", _hub("HGNetV2Backbone", **HGNET), IMAGES_32),
    # Needs training=False: model(x) alone runs its last layers as in fit.
    _settled(
        "deeplab_v3_backbone",
        _hub(
            "DeepLabV3Backbone",
            image_encoder=_hub("ResNetBackbone", **RESNET),
            spatial_pyramid_pooling_key="P4",
            low_level_feature_key="P2",
            upsampling_size=4,
            dilation_rates=[2],
            projection_filters=8,
            image_shape=(32, 32, 3),
        ),
        IMAGES_32,
    ),
    # Needs training=False: model(x) alone runs its last layers as in fit.
    _settled(
        "segformer_backbone",
        _hub(
            "SegFormerBackbone",
            image_encoder=_hub("MiTBackbone", **MIT),
            projection_filters=8,
        ),
        IMAGES_32,
    ),
    _settled(
        "retinanet_backbone",
        _hub(
            "RetinaNetBackbone",
            image_encoder=_hub("ResNetBackbone", **RESNET),
            min_level=3,
            max_level=6,
            use_p5=False,
            image_shape=(64, 64, 3),
        ),
        IMAGES_64,
    ),
    _settled("d_fine_backbone", _hub("DFineBackbone", **DFINE), IMAGES_32),
    HubModel(
        "depth_anything_backbone",
        _hub(
            "DepthAnythingBackbone",
            image_encoder=_hub("DINOV2Backbone", **DINOV2),
            reassemble_factors=[2, 1],
            neck_hidden_dims=[8, 8],
            fusion_hidden_dim=8,
            head_hidden_dim=8,
            head_in_index=-1,
            feature_keys=["stage1", "stage2"],
        ),
        IMAGES,
    ),
    HubModel("vae_backbone", _vae, IMAGES_32),
    HubModel(
        "video_prism_backbone",
        _hub("VideoPrismBackbone", **VIDEO_PRISM),
        lambda: VIDEO()["pixel_values"],
    ),
    HubModel("sam_backbone", _hub("SAMBackbone", **SAM), SAM_INPUTS),
]

MULTIMODAL = [
    HubModel(
        "clip_backbone",
        _hub(
            "CLIPBackbone",
            vision_encoder=_hub("CLIPVisionEncoder", **PATCHES),
            text_encoder=_hub("CLIPTextEncoder", **TEXT_TOWER),
            projection_dim=8,
        ),
        _join(_images(16, "images"), _text("token_ids")),
    ),
    HubModel(
        "metaclip_2_backbone",
        _hub(
            "MetaCLIP2Backbone",
            vision_encoder=_hub("MetaCLIP2VisionEncoder", **PATCHES),
            text_encoder=_hub("MetaCLIP2TextEncoder", **TEXT_TOWER),
            projection_dim=8,
        ),
        _join(_images(16, "images"), _text("token_ids")),
    ),
    HubModel(
        "siglip_backbone",
        _hub(
            "SigLIPBackbone",
            vision_encoder=_hub("SigLIPVisionEncoder", **PATCHES),
            text_encoder=_hub("SigLIPTextEncoder", **TEXT_TOWER),
        ),
        _join(_images(16, "images"), _text("token_ids")),
    ),
    HubModel(
        "pali_gemma_backbone",
        _hub("PaliGemmaBackbone", **PALI_GEMMA),
        _join(
            _images(16, "images"),
            _text("token_ids", "padding_mask", "response_mask"),
        ),
    ),
    HubModel(
        "gemma3_vision_backbone",
        _hub("Gemma3Backbone", head_dim=4, **GEMMA3_VISION, **DECODER),
        _join(
            TOKENS,
            _floats(images=(2, 1, 16, 16, 3)),
            vision_indices=[[1, 2, 3, 4]] * 2,
            vision_mask=[[0, 1, 1, 1, 1, 0]] * 2,
        ),
    ),
    HubModel(
        "blip2_backbone",
        _hub("BLIP2Backbone", **BLIP2),
        _join(TOKENS, _images(16, "images")),
    ),
    HubModel(
        "parseq_backbone",
        _hub(
            "PARSeqBackbone",
            image_encoder=_hub("ViTBackbone", use_class_token=False, **VIT),
            vocabulary_size=VOCABULARY,
            max_label_length=LENGTH,
            decoder_hidden_dim=8,
            num_decoder_layers=1,
            num_decoder_heads=2,
            decoder_mlp_dim=16,
        ),
        _join(_images(16, "images"), TOKENS),
    ),
    HubModel(
        "video_prism_text_backbone",
        _hub(
            "VideoPrismBackbone",
            vocabulary_size=VOCABULARY,
            num_text_layers=1,
            **VIDEO_PRISM,
        ),
        _join(VIDEO, TOKENS),
    ),
    HubModel("flux_backbone", _hub("FluxBackbone", **FLUX), FLUX_INPUTS),
    HubModel(
        "stable_diffusion_3_backbone",
        _hub("StableDiffusion3Backbone", **STABLE_DIFFUSION),
        _join(
            _images(32, "images"),
            _floats(latents=(2, 4, 4, 16)),
            _text(
                "clip_l_token_ids",
                "clip_l_negative_token_ids",
                "clip_g_token_ids",
                "clip_g_negative_token_ids",
            ),
            num_steps=np.array([2, 2], "int32"),
            guidance_scale=np.array([7.0, 7.0], "float32"),
        ),
    ),
    HubModel(
        "sam3_backbone",
        _hub("SAM3PromptableConceptBackbone", **SAM3),
        SAM3_INPUTS,
        # On torch its region pooling imports torchvision.
        backends=("tensorflow", "jax"),
    ),
    HubModel(
        "rqvae_backbone",
        _rqvae,
        lambda: np.random.default_rng(0).uniform(size=(2, 8)).astype("float32"),
    ),
]

TASKS = [
    HubModel(
        "bert_text_classifier",
        _task(
            "BertTextClassifier",
            _hub("BertBackbone", **ENCODER),
            num_classes=2,
        ),
        SEGMENTED,
    ),
    HubModel(
        "roberta_text_classifier",
        _task(
            "RobertaTextClassifier",
            _hub("RobertaBackbone", **ENCODER),
            num_classes=2,
        ),
        TOKENS,
    ),
    HubModel(
        "distil_bert_text_classifier",
        _task(
            "DistilBertTextClassifier",
            _hub("DistilBertBackbone", **ENCODER),
            num_classes=2,
        ),
        TOKENS,
    ),
    HubModel(
        "bert_masked_lm",
        _task("BertMaskedLM", _hub("BertBackbone", **ENCODER)),
        MASKED_SEGMENTED,
    ),
    HubModel(
        "deberta_v3_masked_lm",
        _task(
            "DebertaV3MaskedLM",
            _hub("DebertaV3Backbone", bucket_size=4, **ENCODER),
        ),
        MASKED,
    ),
    HubModel(
        "gpt2_causal_lm",
        _task("GPT2CausalLM", _hub("GPT2Backbone", **ENCODER)),
        TOKENS,
    ),
    HubModel(
        "gemma_causal_lm",
        _task("GemmaCausalLM", _hub("GemmaBackbone", head_dim=4, **DECODER)),
        TOKENS,
    ),
    HubModel(
        "llama_causal_lm",
        _task("LlamaCausalLM", _hub("LlamaBackbone", **DECODER)),
        TOKENS,
    ),
    HubModel(
        "bart_seq_2_seq_lm",
        _task("BartSeq2SeqLM", _hub("BartBackbone", **ENCODER)),
        SEQ2SEQ,
    ),
    HubModel(
        "t5_seq_2_seq_lm",
        _task("T5Seq2SeqLM", _hub("T5Backbone", **ENCODER)),
        SEQ2SEQ,
    ),
    _settled(
        "resnet_image_classifier",
        _task(
            "ResNetImageClassifier",
            _hub("ResNetBackbone", **RESNET),
            num_classes=3,
        ),
        IMAGES_32,
    ),
    HubModel(
        "vit_image_classifier",
        _task("ViTImageClassifier", _hub("ViTBackbone", **VIT), num_classes=3),
        IMAGES,
    ),
    HubModel(
        "sam_image_segmenter",
        _task("SAMImageSegmenter", _hub("SAMBackbone", **SAM)),
        SAM_INPUTS,
    ),
]

MODELS = (
    TEXT_ENCODERS
    + TEXT_DECODERS
    + SEQUENCE_TO_SEQUENCE
    + VISION
    + MULTIMODAL
    + TASKS
)


def _application(class_name, **config):
    def make():
        return getattr(keras.applications, class_name)(
            weights=None,
            input_shape=(32, 32, 3),
            classes=3,
            classifier_activation=None,
            **config,
        )

    return make


APPLICATIONS = [
    _settled(
        "mobilenet_v2", _application("MobileNetV2", alpha=0.35), IMAGES_32
    ),
    _settled("resnet50", _application("ResNet50"), IMAGES_32),
    _settled(
        "efficientnet_b0",
        _application("EfficientNetB0"),
        # It holds its own scaling from 0..255.
        lambda: 255 * IMAGES_32(),
    ),
]

UNSUPPORTED = {
    "basnet": "its width is tied to ResNet's 64: 48 million parameters",
    "gemma3n vision and audio": "the text-only model covers the family",
    "gemma4 vision and audio": "the text-only model covers the family",
}
