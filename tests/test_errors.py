"""errors: texts of libraries on one printable line."""

import pytest

from rdm_fast.errors import UserError, message_of, printable


def test_a_librarys_text_is_whole_on_one_line_and_printable() -> None:
    long = "x" * 300
    error = ValueError(f"\x1b[1;31mbold\x1b[0m \n\t(1) bell\x07 {long}")
    assert message_of(error) == rf"bold (1) bell\x07 {long}"
    assert message_of(EOFError()) == "EOFError"


@pytest.mark.parametrize("text", ["a\nb", "a\udc80b", "a\x1b[1mb"])
def test_a_users_error_is_one_printable_line(text: str) -> None:
    assert str(UserError(text)) == printable(text) == text.encode("unicode_escape").decode()
