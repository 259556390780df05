"""Who plays in a story: the makers of characters that a grammar's [x=child] and the like call."""

from grammar import Person

GIRLS = """Mia Anna Lily Rosa Nora Ella Ivy Clara Emma Zoe Maya Lucy Hana Ruby Alice Tessa Wren Olive June Daisy Greta
Molly Sofia Amina Leila Priya Mei Yuki Ingrid Marta Elsa Hazel Nina Pearl Sadie Talia Vera Willa Abby Bella Carmen Dora
Edith Flora Gwen Holly Iris Jane Kira Lena Mabel Nell Opal Penny Robin Stella Tilda Una Violet Ada Beth Cora Dina Esther
Fern Grace Heidi Ida Josie Kate Lottie Maggie Naomi Paula Rachel Sally Tina Wilma Zara Aisha Ama Chloe Eva Fatima Freya
Joy Kim Lola Maria Milly Polly Sara Susan""".split()
BOYS = """Tom Ben Sam Leo Max Finn Jack Oscar Noah Eli Hugo Theo Omar Ravi Kenji Pablo Mateo Anton Emil Lars Otto Felix
Henry Arthur George Peter Simon Jonah Caleb Micah Toby Will Jasper Rufus Silas Amos Ned Ollie Paul Ryan Seth Tim Victor
Walter Adam Bruno Carl Daniel David Erik Frank Gus Harry Ivan Jacob Karl Luke Martin Nico Owen Philip Quinn Robert Samir
Tariq Umar Vince Wesley Yusuf Ali Andy Billy Charlie Dan Diego Edgar Fred Gabriel Hassan Isaac James Jamal Joe Kofi Liam
Marco Nathan Oliver Pedro Rory Roy Stefan Tobias""".split()
SURNAMES = """Reed Hill Brook Miller Baker Fisher Wood Green Marsh Field Stone Lane Bell Hart Moss Pike Finch Rose Frost Dale
Carter Cole Dunn Ellis Flint Grant Holt Kent Lowe Mills Nash Page Price Shaw Stokes Webb West Wells Young Potter Penn
Mendez Okafor Tanaka Patel Novak Rossi Silva Lindt Olsen Berg Haddad Chen Kovac Duval""".split()

ADJECTIVES = [
    "little",
    "little",
    "little",
    "small",
    "young",
    "quiet",
    "kind",
    "curious",
    "cheerful",
    "clever",
    "shy",
    "brave",
    "lively",
    "gentle",
    "thoughtful",
    "stubborn",
    "dreamy",
    "busy",
    "bright",
    "careful",
]
CHILD_HOMES = [
    "a small house by the sea",
    "a white house at the end of the lane",
    "a little village in the hills",
    "a tall house in the middle of the town",
    "a farmhouse outside the village",
    "a cottage near the woods",
    "a flat above a bakery",
    "a narrow house by the canal",
    "a village beside a wide river",
    "a house with a red roof",
    "a stone cottage on the hill",
    "a busy town by the harbor",
    "a house at the edge of the forest",
    "a quiet street near the park",
    "a mountain village",
    "an old mill by the stream",
    "a wooden house with a green door",
    "a fishing village",
    "a house with a big garden",
    "a valley full of apple trees",
    "a small town with a clock tower",
    "a lighthouse at the end of the bay",
    "a yellow house across from the school",
]
# Now and then a hero out of a fairy tale: she, he, homes.
ROLES = [
    ("princess", "prince", ["a castle on a rock", "a palace with a hundred windows", "a tower by the sea"]),
    ("princess", "prince", ["a small kingdom between two rivers", "a castle in the mountains"]),
    ("shepherd girl", "shepherd boy", ["a hut on the hill", "a village in the mountains"]),
    ("miller's daughter", "miller's son", ["an old mill by the stream", "a mill outside the village"]),
    ("goose girl", "stable boy", ["a farm at the foot of the hills", "a room above the stables"]),
    ("fisher girl", "fisher boy", ["a hut on the beach", "a fishing village"]),
    ("baker's daughter", "baker's son", ["a house that always smelled of bread", "a narrow street near the market"]),
    ("young witch", "young wizard", ["a crooked house in the woods", "a tower full of books"]),
    ("weaver", "tailor", ["a village at the edge of the forest", "a small house with a big window"]),
]
# kind: homes, names, what it eats, a paw or a hand
ANIMALS = {
    "fox": (
        ["a den under an old oak", "a den at the edge of the forest", "a hollow among the ferns"],
        "berries",
        "paw",
    ),
    "rabbit": (
        ["a burrow beneath the hedge", "a warm burrow in the meadow", "a hole under the roots of a beech"],
        "clover",
        "paw",
    ),
    "bear": (["a cave in the hills", "a dry cave near the river", "a den deep in the woods"], "honey", "paw"),
    "mouse": (
        ["a hole in the barn wall", "a tiny nest in the wheat field", "a teapot behind the kitchen stove"],
        "crumbs",
        "paw",
    ),
    "squirrel": (
        ["a nest high in a pine tree", "a hollow tree by the path", "the tallest oak in the park"],
        "nuts",
        "paw",
    ),
    "badger": (["a deep sett under the hill", "a tidy sett beneath the birches"], "roots", "paw"),
    "hedgehog": (["a heap of leaves under the hedge", "a snug nest at the bottom of the garden"], "apples", "paw"),
    "otter": (["a den on the river bank", "a hollow under the willow roots"], "fish", "paw"),
    "mole": (["a long tunnel under the meadow", "a small round room beneath the garden"], "worms", "paw"),
    "kitten": (["a basket in the farmhouse kitchen", "a box behind the baker's oven"], "milk", "paw"),
    "puppy": (["a kennel beside the barn", "a basket under the stairs"], "biscuits", "paw"),
    "beaver": (["a lodge in the middle of the pond", "a house of sticks on the lake"], "bark", "paw"),
    "raccoon": (["a hollow log near the creek", "an old crate behind the mill"], "corn", "paw"),
}
ANIMAL_NAMES = """Pip Rusty Bramble Clover Hazel Thistle Nutkin Pepper Biscuit Poppy Tansy Moss Fern Barley Button Acorn
Bristle Maple Sorrel Willow Bracken Juniper Tuppence Snowy Dusty Ginger Mitten Pebble Ripple Sandy Sprout Tumble Twig
Whisper Cricket Dandelion Nettle Primrose Scamp Marigold Hopper Skipper Teasel Velvet Burdock""".split()
PETS = {
    "dog": "Rex Bello Patch Buster Scout Bingo Rover Shadow Sparky Toffee".split(),
    "cat": "Whiskers Smoky Tiger Luna Felix Socks Misty Mittens Cocoa".split(),
}
SMALL_HELP = {"brother": "he", "sister": "she", "cousin": "she"}


