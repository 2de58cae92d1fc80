"""Makes catalogues in WebShop's file layout, of our own words, to play and test without the data.

    python -m spa_jax.envs.webshop.generate --out DIR --products 500 --goals 300 --seed 1

writes items_shuffle.json, items_ins_v2.json, items_human_ins.json and the index files of
the splits, which share no product.  Every goal can be reached by search, and buying its
product with the options that it names is worth the full reward.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

from spa_jax.envs import cli
from spa_jax.envs.webshop.goals import order
from spa_jax.errors import UserError

SPLITS = "train:0.6,valid:0.1,test:0.3"
_MARKER = "generated.json"

_COLOURS = (
    "black white navy blue green grey red pink purple yellow orange brown beige teal olive "
    "burgundy coral ivory khaki lavender"
).split()
_SIZES = ("small", "medium", "large", "x-large", "xx-large")
_SHOE_SIZES = tuple(str(size) for size in range(6, 13))
_BED_SIZES = ("twin", "full", "queen", "king")
_PACKS = ("pack of 1", "pack of 2", "pack of 4", "pack of 6")
_FLAVOURS = ("vanilla", "honey", "sea salt", "cinnamon", "dark cocoa", "lemon zest", "maple")
_SCENTS = ("rosewood", "citrus", "unscented", "lavender mist", "green tea", "cedar")
_LENGTHS = ("3 feet", "6 feet", "10 feet", "15 feet")
_STYLES = ("classic", "deluxe", "compact")

# category, path of categories, what sellers call it, its plural, attributes, options
_KINDS: tuple[tuple[str, str, str, str, str, dict[str, Sequence[str]]], ...] = (
    ("garden", "Home › Lighting › Lamps", "table lamp", "table lamps",
     "solid wood,energy efficient,easy assemble,living room,bronze finish",
     {"Color": _COLOURS, "Style": _STYLES}),
    ("garden", "Home › Lighting › Pendants", "pendant light", "pendant lights",
     "glass shade,easy install,dining room,brushed nickel,dimmable light", {"Color": _COLOURS}),
    ("garden", "Home › Bedding › Blankets", "throw blanket", "throw blankets",
     "machine washable,super soft,queen size,easy care,double sided",
     {"Color": _COLOURS, "Size": _BED_SIZES}),
    ("garden", "Home › Furniture › Desks", "writing desk", "home office desks",
     "height adjustable,steel frame,easy assemble,storage space,heavy duty",
     {"Color": _COLOURS, "Size": ("small", "medium", "large")}),
    ("garden", "Home › Decor › Rugs", "area rug", "area rugs",
     "non slip,easy clean,stain resistant,living room,machine washable",
     {"Color": _COLOURS, "Size": ("2 x 3", "4 x 6", "5 x 8", "8 x 10")}),
    ("garden", "Home › Decor › Curtains", "window curtain", "window curtains",
     "light filtering,machine washable,white polyester,easy hang,noise reducing",
     {"Color": _COLOURS, "Size": ("52 x 63", "52 x 84", "52 x 96")}),
    ("fashion", "Clothing › Men › Shirts", "casual shirt", "men's shirts",
     "slim fit,long sleeve,machine wash,button closure,quick drying",
     {"Color": _COLOURS, "Size": _SIZES}),
    ("fashion", "Clothing › Women › Dresses", "summer dress", "women's dresses",
     "high waist,short sleeve,elastic waistband,hand wash,relaxed fit",
     {"Color": _COLOURS, "Size": _SIZES}),
    ("fashion", "Clothing › Men › Trousers", "hiking trousers", "men's pants",
     "water resistant,drawstring closure,straight leg,moisture wicking,regular fit",
     {"Color": _COLOURS, "Size": _SIZES}),
    ("fashion", "Clothing › Women › Jackets", "rain jacket", "women's coats",
     "zipper closure,wind resistant,faux fur,long sleeve,machine wash",
     {"Color": _COLOURS, "Size": _SIZES}),
    ("fashion", "Shoes › Women › Boots", "ankle boots", "women's boots",
     "rubber sole,memory foam,side zipper,arch support,faux leather",
     {"Color": _COLOURS, "Size": _SHOE_SIZES}),
    ("fashion", "Shoes › Men › Sneakers", "running sneakers", "men's fashion sneakers",
     "non slip,rubber outsole,lace closure,breathable mesh,shock absorbing",
     {"Color": _COLOURS, "Size": _SHOE_SIZES}),
    ("beauty", "Beauty › Hair › Treatment", "hair mask", "hair treatments",
     "sulfate free,coconut oil,dry hair,paraben free,cruelty free",
     {"Scent": _SCENTS, "Size": ("4 ounce", "8 ounce", "16 ounce")}),
    ("beauty", "Beauty › Skin › Creams", "face cream", "face moisturizers",
     "fragrance free,hyaluronic acid,sensitive skin,anti aging,long lasting",
     {"Size": ("2 ounce", "4 ounce", "6 ounce"), "Style": _STYLES}),
    ("beauty", "Beauty › Tools › Brushes", "makeup brush set", "makeup brushes",
     "cruelty free,synthetic hair,travel size,easy carry,soft bristles",
     {"Color": _COLOURS, "Style": _STYLES}),
    ("beauty", "Beauty › Oral › Toothbrushes", "bamboo toothbrush", "manual toothbrushes",
     "eco friendly,bpa free,oral hygiene,teeth whitening,soft bristles",
     {"Color": _COLOURS, "Item Package Quantity": _PACKS}),
    ("grocery", "Food › Snacks › Bars", "protein bar", "protein bars",
     "gluten free,plant based,low sugar,non gmo,high protein",
     {"Flavor Name": _FLAVOURS, "Size": _PACKS}),
    ("grocery", "Food › Snacks › Nuts", "roasted almonds", "nut snacks",
     "dairy free,kosher certified,resealable bag,keto friendly,artificial colors",
     {"Flavor Name": _FLAVOURS, "Size": ("8 ounce", "16 ounce", "32 ounce")}),
    ("grocery", "Food › Drinks › Tea", "herbal tea", "herbal teas",
     "caffeine free,usda organic,individually wrapped,sugar free,natural ingredients",
     {"Flavor Name": _FLAVOURS, "Size": _PACKS}),
    ("grocery", "Food › Pantry › Oils", "olive oil", "cooking oils",
     "cold pressed,gluten free,fair trade,glass bottle,heart healthy",
     {"Size": ("8 fl oz", "17 fl oz", "34 fl oz")}),
    ("electronics", "Electronics › Cables › HDMI", "video cable", "hdmi cables",
     "gold plated,high speed,ultra hd,plug play,heavy duty",
     {"Size": _LENGTHS, "Color": ("black", "white", "grey")}),
    ("electronics", "Electronics › Audio › Speakers", "bluetooth speaker", "portable speakers",
     "stereo sound,water proof,hands free,long lasting battery,easy carry",
     {"Color": _COLOURS, "Style": _STYLES}),
    ("electronics", "Electronics › Phones › Cases", "phone case", "phone cases",
     "wireless charging,shock proof,tempered glass,dust proof,easy install",
     {"Color": _COLOURS, "Style": _STYLES}),
    ("electronics", "Electronics › Video › Cameras", "security camera", "surveillance cameras",
     "motion detection,night vision,easy install,1080p hd,aaa batteries", {"Style": _STYLES}),
)  # fmt: skip

_SYLLABLES = (
    "al ber cor dal el fen gar hol is jun kel lor mar nor os pel quin ral sol tam ul ver wen xan "
    "yor zel bri cla dre fro gli hra"
).split()
_ENDINGS = "den mark ton via lune ford ra wick nia stead holt mere lo sen by dor".split()
_SERIES = (
    "Meadow Harbor Summit Willow Ember Canyon Orchard Lantern Prairie Glacier Juniper Cobble "
    "Saffron Drift Marble Thicket Beacon Quarry Heron Fable"
).split()
_SENTENCES = (
    "Made for every day, this {kind} by {brand} keeps its shape for years.",
    "The {series} line brings together {first} and {second} in one {kind}.",
    "A careful {kind}: {second}, with a plain design that suits most homes.",
    "Our workshop checks each {kind} by hand before it leaves.",
    "If something is not right, {brand} replaces your {kind} within a year.",
)
_BULLETS = (
    "{attribute}: that is what buyers of this {kind} ask for most.",
    "You get {attribute} without paying for what you do not need.",
    "With {attribute}, the {series} {kind} is simple to live with.",
    "Designed around {attribute} from the first drawing on.",
)
_WISHES = (
    "i am looking for a {what}",
    "i need a {what}",
    "find me a {what}",
    "i want to buy a {what}",
    "please help me find a {what}",
)


def make_asin(seed: int, row: int) -> str:
    """The id of a product: unique within a catalogue of any size up to 36^8."""
    number = (row * 1_000_003_000_007 + seed * 7_919_000_003) % 36**8
    digits = ""
    for _ in range(8):
        number, digit = divmod(number, 36)
        digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"[digit] + digits
    return f"B0{digits}"


def make_product(seed: int, row: int, goals: int) -> tuple[dict[str, Any], dict, list[dict]]:
    """The records of one product in the three files; `goals` of them are human goals."""
    random = Random(f"{seed}/{row}")
    category, path, kind, query, attributes, options = random.choice(_KINDS)
    own = random.sample(attributes.split(","), random.randint(3, 4))
    brand = "".join(random.sample(_SYLLABLES, random.randint(1, 2))) + random.choice(_ENDINGS)
    words = {
        "kind": kind,
        "brand": brand.capitalize(),
        "series": random.choice(_SERIES),
        "first": own[0],
        "second": own[1],
    }
    asin = make_asin(seed, row)
    customisation = {
        name: [{"value": value, "image": None} for value in _some(values, random)]
        for name, values in options.items()
        if random.random() < 0.85
    }
    title = f"{words['brand']} {words['series']} {kind.title()}, {own[0].title()}, {own[1].title()}"
    item = {
        "name": f"{title} for {path.split(' › ')[1]}",
        "full_description": " ".join(s.format(**words) for s in random.sample(_SENTENCES, 3)),
        "pricing": _price_tag(random),
        "images": [""],
        "product_category": path,
        "average_rating": "",
        "small_description": [
            random.choice(_BULLETS).format(attribute=name.capitalize(), **words) for name in own
        ],
        "customization_options": customisation or "",
        "asin": asin,
        "category": category,
        "query": query,
        "page": 1,
    }
    asked = random.sample(own, 2)
    notes = {
        "attributes": own,
        "instruction": f"Find me {asked[0]} {query} with {asked[1]}",
        "instruction_attributes": asked,
    }
    return item, notes, [_make_goal(item, own, words, random) for _ in range(goals)]


def _some(values: Sequence[str], random: Random) -> list[str]:
    count = random.randint(min(2, len(values)), min(5, len(values)))
    return [values[i] for i in sorted(random.sample(range(len(values)), count))]


def _price_tag(random: Random) -> str:
    price = random.randint(3, 180) + random.choice((0.0, 0.49, 0.5, 0.95, 0.99))
    if random.random() < 0.1:
        return f"${price:.2f} to ${price + random.randint(1, 20):.2f}"
    return f"${price:.2f}"


def _make_goal(
    item: dict[str, Any], own: list[str], words: dict[str, str], random: Random
) -> dict[str, Any]:
    """A goal as a person would put it."""
    attributes = random.sample(own, random.randint(1, 2))
    maker = f"{words['brand']} " if random.random() < 0.5 else f"{words['series']} "
    what = f"{' '.join(attributes)} {maker.lower()}{words['kind']}"
    chosen = {
        name: random.choice(values)["value"]
        for name, values in (item["customization_options"] or {}).items()
    }
    text = random.choice(_WISHES).format(what=what)
    if chosen:
        text += " in " + " and ".join(chosen.values())
    return {
        "asin": item["asin"],
        "instruction": f"{text}.",
        "attributes": own,
        "options": [f"{name.lower()}: {value}" for name, value in chosen.items()],
        "instruction_attributes": attributes,
        "instruction_options": list(chosen.values()),
    }


def read_splits(text: str) -> dict[str, float]:
    """Shares of the products with goals, by split, of a text like `SPLITS`.

    Raises:
      UserError: if it is none, or the shares are more than 1 together.
    """
    try:
        shares = {name: float(share) for name, share in (s.split(":") for s in text.split(","))}
    except ValueError as error:
        raise UserError(f"--splits={text}: give something like {SPLITS}") from error
    if sum(shares.values()) > 1 + 1e-9 or not all(0 < share for share in shares.values()):
        raise UserError(f"--splits={text}: shares are above 0, and at most 1 together")
    return shares


def generate(out: str | Path, products: int, goals: int, seed: int, splits: str = SPLITS) -> Path:
    """Writes a catalogue into `out` and returns that folder; one that is there is kept.

    Args:
      out: the folder.
      products: how many products.
      goals: how many human goals, spread over the products.
      seed: other seeds, other catalogues.
      splits: names and shares of the splits; see `read_splits`.

    Raises:
      UserError: if the numbers make no catalogue, or `out` holds another one.
    """
    if products < 1 or goals < 1:
        raise UserError("--products and --goals must be at least 1")
    shares = read_splits(splits)
    root = Path(out)
    settings = {"products": products, "goals": goals, "seed": seed, "splits": splits}
    marker = root / _MARKER
    if marker.exists():
        if json.loads(marker.read_text()) != settings:
            raise UserError(f"--out={root} holds another catalogue; give another folder")
        return root
    root.mkdir(parents=True, exist_ok=True)
    more = set(Random(f"{seed}/goals").sample(range(products), goals % products))
    counts = [goals // products + (row in more) for row in range(products)]
    _write_records(root, seed, counts)
    for name, numbers in _split(counts, shares, seed).items():
        _write(root / f"{name}_indices.json", json.dumps(numbers))
    _write(marker, json.dumps(settings))
    return root


def _write_records(root: Path, seed: int, counts: list[int]) -> None:
    """Writes the three files, product by product."""
    paths = [root / name for name in ("items_shuffle", "items_ins_v2", "items_human_ins")]
    temporary = [path.with_name(f".{path.name}.tmp") for path in paths]
    items, notes, human = (path.open("w", encoding="utf-8") for path in temporary)
    with items, notes, human:
        for row, count in enumerate(tqdm(counts, desc="products", unit="product")):
            item, note, goals = make_product(seed, row, count)
            comma = "," if row else ""
            items.write(f"{comma or '['}\n{json.dumps(item)}")
            notes.write(f"{comma or '{'}\n{json.dumps(item['asin'])}: {json.dumps(note)}")
            if goals:
                first = "," if human.tell() else "{"
                human.write(f"{first}\n{json.dumps(item['asin'])}: {json.dumps(goals)}")
        items.write("\n]\n")
        notes.write("\n}\n")
        human.write("\n}\n")
    for path, finished in zip(paths, temporary, strict=True):
        finished.rename(path.with_suffix(".json"))


def _split(counts: list[int], shares: dict[str, float], seed: int) -> dict[str, list[int]]:
    """The goals of each split, in the goals' final order."""
    rows = [row for row, count in enumerate(counts) if count]
    Random(f"{seed}/splits").shuffle(rows)
    owner: dict[int, str] = {}
    start, total = 0, 0.0
    for name, share in shares.items():
        total += share
        end = round(total * len(rows))
        owner.update(dict.fromkeys(rows[start:end], name))
        start = end
    drawn = [row for row, count in enumerate(counts) for _ in range(count)]
    numbers: dict[str, list[int]] = {name: [] for name in shares}
    for number, place in enumerate(order(len(drawn))):
        if drawn[place] in owner:
            numbers[owner[drawn[place]]].append(number)
    return numbers


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
    temporary.rename(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = cli.generator("webshop", "Make a WebShop catalogue in the official layout.")
    parser.add_argument("--out", required=True, help="folder of the catalogue")
    parser.add_argument("--products", type=int, required=True, help="how many products")
    parser.add_argument("--goals", type=int, required=True, help="how many goals")
    parser.add_argument("--seed", type=int, required=True, help="other seeds, other catalogues")
    parser.add_argument("--splits", default=SPLITS, help="names and shares of the splits")

    def work(flags: argparse.Namespace) -> str:
        generate(flags.out, flags.products, flags.goals, flags.seed, flags.splits)
        return f"products={flags.products} goals={flags.goals}"

    return cli.run(parser, argv, work)


if __name__ == "__main__":
    sys.exit(main())
