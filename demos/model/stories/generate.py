"""Tells stories: python generate.py [--seed N] [--count N] [--plot NAME] prints some to read."""

import argparse
from pathlib import Path

from cast import MAKERS
from grammar import Grammar, Story
from procedural import PLOTS

HERE = Path(__file__).parent
# Plots that no training text tells: the held-out stories.
HELD_OUT = ["lost_child_in_crowd", "quarrel_friends", "patience_seed", "moon_in_pond", "snowed_in", "riddle_bridge"]
# Plots that put many small scenes together: no two are alike, so they are told more often than the others.
SCENES = ["day_of_scenes", "two_scenes_family", "visit_and_talk", "morning_at_work"]
SCENE_SHARE = 0.3


def plots(grammar):
    return sorted({**grammar.plots, **PLOTS})


def tell(grammar, seed, names):
    """A story of one of these plots, or now and then of several, one after the other, with the same hero."""
    story = Story(grammar, seed, MAKERS)
    rng = story.rng
    scenes = [n for n in names if n in SCENES]
    name = rng.choice(scenes if scenes and rng.random() < SCENE_SHARE else names)
    story.airy = rng.choice([0, 0.25, 0.5, 0.8])
    play(story, name)
    while len(names) > 1 and rng.random() < 0.12 and story.episode < 2:
        story.next_episode()
        play(story, rng.choice([n for n in names if n != name and "hero" in heroes(grammar, n)] or names))
    return story.text()


def heroes(grammar, name):
    """'hero' for plots whose hero may be a child or an animal; other plots cannot follow just any."""
    if name in PLOTS:
        return "hero" if name not in ("house_search", "three_tasks") else "child"
    return next(what for _, nodes in grammar.plots[name] for kind, x, what in binds(nodes) if x == "h")


def binds(nodes):
    return [node for node in nodes or [] if node[0] == "bind"]


def play(story, name):
    if name in PLOTS:
        PLOTS[name](story)
    else:
        story.plot(name)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--plot", nargs="*")
    args = parser.parse_args()
    grammar = Grammar(HERE)
    for seed in range(args.seed, args.seed + args.count):
        print(tell(grammar, seed, args.plot or plots(grammar)), "\n\n---\n")


if __name__ == "__main__":
    main()
