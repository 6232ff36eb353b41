"""A checkpoint with plain weights as GGUF, for llama.cpp: DeepSeek-V3's layout and DeepSeek-V4's.

``python to_gguf.py CHECKPOINT OUT.gguf f32|bf16|q8_0|q4_0`` writes every matrix in that type, as ``llama-quantize
--pure`` does; vectors, routers and what llama.cpp computes in float32 stay float32. There is no vocabulary: tokens are
numbers. Experts are stacked, and ``kv_b_proj`` is split into what absorbs queries and what makes values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape, quantize

from v4export.checkpoint.audit import Weight, audit
from v4export.checkpoint.index import Checkpoint
from v4export.config import ModelConfig
from v4export.errors import NotSupported

TYPES = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("f32", "bf16", "q8_0", "q4_0")}
_F32, _I32 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.I32
#: llama.cpp's numbers for what makes weights of a router's scores.
_GATING = {"sigmoid": 2, "sqrtsoftplus": 4}

#: Names in GGUF -> in the checkpoint, outside of layers and in them. A role in brackets is not a matrix to llama.cpp.
_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "output_hc_fn.weight": "model.hc_head.hc_fn",
    "output_hc_base.weight": "model.hc_head.hc_base",
    "output_hc_scale.weight": "model.hc_head.hc_scale",
}
_INSIDE = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q_a.weight": "self_attn.q_a_proj.weight",
    "attn_q_b.weight": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa.weight": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "attn_kv.weight": "self_attn.kv_proj.weight",
    "attn_sinks.weight": "self_attn.sinks",
    "attn_output_a.weight": "self_attn.o_a_proj.weight",
    "attn_output_b.weight": "self_attn.o_b_proj.weight",
    "attn_compressor_kv.weight": "self_attn.compressor.kv_proj.weight",
    "attn_compressor_gate.weight": "self_attn.compressor.gate_proj.weight",
    "attn_compressor_ape.weight": "self_attn.compressor.position_bias",
    "attn_compressor_norm.weight": "self_attn.compressor.kv_norm.weight",
    "indexer.attn_q_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "indexer.proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "indexer_compressor_kv.weight": "self_attn.compressor.indexer.kv_proj.weight",
    "indexer_compressor_gate.weight": "self_attn.compressor.indexer.gate_proj.weight",
    "indexer_compressor_ape.weight": "self_attn.compressor.indexer.position_bias",
    "indexer_compressor_norm.weight": "self_attn.compressor.indexer.kv_norm.weight",
    **{f"hc_{part}_{name}.weight": f"{part}_hc.{name}" for part in ("attn", "ffn") for name in ("fn", "base", "scale")},
    "ffn_norm.weight": "post_attention_layernorm.weight",
    **{f"ffn_{part}.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp.weight": f"mlp.shared_experts.{part}_proj.weight" for part in ("gate", "up", "down")},
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
    "ffn_gate_tid2eid.weight": "mlp.gate.tid2eid",
}
#: The norms of latents, which the two layouts name in their own way.
_NORMS = {
    "attn_q_a_norm.weight": ("self_attn.q_a_layernorm.weight", "self_attn.q_a_norm.weight"),
    "attn_kv_a_norm.weight": ("self_attn.kv_a_layernorm.weight", "self_attn.kv_norm.weight"),
}
#: Roles of what is a matrix to llama.cpp, and may be quantised.
_MATRICES = ("embedding", "head", "linear", "expert")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a GGUF file: slices of its first axis follow each other in ``weights``, or it is made of one.

    Attributes:
        name: in the file.
        shape: NumPy's order.
        kind: type in the file.
        weights: of the checkpoint.
        part: of ``kv_b_proj``: queries' or values'.
    """

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    weights: tuple[Weight, ...]
    part: slice | None = None

    def pieces(self, config: ModelConfig) -> Iterator[np.ndarray]:
        """Its bytes in order, an expert at a time."""
        for weight in self.weights:
            values = weight.data.numpy()
            if self.kind == _I32:
                yield values.astype(np.int32)
                continue
            values = values.astype(np.float32)
            if self.part is not None:
                heads = values.reshape(config.num_heads, -1, config.kv_lora_rank)[:, self.part]
                # Queries are multiplied with the transposed half, latents with the other as it is.
                values = heads.swapaxes(1, 2) if self.part.start == 0 else heads
            yield quantize(np.ascontiguousarray(values), self.kind)


def tensors(config: ModelConfig, weights: Mapping[str, Weight], kind: gguf.GGMLQuantizationType) -> list[Tensor]:
    """All tensors of the file.

    Raises:
        NotSupported: a weight has no place in it.
    """
    left, found = dict(weights), []

    def add(name: str, own: tuple[Weight, ...], shape: tuple[int, ...], part: slice | None = None) -> None:
        for one in own:
            left.pop(one.name, None)
        plain = _I32 if own[0].role == "hash_table" else _F32
        found.append(Tensor(name, shape, kind if own[0].role in _MATRICES else plain, own, part))

    def copied(name: str, stored: str) -> None:
        if stored in weights:
            add(name, (weights[stored],), weights[stored].shape)

    for name, stored in _OUTSIDE.items():
        copied(name, stored)
    for layer in range(config.num_layers):
        ours, theirs = f"model.layers.{layer}", f"blk.{layer}"
        for name, stored in _INSIDE.items():
            copied(f"{theirs}.{name}", f"{ours}.{stored}")
        for name, spellings in _NORMS.items():
            for stored in spellings:
                copied(f"{theirs}.{name}", f"{ours}.{stored}")
        if kv_b := weights.get(f"{ours}.self_attn.kv_b_proj.weight"):
            heads, nope, value = config.num_heads, config.qk_nope_head_dim, config.v_head_dim
            latent = config.kv_lora_rank
            add(f"{theirs}.attn_k_b.weight", (kv_b,), (heads, latent, nope), slice(0, nope))
            add(f"{theirs}.attn_v_b.weight", (kv_b,), (heads, value, latent), slice(nope, nope + value))
        for part in ("gate", "up", "down") if config.is_moe(layer) else ():
            names = [f"{ours}.mlp.experts.{e}.{part}_proj.weight" for e in range(config.num_experts)]
            own = tuple(weights[name] for name in names)
            add(f"{theirs}.ffn_{part}_exps.weight", own, (len(own), *own[0].shape))
    if left:
        raise NotSupported("the converter has no place for some weights", ", ".join([*left][:5]))
    return found


