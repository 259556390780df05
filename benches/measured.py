#!/usr/bin/env python3
"""Makes the README's tables from the records of a run: what `lamina bench kernel`, `attention-types` and `model`
print with `--json`, any number of files in one folder of benches/runs.

    benches/measured.py benches/runs/DIR            prints the tables
    benches/measured.py benches/runs/DIR README.md  puts them between the file's `measured` marks

Records of one shape by several kernels (`--variant`) become columns. The folder's name starts with the date.
"""

import json
import pathlib
import sys

MARKS = ("<!-- measured -->\n", "<!-- /measured -->\n")


def number(value):
    """Three digits, or all before the point."""
    for least, after in ((100, 0), (10, 1), (1, 2)):
        if value >= least:
            return f"{value:,.{after}f}"
    return f"{value:.3g}"


def counted(count, what):
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def percent(share):
    return f"{100 * share:.0f} %"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + "\n"


def records(folder):
    found = [(path, json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))]
    if not found:
        sys.exit(f"{folder}: expected records of lamina bench, found no .json file")
    for path, record in found:
        if "device" not in record or "ceilings" not in record:
            sys.exit(f"{path}: expected a record of lamina bench --json, found the keys {', '.join(record)}")
    adapters = {record["device"]["adapter"] for _, record in found}
    if len(adapters) > 1:
        sys.exit(f"{folder}: expected records of one adapter, found {', '.join(sorted(adapters))}")
    return [record for _, record in found]


def head(folder, all_records):
    first = all_records[0]
    device, ceilings = first["device"], first["ceilings"]
    date = "-".join(folder.name.split("-")[:3])
    commits = sorted({record.get("commit") or "" for record in all_records} - {""})
    text = f"{device['adapter']} ({device['backend']}, driver {first['driver']}), {date}"
    text += f", at {', '.join(commits)}" if commits else ""
    text += f". It reads {number(ceilings['read_gbs'])} GB/s and multiplies {number(ceilings['f32_tflops'])} TFLOP/s in f32"
    if ceilings.get("matrix_tflops"):
        text += f", {number(ceilings['matrix_tflops'])} on matrix units"
    return text + ".\n\n"


def decode(all_records):
    """A row for each shape and format, with the kernels' times side by side."""
    shapes = {}
    kernels = []
    for figure in (figure for record in all_records for figure in record.get("decode", [])):
        contexts = " ".join(f"{context:,}" for context in figure["contexts"])
        key = (figure["batch"], contexts, figure["heads"], figure["tokens"], figure["dtype"])
        kernel = figure["variant"].replace("mla_decode_coop", "matrix units").replace("mla_decode ", "").split(" rows")[0]
        if kernel not in kernels:
            kernels.append(kernel)
        # Of several records of one kernel the last file's stands.
        shapes.setdefault(key, {})[kernel] = figure
    if not shapes:
        return ""
    text = "Absorbed decode, and its combine where a sequence has several splits: records of 512 + 64 values in "
    text += "shuffled pages of 64 tokens, caches cold, medians; the bandwidth counts each record once.\n\n"
    times = [f"{kernel}, us" for kernel in kernels]
    header = ["sequences", "context", "heads", "new", "dtype", *times, "GB/s", "TFLOP/s", "of ceiling", "beside"]
    rows = []
    for (batch, contexts, heads, tokens, dtype), figures in shapes.items():
        best = min(figures.values(), key=lambda figure: figure["median_us"])
        beside = ""
        if best["published"]:
            theirs = best["published"]
            beside = f"{theirs['ratio']:.2f}x {theirs['by']}, {number(theirs['us'])} us"
        elif best["gain_over_f16"]:
            beside = f"{best['gain_over_f16']:.2f}x f16"
        own = [number(figures[kernel]["median_us"]) if kernel in figures else "" for kernel in kernels]
        share = f"{percent(best['share'])} {best['bound']}"
        numbers = [number(best["gbs"]), number(best["tflops"]), share, beside]
        rows.append([f"{batch}", contexts, f"{heads}", f"{tokens}", dtype, *own, *numbers])
    return text + table(header, rows)


