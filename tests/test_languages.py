"""What is wrong with a document, before an engine has seen it."""

import pytest

from pman.jobs import Complaint
from pman.languages import LANGUAGES, check_sbatch


@pytest.mark.parametrize(
    ("script", "line", "words"),
    [
        ("echo\n", 1, "sbatch wants `#!`"),
        ("", 1, "sbatch wants `#!`"),
        ("#!/bin/bash\necho a\r\n", 2, "carriage return"),
        ("#!/bin/bash\n\n# why\necho\n#SBATCH --hold\n", 5, "move it up"),
        ("#!/bin/bash\nif true; then\n", 3, "syntax error"),
        ("#!/bin/bash\necho a\necho )\n", 3, "syntax error near unexpected token `)'"),
        ("#!/bin/bash\necho '\n\n", 2, "looking for matching `''"),
        ("#!/bin/bash\ncat <<EOF\na\n", 3, "here-document at line 2 delimited by end-of-file"),
    ],
)
def test_a_wrong_script_is_told_with_its_line(script: str, line: int, words: str) -> None:
    complaint = check_sbatch(script)
    assert complaint is not None
    assert complaint.line == line
    assert words in complaint.reason


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/bash\n",
        "#!/bin/sh\n#SBATCH --hold\n# a comment\n\n  \n#SBATCH --nodes=1\necho a\n# SBATCH no\n",
        "#!/bin/bash\ncat <<EOF\n'\nEOF\n",
        f"#!/bin/bash\necho {'x' * 3_000_000}\n",
    ],
)
def test_a_right_script_is_right(script: str) -> None:
    assert check_sbatch(script) is None


def test_without_bash_nothing_is_called_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    complaint = check_sbatch("#!/bin/bash\n")
    assert isinstance(complaint, Complaint)
    assert "bash, which checks the script, can't be run here" in complaint.reason


def test_the_words_of_bash_do_not_depend_on_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "no_SUCH.locale")
    assert check_sbatch("#!/bin/bash\n") is None


def test_each_language_has_a_folder_and_an_ending_of_its_own() -> None:
    assert len({language.folder for language in LANGUAGES.values()}) == len(LANGUAGES)
    assert all(language.ending.endswith(".j2") for language in LANGUAGES.values())
