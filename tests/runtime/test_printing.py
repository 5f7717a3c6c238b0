"""Text for a person: one printable line for an error, nothing that a stream cannot encode."""

import io

import pytest

from rdm_fast.errors import DataError, UserError
from rdm_fast.runtime.printing import print_error, print_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe 3 µm", "Größe 3 µm"),
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("bad \udcff byte", r"bad \udcff byte"),
        ("right\u202eleft", r"right\u202eleft"),
    ],
)
def test_an_error_is_one_printable_line(text: str, shown: str) -> None:
    assert str(DataError(text)) == shown
    assert str(UserError(str(DataError(text)))) == shown


def test_printed_lines_stay_lines_in_the_encoding_of_the_stream() -> None:
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    print_line("a\nβ \x07", file)
    assert file.buffer.getvalue() == b"a\n\\u03b2 \\x07\n"  # type: ignore[attr-defined]


def test_errors_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    print_error(DataError("no"), "rank 3: ")
    assert capsys.readouterr() == ("", "error: rank 3: no\n")
