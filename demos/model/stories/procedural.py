"""Plots whose shape changes with every telling: chains, searches, rounds. Each takes a Story and tells it."""

TRADE = [  # what someone has, and why he or she needs what the chain brings
    ("a ball of string", "My gate will not stay shut", "the goat gets out every night"),
    ("a jar of honey", "I have a sore throat", "I must sing on Sunday"),
    ("a warm blanket", "My hens will not lay in this cold", "I have not had an egg for weeks"),
    ("a basket of eggs", "I want to bake a cake", "my daughter is getting married"),
    ("a sharp knife", "I have nothing to cut my bread with", "I am tired of tearing it"),
    ("a bundle of firewood", "My stove is cold", "the baby has a cough"),
    ("a red ribbon", "My cow has lost her bell", "I cannot tell her from the others anymore"),
    ("a sack of flour", "There is not a crumb in the house", "my brothers are coming to supper"),
    ("a tin whistle", "My dog does not listen to me", "he runs off whenever he likes"),
    ("a lantern", "It gets dark so early", "I have fallen over the step twice"),
    ("a pair of boots", "My feet are always wet", "I walk to the mill every day"),
    ("a wooden spoon", "I have only my fingers to stir with", "the soup is hot"),
    ("a good rope", "My boat drifts away", "the river is high"),
    ("a straw hat", "The sun burns my head", "I work in the field all day"),
]
PEOPLE = [
    "an old woman",
    "a farmer",
    "a boy with a cart",
    "a miller",
    "a fisherman",
    "a girl with two braids",
    "a shepherd",
    "a tinker",
    "a washerwoman",
    "a man with a long beard",
    "a soldier",
    "a peddler",
    "a milkmaid",
    "a hunter",
]
HERS = {"an old woman", "a girl with two braids", "a washerwoman", "a milkmaid"}


def the(noun):
    """'a farmer' -> 'the farmer'."""
    return "the " + noun.split(" ", 1)[1]


def trade_chain(s):
    """Someone needs a thing, whose owner needs another thing, and so on; then all the way back."""
    r = s.rng
    length = r.randint(2, 4)
    things = r.sample(TRADE, length)
    people = r.sample(PEOPLE, length)
    s.say("[h=hero] [m=parent] <open>")
    first = things[0][0]
    names = [thing for thing, _, _ in things]
    s.say(
        f'<one_day>, {{[m] said, "We need {first}, and there is none in the house. Will you see what you can find?"|'
        f"[h.n] needed {first}, but there was none at home}}. So [h.he] {{set off|went out to look}}."
    )
    for i, (thing, person) in enumerate(zip(names, people)):
        pronoun = "she" if person in HERS else "he"
        s.say(
            f"{{On the road|At the crossroads|By the bridge|Near the church}} [h.he] met {person}."
            if i == 0
            else f"{{[h] found|So [h.n] went to|Then [h.n] looked for}} {person}."
        )
        s.say(f'"{{Have you got|Can you give me|Do you have}} {thing}?" asked [h.n].')
        if i + 1 < length:
            want, why, more = things[i + 1]
            s.say(
                f'"{{I have|I do}}," said {the(person)}, "but I need something, too. {why}, and {more}. '
                f'{{Bring me {want}, and|If you bring me {want},}} you {{shall have|may have}} what you want."'
            )
            s.say(
                '{[h] nodded and went on.|"I will," said [h.n].|So [h.n] had to go farther.|'
                f'"Where can I find {want}?" [h.n] thought. [h] walked on.}}'
            )
        else:
            s.say(
                f'"{{Yes, I have|Of course|I have two}}," said {the(person)}. '
                '"{And I need nothing for it|Take it. You look tired|Only tell me a story for it}."'
            )
            s.say(
                f"{{[h] thanked {the(person)} a hundred times.|[h] told the best story that [h.he] knew.|"
                f"{pronoun} would not take anything for it.}}"
            )
    s.paragraph()
    for i in reversed(range(length - 1)):
        s.say(
            f"{{So [h.n] brought|[h] carried|Then [h.n] gave}} {the(things[i + 1][0])} to {the(people[i])}"
            f"{{, who was delighted|, who laughed for joy|}}, and {{got|received}} {things[i][0]}"
            "{ in return|, just as they had agreed|}."
        )
    s.say(
        f'<time> [h.n] came home with {the(first)}. "{{What took you so long|Where have you been all day}}?" asked '
        '[m]. {"It is a long story," said [h.n].|[h] told everything, from beginning to end.} '
        '{And [m] laughed until [m.he] cried.|"Then everyone has what they needed," said [m].}'
    )
    s.say("<end>")


