"""The story grammar: text with alternatives, references to characters and things, and rules that call rules.

A grammar file is plain text:

    %% table                 records, one a line:   head; key=value; key=value
    %% table: a, b, c        records that are heads alone
    == rule                  alternatives, one a line
    @@ plot                  a whole story: lines are sentences, an empty line is a new paragraph;
                             a line that begins with '?' is told half of the time

A line that begins with spaces goes on with the line before; '#' begins a comment line. Inside the text:

    {a|b|c}        one of them, nested at will
    [x]            character x as the subject: the name, 'the girl', or 'she', whichever is clear here;
    [x.o] [x.s]    the same as an object, as a possessive
    [x.n] [x.he] [x.him] [x.his] [x.himself] [x.kind] [x.a] ...    that form, or an attribute, always
    ? <rule>       the rule or nothing
    [x=table]      binds x to a record or a new character (none is taken twice in a story); prints nothing
    [x=h+k]        binds x to two characters together ('they')
    [x:=text]      binds x to a thing named by that text
    <rule c=h>     an alternative of the rule, in which c means h
    ^              the next letter is a capital

A pronoun is used only where one character alone can be meant: it was named in this sentence or the last one, and
no other of the same pronoun was.
"""

import random
import re
from pathlib import Path

PRONOUNS = {
    "she": ("she", "her", "her", "herself"),
    "he": ("he", "him", "his", "himself"),
    "it": ("it", "it", "its", "itself"),
    "they": ("they", "them", "their", "themselves"),
}
ENDS = re.compile(r"[.!?]")
OPTIONAL = re.compile(r"(^|\s)\? (<[^<>]+>)")


def synonyms(path):
    """{word: the words that may stand for it}, with and without a capital."""
    sets = [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]
    found = {word: words for words in sets for word in words}
    return found | {word.capitalize(): [w.capitalize() for w in words] for word, words in found.items()}


def swaps(path):
    """Sets of nouns, one of which may stand for another through a whole story."""
    return [line.split() for line in path.read_text().splitlines() if not line.startswith("#")]


class Grammar:
    """Tables, rules and plots, read from the files of a folder."""

    def __init__(self, folder):
        self.tables, self.rules, self.plots = {}, {}, {}
        self.synonyms = synonyms(Path(folder) / "synonyms.txt")
        self.swaps = swaps(Path(folder) / "swaps.txt")
        self.swap = re.compile(r"\b(" + "|".join(w for words in self.swaps for w in words) + r")\b")
        self.synonym = re.compile(r"\b(" + "|".join(self.synonyms) + r")\b")
        for path in sorted(Path(folder).glob("**/*.txt")):
            if path.name in ("synonyms.txt", "swaps.txt"):
                continue
            self.read(path.read_text().splitlines(), path.name)

    def read(self, lines, name):
        put = None
        for number, line in enumerate(joined(lines), 1):
            head = line[:2]
            if line.startswith("#"):
                continue
            if head == "%%":
                table, _, rest = line[2:].partition(":")
                rows = self.tables.setdefault(table.strip(), [])
                rows.extend({"head": parse(word.strip())} for word in rest.split(",") if word.strip())
                put = lambda text, rows=rows: rows.append(record(text)) if text.strip() else None
            elif head == "==":
                rows = self.rules.setdefault(line[2:].strip(), [])
                put = lambda text, rows=rows: rows.append(parse(text.strip())) if text.strip() else None
            elif head == "@@":
                rows = self.plots[line[2:].strip()] = []
                put = lambda text, rows=rows: rows.append(plot_line(text))
            elif put is None and not line.strip():
                continue
            elif put is None:
                raise ValueError(f"{name}:{number}: text before the first table, rule or plot")
            else:
                put(line)


def joined(lines):
    """Lines, each with the indented ones that follow it."""
    whole = None
    for line in lines:
        if whole is not None and line.startswith(" ") and line.strip():
            whole += " " + line.strip()
            continue
        if whole is not None:
            yield whole
        whole = line.rstrip()
    if whole is not None:
        yield whole


