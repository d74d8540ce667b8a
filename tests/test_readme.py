"""The front page stays one page, and its numbers are those that were measured."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_front_page_is_short_and_has_three_programs():
    assert len(README.splitlines()) <= 120
    assert README.count("```python\n") == 3


def test_what_flows_buy_in_a_vae_is_what_the_demo_printed():
    prior, posterior, both = re.findall(
        r"flow prior\s+buys ([\d.]+) nats per image, a flow posterior ([\d.]+), both ([\d.]+)",
        README,
    )[0]
    table = (ROOT / "docs" / "explanation" / "digits.md").read_text(encoding="utf-8")
    rows = dict(
        re.findall(r"^VAE, (\w+ prior, \w+ posterior) +IWAE-1000 .*?\) +\+([\d.]+) \(", table, re.M)
    )
    assert rows == {
        "standard prior, flow posterior": posterior,
        "flow prior, normal posterior": prior,
        "flow prior, flow posterior": both,
    }