def keys(config: ModelConfig) -> dict[str, Any]:
    """What llama.cpp is told of a model, behind the architecture's name."""
    c = config
    shared = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_layers,
        "feed_forward_length": c.intermediate_size or c.moe_intermediate_size,
        "vocab_size": c.vocab_size,
        "attention.head_count": c.num_heads,
        "attention.head_count_kv": 1,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "attention.q_lora_rank": c.q_lora_rank,
        "rope.dimension_count": c.qk_rope_head_dim,
        "rope.freq_base": float(c.rope_theta),
        "expert_count": c.num_experts,
        "expert_used_count": c.experts_per_token,
        "expert_shared_count": c.num_shared_experts,
        "expert_feed_forward_length": c.moe_intermediate_size,
        "expert_weights_scale": float(c.routed_scaling_factor),
        "expert_weights_norm": c.norm_topk_prob,
        "expert_gating_func": _GATING[c.scoring],
    }
    return shared | (_v3(c) if c.compressed is None else _v4(c))


def _v3(c: ModelConfig) -> dict[str, Any]:
    return {
        "leading_dense_block_count": c.num_layers - len(c.moe_layers),
        "expert_group_count": c.num_groups,
        "expert_group_used_count": c.topk_groups,
        "attention.kv_lora_rank": c.kv_lora_rank,
        "attention.key_length": c.kv_lora_rank + c.qk_rope_head_dim,
        "attention.value_length": c.kv_lora_rank,
        "attention.key_length_mla": c.qk_nope_head_dim + c.qk_rope_head_dim,
        "attention.value_length_mla": c.v_head_dim,
    }


def _v4(c: ModelConfig) -> dict[str, Any]:
    assert c.compressed and c.indexer and c.hyper
    return {
        "attention.key_length": c.compressed.head_dim,
        "attention.value_length": c.compressed.head_dim,
        "attention.sliding_window": c.compressed.window,
        "attention.output_group_count": c.compressed.o_groups,
        "attention.output_lora_rank": c.compressed.o_lora_rank,
        "attention.compress_rope_freq_base": float(c.compressed.rope_theta),
        "attention.compress_ratios": list(c.compressed.ratios),
        "attention.indexer.head_count": c.indexer.num_heads,
        "attention.indexer.key_length": c.indexer.head_dim,
        "attention.indexer.top_k": c.indexer.top_k,
        "hyper_connection.count": c.hyper.streams,
        "hyper_connection.sinkhorn_iterations": c.hyper.sinkhorn_iterations,
        "hyper_connection.epsilon": float(c.hyper.eps),
        "hash_layer_count": len(c.hash_layers),
        "swiglu_clamp_exp": [float(c.swiglu_limit)] * c.num_layers,
    }


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name of a model's layout.

    Raises:
        NotSupported: the converter does not know it.
    """
    c = config.compressed
    if config.yarn or config.fp8 or config.engram or (c and c.shared) or (config.indexer and not c):
        raise NotSupported("the converter knows V3's and V4's layout, in plain weights, without YaRN", config.family)
    return "deepseek4" if c else "deepseek2"


def convert(checkpoint: Path, out: Path, kind: str) -> Path:
    """Write a checkpoint as GGUF; memory is that of one expert."""
    opened = Checkpoint.open(checkpoint)
    config, arch = opened.config, architecture(opened.config)
    writer = gguf.GGUFWriter(out, arch)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, list: writer.add_array}
    for key, value in keys(config).items():
        add[type(value)](f"{arch}.{key}", value)
    made = tensors(config, audit(opened, scan_values=False).weights, TYPES[kind])
    for tensor in made:
        shape = tensor.shape
        if tensor.kind not in (_F32, _I32):
            shape = quant_shape_to_byte_shape(shape, tensor.kind)
        width = 4 if tensor.kind in (_F32, _I32) else 1
        dtype = np.dtype(np.int32 if tensor.kind == _I32 else np.float32 if width == 4 else np.uint8)
        writer.add_tensor_info(tensor.name, shape, dtype, int(np.prod(shape)) * width, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in made:
        _write(writer, tensor, config)
    writer.close()
    return out


def _write(writer: gguf.GGUFWriter, tensor: Tensor, config: ModelConfig) -> None:
    """One tensor; experts that are stacked are written one by one, which the writer itself does not offer."""
    stream = writer.fout[0]
    writer.write_padding(stream, stream.tell())
    for piece in tensor.pieces(config):
        piece.tofile(stream)
    writer.write_padding(stream, stream.tell())


@click.command(help=__doc__)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("kind", type=click.Choice([*TYPES]))
def main(checkpoint: Path, out: Path, kind: str) -> None:
    convert(checkpoint, out, kind)


if __name__ == "__main__":
    main()