def attention(all_records):
    text = ""
    for record in (record for record in all_records if "attention" in record):
        dims = record["dims"]
        text += f"One layer of width {dims['hidden']:,} decodes a token of {counted(record['batch'], 'sequence')}: {dims['heads']} "
        text += f"heads of {dims['head']}; MLA with a latent of {dims['latent']}, keys of {dims['nope']} and a rope key of "
        text += f"{dims['rope']}. 'MLA expanded' multiplies on invocations, as a device without matrix units has to.\n\n"
        rows = []
        for figure in record["attention"]:
            to_gqa = figure["layer_to_gqa"]
            numbers = [number(figure["token_bytes"]), number(figure["attention"]["median_us"]), number(figure["attention_gbs"])]
            numbers += [number(figure["layer"]["median_us"]), percent(figure["layer_share"])]
            rows.append([f"{figure['context']:,}", figure["kind"], *numbers, "" if to_gqa is None else f"{to_gqa:.2f}x"])
        header = ["context", "attention", "bytes a token", "alone, us", "GB/s", "layer, us", "of bandwidth", "to GQA"]
        text += table(header, rows)
    return text


def model(all_records):
    text = ""
    for record in (record for record in all_records if "depths" in record):
        text += f"{record['model']}, weights of {record['weight_bytes'] / 2**30:.1f} GiB, a cache of {record['cache_format']}.\n\n"
        rows = []
        for depth in record["depths"]:
            token = depth["token"]
            numbers = [number(depth["prefill_tokens_per_s"]), number(depth["prefill_tflops"]), percent(depth["prefill_share"])]
            numbers += [number(depth["decode_tokens_per_s"]), percent(depth["bandwidth_share"])]
            numbers += [number(token["gpu_us"]), number(token["gap_us"])]
            rows.append([f"{depth['depth']:,}", *numbers, f"{token['dispatches_per_layer']:.1f}"])
        header = ["depth", f"prompt of {record['prompt']:,}, tokens/s", "TFLOP/s", "of ceiling"]
        header += [f"text of {record['text']}, tokens/s", "of bandwidth", "GPU, us a token", "waiting, us"]
        text += table(header + ["dispatches a layer"], rows)
        text += prompt_attention(record)
    return text


def prompt_attention(record):
    """What attention takes of a prompt, where it is a step of its own behind nothing."""
    first = record["depths"][0]
    step = first["prompt"]
    kernels = [kernel for kernel in step["kernels"] if kernel["kernel"].startswith("mla_prefill")]
    if first["depth"] > 0 or step["tokens"] < record["prompt"] or len(kernels) != 1:
        return ""
    kernel = kernels[0]
    tflops = step["attention_flops"] / kernel["us"] / 1e6
    ceilings = record["ceilings"]
    ceiling = max(ceilings.get(name) or 0.0 for name in ("f32_tflops", "f16_tflops", "matrix_tflops"))
    text = f"Attention alone (`{kernel['kernel']}`) takes {number(kernel['us'] / kernel['dispatches'])} us a layer for "
    text += f"{step['tokens']:,} tokens behind nothing: {number(tflops)} TFLOP/s, causal ones counted once, "
    return text + f"{100 * tflops / ceiling:.1f} % of the ceiling.\n\n"


def main():
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    folder = pathlib.Path(sys.argv[1])
    found = records(folder)
    text = head(folder, found) + decode(found) + attention(found) + model(found)
    text += f"The records, and the commands that made them: [{folder}]({folder}/README.md).\n"
    if len(sys.argv) == 2:
        sys.stdout.write(text)
        return
    path = pathlib.Path(sys.argv[2])
    whole = path.read_text()
    if any(whole.count(mark) != 1 for mark in MARKS):
        sys.exit(f"{path}: expected the lines {MARKS[0].strip()} and {MARKS[1].strip()}, each once")
    before, rest = whole.split(MARKS[0])
    path.write_text(before + MARKS[0] + text + MARKS[1] + rest.split(MARKS[1])[1])


main()
