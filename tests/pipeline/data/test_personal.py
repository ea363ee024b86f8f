"""Likely personal data is counted by kind; numbers with a checksum only where it is right."""

import pytest

from pipeline.data.quality.personal import personal_data

FOUND = {
    "e-mail address": ["write to jo.doe+x@mail.example.org.", "<a_b@c.de>"],
    "phone number": [
        "Tel.: +49 30 901820",
        "call 030 9018 2345 now",
        "(555) 123-4567",
        "555-123-4567",
        "+4930901820",
    ],
    "IBAN": [
        "DE89 3704 0044 0532 0130 00",
        "to GB82WEST12345698765432, please",
        "BE68 5390 0754 7034 BIC GEBABEBB",
    ],
    "card number": [
        "4111 1111 1111 1111",
        "card 5500-0000-0000-0004.",
        "4111 1111 1111 1111 12/27",
    ],
    "IP address": ["from 192.168.1.20.", "2001:db8::8a2e:370:7334"],
}
NONE = (
    *(
        "DE88 3704 0044 0532 0130 00",
        "4111 1111 1111 1112",
        "256.1.1.1",
        "at 12:30:45",
        "2024-01-15",
        "01-02-2024",
    ),
    *("order 12345678", "05-12-2024 10:30", "1,250,000.00", "a @ b", "version 3.11.7"),
)


@pytest.mark.parametrize("kind", FOUND)
def test_each_kind_is_found(kind: str) -> None:
    for text in FOUND[kind]:
        assert list(personal_data(text)) == [kind], text


@pytest.mark.parametrize("text", NONE)
def test_other_numbers_and_wrong_checksums_are_none(text: str) -> None:
    assert list(personal_data(text)) == []
