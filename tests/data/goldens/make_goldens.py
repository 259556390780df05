#!/usr/bin/env python3
"""Compute the golden files of tests/goldens/ with PyTorch on a CUDA device.

    python make_goldens.py [OUT] [--device cuda]

Needs torch and numpy. Writes to OUT (this folder):
    attention.safetensors  absorbed attention over a latent cache, `CASES`: `NAME.output [tokens, heads, r]` f32 and
                           `NAME.lse [tokens, heads]` f32 (natural logarithm), by float64 arithmetic on values that
                           the format holds exactly (fp8: as torch.float8_e4m3fn rounds them);
                           `NAME.native [tokens, heads, r]`, by scaled_dot_product_attention in the format itself
    mla_layer.safetensors  one layer with the attention of DeepSeek-V2-Lite: `exact [tokens, hidden]` f32, the hidden
                           states behind it and the final norm; `f16` and `fp8`, the same where the latent and the
                           rope key pass through such records
    moe_layer.safetensors  one mixture of experts of DeepSeek-V2-Lite: `logits [tokens, 64]`, `routed` and `output
                           [tokens, hidden]` f32, `experts [tokens, 6]` i32, `weights [tokens, 6]` f32
The layers are float64 arithmetic, too. A line for each tensor says what was made; all faults are printed, and a file
with a fault is not written. The files name the versions and the GPU. Inputs and weights come from an integer hash that
tests/goldens/ has, too.
"""
import argparse, json, math, platform, struct, sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

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


# ---- checks

FAULTS = []


def fault(text):
    print(f"FAULT: {text}")
    FAULTS.append(text)


def described(values):
    """In words, what a fault or a line of the report needs to know of a tensor."""
    values = values.double()
    finite = values[torch.isfinite(values)]
    text = f"{list(values.shape)}, {finite.min():.4g} to {finite.max():.4g}" if len(finite) else "nothing finite"
    nan, infinite = int(values.isnan().sum()), int(values.isinf().sum())
    return text + (f", {nan} NaN and {infinite} infinite of {values.numel()}" if nan + infinite else "")


