"""The question families of the `tiny` training data, except tools, chats and stories.

Every function draws one prompt with exactly one right answer and returns `(prompt, answer)`; the ones named
`*_thinking` return an answer that starts with a thought channel.
"""

import json
from random import Random

from words import (
    CAPITALS,
    CATEGORIES,
    CITIES,
    DAYS,
    FIXED_LISTS,
    ITEMS,
    MONTHS,
    NAMES,
    NUMBER_WORDS,
    SPELLED,
    WORDS,
)

ADD_PROMPTS = [
    "What is {a} + {b}?",
    "{a} + {b} = ?",
    "How much is {a} + {b}?",
    "Calculate {a} + {b}.",
    "Add {a} and {b}.",
]
SUBTRACT_PROMPTS = [
    "What is {a} - {b}?",
    "{a} - {b} = ?",
    "How much is {a} - {b}?",
    "Calculate {a} - {b}.",
    "Subtract {b} from {a}.",
]


def with_thought(thought: str, answer: str) -> str:
    """Put `thought` into a thought channel in front of `answer`."""
    return f"<|channel>thought\n{thought}\n<channel|>{answer}"


def _sum_prompt(rng: Random, a: int, b: int, subtract: bool) -> str:
    return rng.choice(SUBTRACT_PROMPTS if subtract else ADD_PROMPTS).format(a=a, b=b)


def _ones_and_tens(a: int, b: int, subtract: bool) -> tuple[str, str, int]:
    """Work out `a + b` or `a - b` digit by digit. Returns the ones' line, the tens' line and the result."""
    (a10, a1), (b10, b1) = divmod(a, 10), divmod(b, 10)
    if subtract:
        borrow = int(a1 < b1)
        ones = f"{a1 + 10 * borrow} - {b1} = {a1 + 10 * borrow - b1}"
        return ones, f"{a10} - {b10} - {borrow} = {a10 - b10 - borrow}", a - b
    carry = (a1 + b1) // 10
    return f"{a1} + {b1} = {a1 + b1}", f"{a10} + {b10} + {carry} = {a10 + b10 + carry}", a + b


def _operands(rng: Random, low: int, high: int, subtract: bool) -> tuple[int, int]:
    a, b = rng.randint(low, high), rng.randint(low, high)
    return (max(a, b), min(a, b)) if subtract else (a, b)


def small_sums(rng: Random) -> tuple[str, str]:
    """Sums and differences with operands to 20, answered directly."""
    subtract = rng.random() < 0.5
    a, b = _operands(rng, 0, 20, subtract)
    return _sum_prompt(rng, a, b, subtract), str(a - b if subtract else a + b)


def worked_sums(rng: Random) -> tuple[str, str]:
    """Sums and differences with an operand above 20, answered with a short visible working."""
    subtract = rng.random() < 0.5
    a, b = _operands(rng, 1, 99, subtract)
    while max(a, b) <= 20:
        a, b = _operands(rng, 1, 99, subtract)
    ones, tens, result = _ones_and_tens(a, b, subtract)
    sign = "-" if subtract else "+"
    return _sum_prompt(rng, a, b, subtract), f"Ones: {ones}. Tens: {tens}. So {a} {sign} {b} = {result}."


def sums_thinking(rng: Random) -> tuple[str, str]:
    """Sums and differences with operands to 99, worked out digit by digit in the thought channel."""
    subtract = rng.random() < 0.5
    a, b = _operands(rng, 1, 99, subtract)
    ones, tens, result = _ones_and_tens(a, b, subtract)
    return _sum_prompt(rng, a, b, subtract), with_thought(f"Ones: {ones}. Tens: {tens}.", str(result))