PLACES = [
    ("behind the stove", "a thimble"),
    ("under the bed", "one gray sock"),
    ("in the old jug", "a dried pea"),
    ("on top of the wardrobe", "a great deal of dust"),
    ("in the woodbox", "a sleeping cat"),
    ("behind the mirror", "a forgotten letter"),
    ("in the rain barrel", "two frogs"),
    ("under the doormat", "a flat beetle"),
    ("in the coat pockets", "three nuts and a ticket"),
    ("in the flour bin", "only flour"),
    ("behind the clock", "a mouse, which looked very surprised"),
    ("in the sewing basket", "a hundred buttons"),
    ("under the stairs", "a broken umbrella"),
    ("in the bread box", "a heel of bread"),
    ("among the flowerpots", "a snail"),
]
LOST = [
    ("glasses", "them", "are", "on top of [g.his] head", "could not read the newspaper"),
    ("hat", "it", "is", "on the scarecrow in the garden", "would not go out without it"),
    ("keys", "them", "are", "in the lock, on the outside of the door", "could not lock the door"),
    ("left slipper", "it", "is", "in the dog's basket", "had to hop about on one foot"),
    ("pipe", "it", "is", "in [g.his] own mouth", "could not think without it"),
    ("spoon", "it", "is", "in the jam", "could not eat the soup"),
]


def house_search(s):
    """Something is looked for in one place after another, and each place holds something else."""
    r = s.rng
    thing, it, are, where, why = r.choice(LOST)
    s.say("[h=child] [g=grandparent] <open>")
    s.say(
        f'<one_day>, [g.n] {{could not find|had lost}} [g.his] {thing}. "{{Where {are} my {thing}|I have looked '
        f'everywhere for my {thing}}}?" [g.he] said. [g] {why}. "I will find {it}," said [h.n].'
    )
    spots = r.sample(PLACES, r.randint(3, 5))
    for i, (place, found) in enumerate(spots):
        s.say(
            r.choice(
                [
                    f"[h] looked {place}. {{But all [h.he] found there was|There [h.he] found}} {found}{{, and nothing else|}}.",
                    f"{{Then|Next}} [h.he] looked {place}, and [h.he] found {found}.".replace("{Then|Next}", "First")
                    if i == 0
                    else f"{{Then|Next}} [h.he] looked {place}, and [h.he] found {found}.",
                    f"{place.capitalize()} [h.he] found {found}.",
                    f'"Perhaps {place}," said [h.n]. But there [h.he] found only {found.removeprefix("only ")}.',
                ]
            )
        )
        if r.random() < 0.3:
            s.say('{"Not there, either," said [h.n].|[g] sighed.|"Look again," said [g].|[h] did not give up.}')
    s.say(
        "{At last [h.he] sat down on the floor.|[h] was covered with dust.|By now the whole house was upside down.} "
        f'Then [h.he] looked at [g.o], and [h.he] began to {{laugh|giggle}}. "{{What is so funny|Why are you laughing}}?" '
        f"asked [g]. The {thing} {'were' if it == 'them' else 'was'} {where}!"
        if "[g.his]" in where
        else f"{{At last|Then}} [h.he] went outside to {{think|sweep the step|get some air}}. And there [h.he] saw {it}. "
        f"The {thing} {'were' if it == 'them' else 'was'} {where}!"
    )
    s.say(
        f'"{{And all the time I was looking|Well, I never|How did that happen|What would I do without you}}?" said [g], '
        "and {they both laughed until they had to sit down|[g.he] laughed until [g.his] eyes were wet}. "
        '{Then they cleaned up together.|"Now we only have to put everything back," said [h.n].|<meal>}'
    )