def record(text):
    head, *rest = split_top(text, ";")
    fields = {"head": parse(head.strip())}
    for part in rest:
        key, _, value = part.partition("=")
        fields[key.strip()] = parse("{" + value.strip() + "}")
    return fields


def plot_line(text):
    """(may be left out, nodes); nodes None for a new paragraph."""
    if not text.strip():
        return False, None
    return text.startswith("?"), parse(text.lstrip("? "))


def split_top(text, mark):
    """Splits at a mark that stands in no bracket."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == mark and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return parts + [text[start:]]


def parse(text):
    """Text -> nodes: str | ('alt', choices) | ('ref', x, attribute) | ('bind', x, what) | ('set', x, nodes) |
    ('call', rule, aliases)."""
    nodes, i = [], 0
    text = OPTIONAL.sub(r"\1{\2|}", text)
    while i < len(text):
        c = text[i]
        if c in "{[<":
            j, depth = i, 0
            while True:
                if j == len(text):
                    raise ValueError(f"a bracket is not closed: {text}")
                depth += (text[j] in "{[<") - (text[j] in "}]>")
                j += 1
                if depth == 0:
                    break
            inner = text[i + 1 : j - 1]
            if c == "{":
                nodes.append(("alt", [parse(choice) for choice in ended(split_top(inner, "|"), text[j:])]))
            elif c == "<":
                rule, *aliases = inner.split()
                nodes.append(("call", rule, [tuple(alias.split("=")) for alias in aliases]))
            elif ":=" in inner:
                name, _, value = inner.partition(":=")
                nodes.append(("set", name, parse(value)))
            elif "=" in inner:
                nodes.append(("bind", *inner.split("=")))
            else:
                nodes.append(("ref", *inner.partition(".")[::2]))
            i = j
        else:
            j = i
            while j < len(text) and text[j] not in "{[<":
                j += 1
            nodes.append(text[i:j])
            i = j
    return nodes


def ended(choices, rest):
    """Choices, all with a full stop at the end if one of them ends a sentence there."""
    if rest[:1] not in ("", " ") or not any(re.search(r'[.!?]"?$', choice) for choice in choices):
        return choices
    return [c if not c or re.search(r'[.!?]["}>]?$|>$|,"$', c) else c + "." for c in choices]


class Person:
    """A character: how it is named, and when it was last spoken of."""

    def __init__(self, name, pronoun, kind, the=None, owner=None, words=(), members=()):
        self.name, self.pronoun, self.kind, self.the, self.owner = name, pronoun, kind, the, owner
        self.words, self.members = dict(words), members
        self.last, self.count = -9, 0


class Thing:
    """A record or a named thing."""

    def __init__(self, fields):
        self.fields, self.count, self.full = fields, 0, None


class Story:
    """One telling: its random choices, its bound names, and the text so far."""

    def __init__(self, grammar, seed, makers):
        self.grammar, self.makers = grammar, makers
        self.rng = random.Random(seed)
        self.vars, self.used, self.parts = {}, set(), []
        self.sentence, self.episode, self.style = 0, 0, {}
        self.airy = 0  # how often a line ends a paragraph

    # Telling

    def plot(self, name):
        for optional, nodes in self.grammar.plots[name]:
            if nodes is None:
                self.paragraph()
            elif not (optional and self.rng.random() < 0.5):
                self.line(nodes)

    def line(self, nodes):
        """A line of a plot; a full stop where it has no end."""
        start = len(self.parts)
        self.run(nodes)
        told = "".join(self.parts[start:]).rstrip()
        if told and told[-1] not in '.!?":,;':
            self.parts.append(".")
            self.sentence += 1
        self.parts.append(" ")
        if self.rng.random() < self.airy:
            self.paragraph()

    def say(self, text):
        """Tells a line that a procedural plot composed."""
        self.line(parse(text))

    def next_episode(self):
        """Another plot follows: the hero stays, all other names are free again."""
        self.episode += 1
        self.vars = {"h": self.vars["h"]}
        self.paragraph()

    def paragraph(self):
        self.parts.append("\n\n")
        self.sentence += 2

    def text(self):
        """The whole telling, in which some words stand for others of their kind."""
        words = self.grammar.synonyms
        text = polish("".join(self.parts))
        change = 0.4 * self.rng.random()
        text = self.grammar.synonym.sub(
            lambda m: self.rng.choice(words[m[0]]) if self.rng.random() < change else m[0], text
        )
        return articles(self.swapped(text))

    def swapped(self, text):
        """Some nouns changed for others, the same way everywhere, and one for one so that two stay two."""
        change = {}
        for words in self.grammar.swaps:
            if self.rng.random() < 0.35:
                change |= dict(zip(words, self.rng.sample(words, len(words))))
        return self.grammar.swap.sub(lambda m: change.get(m[0], m[0]), text) if change else text

    def run(self, nodes):
        for node in nodes:
            if isinstance(node, str):
                self.parts.append(node)
                self.sentence += len(ENDS.findall(node))
            elif node[0] == "alt":
                self.run(self.rng.choice(node[1]))
            elif node[0] == "ref":
                self.ref(node[1], node[2])
            elif node[0] == "bind":
                self.bind(node[1], node[2])
            elif node[0] == "set":
                self.vars[node[1]] = Thing({"head": [self.render(node[2])]})
            else:
                self.call(node[1], node[2])

    def render(self, nodes):
        """The text of nodes, told nowhere."""
        kept, self.parts = self.parts, []
        self.run(nodes)
        text, self.parts = "".join(self.parts), kept
        return text

    def call(self, rule, aliases=()):
        if rule == "open" and self.episode:
            rule = "reopen"
        if rule not in self.grammar.rules:
            raise ValueError(f"no rule {rule}")
        kept = {}
        for name, other in aliases:
            kept[name] = self.vars.get(name)
            self.vars[name] = self.vars[other]
        choices = self.grammar.rules[rule]
        fresh = [i for i in range(len(choices)) if (rule, i) not in self.used] or range(len(choices))
        i = self.rng.choice(fresh)
        self.used.add((rule, i))
        self.run(choices[i])
        for name, value in kept.items():
            if value is None:
                del self.vars[name]
            else:
                self.vars[name] = value

    # Names

    def bind(self, name, what):
        if "+" in what:
            members = [self.vars[m] for m in what.split("+")]
            both = " and ".join(m.name for m in members)
            self.vars[name] = Person(
                both, "they", "friends", "{the two friends|the two of them|the two}", members=members
            )
        elif what in self.vars:
            self.vars[name] = self.vars[what]
        elif what in self.makers:
            if not (self.episode and isinstance(self.vars.get(name), Person)):
                self.vars[name] = self.makers[what](self)
        else:
            self.vars[name] = self.pick(what)

    def pick(self, table):
        """A record that this story has not used."""
        if table not in self.grammar.tables:
            raise ValueError(f"no table {table}")
        rows = self.grammar.tables[table]
        fresh = [i for i in range(len(rows)) if (table, i) not in self.used] or range(len(rows))
        i = self.rng.choice(fresh)
        self.used.add((table, i))
        return Thing(rows[i])

    def ref(self, name, attribute):
        if name not in self.vars:
            raise ValueError(f"[{name}.{attribute}] is not bound")
        value = self.vars[name]
        if isinstance(value, Person):
            self.parts.append(self.mention(value, attribute))
        else:
            self.run(self.thing(value, attribute))

    def thing(self, thing, attribute):
        if attribute:
            if attribute not in thing.fields:
                raise ValueError(f"{thing.fields['head']} has no {attribute}")
            return self.unused(thing.fields, attribute)
        if thing.full is None:
            head = self.render(thing.fields["head"])
            adjective = self.render(thing.fields["adj"]) + " " if "adj" in thing.fields else ""
            thing.full, thing.short = [adjective + head], [head]
        thing.count += 1
        return thing.full if thing.count == 1 or self.rng.random() < 0.2 else thing.short

    def unused(self, fields, attribute):
        """A choice of an attribute that this story has not told yet."""
        [(_, choices)] = fields[attribute]
        fresh = [i for i in range(len(choices)) if (id(fields), attribute, i) not in self.used] or range(len(choices))
        i = self.rng.choice(fresh)
        self.used.add((id(fields), attribute, i))
        return choices[i]

    def clear(self, person):
        """Whether a pronoun can mean this person alone."""
        rivals = (v for v in self.vars.values() if isinstance(v, Person) and v is not person)
        return person.last >= self.sentence - 1 and not any(
            r.pronoun == person.pronoun and r.last >= self.sentence - 1 for r in rivals
        )

    def touch(self, person):
        person.last = self.sentence
        person.count += 1
        for member in person.members:
            member.last = self.sentence

    def mention(self, person, attribute):
        subject, object_, possessive, reflexive = PRONOUNS[person.pronoun]
        forced = {"he": subject, "him": object_, "his": possessive, "himself": reflexive}
        if attribute in forced:
            if person.last == self.sentence or attribute == "himself" or self.clear(person):
                self.touch(person)
                return forced[attribute]
            attribute = {"he": "", "him": "o", "his": "s"}[attribute]
        if attribute in ("", "o", "s"):
            again = 0.95 if person.last == self.sentence else 0.72
            if self.clear(person) and self.rng.random() < again:
                text = {"": subject, "o": object_, "s": possessive}[attribute]
            else:
                text = self.called(person)
                if attribute == "s":
                    text += "'" if text.endswith("s") and person.pronoun == "they" else "'s"
            self.touch(person)
            return text
        if attribute == "n":
            text = self.named(person)
            self.touch(person)
            return text
        if attribute == "kind":
            return person.kind
        if attribute == "the":
            self.touch(person)
            return person.the and self.render(parse(person.the)) or self.named(person)
        if attribute in person.words:
            value = person.words[attribute]
            if attribute in ("intro", "a"):
                self.touch(person)
            return self.render(parse(value))
        raise ValueError(f"{person.name} has no {attribute}")

    def called(self, person):
        """The name, or a description where that is as clear."""
        if person.the and person.count and self.rng.random() < (0.4 if person.members else 0.13):
            others = (v for v in self.vars.values() if isinstance(v, Person) and v is not person)
            if not any(o.kind == person.kind for o in others):
                return self.render(parse(person.the))
        return self.named(person)

    def named(self, person):
        """'Mia', or 'her mother' and 'Tom's mother' for someone's mother."""
        if person.owner is None:
            return person.name
        owner = self.vars[person.owner]
        if owner.last >= self.sentence - 3 and self.clear_among(owner, person):
            return f"{PRONOUNS[owner.pronoun][2]} {person.name}"
        return f"{owner.name}'s {person.name}"

    def clear_among(self, owner, person):
        rivals = (v for v in self.vars.values() if isinstance(v, Person) and v not in (owner, person))
        return not any(r.pronoun == owner.pronoun and r.last >= self.sentence - 1 for r in rivals)


QUESTION = re.compile(
    r"(?!So (?:am|was|do|did|is|are|were) )(?:(?:And|But|So|Well|Then|Now|Oh|Please),? )?"
    r"(?:[Ww]hat(?! an? )|[Ww]ho(?:se)?|[Ww]here|[Ww]hy|[Ww]hich|[Ww]hen (?:do|did|will|is|was|are|can|shall)"
    r"|[Hh]ow(?! (?:clever|strange|kind|odd|curious|you have|nice|lovely|beautiful))|[Dd]o(?! not| it| what| your)"
    r"|[Dd]oes|[Dd]id|[Ii]s|[Aa]re|[Ww]as|[Ww]ere|[Mm]ay|[Cc]an|[Cc]ould|[Ss]hall|[Ss]hould|[Ww]ill|[Ww]ould"
    r"|Have(?! a\b)|Has|Had|Am)\b",
)
NEXT = (
    "After that|A little later|Soon afterward|Then|Later that day|An hour later|After lunch|In the afternoon|Before long"
    "|On the way back|When that was done|After a while|Soon|Before long|In the end|At last|later"
)
TAGS = "said|asked|cried|called|shouted|whispered|wondered|thought|answered|replied|murmured"
QUOTE = re.compile(r'"([^"]*?)([,.?])"(\s+(?:\w+\s+){0,3}?(?:asked|said)\b)?')


def spoken(match):
    """A quotation with the marks that its sentences ask for: alternatives mix statements and questions."""
    words, mark, tag = match[1], match[2], match[3] or ""
    *before, last = re.split(r"(?<=[.!?]) ", words)
    before = [s[:-1] + marked(s[:-1], s[-1], ".") for s in before]
    follows = re.match(r"\s+(?:[a-z]|\^?[A-Z]\w* (?:said|asked)\b)", match.string[match.end(2) + 1 :][:30])
    ended = marked(last, mark, "," if tag or follows else ".")
    if mark == "?" != ended:
        tag = tag.replace("asked", "said")
    return f'"{" ".join([*before, last])}{ended}"{tag}'


def marked(sentence, mark, plain):
    if mark == "!" or sentence[:1].islower():
        return mark
    if QUESTION.match(sentence) or re.match(r"If .*, (?:why|what|who|how|where)\b", sentence):
        return "?"
    return plain if mark == "?" and len(sentence.split()) > 2 else mark


def articles(text):
    """'a' or 'an'."""
    text = re.sub(r"\b([Aa])n (?=[^\W\daeiouhAEIOU])", r"\1 ", text)
    return re.sub(r"\b([Aa]) (?=[aeioAEIO]|u(?!n?i|s[eu])|U(?!n?i)|hour|honest)(?!one\b|once\b|eu)", r"\1n ", text)


def polish(text):
    """Spaces, the marks of quotations, 'a' or 'an', capitals."""
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r"\s*\n\s*\n\s*", "\n\n", text).strip()
    text = re.sub(r" ([.,!?;:])", r"\1", text)
    text = re.sub(r"\b(old|warm|little|small) \1\b", r"\1", text)
    text = re.sub(r"([.!?]) ?\.(?!\.)", r"\1", text)
    text = re.sub(r'"\s*([^"]*?)\s*"', r'"\1"', text)
    text = re.sub(
        rf"((?:{NEXT}), )(At|In|From|On|They|It|The|All|For|Excuse|One)\b", lambda m: m[1] + m[2].lower(), text
    )
    text = re.sub(r",([.,;!?])", r"\1", text)
    text = re.sub(rf"\b({TAGS}) (he|she|they)\b", r"\2 \1", text)
    text = QUOTE.sub(spoken, text)
    text = articles(text)
    text = re.sub(r"(^|[.!?]\s+\"?|\.\"\s+\"?|[!?]\" \"|\n\s*\"?)([a-z])", lambda m: m[1] + m[2].upper(), text)
    text = re.sub(r"\^(\w?)", lambda m: m[1].upper(), text)
    text = re.sub(rf'([!?]") ({TAGS.title()})\b', lambda m: f"{m[1]} {m[2].lower()}", text)
    text = re.sub(rf'([!?]") (His|Her|The) (?=(?:\w+ ){{1,2}}(?:{TAGS})\b)', lambda m: f"{m[1]} {m[2].lower()} ", text)
    return re.sub(rf'([!?]") (He|She|They) (?=(?:{TAGS})\b)', lambda m: f"{m[1]} {m[2].lower()} ", text)
