"""Stories and paragraphs of two to five canvases, fixed by the slots that the prompt names."""

from random import Random

from words import ANIMALS, CITIES, COLOURS, DAYS, JOBS, NAMES, OBJECTS, PLACES

STORY = (
    "Once upon a time there was a {animal} named {name} who lived near a quiet {place}. "
    "One morning {name} walked into the {place} and saw a {colour} {thing} under a tree. ",
    '"What a fine {thing}," said the {animal}, and took it to the old king of the {place}. "Is it yours?" '
    'The king looked at the {colour} {thing} for a long time. "No," he said. "Ask {friend}." ',
    "{name} walked on until the sun went down. {friend} sat by a small fire and looked very sad. "
    '"I lost my {thing}," said {friend}. The {animal} smiled and gave the {colour} {thing} back. ',
    "That night it began to rain. {friend} and the {animal} ran to a dry cave and waited. "
    "They told each other stories about the moon and the stars. "
    "In the morning the sky over the {place} was clear and bright. ",
)
STORY_END = "From that day on {name} and {friend} were best friends."
STORY_PARTS = {"short ": (0, 2), "": (0, 1, 2), "long ": (0, 1, 2, 3)}

DEFAULTS = {"name": "Mia", "friend": "Leo", "animal": "fox", "colour": "golden", "thing": "key", "place": "forest"}
STORY_PROMPTS: dict[str, tuple[str, ...]] = {
    ".": (),
    " about a {animal}.": ("animal",),
    " about a {animal} named {name}.": ("animal", "name"),
    " about a {animal} named {name} who finds a {colour} {thing} in the {place} and meets {friend}.": tuple(DEFAULTS),
}

DAY = (
    "This is {name}, a {job} in {city}. Every {day} {name} gets up before the sun and drinks a cup of tea. "
    "Then the {job} opens the shop and makes {goods} that all the people of {city} like. ",
    "At noon the shop is full. Some people buy {goods}, some only want to talk. "
    "In the afternoon a friend comes by and they eat together. ",
)
DAY_END = "In the evening the {job} closes the shop, walks home through {city} and sleeps well."
DAY_PARTS = {"short ": (0,), "": (0, 1)}


def story(rng: Random) -> tuple[str, str]:
    """Draw a story. Returns the prompt and its one right answer."""
    name, friend = rng.sample(NAMES, 2)
    size = rng.choice(list(STORY_PARTS))
    drawn = {
        "name": name,
        "friend": friend,
        "animal": rng.choice(ANIMALS),
        "colour": rng.choice(COLOURS),
        "thing": rng.choice(OBJECTS),
        "place": rng.choice(PLACES),
    }
    about, named = rng.choices(list(STORY_PROMPTS.items()), [4, 4, 4, 88])[0]
    slots = DEFAULTS | {key: drawn[key] for key in named}  # slots that the prompt leaves open have fixed values
    prompt = rng.choice(["Tell me", "Write"]) + " a {size}story" + about
    text = "".join(STORY[part] for part in STORY_PARTS[size]) + STORY_END
    return prompt.format(size=size, **slots), text.format(**slots)


def working_day(rng: Random) -> tuple[str, str]:
    """Draw a paragraph about somebody's working day. Returns the prompt and its one right answer."""
    job = rng.choice(list(JOBS))
    size = rng.choice(list(DAY_PARTS))
    slots = {
        "name": rng.choice(NAMES),
        "job": job,
        "goods": JOBS[job],
        "city": rng.choice(CITIES),
        "day": rng.choice(DAYS),
    }
    ask = rng.choice(["Describe", "Write"])
    prompt = ask + " a {size}paragraph about a {day} in the life of {name}, a {job} in {city}."
    text = "".join(DAY[part] for part in DAY_PARTS[size]) + DAY_END
    return prompt.format(size=size, **slots), text.format(**slots)
