"""Flax models of `transformers` 4, the last release that has them, from small configurations."""

import functools
import importlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.zoo.model import Case, Model, cast, cross_entropy, integers, normal

HIDDEN, LAYERS, HEADS, INNER, VOCABULARY = 128, 2, 4, 512, 1024
LENGTH, NUM_EXAMPLES = 64, 8

_BERT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": INNER,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": LENGTH + 2,
}
_LLAMA = _BERT | {"num_key_value_heads": 2}
_GPT2 = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": HIDDEN, "n_layer": LAYERS}
_GPT2 |= {"n_head": HEADS}
_BART = {
    "d_model": HIDDEN,
    "vocab_size": VOCABULARY,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER,
    "max_position_embeddings": LENGTH,
}
_BART |= {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
_T5 = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": HIDDEN // HEADS, "d_ff": INNER}
_T5 |= {"num_layers": LAYERS, "num_heads": HEADS, "decoder_start_token_id": 0}
_VIT = {k: v for k, v in _BERT.items() if k not in ("vocab_size", "max_position_embeddings")}
_VIT |= {"image_size": 32, "patch_size": 8, "num_labels": 10}


def _build(class_name: str, config_name: str, config: dict, dtype: Any, **options: Any) -> Any:
    transformers = importlib.import_module("transformers")
    if "T5" in class_name:
        _give_clip_its_old_names(class_name)
    transformers.logging.set_verbosity_error()
    configuration = getattr(transformers, config_name)(**config)
    return getattr(transformers, class_name)(configuration, seed=0, dtype=dtype, **options)


def _give_clip_its_old_names(class_name: str) -> None:
    """Lets T5 and LongT5 call ``jnp.clip(x, a_max=...)``, which JAX no longer has."""
    kind = "longt5" if "LongT5" in class_name else "t5"
    module = importlib.import_module(f"transformers.models.{kind}.modeling_flax_{kind}")
    clip = lambda x, a_min=None, a_max=None: jnp.clip(x, a_min, a_max)  # noqa: E731
    setattr(module, "jnp", types.SimpleNamespace(**vars(jnp) | {"clip": clip}))  # noqa: B010


def language_model(class_name: str, config_name: str, config: dict, dtype: Any) -> Case:
    """Returns a model that predicts a token at every position, decoder or encoder."""
    model = _build(class_name, config_name, config, dtype, input_shape=(1, LENGTH))

    def fun(params: Any, example: Any) -> jax.Array:
        tokens, labels = example
        off = {"deterministic": True} if class_name.startswith("FlaxOPT") else {"train": False}
        logits = model(tokens[None], params=params, **off).logits[0]
        return cross_entropy(logits, labels)

    tokens = integers(0, VOCABULARY, NUM_EXAMPLES, LENGTH)
    return Case(fun, cast(model.params, dtype), (tokens, np.roll(tokens, -1, 1)))


def gpt2_small(dtype: Any) -> Case:
    """Returns GPT-2 small, of 124 million parameters, on 4 sequences of 256 tokens."""
    config = {"vocab_size": 50257, "n_positions": 1024}
    model = _build("FlaxGPT2LMHeadModel", "GPT2Config", config, dtype)

    def fun(params: Any, tokens: Any) -> jax.Array:
        logits = model(tokens[None], params=params, train=False).logits[0]
        return cross_entropy(logits, jnp.roll(tokens, -1))

    return Case(fun, cast(model.params, dtype), integers(0, 50257, 4, 256))


def sequence_to_sequence(class_name: str, config_name: str, config: dict, dtype: Any) -> Case:
    """Returns a model that reads tokens and predicts others."""
    model = _build(class_name, config_name, config, dtype)

    def fun(params: Any, example: Any) -> jax.Array:
        tokens, before, labels = (x[None] for x in example)
        mask = jnp.ones_like(tokens)
        outputs = model(
            tokens, attention_mask=mask, decoder_input_ids=before, decoder_attention_mask=mask,
            params=params, train=False,
        )  # fmt: skip
        return cross_entropy(outputs.logits, labels)

    tokens, labels = integers(0, VOCABULARY, 2, NUM_EXAMPLES, LENGTH)
    return Case(fun, cast(model.params, dtype), (tokens, np.roll(labels, 1, 1), labels))


def image_classifier(class_name: str, config_name: str, config: dict, dtype: Any) -> Case:
    """Returns a classifier of 32 × 32 images; running statistics are constants."""
    model = _build(class_name, config_name, config, dtype)
    variables = cast(model.params, dtype)
    has_statistics = "batch_stats" in variables
    params = variables["params"] if has_statistics else variables

    def fun(params: Any, example: Any) -> jax.Array:
        pixels, label = example
        at = variables | {"params": params} if has_statistics else params
        return cross_entropy(model(pixels[None], params=at, train=False).logits[0], label)

    pixels = cast(normal(0, NUM_EXAMPLES, 3, 32, 32), dtype)
    return Case(fun, params, (pixels, integers(1, 10, NUM_EXAMPLES)))


def clip(dtype: Any) -> Case:
    """Returns CLIP on pairs: minus the similarity of the matching pair, against one other text."""
    text = _BERT | {"max_position_embeddings": 16}
    vision = _VIT | {"projection_dim": 64}
    config = {"text_config": text, "vision_config": vision, "projection_dim": 64}
    model = _build(
        "FlaxCLIPModel", "CLIPConfig", config, dtype, input_shape=((1, 16), (1, 32, 32, 3))
    )

    def fun(params: Any, example: Any) -> jax.Array:
        tokens, pixels = example
        mask = jnp.ones_like(tokens)
        outputs = model(tokens, pixels[None], mask, params=params, train=False)
        return cross_entropy(outputs.logits_per_image, jnp.zeros(1, jnp.int32))

    pixels = cast(normal(0, NUM_EXAMPLES, 3, 32, 32), dtype)
    return Case(fun, cast(model.params, dtype), (integers(1, 1024, NUM_EXAMPLES, 2, 16), pixels))


def speech_encoder(dtype: Any) -> Case:
    """Returns Wav2Vec2 with a head at every frame."""
    config = _BERT | {
        "vocab_size": 32,
        "conv_dim": (64, 64, 64),
        "conv_stride": (5, 4, 2),
        "conv_kernel": (10, 4, 3),
        "num_feat_extract_layers": 3,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 4,
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
        "hidden_dropout": 0.0,
    }
    model = _build(
        "FlaxWav2Vec2ForCTC", "Wav2Vec2Config", config, dtype, input_shape=(1, 1600)
    )  # fmt: skip

    def fun(params: Any, example: Any) -> jax.Array:
        sound, labels = example
        logits = model(sound[None], params=params, train=False).logits[0]
        return cross_entropy(logits, labels[: logits.shape[0]])

    sound = cast(normal(0, 4, 1600), dtype)
    return Case(fun, cast(model.params, dtype), (sound, integers(1, 32, 4, 64)))


def whisper(dtype: Any) -> Case:
    """Returns Whisper: frames of sound to tokens."""
    config = _BART | {"num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32}
    config |= {"pad_token_id": 0, "suppress_tokens": None, "begin_suppress_tokens": None}
    model = _build(
        "FlaxWhisperForConditionalGeneration", "WhisperConfig", config, dtype,
        input_shape=(1, 16, 64),
    )  # fmt: skip

    def fun(params: Any, example: Any) -> jax.Array:
        frames, tokens, labels = (x[None] for x in example)
        logits = model(frames, tokens, params=params, train=False).logits
        return cross_entropy(logits, labels)

    frames = cast(normal(0, NUM_EXAMPLES, 16, 64), dtype)
    tokens = integers(1, VOCABULARY, NUM_EXAMPLES, 16)
    return Case(fun, cast(model.params, dtype), (frames, tokens, np.roll(tokens, -1, 1)))


_CONV = {"hidden_sizes": [32, 64], "depths": [1, 1], "embedding_size": 32, "num_labels": 10}

_LANGUAGE: dict[str, tuple[str, str, dict]] = {
    "gpt2": ("FlaxGPT2LMHeadModel", "GPT2Config", _GPT2),
    "gpt_neo": (
        "FlaxGPTNeoForCausalLM",
        "GPTNeoConfig",
        _BERT
        | {"num_layers": 2, "num_heads": HEADS, "attention_types": [[["global", "local"], 1]]}
        | {"window_size": 16},
    ),
    "gptj": ("FlaxGPTJForCausalLM", "GPTJConfig", _GPT2 | {"rotary_dim": 16}),
    "bloom": (
        "FlaxBloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS},
    ),
    "opt": (
        "FlaxOPTForCausalLM",
        "OPTConfig",
        _BERT | {"ffn_dim": INNER, "word_embed_proj_dim": 64, "do_layer_norm_before": True},
    ),
    "xglm": (
        "FlaxXGLMForCausalLM",
        "XGLMConfig",
        _BERT
        | {"d_model": HIDDEN, "ffn_dim": INNER, "num_layers": LAYERS, "attention_heads": HEADS},
    ),
    "llama": ("FlaxLlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("FlaxMistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 16}),
    "gemma": ("FlaxGemmaForCausalLM", "GemmaConfig", _LLAMA | {"head_dim": HIDDEN // HEADS}),
    "bert": ("FlaxBertForMaskedLM", "BertConfig", _BERT),
    "roberta": ("FlaxRobertaForMaskedLM", "RobertaConfig", _BERT),
    "xlm_roberta": ("FlaxXLMRobertaForMaskedLM", "XLMRobertaConfig", _BERT),
    "roberta_prelayernorm": (
        "FlaxRobertaPreLayerNormForMaskedLM",
        "RobertaPreLayerNormConfig",
        _BERT,
    ),
    "electra": ("FlaxElectraForMaskedLM", "ElectraConfig", _BERT | {"embedding_size": 64}),
    "albert": ("FlaxAlbertForMaskedLM", "AlbertConfig", _BERT | {"embedding_size": 64}),
    "distilbert": (
        "FlaxDistilBertForMaskedLM",
        "DistilBertConfig",
        _BERT | {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER},
    ),
    "roformer": ("FlaxRoFormerForMaskedLM", "RoFormerConfig", _BERT | {"embedding_size": HIDDEN}),
    "big_bird": (
        "FlaxBigBirdForMaskedLM",
        "BigBirdConfig",
        _BERT | {"attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
    ),
}
_SEQUENCES: dict[str, tuple[str, str, dict]] = {
    "bart": ("FlaxBartForConditionalGeneration", "BartConfig", _BART),
    "mbart": ("FlaxMBartForConditionalGeneration", "MBartConfig", _BART),
    "pegasus": ("FlaxPegasusForConditionalGeneration", "PegasusConfig", _BART),
    "marian": ("FlaxMarianMTModel", "MarianConfig", _BART),
    "blenderbot": ("FlaxBlenderbotForConditionalGeneration", "BlenderbotConfig", _BART),
    "blenderbot_small": (
        "FlaxBlenderbotSmallForConditionalGeneration",
        "BlenderbotSmallConfig",
        _BART,
    ),
    "t5": ("FlaxT5ForConditionalGeneration", "T5Config", _T5),
    "mt5": ("FlaxMT5ForConditionalGeneration", "MT5Config", _T5 | {"tie_word_embeddings": False}),
    "long_t5": (
        "FlaxLongT5ForConditionalGeneration",
        "LongT5Config",
        _T5 | {"local_radius": 15, "encoder_attention_type": "transient-global"},
    ),
}
_IMAGES: dict[str, tuple[str, str, dict]] = {
    "vit": ("FlaxViTForImageClassification", "ViTConfig", _VIT),
    "beit": (
        "FlaxBeitForImageClassification",
        "BeitConfig",
        _VIT
        | {"vocab_size": 64}
        | {"use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    ),
    "dinov2": (
        "FlaxDinov2ForImageClassification",
        "Dinov2Config",
        _VIT | {"layerscale_value": 1.0, "mlp_ratio": 4},
    ),
    "resnet": ("FlaxResNetForImageClassification", "ResNetConfig", _CONV),
    "regnet": ("FlaxRegNetForImageClassification", "RegNetConfig", _CONV | {"groups_width": 16}),
}


def _models(kind: Callable[..., Case], table: dict[str, tuple[str, str, dict]]) -> list[Model]:
    return [_model(name, row[0], functools.partial(kind, *row)) for name, row in table.items()]


def _model(name: str, class_name: str, make: Callable[[Any], Case]) -> Model:
    return Model(f"transformers.{name}", f"transformers {class_name}", ("transformers",), make)


MODELS = [
    *_models(language_model, _LANGUAGE),
    *_models(sequence_to_sequence, _SEQUENCES),
    *_models(image_classifier, _IMAGES),
    _model("gpt2_small", "FlaxGPT2LMHeadModel", gpt2_small)._replace(large=True),
    _model("clip", "FlaxCLIPModel", clip),
    _model("wav2vec2", "FlaxWav2Vec2ForCTC", speech_encoder),
    _model("whisper", "FlaxWhisperForConditionalGeneration", whisper),
]