RIDDLES = [
    ("What has teeth but cannot bite", "A comb"),
    ("What gets wetter the more it dries", "A towel"),
    ("What has hands but cannot clap", "A clock"),
    ("What runs all day but never gets tired", "A river"),
    ("What has one eye but cannot see", "A needle"),
    ("What has a neck but no head", "A bottle"),
    ("What goes up when the rain comes down", "An umbrella"),
    ("What can you catch but not throw", "A cold"),
    ("What has legs but cannot walk", "A table"),
    ("What grows bigger the more you take away from it", "A hole"),
    ("What has leaves but is not a tree", "A book"),
    ("What follows you all day and leaves you at night", "My shadow"),
    ("What falls every winter and never gets hurt", "Snow"),
    ("What has a bed but never sleeps", "A river"),
    ("What has ears but cannot hear", "A field of corn"),
    ("What belongs to you, although others use it more than you do", "My name"),
    ("What speaks every language and has no mouth", "An echo"),
    ("What can fill a room and takes up no space", "Light"),
]


def riddle_bridge(s):
    """A keeper lets no one pass who cannot answer."""
    r = s.rng
    keeper, pronoun = r.choice(
        [
            ("an old troll", "he"),
            ("a gray goose", "she"),
            ("a giant with a broom", "he"),
            ("a very old woman", "she"),
            ("a toad in a green coat", "he"),
            ("a tall heron", "she"),
        ]
    )
    short = the(keeper)
    s.say("[h=hero] <open>")
    s.say(
        "<one_day>, [h.n] had to {cross the river to visit [h.his] aunt|take a basket to the other side of the valley|get to "
        f'the town before dark}}. But on the bridge {{sat|stood}} {keeper}. "{{Nobody crosses my bridge for nothing|Stop}}," '
        f'said {short}. "{{Answer my riddles, and you may pass|First you must answer me}}."'
    )
    count = r.randint(2, 3)
    for i, (question, answer) in enumerate(r.sample(RIDDLES, count)):
        s.say(
            f'"{["Here is the first one", "Now the second", "And now the last"][i if i < count - 1 else 2]}. '
            f'{question}?" {{asked {short}|{pronoun} asked}}.'
        )
        s.say(
            r.choice(
                [
                    "<think c=h>",
                    "[h] {looked around|looked at the water|walked up and down}.",
                    "That was {hard|not easy}. <think c=h>",
                    "[h] did not have to think for long.",
                ]
            )
        )
        s.say(
            f'"{answer}!" {{said|cried|answered}} [h.n]. '
            + r.choice(
                [
                    f"{short} {{nodded slowly|frowned|grumbled something}}.",
                    f'"{{Right|Correct|Not bad}}," {pronoun} said.',
                    f'"{{How did you know|That was too easy}}?" {pronoun} said.',
                ]
            )
        )
    s.say(
        '{Now the way was free.|"You may pass," '
        + pronoun
        + ' said.} But [h.n] did not go. "{Now I have one for you|May I '
        'ask you something, too}?" [h.he] said. "{Who sits on a bridge all day and has no one to talk to|Who asks and asks, '
        f'and is never asked anything}}?" ^{short} {{was silent for a long time|turned red}}. "I do," {pronoun} said {{at last|'
        "quietly}."
    )
    s.say(
        '{So [h.n] sat down, and they shared what was in the basket.|"Then I will come again tomorrow," said [h.n].|"Come with '
        'me," said [h.n]. "There is enough cake for two."} {And after that, everyone could cross the bridge for nothing.|'
        "From then on, they told each other riddles every week.|And the bridge had a friendly keeper from that day on.}"
    )


