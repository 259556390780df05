#!/usr/bin/env python3
"""Times an adapter for a folder of benches/runs, everything in one go: kernels and types of attention, and a model
where one is given. LAMINA_ADAPTER names the adapter, as for every command.

    benches/record.py DIR                     NAME.json in DIR for each benchmark, and a README.md that lists them;
                                              nothing is timed before `lamina check` passed
    benches/record.py DIR --model CHECKPOINT  a model's, too; benches/random_checkpoint.py makes one
    benches/record.py DIR --only kernel-1,kernel-128
                                              some of them again, without the check, beside the README.md that is there
    benches/record.py DIR --lamina PROGRAM    by this program in place of target/release/lamina

Build with LAMINA_COMMIT=$(git rev-parse --short HEAD), and the records say what they were made of. Exit code 1 where a
benchmark failed; the others are made nevertheless.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

DECODE = "bench kernel --dtype f16"
BENCHMARKS = {
    "kernel-1": f"{DECODE},fp8 --batch 1 --heads 16,64,128 --context 4096,32768,131072",
    "kernel-128": f"{DECODE},fp8 --batch 128 --heads 16,64,128 --context 4096",
    "kernel-portable": f"{DECODE} --variant portable --batch 1 --heads 16 --context 4096,131072",
    "kernel-subgroup": f"{DECODE} --variant subgroup --batch 1 --heads 16,128 --context 4096,32768",
    "attention-types": "bench attention-types",
    "attention-types-64": "bench attention-types --nope 64 --context 128,2048,32768",
}
OF_A_MODEL = {
    "model": "bench model --ctx 8192 --depth 0,512,4096 --prompt 512 --text 128 --repeat 3",
    "prompt-4096": "bench model --ctx 8192 --depth 0 --prompt 4096 --text 32 --repeat 5",
}


def told(seconds, text):
    print(f"{seconds:6.0f} s  {text}", file=sys.stderr, flush=True)


def check(lamina):
    """The last line of `lamina check`; ends the program where a case fails."""
    done = subprocess.run([lamina, "check"], stdout=subprocess.PIPE, text=True)
    last = done.stdout.strip().split("\n")[-1]
    if done.returncode != 0:
        sys.exit(f"lamina check: expected all cases to pass, found exit code {done.returncode}: {last}")
    return last


def shown(command):
    """A command as a README has it: a folder of this machine by its last part."""
    return " ".join(["lamina", *(pathlib.Path(part).name if os.path.isdir(part) else part for part in command[1:])])


def readme(record, rows, checked):
    device = record["device"]
    text = f"# {device['adapter']}, {device['backend']}, driver {record['driver']}, {time.strftime('%Y-%m-%d')}\n\n"
    text += f"At {record.get('commit') or 'an unnamed commit'}, in one go; each figure was checked before it was timed.\n\n"
    text += "| file | command |\n| --- | --- |\n" + "".join(f"| `{name}` | `{command}` |\n" for name, command in rows)
    return text + f"\n`lamina check`: {checked}.\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--model", metavar="CHECKPOINT")
    parser.add_argument("--only", metavar="NAMES")
    parser.add_argument("--lamina", metavar="PROGRAM", default="target/release/lamina")
    asked = parser.parse_args()
    benchmarks = {name: line.split() for name, line in BENCHMARKS.items()}
    if asked.model:
        benchmarks |= {name: [*line.split(), "--model", asked.model] for name, line in OF_A_MODEL.items()}
    if asked.only:
        names = asked.only.split(",")
        for name in names:
            if name not in benchmarks:
                parser.error(f"--only: expected some of {', '.join(benchmarks)}, found {name!r}")
        benchmarks = {name: benchmarks[name] for name in names}
    if not pathlib.Path(asked.lamina).is_file():
        parser.error(f"--lamina: expected a program, found nothing at {asked.lamina} (cargo build --release makes it)")
    path = asked.dir / "README.md"
    if path.exists() and not asked.only:
        parser.error(f"DIR: expected a folder without records, found {path}")

    asked.dir.mkdir(parents=True, exist_ok=True)
    # The kernels' own tables, not what `lamina bench tune` kept here.
    kept = tempfile.TemporaryDirectory(prefix="lamina-record-")
    os.environ["LAMINA_CACHE"] = kept.name
    started = time.monotonic()
    checked = check(asked.lamina) if not asked.only else None
    if checked:
        told(time.monotonic() - started, checked)
    rows, failed, record = [], [], None
    for name, line in benchmarks.items():
        command = [asked.lamina, *line, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE)
        if done.returncode == 0:
            record = json.loads(done.stdout)
            (asked.dir / f"{name}.json").write_bytes(done.stdout)
            rows.append((f"{name}.json", shown(command)))
            ended = ""
        elif done.returncode == 2 and "subgroup" in line:
            ended = ": this adapter has no such variant"
        else:
            failed.append(name)
            ended = ": failed"
        told(time.monotonic() - started, shown(command) + ended)
    if record and not asked.only:
        path.write_text(readme(record, rows, checked))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


main()