HEADS = """Al Am An Ar As Be Bel Ber Bo Bri Ca Cal Cor Da Dal Del Do Dor E El Em Er Fa Fi Flo Ga Gil Ha Hel Il Is Ja Jo Jul Ka Kel Ki La
Le Lin Lo Lu Ma Mar Me Mil Mo Na Nel Ni No O Or Pa Per Pi Ra Ri Ro Ru Sa Sel Si So Ta Tal Ti To Tu Va Vi Wen Wil Ya Yo Za Zel""".split()
TAILS = {
    "she": "la na ra mina lina delle ria sa bet nia dora lotte mara nella via wyn tta ssa".split(),
    "he": "bert do lo mir nard rik ron sten ton vin mund bo dan win to ras rian mo".split(),
}


def invented(story, pronoun):
    """One of some thousand names that sound like names."""
    return story.rng.choice(HEADS) + story.rng.choice(TAILS[pronoun])


def name(story, names, pronoun=None):
    """A name that no one in the story has; with a pronoun, now and then an invented one."""
    while True:
        pick = invented(story, pronoun) if pronoun and story.rng.random() < 0.4 else story.rng.choice(names)
        if ("name", pick) not in story.used:
            story.used.add(("name", pick))
            return pick


def unlike_hero(story):
    """A pronoun, most often not the hero's, so that pronouns stay clear."""
    first = story.vars.get("h")
    if isinstance(first, Person) and story.rng.random() < 0.75:
        return "he" if first.pronoun == "she" else "she"
    return story.rng.choice(["he", "she"])


def child(story):
    rng = story.rng
    story.style.setdefault("world", "child")
    girl = unlike_hero(story) == "she"
    kind, called = ("girl", name(story, GIRLS, "she")) if girl else ("boy", name(story, BOYS, "he"))
    adjective, home = rng.choice(ADJECTIVES), rng.choice(CHILD_HOMES)
    if "h" not in story.vars and rng.random() < 0.14:
        she, he, homes = rng.choice(ROLES)
        kind, home = she if girl else he, rng.choice(homes)
    words = {
        "intro": f"{{a {adjective} {kind} {{named|named|called}} {called}|a {kind} named {called}"
        f"|a {adjective} {kind} whose name was {called}}}",
        "a": f"a {adjective} {kind}",
        "call": called,
        "home": home,
        "hand": "hand",
        "young": "child",
        "food": rng.choice(["bread and cheese", "pancakes", "apples", "soup", "toast and jam"]),
        "years": rng.choice("five six seven eight nine ten".split()),
        "folk": "people",
        "adj": adjective,
        "sib": "sister" if girl else "brother",
        "grown": "woman" if girl else "man",
    }
    return Person(called, "she" if girl else "he", kind, f"the {kind}", words=words)


