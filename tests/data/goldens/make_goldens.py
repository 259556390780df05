#!/usr/bin/env python3
"""Compute the golden files of tests/goldens.rs with PyTorch on a CUDA device.

    python make_goldens.py [OUT] [--device cuda]

Needs torch and numpy. Writes to OUT (this folder):
    attention.safetensors  absorbed attention over a latent cache, `CASES`: `NAME.output [tokens, heads, r]` f32 and
                           `NAME.lse [tokens, heads]` f32 (natural logarithm), by float32 arithmetic on values that
                           the format holds exactly (fp8: as torch.float8_e4m3fn rounds them);
                           `NAME.native [tokens, heads, r]`, by scaled_dot_product_attention in the format itself
    mla_layer.safetensors  one layer with the attention of DeepSeek-V2-Lite: `exact [tokens, hidden]` f32, the hidden
                           states behind it and the final norm; `f16` and `fp8`, the same where the latent and the
                           rope key pass through such records
    moe_layer.safetensors  one mixture of experts of DeepSeek-V2-Lite: `logits [tokens, 64]`, `routed` and `output
                           [tokens, hidden]` f32, `experts [tokens, 6]` i32, `weights [tokens, 6]` f32
The files name the versions and the GPU. Inputs and weights come from an integer hash that tests/goldens.rs has, too.
"""
import argparse, json, math, platform, struct, sys
from pathlib import Path

import numpy as np
import torch

# ---- inputs: value i of a stream, one integer hash away (the constants are Chris Wellons' lowbias32)


def mixed(x):
    """The hash of u32 values."""
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def stream(number, shape, bits):
    """Uniform values in [-1, 1), multiples of 2^(1 - bits): bf16 and f16 hold those of 8 bits, f16 those of 11."""
    count = math.prod(shape)
    assert count < 2**32
    seed = mixed(np.array([number], dtype=np.uint32))[0]
    top = mixed(np.arange(count, dtype=np.uint32) ^ seed) >> np.uint32(32 - bits)
    return ((top.astype(np.float32) - np.float32(2 ** (bits - 1))) / np.float32(2 ** (bits - 1))).reshape(shape)


# ---- files


def save(path, tensors, metadata):
    """A safetensors file: length of the header, header, bytes."""
    names = {"torch.float32": "F32", "torch.bfloat16": "BF16", "torch.float16": "F16", "torch.int32": "I32"}
    header, parts, at = {"__metadata__": metadata}, [], 0
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous().cpu()
        parts.append(tensor.view(torch.uint8).numpy().tobytes())
        end = at + len(parts[-1])
        header[name] = {"dtype": names[str(tensor.dtype)], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))
    print(f"{path}: {path.stat().st_size} bytes, {len(tensors)} tensors")


# ---- attention over the latent cache

# Name, format, heads, r, p, position (tokens before), new tokens, factor of the queries.
CASES = [
    ("f16-first", "f16", 16, 512, 64, 0, 1, 1.0),
    ("f16-peaked", "f16", 16, 512, 64, 62, 1, 8.0),
    ("f16-heads", "f16", 128, 512, 64, 129, 1, 1.0),
    ("f16-two", "f16", 20, 512, 64, 998, 2, 1.0),
    ("f16-narrow", "f16", 40, 256, 32, 256, 1, 4.0),
    ("f16-no-rope", "f16", 12, 512, 0, 196, 4, 1.0),
    ("f16-small", "f16", 3, 48, 16, 1495, 5, 1.0),
    ("bf16-one", "bf16", 16, 512, 64, 699, 1, 1.0),
    ("bf16-heads", "bf16", 64, 512, 64, 128, 1, 4.0),
    ("bf16-three", "bf16", 32, 256, 64, 297, 3, 1.0),
    ("bf16-long", "bf16", 1, 512, 64, 4095, 1, 1.0),
    ("fp8-page", "fp8", 16, 512, 64, 64, 1, 1.0),
    ("fp8-long", "fp8", 16, 512, 64, 2047, 1, 4.0),
    ("fp8-heads", "fp8", 128, 512, 64, 63, 1, 1.0),
    ("fp8-eight", "fp8", 9, 512, 64, 313, 8, 1.0),
    ("fp8-small", "fp8", 3, 32, 8, 499, 1, 1.0),
]
SCALE = 1.0 / math.sqrt(128 + 64)


