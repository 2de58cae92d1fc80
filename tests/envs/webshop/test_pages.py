from spa_jax.envs.webshop import pages
from spa_jax.envs.webshop.catalogue import Product

_PRODUCT = Product(
    asin="B000000001",
    title="Oak Table",
    description=" ",
    bullets=("One", ""),
    price_tag="$12.0",
    price=12.0,
    options={"color": ("red", "blue"), "size": ("", "red")},
    attributes=(),
    category="garden",
    query="tables",
    product_category="Home",
)
_GOAL = "Instruction: [SEP] a table"


def test_the_first_page() -> None:
    page = pages.search_page("a table")
    assert page.text == "WebShop [SEP] Instruction: [SEP] a table [SEP] Search"
    assert page.clickables == ("search",) and page.has_search_bar


def test_result_pages() -> None:
    page = pages.results_page("a table", [_PRODUCT], 1, 1)
    assert page.text == (
        f"{_GOAL} [SEP] Back to Search [SEP] Page 1 (Total results: 1) [SEP] Next > "
        "[SEP] B000000001 [SEP] Oak Table [SEP] $12.0"
    )
    assert page.clickables == ("back to search", "next >", "b000000001")
    empty = pages.results_page("a table", [], 2, 1)
    assert empty.text.endswith("Page 2 (Total results: 1) [SEP] < Prev [SEP] Next >")
    assert empty.clickables == ("back to search", "< prev", "next >")


def test_an_items_page() -> None:
    page = pages.item_page("a table", _PRODUCT)
    assert page.text == (
        f"{_GOAL} [SEP] Back to Search [SEP] < Prev [SEP] color [SEP] red [SEP] blue [SEP] size "
        "[SEP] red [SEP] Oak Table [SEP] Price: $12.0 [SEP] Rating: N.A. [SEP] Description [SEP] "
        "Features [SEP] Reviews [SEP] Buy Now"
    )
    assert page.clickables == (
        "back to search",
        "< prev",
        "description",
        "features",
        "reviews",
        "buy now",
        "red",
        "blue",
        "",
    )


def test_blank_texts_are_what_html_makes_of_them() -> None:
    start = f"{_GOAL} [SEP] Back to Search [SEP] < Prev"
    assert pages.detail_page("a table", _PRODUCT, "Features").text == f"{start} [SEP] One [SEP] "
    assert pages.detail_page("a table", _PRODUCT, "Description").text == f"{start} [SEP] "
    assert pages.detail_page("a table", _PRODUCT, "Reviews").text == start
    for description in ("", "\n ", "\n"):
        product = Product(**(_PRODUCT.__dict__ | {"description": description}))
        assert pages.detail_page("a table", product, "Description").text == start


def test_the_last_page_writes_options_as_flask_does() -> None:
    text = pages.done_page("B000000001", {"size": "5' <\u00e9>", "color": "a & b"}, 2 / 3).text
    chosen = r'{"color": "a \u0026 b", "size": "5\u0027 \u003c\u00e9\u003e"}'
    assert f"asin [SEP] B000000001 [SEP] options [SEP] {chosen} [SEP] attrs" in text
    assert text.endswith("[SEP] 0.6666666666666666 [SEP] Reward Details [SEP] None")
