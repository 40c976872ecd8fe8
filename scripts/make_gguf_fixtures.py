"""Makes tests/fixtures/gguf: tiny GGUF files of every tensor type that infold reads, and their goldens.

Called by make_fixtures.py, which also holds the versions. The goldens are what transformers computes in f32 from
the dequantised weights; an engine that quantises activations too stays within a tolerance of them, not 1e-4.
The `gguf` package quantises the legacy types only, so the K-quant blocks are packed here (layouts of
ggml-common.h) and read back with the package's own dequantisation.
"""

import json
import math

import gguf
import numpy as np
import torch

import make_fixtures as fixtures

LEGACY = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1")
K_QUANTS = ("Q4_K", "Q5_K", "Q6_K")
# Logits of a few prompts are enough: the files differ in their weights' form only.
PROMPT_LENGTHS = (1, 17, 100)


def make_all(tokenizer):
    """Writes every GGUF file and golden."""
    llama = dict(fixtures.MODELS["tiny-llama"]["config"], rope_scaling=None)
    llama_state = fixtures.random_state(fixtures.build("Llama", llama), fixtures.MODELS["tiny-llama"]["seed"])
    for kind in LEGACY:
        make("tiny-llama-" + kind, "Llama", llama, llama_state, lambda name, kind=kind: kind, tokenizer)
    # The float types side by side, and the Llama 3 scaling, which GGUF holds as a tensor of factors.
    scaled = fixtures.MODELS["tiny-llama"]["config"]
    make("tiny-llama-float", "Llama", scaled, llama_state, float_type, tokenizer)
    qwen2 = fixtures.MODELS["tiny-qwen2"]["config"]
    qwen2_state = fixtures.random_state(fixtures.build("Qwen2", qwen2), fixtures.MODELS["tiny-qwen2"]["seed"])
    make("tiny-qwen2-Q8_0", "Qwen2", qwen2, qwen2_state, lambda name: "Q8_0", tokenizer)
    qwen3 = dict(fixtures.MODELS["tiny-qwen3"]["config"], num_hidden_layers=1)
    qwen3_state = fixtures.random_state(fixtures.build("Qwen3", qwen3), fixtures.MODELS["tiny-qwen3"]["seed"])
    make("tiny-qwen3-Q4_0", "Qwen3", qwen3, qwen3_state, lambda name: "Q4_0", tokenizer)
    # A K-quant super block is 256 weights, so every linear needs that many inputs.
    wide = fixtures.base_config(
        hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_key_value_heads=2, attention_bias=False,
    )
    wide_state = fixtures.random_state(fixtures.build("Llama", wide), 15)
    for kind in K_QUANTS:
        make("tiny-llama-" + kind, "Llama", wide, wide_state, lambda name, kind=kind: kind, tokenizer)


def float_type(name):
    """Returns the type of a tensor of the float file: attention F16, MLP BF16, embeddings F32."""
    return "F16" if "attn" in name else "BF16" if "ffn" in name else "F32"


