"""Quoting, judged by the real bash."""

import random
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pman.quoting import misplaced_words, shell_word
from tests.hostile import HOSTILE

BEGIN, END = "\x02nonce", "\x03nonce"

texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.text(
    "\\'\"$`#\n\r\t\x85 ;01é"
)


def run_bash(script: str, folder: Path, locale: str = "C.UTF-8") -> bytes:
    done = subprocess.run(
        ["bash", "--norc"],
        input=script.encode(),
        cwd=folder,
        env={"PATH": "/usr/bin:/bin", "LC_ALL": locale},
        capture_output=True,
        check=False,
    )
    return done.stdout


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
@given(words=st.lists(texts, min_size=1))
@example(words=[*HOSTILE, *(f"{text}\n{text}" for text in HOSTILE)])
def test_words_arrive_byte_for_byte(words: list[str], locale: str, tmp_path: Path) -> None:
    script = f"printf '%s\\0' {' '.join(map(shell_word, words))}\n"
    assert run_bash(script, tmp_path, locale) == "".join(f"{word}\0" for word in words).encode()


@given(texts)
def test_a_word_never_leaves_its_line(text: str) -> None:
    for line in (shell_word(text), shell_word(f"{text}\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029")):
        assert len(f"{line}.".splitlines()) == 1
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 for c in line)


def test_a_nul_byte_is_refused() -> None:
    with pytest.raises(ValueError, match="NUL byte"):
        shell_word("a\0b")


def places(template: str, value: str = "a b") -> list[str]:
    """Where each ``@`` of ``template`` is misplaced, once it is ``value``."""
    text = template.replace("@", f"{BEGIN}{shell_word(value)}{END}")
    return [f"{wrong.line}: {wrong.where}" for wrong in misplaced_words(text, BEGIN, END)]


@pytest.mark.parametrize(
    "template",
    [
        "@",
        "echo @ a@b --x=@",
        "echo 'a'@\"b\"@$'c'@",
        'x="$(cat @)"',
        'x="$(cat "$(cat @)")"@',
        "x=$(cat @; (cat @))",
        "cat <(cat @) <<< @",
        "# it's @\necho @",
        "a#'x' @",
        "a#'x\ny' @",
        "a;# don't\n@",
        "case $x in a)# don't\n echo @ ;; esac",
        "echo \\' @ \\\" @ \\\\@",
        "echo ${#x} $# ${x#\\'} ${x/ #/} @",
        "echo ${x:-'a}b'} @",
        'echo "${x:-}\'" @',
        'echo "a\'b" @',
        "echo $'it\\'s' @",
        "cat <<EOF\nit's\nEOF\n@",
        "cat <<'E F'\n'\nE F\n@",
        "cat <<-EOF @ # it's\n\t'\n\tEOF\n@",
        "cat <<A <<B\n'\nA\n'\nB\n@",
        'cat <<"A" \\\n @\n\'\nA\n@',
        "x=$((1 << 2))\n(( x <<= 2 ))\n@",
        "((x = (1 + 2) * 3)) || echo @",
        "x=$(( $(echo @) + 1 ))@",
        "echo `echo a`@",
        "case x in x) @ ;; esac\n@",
        "@\nEOF\n@",
    ],
)
def test_a_value_may_stand_where_bash_reads_it_as_a_word(template: str) -> None:
    assert places(template) == []


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ('\necho "@"', ["2: double quotes"]),
        ("echo 'it''@'", ["1: single quotes"]),
        ("echo $'@'", ["1: $'…' quotes"]),
        ('echo "\\"@"', ["1: double quotes"]),
        ('echo "\\@"', ["1: double quotes"]),
        ('echo "$(echo "@")"', ["1: double quotes"]),
        ('echo "$(echo a) @" @', ["1: double quotes"]),
        ("a'#' '@'", ["1: single quotes"]),
        ("echo `cat @`", ["1: `…`"]),
        ('echo "`cat "@"`"', ["1: `…`"]),
        ("echo `cat \\`cat @\\``", ["1: `…`"]),
        ("echo \\@", ["1: the reach of a backslash, a `$` or a `<<`"]),
        ("echo ${@}", ["1: ${…}"]),
        ("echo $@ @", ["1: the reach of a backslash, a `$` or a `<<`"]),
        ('cat <<EOF"@"', ["1: double quotes"]),
        ("cat <<EOF$@", ["1: the reach of a backslash, a `$` or a `<<`"]),
        ("cat <<@\n@", ["1: the reach of a backslash, a `$` or a `<<`"]),
        ("echo ${x:-@}", ["1: ${…}"]),
        ('echo "${x:-@}"', ["1: ${…} in double quotes"]),
        ('echo "${x:-"@"}"', ["1: ${…} in double quotes"]),
        ('echo ${x:-"@"}', ["1: double quotes"]),
        ("echo $((@ + 1))", ["1: ((…))"]),
        ("(( (@) ))", ["1: ((…))"]),
        ('echo "$((@ + 1))"', ["1: ((…))"]),
        ("echo $[@]", ["1: $[…]"]),
        ("cat <<EOF\n@ @\n@\nEOF\n@", ["2: a here-document"] * 2 + ["3: a here-document"]),
        ("cat <<'EOF'\n@\nEOF", ["2: a here-document"]),
        ("cat 0<<EOF\n@\nEOF", ["2: a here-document"]),
        ("cat <<!\n@\n!", ["2: a here-document"]),
        ('cat <<"E F"\n@\nE F', ["2: a here-document"]),
        ("cat <<-EOF\n\t@\n\tEOF", ["2: a here-document"]),
        ("cat <<EOF\nEOF \n@", ["3: a here-document"]),
        ("cat <<A <<B\nA\n@\nB", ["3: a here-document"]),
        ("x=$(cat <<EOF\n@\nEOF\n)", ["2: a here-document"]),
        ("cat <<EOF # @\n@", ["2: a here-document"]),
    ],
)
def test_a_value_is_misplaced_where_its_quotes_do_not_hold(
    template: str, expected: list[str]
) -> None:
    assert places(template) == expected


