#!/usr/bin/env python3
"""Writes a checkpoint with random bf16 weights at a published model's real dimensions, in Hugging Face layout,
for benchmarks: its text is noise, its time and memory are those of the model.

    benches/random_checkpoint.py deepseek-v2-lite DIR [--layers N]

Takes PyTorch with CUDA where it is installed (half a minute for 31 GB), else NumPy. The numbers are normal with
standard deviation 0.02, norms 1, drawn from one block of 16 Mi numbers, each tensor from another place of it.
"""

import argparse
import json
import math
import os
import struct
import sys

# From deepseek-ai/DeepSeek-V2-Lite's config.json.
DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_shared_experts": 2,
    "n_routed_experts": 64,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 6,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
    },
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}

MODELS = {"deepseek-v2-lite": DEEPSEEK_V2_LITE}
SHARD = 5 << 30  # bytes of a file, about
BLOCK = 1 << 24  # random numbers that all tensors are cut from


def tensors(c):
    """Name and shape of each tensor."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    nope, rope, value, rank = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["kv_lora_rank"]
    yield "model.embed_tokens.weight", [c["vocab_size"], hidden]

    def gated(name, width):
        yield f"{name}.gate_proj.weight", [width, hidden]
        yield f"{name}.up_proj.weight", [width, hidden]
        yield f"{name}.down_proj.weight", [hidden, width]

    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", [hidden]
        yield f"{layer}.self_attn.q_proj.weight", [heads * (nope + rope), hidden]
        yield f"{layer}.self_attn.kv_a_proj_with_mqa.weight", [rank + rope, hidden]
        yield f"{layer}.self_attn.kv_a_layernorm.weight", [rank]
        yield f"{layer}.self_attn.kv_b_proj.weight", [heads * (nope + value), rank]
        yield f"{layer}.self_attn.o_proj.weight", [hidden, heads * value]
        yield f"{layer}.post_attention_layernorm.weight", [hidden]
        if i < c["first_k_dense_replace"]:
            yield from gated(f"{layer}.mlp", c["intermediate_size"])
        else:
            width = c["moe_intermediate_size"]
            yield f"{layer}.mlp.gate.weight", [c["n_routed_experts"], hidden]
            for e in range(c["n_routed_experts"]):
                yield from gated(f"{layer}.mlp.experts.{e}", width)
            yield from gated(f"{layer}.mlp.shared_experts", c["n_shared_experts"] * width)
    yield "model.norm.weight", [hidden]
    yield "lm_head.weight", [c["vocab_size"], hidden]


def random_block():
    """BLOCK bf16 numbers as bytes."""
    try:
        import torch

        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        numbers = torch.randn(BLOCK, device=device).mul_(0.02).to(torch.bfloat16)
        return memoryview(numbers.view(torch.int16).cpu().numpy()).cast("B")
    except ImportError:
        import numpy

        numbers = (numpy.random.default_rng(0).standard_normal(BLOCK, numpy.float32) * 0.02).view(numpy.uint32)
        return memoryview((numbers >> 16).astype(numpy.uint16)).cast("B")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("folder")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has")
    args = parser.parse_args()
    config = dict(MODELS[args.model])
    if args.layers:
        config["num_hidden_layers"] = args.layers
    os.makedirs(args.folder, exist_ok=True)
    with open(os.path.join(args.folder, "config.json"), "w") as file:
        json.dump(config, file, indent=1)

    shards, size = [[]], 0
    for name, shape in tensors(config):
        bytes_ = 2 * math.prod(shape)
        if size + bytes_ > SHARD and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((name, shape, bytes_))
        size += bytes_

    block = random_block()
    place, index, total = 0, {}, 0
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header, at = {}, 0
        for name, shape, bytes_ in shard:
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + bytes_]}
            index[name] = file_name
            at += bytes_
        total += at
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(os.path.join(args.folder, file_name), "wb", buffering=0) as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name, shape, bytes_ in shard:
                if len(shape) == 1:
                    file.write(b"\x80\x3f" * shape[0])  # 1.0
                    continue
                place = (place + 2 * 1000003) % len(block)
                while bytes_ > 0:
                    written = file.write(block[place : place + min(bytes_, len(block) - place)])
                    bytes_ -= written
                    place = (place + written) % len(block)
    with open(os.path.join(args.folder, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {"total_size": total}, "weight_map": index}, file)
    print(f"{args.folder}: {total / 1e9:.1f} GB in {len(shards)} files", file=sys.stderr)


if __name__ == "__main__":
    main()