def nmse(found, expected):
    """Sum of squared differences over the sum of squares; NaN where one is not finite."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).square().sum() / expected.square().sum())


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
    for part in latent.float().split(128, dim=-1):
        largest = part.abs().amax(dim=-1, keepdim=True)
        exponent = torch.ceil(torch.log2(largest / 448.0)).clamp_min(-64.0).int().cpu().numpy()
        scale = torch.from_numpy(np.ldexp(np.float32(1.0), exponent)).to(part.device)  # exp2 may round
        scale = torch.where(largest > 448.0 * scale, 2.0 * scale, scale)  # log2 may round
        scale = torch.where(largest <= 224.0 * scale, 0.5 * scale, scale)
        parts.append((part / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.cat(parts, dim=-1).to(latent.dtype)


def exact(q, records, r, mask):
    """Attention by sums in float64, a token at a time, without a library for matrices."""
    records, outputs, lse = records.double(), [], []
    for query, seen in zip(q.double(), mask):
        scores = (query[:, None, :] * records[seen][None]).sum(-1) * SCALE
        weights = torch.softmax(scores, dim=-1)
        outputs.append((weights[:, :, None] * records[seen][None, :, :r]).sum(1))
        lse.append(torch.logsumexp(scores, dim=-1))
    return torch.stack(outputs).float(), torch.stack(lse).float()


def by_matmul(q, records, r, mask):
    """The same by float32 matrix products: the output, and the NaN among the scores and the weights. Only compared."""
    scores = (torch.einsum("thd,kd->thk", q, records) * SCALE).masked_fill(~mask[:, None, :], -math.inf)
    weights = torch.softmax(scores, dim=-1)
    nan = f"{int(scores.isnan().sum())} and {int(weights.isnan().sum())}"
    return torch.einsum("thk,kr->thr", weights, records[:, :r]).cpu(), nan


def native_attention(name, q, records, r, mask, expected):
    """By scaled_dot_product_attention: the backend that PyTorch picks, or its plain one where that fails."""
    key = records[None, None].expand(1, q.shape[1], *records.shape)
    query = q.transpose(0, 1)[None]
    limit = 1e-4 if q.dtype == torch.bfloat16 else 2e-6
    for which, backend in (("the backend picked", nullcontext()), ("the plain one", sdpa_kernel(SDPBackend.MATH))):
        with backend:
            output = torch.nn.functional.scaled_dot_product_attention(
                query, key, key[..., :r], attn_mask=mask[None, None], scale=SCALE
            )
        output = output[0].transpose(0, 1).cpu()
        off = nmse(output, expected)
        print(f"{name}.native by {which}: {described(output)}, NMSE {off:.2g}")
        if off <= limit:
            return output
    fault(f"{name}.native: NMSE {off:.2g}, over {limit:.2g}")
    return output


def attention(device):
    tensors, cases = {}, []
    for number, (name, dtype, heads, r, p, position, tokens, sharp) in enumerate(CASES):
        bits = {"bf16": 8, "f16": 11, "fp8": 11}[dtype]
        length = position + tokens
        q = torch.from_numpy(stream(2 * number + 100, (tokens, heads, r + p), bits)).to(device) * sharp
        records = torch.from_numpy(stream(2 * number + 101, (length, r + p), bits)).to(device)
        if dtype == "fp8":
            # Each token's and each block's values have a magnitude of their own, 2^0 to 2^-7.
            shifts = (np.arange(length)[:, None] + 3 * (np.arange(r) // 128)[None, :]) % 8
            records[:, :r] = fp8(records[:, :r] * torch.from_numpy(np.ldexp(np.float32(1.0), -shifts)).to(device))
        mask = torch.arange(length, device=device)[None, :] <= position + torch.arange(tokens, device=device)[:, None]
        for what, values in (("queries", q), ("records", records)):
            if not torch.isfinite(values).all():
                fault(f"{name}: {what}: {described(values)}")
        # On the CPU at once: what runs later on the device can not reach them.
        output, lse = (values.cpu() for values in exact(q, records, r, mask))
        tensors[f"{name}.output"], tensors[f"{name}.lse"] = output, lse
        other, nan = by_matmul(q, records, r, mask)
        other = f"float32 products {described(other)}, NMSE {nmse(other, output):.2g}, NaN before: {nan}"
        print(f"{name}: output {described(output)}; lse {described(lse)}; {other}")
        cases.append((name, q, records, r, mask, output))
    # Behind all the others, with copies of the inputs before them to see what it may write over.
    for name, q, records, r, mask, output in cases:
        native = {"bf16": torch.bfloat16, "f16": torch.float16}.get(name.split("-")[0])
        if native:
            before = q.cpu(), records.cpu()
            arguments = q.to(native), records.to(native), r, mask
            tensors[f"{name}.native"] = native_attention(name, *arguments, output)
            if not (torch.equal(q.cpu(), before[0]) and torch.equal(records.cpu(), before[1])):
                fault(f"{name}: scaled_dot_product_attention wrote over its inputs")
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
    values = torch.from_numpy(stream(number, shape, 8) * np.float32(2.0**exponent))
    # Float64, but for the experts: a token needs 6 of them.
    return values.to(device) if name.startswith("experts.") else values.to(device).double()


def norm(name, x):
    number, length = NORMS[name]
    weight = 1.0 + torch.from_numpy(stream(number, (length,), 8)).to(x.device).double() / 4.0
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
    cos, sin = (torch.from_numpy(f(angle)).to(device) for f in (np.cos, np.sin))
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
    f16 = lambda x: x.float().half().double()
    records = {"exact": (c_kv, k_pe), "f16": (f16(c_kv), f16(k_pe)), "fp8": (fp8(c_kv), f16(k_pe))}
    return {name: behind(device, hidden, q_nope, q_pe, *record).float() for name, record in records.items()}


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
            expert = gate[e].double(), up[e].double(), down[e].double()
            routed[token] += weight * gated(x[token : token + 1], *expert)[0]
    shared = gated(x, of("shared.gate_proj"), of("shared.up_proj"), of("shared.down_proj"))
    found = {"logits": logits, "weights": chosen, "routed": routed, "output": routed + shared}
    return {"experts": experts.int()} | {name: values.float() for name, values in found.items()}


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
        before = len(FAULTS)
        try:
            tensors = make(device)
        except RuntimeError as error:
            tensors = {}
            fault(f"{name}: {error}")
        for tensor, values in tensors.items():
            if make is not attention:
                print(f"{tensor}: {described(values)}")
            if not torch.isfinite(values).all():
                fault(f"{tensor}: {described(values)}")
        if len(FAULTS) == before:
            save(args.out / f"{name}.safetensors", tensors, metadata)
        else:
            print(f"{name}.safetensors is not written")
    print(f"{len(FAULTS)} faults", *FAULTS, sep="\n")
    return min(len(FAULTS), 1)


if __name__ == "__main__":
    sys.exit(main())