WAYS = [
    ("the bear", "in the cave", "yawned and turned over"),
    ("the squirrel", "in the oak", "dropped a nut in surprise"),
    ("the frog", "by the pond", "blinked twice"),
    ("the owl", "in the hollow tree", "opened one eye"),
    ("the hare", "in the meadow", "stopped in the middle of a jump"),
    ("the fox", "in the den", "smiled a thin smile"),
    ("the hedgehog", "under the hedge", "put down a leaf"),
    ("the duck", "on the lake", "came paddling over"),
    ("the mole", "in the garden", "put out a pink nose"),
    ("the crow", "on the fence", "tilted its head"),
    ("the snail", "on the wall", "took a long time to answer"),
    ("the deer", "among the birches", "lifted its head"),
]
QUESTIONS = [
    (
        "where the sun goes at night",
        "behind the hill",
        "into the sea",
        "under the roots of the trees",
        "to the other side of the world, where children are just getting up",
    ),
    (
        "what the most beautiful sound in the world is",
        "the sound of nuts falling",
        "a long, deep silence",
        "rain on the water",
        "someone calling you to supper",
    ),
    (
        "what happiness is",
        "a full cupboard",
        "a warm, dry bed",
        "plenty of mud",
        "having someone to ask, and someone to tell",
    ),
    (
        "who is the strongest in the world",
        "the storm",
        "the river, which carries off trees",
        "the winter",
        "the little green shoot, because it lifts the stone",
    ),
    (
        "what lies beyond the mountains",
        "more mountains",
        "a great green valley",
        "nothing at all",
        "somebody who is wondering what lies on this side",
    ),
]


def asking_around(s):
    """A question is asked of one animal after another; the last answer is found at home."""
    r = s.rng
    what, *answers, best = r.choice(QUESTIONS)
    asked = r.sample(WAYS, r.randint(2, 3))
    r.shuffle(answers)
    s.say("[h=hero] [m=parent] <open>")
    s.say(
        f"<one_day>, [h.n] {{wondered|wanted to know}} {what}. {{Nobody at home had time|[h] thought about it all morning}}. "
        "So [h.he] went out to ask."
    )
    for i, ((who, where, does), answer) in enumerate(zip(asked, answers)):
        s.say(
            f"{{{['First', 'Then', 'After that'][i]} [h.he] came to {who} {where}|{['At first', 'Next', 'Then'][i]} [h.he] "
            f'asked {who} {where}}}. "{{Do you know|Can you tell me}} {what}?" asked [h.n]. {who} {does}. '
            f'"{{That is easy|Everyone knows that|I can tell you}}," {{said {who}|it said}}. "{answer[0].upper()}{answer[1:]}."'
        )
        s.say(
            r.choice(
                [
                    "{[h] was not so sure.|That did not sound right.|[h] thanked it and went on.}",
                    '"{Thank you|I see}," said [h.n], but [h.he] was not quite satisfied.',
                    "<think c=h>",
                ]
            )
        )
    s.say(
        f'In the evening [h.n] came home, {{tired|hungry}} and {{with a head full of answers|no wiser than before}}. "{{Everyone '
        f'tells me something different|They cannot all be right}}," [h.he] said to [m.o]. "What do you think?"'
    )
    s.say(
        f'^[m] {{thought for a while|put down [m.his] work}}. "{{Perhaps they are all a little right|Each of them sees it from '
        f'where it lives}}," [m.he] said. "{{But if you ask me, it is this|And this is what I think}}: {best}." '
        '{[h] thought about that for a long time.|[h] smiled. That was the answer.|"Yes," said [h.n]. "I think so, too."}'
    )
    s.say("{<sleep c=h>|<sky>}")