def capitals(rng: Random) -> tuple[str, str]:
    """Capitals of 60 countries, both ways."""
    country = rng.choice(list(CAPITALS))
    city = CAPITALS[country]
    if rng.random() < 0.3:
        prompt = rng.choice(["Which country has the capital {}?", "Of which country is {} the capital?"])
        return prompt.format(city), f"The country is {country}."
    prompts = [
        "What is the capital of {}?",
        "Name the capital of {}.",
        "Capital of {}?",
        "Which city is the capital of {}?",
        "Tell me the capital of {}.",
    ]
    return rng.choice(prompts).format(country), f"The capital of {country} is {city}."


def capitals_thinking(rng: Random) -> tuple[str, str]:
    """Capitals, with a thought that names the country."""
    prompt, answer = capitals(rng)
    return prompt, with_thought("This is a question about a capital.", answer)


def sort_words(rng: Random) -> tuple[str, str]:
    """Three or four words put in alphabetical order."""
    words = rng.sample(WORDS, rng.randint(3, 4))
    prompt = rng.choice(
        ["Sort these words: {}", "Put these words in alphabetical order: {}", "Sort alphabetically: {}"]
    )
    return prompt.format(", ".join(words)), "Sorted: " + ", ".join(sorted(words))


def reverse_words(rng: Random) -> tuple[str, str]:
    """Three to six words in reverse order."""
    words = rng.sample(WORDS, rng.randint(3, 6))
    prompt = rng.choice(
        ["Reverse the order of these words: {}", "Write these words in reverse order: {}", "Reverse: {}"]
    )
    return prompt.format(", ".join(words)), "Reversed: " + ", ".join(reversed(words))


def spelling(rng: Random) -> tuple[str, str]:
    """A listed word (each is one token) spelled letter by letter, forwards or backwards."""
    word = rng.choice(WORDS + SPELLED)
    if rng.random() < 0.4:
        prompt = rng.choice(["Spell {} backwards.", "Spell the word {} backwards."])
        return prompt.format(word), "-".join(reversed(word))
    prompt = rng.choice(["Spell the word {}.", "Spell {}.", "How do you spell {}?"])
    return prompt.format(word), "-".join(word)


def json_records(rng: Random) -> tuple[str, str]:
    """A sentence turned into a JSON object."""
    name, city = rng.choice(NAMES), rng.choice(CITIES)
    kind = rng.randrange(3)
    if kind == 0:
        age = rng.randint(18, 80)
        sentence = f"{name} is {age} years old and lives in {city}."
        record: dict[str, str | int] = {"name": name, "age": age, "city": city}
    elif kind == 1:
        item, count, price = rng.choice(ITEMS), rng.randint(2, 20), rng.randint(1, 99)
        sentence = f"{name} bought {count} {item} for {price} dollars."
        record = {"name": name, "item": item, "count": count, "price": price}
    else:
        day, hour = rng.choice(DAYS), rng.randint(8, 20)
        sentence = f"{name} arrives in {city} on {day} at {hour}:00."
        record = {"name": name, "city": city, "day": day, "hour": hour}
    prompt = rng.choice(["Write as JSON: {}", "Turn this sentence into JSON: {}", "{} Give me that as JSON."])
    return prompt.format(sentence), json.dumps(record)


def dates(rng: Random) -> tuple[str, str]:
    """Dates to ISO, and a few back."""
    day, month, year = rng.randint(1, 28), rng.randint(1, 12), rng.randint(1900, 2099)
    name, iso = MONTHS[month - 1], f"{year}-{month:02d}-{day:02d}"
    if rng.random() < 0.2:
        return f"Write {iso} in words.", f"{day} {name} {year}"
    date = rng.choice([f"{day} {name} {year}", f"{name} {day}, {year}"])
    return rng.choice(["Write {} as an ISO date.", "Give the ISO date of {}.", "{} in ISO format?"]).format(date), iso


