"""Word lists of the `tiny` training data. All were written for this project."""

CAPITALS: dict[str, str] = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Germany": "Berlin", "Portugal": "Lisbon",
    "Austria": "Vienna", "Belgium": "Brussels", "Greece": "Athens", "Poland": "Warsaw", "Hungary": "Budapest",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Iceland": "Reykjavik",
    "Ireland": "Dublin", "Scotland": "Edinburgh", "England": "London", "Wales": "Cardiff", "Switzerland": "Bern",
    "Croatia": "Zagreb", "Serbia": "Belgrade", "Romania": "Bucharest", "Bulgaria": "Sofia", "Turkey": "Ankara",
    "Russia": "Moscow", "Ukraine": "Kyiv", "Latvia": "Riga", "Estonia": "Tallinn", "Lithuania": "Vilnius",
    "Japan": "Tokyo", "China": "Beijing", "India": "Delhi", "Nepal": "Kathmandu", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Indonesia": "Jakarta", "Malaysia": "Kuala Lumpur", "Mongolia": "Ulaanbaatar", "Iran": "Tehran",
    "Iraq": "Baghdad", "Israel": "Jerusalem", "Lebanon": "Beirut", "Jordan": "Amman", "Egypt": "Cairo",
    "Morocco": "Rabat", "Tunisia": "Tunis", "Kenya": "Nairobi", "Ghana": "Accra", "Nigeria": "Abuja",
    "Senegal": "Dakar", "Ethiopia": "Addis Ababa", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana",
    "Peru": "Lima", "Chile": "Santiago", "Brazil": "Brasilia", "Argentina": "Buenos Aires", "Australia": "Canberra",
}  # fmt: skip

NAMES = "Ana Ben Cleo Dan Eva Finn Gina Hugo Ida Jack Kate Leo Mia Nora Oscar Paul Rosa Sam Tina Zoe".split()
CITIES = "Paris Rome Berlin Madrid London Oslo Vienna Tokyo Cairo Lima Athens Dublin Lisbon Prague Boston".split()
ITEMS = "apples books cups eggs lamps pens plates roses shoes tickets".split()

# For sorting and reversing.
WORDS = (
    "apple bear bell bird boat bread bus cake cat chair cheese clock cloud coffee cup dog door eagle egg field fire "
    "fish flower fox garden goat grape hat honey horse house ice jacket juice kite lake leaf lemon lion map milk moon "
    "mouse night onion orange owl paper pear piano queen rain river road rose salt school ship snow street sun table "
    "tiger tower train tree violin water wheel wind wolf zebra"
).split()
# For spelling, besides WORDS.
SPELLED = (
    "ant arm bag banana bed bee box bridge brush can car cow desk drum fan farm fork frog gate gold ham hill ink jam "
    "jet kettle king lamp letter mirror nest net pencil pepper pin pot rabbit ring stone tent"
).split()

MONTHS = ("January February March April May June July August September October November December").split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

FIXED_LISTS: dict[str, list[str]] = {
    "the days of the week": DAYS,
    "the months of the year": MONTHS,
    "the four seasons": "spring summer autumn winter".split(),
    "the planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split(),
    "the primary colours": "red yellow blue".split(),
    "the vowels": "a e i o u".split(),
    "the continents": ["Africa", "Antarctica", "Asia", "Australia", "Europe", "North America", "South America"],
}
CATEGORIES: dict[str, list[str]] = {
    "fruits": "apple banana cherry lemon pear".split(),
    "colours": "red blue green yellow white".split(),
    "animals": "cat dog horse lion mouse".split(),
    "vegetables": "carrot onion pepper potato bean".split(),
    "birds": "eagle owl robin swan crow".split(),
    "trees": "oak pine maple birch willow".split(),
    "metals": "iron gold silver copper tin".split(),
    "sports": "tennis football golf rugby chess".split(),
    "drinks": "water tea coffee milk juice".split(),
    "tools": "hammer saw drill ladder rake".split(),
}
NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}

ANIMALS = "fox rabbit bear cow cat dog mouse horse lion wolf".split()
COLOURS = "red blue green golden silver white black".split()
OBJECTS = "key lamp map ring book bell stone box".split()
PLACES = "forest garden castle village desert valley harbour cave".split()
JOBS = {
    "baker": "bread", "farmer": "apples", "tailor": "coats", "painter": "pictures",
    "carpenter": "chairs", "potter": "cups", "gardener": "roses", "smith": "tools",
}  # fmt: skip

WEATHER = ["sunny", "cloudy", "rainy", "windy", "foggy", "snowy"]
LANGUAGES = ["French", "Spanish", "German", "Italian", "Greek"]
CURRENCIES = ["euros", "dollars", "pounds", "yen"]
SYSTEM_TEXTS = [
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "Answer briefly.",
    "Be concise and correct.",
    "Answer the question.",
]
