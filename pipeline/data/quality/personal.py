"""Likely personal data in texts: e-mail and IP addresses, phone and card numbers, IBANs.

What has a checksum is checked. The others are patterns: they miss some, and count some that are
none.
"""

import re
from collections.abc import Callable, Iterator
from ipaddress import ip_address

# Every repetition is bounded: a hostile text takes time in proportion to its length.
EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,5}")
IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
CARD = re.compile(r"(?<![\w.-])[3-6](?:[ -]?\d){12,18}(?![\w-])")
PHONE = re.compile(
    r"(?<![\w.,/+-])(?<!\d )(?:\+\d|\(?0\d|\(\d{3}\)|\d{3}[ .-]\d{3}[ .-]\d{4})"
    r"[\d ()/.-]{0,18}(?![\w:])"
)
DATE = re.compile(r"\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}")
ADDRESS = re.compile(r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}|[0-9A-Fa-f:]{6,39})(?![\w:]|\.\w)")


def personal_data(text: str) -> Iterator[str]:
    """The kind of each finding."""
    for kind, (pattern, is_one) in KINDS.items():
        for match in pattern.finditer(text):
            if is_one(match[0]):
                yield kind


def _is_iban(text: str) -> bool:
    """ISO 13616: with the first four characters last and letters as 10 to 35, it is 1 modulo 97."""
    code = text.replace(" ", "")
    digits = "".join(str(int(c, 36)) for c in code[4:] + code[:4])
    return 15 <= len(code) <= 34 and int(digits) % 97 == 1


def _is_card(text: str) -> bool:
    """Luhn's sum: every second digit from the right is doubled, its digits added."""
    digits = [int(c) for c in text if c.isdecimal()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return len(digits) >= 13 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def _begins_with(is_one: Callable[[str], bool]) -> Callable[[str], bool]:
    """Whether a match is one, or is without its last parts: a word or date that follows it."""

    def check(text: str) -> bool:
        parts = text.split(" ")
        return any(is_one(" ".join(parts[:n])) for n in range(len(parts), 0, -1))

    return check


def _is_phone(text: str) -> bool:
    digits, least = sum(c.isdecimal() for c in text), 8 if text.startswith("+") else 9
    return least <= digits <= 15 and not DATE.match(text)


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


KINDS: dict[str, tuple[re.Pattern[str], Callable[[str], bool]]] = {
    "e-mail address": (EMAIL, lambda _: True),
    "phone number": (PHONE, _is_phone),
    "IBAN": (IBAN, _begins_with(_is_iban)),
    "card number": (CARD, _begins_with(_is_card)),
    "IP address": (ADDRESS, _is_address),
}