NIGHTS = [
    "[h.he] heard {something scratch at the wall|the wind talk in the chimney|an owl cry three times}",
    "it was so cold that the water froze in the cup",
    "rain came through the roof, and [h.he] had to move the bed",
    "[h.he] dreamed of home and woke with wet eyes",
    "a mouse came and sat on the table as if it lived there",
    "the stars were so near that [h.he] could almost touch them",
]


def three_tasks(s):
    """Three tasks, three helpers who were helped before."""
    r = s.rng
    helpers = r.sample(
        [
            (
                "ants",
                "An ant was struggling in a puddle, and [h.n] lifted it out with a straw",
                "to sort a heap of peas and lentils before sunrise",
                "the ants came, a thousand of them, and by midnight there were two neat heaps",
            ),
            (
                "fish",
                "A fish lay gasping on the bank, and [h.n] put it back into the water",
                "to find a ring that lay at the bottom of the lake",
                "a silver head came up out of the water, and the fish laid the ring at [h.s] feet",
            ),
            (
                "birds",
                "A young bird had fallen from its nest, and [h.n] climbed up and put it back",
                "to bring an apple from the top of a tree that was as high as a tower",
                "a great flock of birds flew up, and the apple dropped into [h.s] hands",
            ),
            (
                "bees",
                "Some bees had been caught by the rain, and [h.n] covered their hive with a coat",
                "to find, among twelve roses made of silk, the only real one",
                "a bee came in at the window, and it settled on the third rose from the left",
            ),
            (
                "mole",
                "A mole sat in the hot sun and could not find its hole, and [h.n] carried it into the shade",
                "to dig a well in one single night",
                "the ground began to move, and in the morning there was a hole so deep that no one could see the end",
            ),
            (
                "fireflies",
                "A firefly hung in a spider's web, and [h.n] set it free",
                "to walk through the great dark wood without a lamp",
                "small lights came from all sides, and they showed [h.o] the path",
            ),
        ],
        r.randint(2, 3),
    )
    reward = r.choice(
        [
            "a well that never runs dry",
            "the old mill",
            "a horse",
            "the medicine that [m] needed",
            "enough gold to mend the roof",
        ]
    )
    s.say("[h=child] [m=parent] <open>")
    s.say(
        f"[m.n] {{was ill|was worried, for the winter had been hard}}. Now {{it was said that|people said that}} a {{queen|king|rich old "
        f"lady}} beyond the hills would give {reward} to anyone who could {{do|finish}} {['two', 'three'][len(helpers) - 2]} "
        '{hard tasks|tasks}. "{I will try|Let me go}," said [h.n].'
    )
    s.say("On the way {[h.he] was in a hurry, but [h.he] stopped all the same|several things happened}.")
    for _, meeting, _, _ in helpers:
        s.say(
            meeting
            + r.choice(
                [".", '. "{We will not forget it|I will remember you}," said a small voice.', ". Then [h.he] went on."]
            )
        )
    s.paragraph()
    for i, (_, _, task, done) in enumerate(helpers):
        s.say(
            f"The {['first', 'second', 'third'][i]} task was {task}. "
            + r.choice(
                [
                    '"{Nobody can do that|That cannot be done}," thought [h.n].',
                    "[h] {sat down and did not know what to do|looked at it and lost heart}.",
                    "{Many had tried it before, and all had failed|The others had all gone home by then}.",
                ]
            )
        )
        s.say(f"{{But then|Just then|In the night}} {done}.")
    s.say(
        '{Everyone was amazed.|"How did you do that?" they asked.} "{I had help|I did not do it alone}," said [h.n]. '
        f"{{And so [h.he] got {reward}|[h] was given {reward}}}, and {{went home as fast as [h.he] could|went home singing}}. "
        "{[m] got well again.|Nobody in that house was ever hungry again.|On the way [h.he] thanked every one of them.}"
    )
    s.say("<moral_help>")