def make(name, architecture, config, state, type_of, tokenizer):
    """Writes gguf/<name>.gguf with each matrix stored as `type_of(tensor name)`, and golden/gguf-<name>.json."""
    writer = gguf.GGUFWriter(None, architecture.lower())
    write_metadata(writer, name, config, tokenizer)
    if (config.get("rope_scaling") or {}).get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    dequantised = {}
    for hf_name, tensor in state.items():
        stem, suffix = hf_name.rsplit(".", 1)
        gguf_name = f"{names.get_name(stem)}.{suffix}"
        # GGUF's Llama rotates neighbouring pairs, Hugging Face's the two halves of a head.
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        heads = heads.get(gguf_name.split(".")[-2]) if architecture == "Llama" else None
        values = tensor.numpy().astype(np.float32)
        values = permute(values, heads) if heads else values
        if values.ndim == 1:
            writer.add_tensor(gguf_name, values)
            rounded = values
        else:
            kind = gguf.GGMLQuantizationType[type_of(gguf_name)]
            data = quantise(values, kind)
            writer.add_tensor(gguf_name, data, raw_dtype=kind)
            rounded = gguf.dequantize(data, kind).astype(np.float32).reshape(values.shape)
        dequantised[hf_name] = torch.from_numpy(np.ascontiguousarray(unpermute(rounded, heads) if heads else rounded))
    writer.write_header_to_file(fixtures.FIXTURES / "gguf" / f"{name}.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = fixtures.load_state(fixtures.build(architecture, config), dequantised)
    fixtures.write_golden(f"gguf-{name}", f"gguf/{name}.gguf", model, prompt_lengths=PROMPT_LENGTHS)


def write_metadata(writer, name, config, tokenizer):
    """Writes the hyperparameters and the tokenizer as llama.cpp's converter names them."""
    head_dim = config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    writer.add_name(name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    ids = sorted((id, token) for token, id in tokenizer.get_vocab().items())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([token for _, token in ids])
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([control if token in fixtures.SPECIALS else normal for _, token in ids])
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(fixtures.CHATML_TEMPLATE)


def llama3_factors(config):
    """Returns by how much each rotary frequency is divided, `[head_dim / 2]`, f32."""
    scaling = config["rope_scaling"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    base = config["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi * base
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # 1 / factor below `low` turns, 1 above `high`, linear between.
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - kept) / scaling["factor"] + kept)).astype(np.float32)


def permute(weights, num_heads):
    """Moves each head's rows from two halves to neighbouring pairs."""
    rows, columns = weights.shape
    return weights.reshape(num_heads, 2, rows // num_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def unpermute(weights, num_heads):
    """Undoes `permute`."""
    rows, columns = weights.shape
    return weights.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def quantise(values, kind):
    """Returns the stored bytes (or floats) of a matrix."""
    packers = {"Q4_K": pack_q4_k, "Q5_K": pack_q5_k, "Q6_K": pack_q6_k}
    if kind.name not in packers:
        return gguf.quantize(values, kind)
    rows, columns = values.shape
    blocks = packers[kind.name](values.reshape(-1, 256))
    return blocks.reshape(rows, columns // 256 * blocks.shape[1])


def half_bytes(values):
    """Returns f16 values `[blocks]` as bytes `[blocks, 2]`."""
    return values.astype(np.float16).reshape(-1, 1).view(np.uint8)


def min_max_codes(blocks, largest):
    """Quantises `[blocks, 256]` to `d * scale * code - dmin * minimum` in 8 groups of 32, as Q4_K and Q5_K do.

    Returns codes `[blocks, 8, 32]` in `0..=largest`, the 12 packed scale bytes, and the bytes of d and dmin.
    """
    groups = blocks.reshape(-1, 8, 32)
    minimum = np.maximum(-groups.min(axis=2), 0.0)
    step = (np.maximum(groups.max(axis=2), 0.0) + minimum) / largest
    d = (step.max(axis=1) / 63).astype(np.float16).astype(np.float32)
    dmin = (minimum.max(axis=1) / 63).astype(np.float16).astype(np.float32)
    scales = np.clip(np.rint(step / d[:, None]), 1, 63).astype(np.uint8)
    minimums = np.clip(np.rint(minimum / dmin[:, None]), 0, 63).astype(np.uint8)
    offset = (dmin[:, None] * minimums)[:, :, None]
    codes = np.clip(np.rint((groups + offset) / (d[:, None] * scales)[:, :, None]), 0, largest).astype(np.uint8)
    packed = np.zeros((len(groups), 12), np.uint8)
    packed[:, 0:4] = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    packed[:, 4:8] = minimums[:, :4] | (minimums[:, 4:] >> 4 << 6)
    packed[:, 8:12] = (scales[:, 4:] & 15) | ((minimums[:, 4:] & 15) << 4)
    return codes, packed, half_bytes(d), half_bytes(dmin)


def low_nibbles(codes):
    """Packs `[blocks, 8, 32]` four-bit codes: groups 2i and 2i + 1 share 32 bytes."""
    pairs = (codes & 15).reshape(-1, 4, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).reshape(-1, 128)


def pack_q4_k(blocks):
    """Returns Q4_K blocks of 144 bytes: d, dmin, scales, codes."""
    codes, scales, d, dmin = min_max_codes(blocks, 15)
    return np.concatenate([d, dmin, scales, low_nibbles(codes)], axis=1)


def pack_q5_k(blocks):
    """Returns Q5_K blocks of 176 bytes: d, dmin, scales, fifth bits, low nibbles."""
    codes, scales, d, dmin = min_max_codes(blocks, 31)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]
    high = np.bitwise_or.reduce((codes >> 4) << shifts, axis=1)
    return np.concatenate([d, dmin, scales, high, low_nibbles(codes)], axis=1)


def pack_q6_k(blocks):
    """Returns Q6_K blocks of 210 bytes: low nibbles, high bits, 16 signed scales, d."""
    groups = blocks.reshape(-1, 16, 16)
    step = np.abs(groups).max(axis=2) / 31
    d = (step.max(axis=1) / 127).astype(np.float16).astype(np.float32)
    scales = np.clip(np.rint(step / d[:, None]), 1, 127).astype(np.int8)
    codes = np.clip(np.rint(groups / (d[:, None] * scales)[:, :, None]), -32, 31).astype(np.int8) + 32
    # Two halves of 128 weights; in each, four runs of 32.
    codes = codes.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (codes[:, :, :2] & 15) | ((codes[:, :, 2:] & 15) << 4)
    shifts = (np.arange(4, dtype=np.uint8) * 2)[None, None, :, None]
    high = np.bitwise_or.reduce((codes >> 4) << shifts, axis=2)
    parts = [low.reshape(-1, 128), high.reshape(-1, 64), scales.view(np.uint8), half_bytes(d)]
    return np.concatenate(parts, axis=1)
