"""What the README shows and links is there; `tests/integration/test_pages.py` runs its code."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_links_and_commands_are_there():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"make (\w+)", README)) <= set(targets)
    for path in re.findall(r"`((?:tests|examples|docs)/[\w/.]*)", README):
        assert (ROOT / path).exists(), path