def week_of_days(s):
    """A plan that needs every day of the week."""
    r = s.rng
    days = "Monday Tuesday Wednesday Thursday Friday Saturday".split()[: r.randint(4, 6)]
    s.say("[h=hero] [k=friend] [q=craft] <open>")
    s.say(
        "[h] wanted to make [q], and it had to be ready by Sunday, {because [k.n] was coming to visit|for that was [k.s] birthday}."
    )
    does = [
        "[h.he] drew a plan on the back of an old letter",
        "[h.he] gathered everything that was needed: [q.need]",
        "[h.he] [q.a]",
        "[q.bad], and [h.he] had to begin again",
        "[h.he] [q.b]",
        "[h.he] worked from morning to night, and only one small piece was missing",
    ]
    keep = sorted(r.sample(range(1, 5), len(days) - 2))
    for day, i in zip(days, [0, *keep, 5]):
        s.say(
            r.choice(
                [
                    f"On {day} {does[i]}.",
                    f"{day} came, and {does[i]}.",
                    f"On {day} {{it rained, but|the sun shone, and}} {does[i]}.",
                ]
            )
        )
        if r.random() < 0.35:
            s.say(
                '{In the evening [h.his] back hurt.|"It is coming along," said [h.n].|Then [h.he] slept like a stone.|<detail>|'
                "[h] sang as [h.he] worked.}"
            )
    s.say(
        '{On Sunday|And on Sunday} it was done: [q.good]. {[k.n] came up the path and stood still.|"Did you make this?" asked [k.n].} '
        '"{It is for you|It took me only a week|Do you like it}," said [h.n]. <happy c=k> <end>'
    )


def weather_walk(s):
    """A walk on which the weather turns, and each turn is met."""
    r = s.rng
    turns = r.sample(
        [
            "Then the wind came up. It took [h.s] hat, and [h.he] had to run after it.",
            "A few drops fell, and then many. [h] {crept under a bush|ran to the nearest tree} and waited. The rain {smelled good|drummed on the "
            "leaves}.",
            "After that, the sun came out so strongly that {the road steamed|[h.he] took off [h.his] coat}.",
            "Fog rolled down from the hill, and for a while [h.he] could see nothing but [h.his] own feet. [h] {counted [h.his] steps|held on to "
            "the fence}.",
            "There was a rumble far away. [h] {looked for shelter in a barn|lay down flat in a hollow} until the thunder had gone by.",
            "It grew cold all at once, and small hard grains of ice {jumped on the road|stung [h.his] nose}. They melted as soon as they fell.",
        ],
        r.randint(2, 4),
    )
    s.say("[h=hero] [k=friend] [g=grandparent] <open>")
    s.say("[h.s] [g.kind] lived {an hour away|on the other side of the hill|beyond the mill}.")
    s.say(
        '<one_day>, [h.n] set out to {bring [g.o] a pot of soup|visit [g.o]|take a letter to [g.o]}. {The sky was blue when [h.he] left.|"Take a coat," they told [h.o], and luckily [h.he] did.}'
    )
    for turn in turns:
        s.say(turn)
        if r.random() < 0.4:
            s.say("<interlude>")
    s.say(
        '{At last|Two hours later} [h.he] stood at [g.s] door, {wet, dry, and wet again|with mud on [h.his] knees}. "{Did you have a good walk|What '
        'is it like outside}?" asked [g]. {[h] thought about it.|[h] began to laugh.} "{There was a bit of everything|It was never boring}," said '
        "[h.n]. [g] {put a blanket around [h.o]|hung the coat by the fire}, and [dr=drink] they drank [dr] {and looked out of the window|and told "
        "each other about all the weather they had ever seen}. {Outside, the sun was shining again.|Then it began to snow.}"
    )


PLOTS = {
    f.__name__: f
    for f in (trade_chain, house_search, riddle_bridge, asking_around, three_tasks, week_of_days, weather_walk)
}