def test_a_number_may_stand_in_arithmetic() -> None:
    assert places("echo $((@ / 2))", "200") == []
    assert places("echo $((@ / 2))", "200m") != []


ATTACKS = (
    *("$(touch pwned)", "`touch pwned`", "a`;touch pwned;`", "a[$(touch pwned)]"),
    *("';touch pwned;'", "\\';touch pwned;#", "\\'';touch pwned;#", '";touch pwned;"'),
    *(";touch pwned;", "#\ntouch pwned\n", "EOF\ntouch pwned", "}$(touch pwned)"),
    *("');touch pwned;#", "))$(touch pwned)", "]$(touch pwned)"),
)
SYNTAX = (
    *"' \" ` $ \\ ( ) $( ${x:- } $(( )) (( # <<EOF <<'EOF' <<-EOF 0<<! <<< ; ;; a echo x=".split(),
    *"$' \"$( $[ [ ] 1 < ${x# ${x// / | && { case esac @".split(),
    *(" ", " # ", "\n", "\nEOF\n", "\n!\n", "case x in x)"),
)


@pytest.mark.parametrize("seed", range(4))
def test_no_template_that_is_let_through_runs_a_value(seed: int, tmp_path: Path) -> None:
    """Random shell syntax around an attack: what is not called misplaced must be harmless."""
    chance = random.Random(seed)
    tried = 0
    while tried < 40:
        parts = chance.choices(SYNTAX, k=chance.randint(1, 10))
        parts.insert(chance.randint(0, len(parts)), "@")
        attack = chance.choice(ATTACKS)
        template = f"{''.join(parts)}\n"
        if not places(template, attack):
            tried += 1
            run_bash(template.replace("@", shell_word(attack)), tmp_path)
            assert not (tmp_path / "pwned").exists(), (template, attack)