def fable(story):
    rng = story.rng
    story.style.setdefault("world", "animal")
    kind = rng.choice([k for k in ANIMALS if ("kind", k) not in story.used])
    story.used.add(("kind", kind))
    homes, food, hand = ANIMALS[kind]
    pronoun = unlike_hero(story)
    adjective = rng.choice(ADJECTIVES)
    words = {
        "home": rng.choice(homes),
        "hand": hand,
        "young": f"young {kind}",
        "food": food,
        "years": "two",
        "sib": "sister" if pronoun == "she" else "brother",
        "folk": "animals",
        "adj": adjective,
        "a": f"a {adjective} {kind}",
    }
    if rng.random() < 0.7:
        called = name(story, ANIMAL_NAMES, pronoun)
        words |= {
            "intro": f"{{a {adjective} {kind} {{named|called}} {called}|a {kind} named {called}}}",
            "call": called,
        }
        return Person(called, pronoun, kind, f"the {{|{adjective} }}{kind}", words=words)
    words |= {"intro": f"a {adjective} {kind}", "call": kind.capitalize()}
    return Person(f"the {kind}", pronoun, kind, f"the {adjective} {kind}", words=words)


def hero(story):
    """A child in most stories, a young animal in the others."""
    world = story.style.setdefault("world", "child" if story.rng.random() < 0.72 else "animal")
    return (child if world == "child" else fable)(story)


def friend(story):
    return hero(story)


def elder(story):
    """A grown-up neighbour with a name."""
    rng = story.rng
    woman = rng.random() < 0.5
    called = ("Mrs. " if woman else "Mr. ") + name(story, SURNAMES)
    if story.style.get("world") == "animal":
        kind = rng.choice(["owl", "tortoise", "heron", "goose", "goat", "toad", "crow"])
        words = {"intro": f"an old {kind}", "a": f"an old {kind}", "call": kind.capitalize()}
        return Person(f"the old {kind}", "she" if woman else "he", kind, words=words)
    kind = rng.choice(
        [
            "neighbor",
            "gardener",
            "librarian",
            "carpenter",
            "shopkeeper",
            "painter",
            "clockmaker",
            "baker",
            "farmer",
            "music teacher",
            "tailor",
            "postman" if not woman else "nurse",
        ]
    )
    words = {"intro": f"{called}, {{the {kind}|an old {kind}|a kind {kind}}},", "call": called, "a": f"a {kind}"}
    return Person(called, "she" if woman else "he", kind, f"the {{old |}}{kind}", words=words)


def relative(choices):
    """A member of the hero's family."""

    def make(story):
        noun, call, pronoun = story.rng.choice(choices)
        if call and call.lower() != noun and story.rng.random() < 0.4:
            return Person(call, pronoun, noun, words={"call": call, "intro": call, "a": noun})
        return Person(noun, pronoun, noun, owner="h", words={"call": call, "intro": noun, "a": noun})

    return make


PARENTS = [
    ("mother", "Mother", "she"),
    ("mother", "Mama", "she"),
    ("mom", "Mom", "she"),
    ("father", "Father", "he"),
    ("father", "Papa", "he"),
    ("dad", "Dad", "he"),
]
GRANDPARENTS = [
    ("grandmother", "Grandmother", "she"),
    ("grandma", "Grandma", "she"),
    ("grandpa", "Grandpa", "he"),
    ("grandfather", "Grandfather", "he"),
    ("grandmother", "Granny", "she"),
]


def pet(story):
    rng = story.rng
    kind = rng.choice(list(PETS))
    called = name(story, PETS[kind])
    return Person(
        called,
        rng.choice(["he", "she"]),
        kind,
        f"the {kind}",
        words={
            "intro": f"a {kind} named {called}",
            "a": f"a {kind}",
            "call": called,
            "home": "a basket by the stove",
            "hand": "paw",
        },
    )


def critter(story):
    """A wild animal without a name."""
    kind = story.rng.choice(
        [
            "sparrow",
            "robin",
            "duckling",
            "fawn",
            "lamb",
            "owl",
            "swallow",
            "gosling",
            "hare",
            "turtle",
            "blackbird",
            "hedgehog cub",
            "baby squirrel",
            "crow",
            "dove",
            "young seal",
            "calf",
        ]
    )
    return Person(f"the {kind}", "it", kind, words={"a": f"a {kind}", "intro": f"a {kind}", "call": kind})


MAKERS = {
    "child": child,
    "fable": fable,
    "hero": hero,
    "friend": friend,
    "elder": elder,
    "parent": relative(PARENTS),
    "grandparent": relative(GRANDPARENTS),
    "pet": pet,
    "critter": critter,
    "mother": relative(PARENTS[:3]),
    "father": relative(PARENTS[3:]),
    "sibling": relative(
        [
            ("little brother", "", "he"),
            ("little sister", "", "she"),
            ("big sister", "", "she"),
            ("big brother", "", "he"),
            ("cousin", "", "he"),
            ("cousin", "", "she"),
        ]
    ),
    "small": relative([("little brother", "", "he"), ("little sister", "", "she")]),
    "big": relative([("big brother", "", "he"), ("big sister", "", "she"), ("older cousin", "", "he")]),
}