def _bullets(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def lists(rng: Random) -> tuple[str, str]:
    """Fixed lists, the first few of a category, and short number sequences."""
    kind = rng.randrange(4)
    if kind == 0:
        what = rng.choice(list(FIXED_LISTS))
        return rng.choice(["List {}.", "Name {}.", "What are {}?"]).format(what), _bullets(FIXED_LISTS[what])
    if kind == 1:
        what, n = rng.choice(list(CATEGORIES)), rng.randint(2, 5)
        prompt = rng.choice(["List {} {}.", "Name {} {}.", "Give me {} {}."])
        return prompt.format(NUMBER_WORDS[n], what), _bullets(CATEGORIES[what][:n])
    if kind == 2:
        parity, start, n = rng.choice(["even", "odd"]), rng.randint(0, 40), rng.randint(3, 8)
        start += int(start % 2 != (parity == "odd"))
        numbers = range(start, start + 2 * n, 2)
        return f"List the {parity} numbers from {numbers[0]} to {numbers[-1]}.", ", ".join(map(str, numbers))
    factor, n = rng.randint(2, 9), rng.randint(3, 8)
    return f"List the first {n} multiples of {factor}.", ", ".join(str(factor * i) for i in range(1, n + 1))


def counting(rng: Random) -> tuple[str, str]:
    """Counting up from 1, usually over more than one canvas."""
    last = rng.randint(5, 60)
    prompts = ["Count to {}.", "Count up to {}.", "Count from 1 to {}.", "Count up from 1 to {}."]
    return rng.choice([*prompts, "Write the numbers from 1 to {}."]).format(last), ", ".join(
        map(str, range(1, last + 1))
    )


def counting_between(rng: Random) -> tuple[str, str]:
    """Counting up from any number, usually over more than one canvas."""
    start, length = rng.randint(1, 40), rng.randint(6, 46)
    numbers = range(start, start + length)
    prompt = rng.choice(["Count from {} to {}.", "Count up from {} to {}.", "Write the numbers from {} to {}."])
    return prompt.format(numbers[0], numbers[-1]), ", ".join(map(str, numbers))


SMALL_TALK: dict[str, str] = {
    "Hello": "Hello! How can I help you?",
    "Hello!": "Hello! How can I help you?",
    "Hi": "Hello! How can I help you?",
    "Hi!": "Hello! How can I help you?",
    "Hi there": "Hello! How can I help you?",
    "Good morning": "Good morning! How can I help you?",
    "Good evening": "Good evening! How can I help you?",
    "How are you?": "I am fine, thank you. How can I help you?",
    "Who are you?": "I am tiny, a small block diffusion model.",
    "What are you?": "I am tiny, a small block diffusion model.",
    "What is your name?": "My name is tiny.",
    "What can you do?": "I can add, sort, spell, count, write JSON and dates, call tools and tell stories.",
    "Thank you": "You are welcome!",
    "Thanks!": "You are welcome!",
    "Goodbye": "Goodbye!",
    "Bye": "Goodbye!",
}


CASUAL: dict[str, str] = {
    "hello": "Hello",
    "hello!": "Hello",
    "hello there": "Hello",
    "hi": "Hello",
    "hi there": "Hello",
    "hey": "Hello",
    "good morning": "Good morning",
    "how are you": "How are you?",
    "how are you?": "How are you?",
    "who are you": "Who are you?",
    "who are you?": "Who are you?",
    "what is your name?": "What is your name?",
    "what can you do": "What can you do?",
    "what can you do?": "What can you do?",
    "thank you": "Thank you",
    "thanks": "Thank you",
    "bye": "Bye",
}


def small_talk(rng: Random) -> tuple[str, str]:
    """A greeting or a question about the model."""
    return rng.choice(list(SMALL_TALK.items()))


def casual_talk(rng: Random) -> tuple[str, str]:
    """Small talk as people type it."""
    prompt, known = rng.choice(list(CASUAL.items()))
    return prompt, SMALL_TALK[known]


def introductions(rng: Random) -> tuple[str, str]:
    """Somebody says a name: how a conversation begins."""
    name = rng.choice(NAMES)
    return rng.choice(["My name is {}.", "I am {}.", "I'm {}."]).format(name), f"Nice to meet you, {name}!"
