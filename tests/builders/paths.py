"""Where things lie in the checkout."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
FORMAT_1 = TESTS / "fixtures" / "digits-format-1"
PEER_NUMBERS = TESTS / "peer_numbers"