def fp8(latent):
    """What fp8 records keep: e4m3 codes of each 128 values over the least power of two that fits them."""
    parts = []
    for part in latent.split(128, dim=-1):
        largest = part.abs().amax(dim=-1, keepdim=True)
        scale = torch.exp2(torch.ceil(torch.log2(largest / 448.0))).clamp_min(2.0**-64)
        scale = torch.where(largest > 448.0 * scale, 2.0 * scale, scale)  # log2 may round
        scale = torch.where(largest <= 224.0 * scale, 0.5 * scale, scale)
        parts.append((part / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, dim=-1)


def attention(device):
    tensors = {}
    for number, (name, dtype, heads, r, p, position, tokens, sharp) in enumerate(CASES):
        bits = {"bf16": 8, "f16": 11, "fp8": 11}[dtype]
        length = position + tokens
        q = torch.from_numpy(stream(2 * number + 100, (tokens, heads, r + p), bits)).to(device) * sharp
        records = torch.from_numpy(stream(2 * number + 101, (length, r + p), bits)).to(device)
        if dtype == "fp8":
            # Each token's and each block's values have a magnitude of their own, 2^0 to 2^-7.
            shifts = (np.arange(length)[:, None] + 3 * (np.arange(r) // 128)[None, :]) % 8
            records[:, :r] = fp8(records[:, :r] * torch.from_numpy(0.5 ** shifts.astype(np.float32)).to(device))
        mask = torch.arange(length, device=device)[None, :] <= position + torch.arange(tokens, device=device)[:, None]
        scores = torch.einsum("thd,kd->thk", q, records) * SCALE
        scores = scores.masked_fill(~mask[:, None, :], -math.inf)
        tensors[f"{name}.output"] = torch.einsum("thk,kr->thr", torch.softmax(scores, dim=-1), records[:, :r])
        tensors[f"{name}.lse"] = torch.logsumexp(scores, dim=-1)
        native = {"bf16": torch.bfloat16, "f16": torch.float16}.get(dtype)
        if native:
            key = records.to(native)[None, None].expand(1, heads, length, r + p)
            query = q.to(native).transpose(0, 1)[None]
            output = torch.nn.functional.scaled_dot_product_attention(
                query, key, key[..., :r], attn_mask=mask[None, None], scale=SCALE
            )
            tensors[f"{name}.native"] = output[0].transpose(0, 1)
    return tensors


# ---- layers of DeepSeek-V2-Lite (its config.json; modeling_deepseek_v2.py of transformers is what they follow)

HIDDEN, HEADS, R, N, P, V = 2048, 16, 512, 128, 64, 128
EPS = 1e-6
EXPERTS, TOP_K, WIDTH, SHARED = 64, 6, 1408, 2816
TOKENS, MOE_TOKENS, VOCAB, NARROW = 12, 3, 64, 64
THETA, FACTOR, ORIGINAL, FAST, SLOW, MSCALE = 10000.0, 40.0, 4096.0, 32.0, 1.0, 0.707

# Streams of the weights, and the power of two that each is multiplied with. All are bf16 values.
WEIGHTS = {
    "embed_tokens": (1, (VOCAB, HIDDEN), 0),
    "q_proj": (2, (HEADS * (N + P), HIDDEN), -4),
    "kv_a_proj_with_mqa": (3, (R + P, HIDDEN), -4),
    "kv_b_proj": (4, (HEADS * (N + V), R), -4),
    "o_proj": (5, (HIDDEN, HEADS * V), -4),
    "gate_proj": (6, (NARROW, HIDDEN), -5),
    "up_proj": (7, (NARROW, HIDDEN), -5),
    "down_proj": (8, (HIDDEN, NARROW), -3),
    "x": (20, (MOE_TOKENS, HIDDEN), 0),
    "router": (21, (EXPERTS, HIDDEN), -5),
    "experts.gate_proj": (22, (EXPERTS * WIDTH, HIDDEN), -5),
    "experts.up_proj": (23, (EXPERTS * WIDTH, HIDDEN), -5),
    "experts.down_proj": (24, (EXPERTS * HIDDEN, WIDTH), -5),
    "shared.gate_proj": (25, (SHARED, HIDDEN), -5),
    "shared.up_proj": (26, (SHARED, HIDDEN), -5),
    "shared.down_proj": (27, (HIDDEN, SHARED), -5),
}
# Norms are 1 + value / 4.
NORMS = {
    "input_layernorm": (9, HIDDEN),
    "kv_a_layernorm": (10, R),
    "post_attention_layernorm": (11, HIDDEN),
    "norm": (12, HIDDEN),
}


def weights(name, device):
    number, shape, exponent = WEIGHTS[name]
    return torch.from_numpy(stream(number, shape, 8) * np.float32(2.0**exponent)).to(device)


def norm(name, x):
    number, length = NORMS[name]
    weight = 1.0 + torch.from_numpy(stream(number, (length,), 8)).to(x.device) / 4.0
    return x / torch.sqrt((x * x).mean(dim=-1, keepdim=True) + EPS) * weight


def yarn():
    """Radians a position of each pair (Peng et al. 2023), in f64."""
    inverse = THETA ** (-np.arange(0, P, 2) / P)
    pair = lambda turns: P * math.log(ORIGINAL / (turns * 2 * math.pi)) / (2 * math.log(THETA))
    low, high = max(math.floor(pair(FAST)), 0), min(math.ceil(pair(SLOW)), P - 1)
    ramp = np.clip((np.arange(P // 2) - low) / max(high - low, 0.001), 0, 1)
    return inverse * (ramp / FACTOR + 1 - ramp)


def turned(x, device):
    """The pairs (2 i, 2 i + 1) of [tokens, ..., p] turned to their token's position."""
    angle = np.arange(x.shape[0])[:, None] * yarn()[None, :]
    cos, sin = (torch.from_numpy(f(angle).astype(np.float32)).to(device) for f in (np.cos, np.sin))
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (P // 2,)
    cos, sin, a, b = cos.view(shape), sin.view(shape), x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def gated(x, gate, up, down):
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def mla_layer(device):
    """The tokens 0, 5, 10 ... of a vocabulary of 64 through one layer, materialised."""
    of = lambda name: weights(name, device)
    hidden = of("embed_tokens")[[(5 * i) % VOCAB for i in range(TOKENS)]]
    x = norm("input_layernorm", hidden)
    q = (x @ of("q_proj").T).view(TOKENS, HEADS, N + P)
    q_nope, q_pe = q.split([N, P], dim=-1)
    c_kv, k_pe = (x @ of("kv_a_proj_with_mqa").T).split([R, P], dim=-1)
    c_kv, k_pe, q_pe = norm("kv_a_layernorm", c_kv), turned(k_pe, device), turned(q_pe, device)
    rope = k_pe.half().float()
    records = {"exact": (c_kv, k_pe), "f16": (c_kv.half().float(), rope), "fp8": (fp8(c_kv), rope)}
    return {name: behind(device, hidden, q_nope, q_pe, *record) for name, record in records.items()}


def behind(device, hidden, q_nope, q_pe, c_kv, k_pe):
    """The hidden states behind attention over the records, the MLP and the final norm."""
    of = lambda name: weights(name, device)
    k_nope, value = (c_kv @ of("kv_b_proj").T).view(TOKENS, HEADS, N + V).split([N, V], dim=-1)
    mscale = 0.1 * MSCALE * math.log(FACTOR) + 1.0
    scores = torch.einsum("thn,khn->htk", q_nope, k_nope) + torch.einsum("thp,kp->htk", q_pe, k_pe)
    scores = scores * ((N + P) ** -0.5 * mscale * mscale)
    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS, device=device).triu(1).bool(), -math.inf)
    heads = torch.einsum("htk,khv->thv", torch.softmax(scores, dim=-1), value)
    hidden = hidden + heads.reshape(TOKENS, HEADS * V) @ of("o_proj").T
    x = norm("post_attention_layernorm", hidden)
    hidden = hidden + gated(x, of("gate_proj"), of("up_proj"), of("down_proj"))
    return norm("norm", hidden)


def moe_layer(device):
    """Softmax over 64 experts, the greatest 6 as they weigh, and the shared experts."""
    of = lambda name: weights(name, device)
    x = of("x")
    logits = x @ of("router").T
    chosen, experts = torch.topk(torch.softmax(logits, dim=-1), TOP_K, dim=-1)
    gate, up = of("experts.gate_proj").view(EXPERTS, WIDTH, HIDDEN), of("experts.up_proj").view(EXPERTS, WIDTH, HIDDEN)
    down = of("experts.down_proj").view(EXPERTS, HIDDEN, WIDTH)
    routed = torch.zeros_like(x)
    for token in range(MOE_TOKENS):
        for weight, e in zip(chosen[token], experts[token]):
            routed[token] += weight * gated(x[token : token + 1], gate[e], up[e], down[e])[0]
    shared = gated(x, of("shared.gate_proj"), of("shared.up_proj"), of("shared.down_proj"))
    return {"logits": logits, "experts": experts.int(), "weights": chosen, "routed": routed, "output": routed + shared}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent)
    parser.add_argument("--device", default="cuda", help="cpu only to try the script out")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    device = torch.device(args.device)
    gpu = torch.cuda.get_device_name(0) if device.type == "cuda" else "none: made on the CPU"
    metadata = {
        "gpu": gpu, "torch": torch.__version__, "cuda": str(torch.version.cuda), "numpy": np.__version__,
        "python": platform.python_version(), "script": "tests/data/goldens/make_goldens.py",
    }
    print(json.dumps(metadata))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, make in (("attention", attention), ("mla_layer", mla_layer), ("moe_layer", moe_layer)):
        tensors = make(device)
        for tensor, values in tensors.items():
            assert values.dtype == torch.int32 or torch.isfinite(values).all(), f"{tensor} is not finite"
        save(args.out / f"{name}.safetensors", tensors, metadata)


if __name__ == "__main__":
    sys.exit(main())
