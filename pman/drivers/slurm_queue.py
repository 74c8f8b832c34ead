"""What squeue and sacct are asked, and how the answers of a script are read."""

import re

from pman.drivers.slurm_states import Row
from pman.errors import Unavailable
from pman.shell import Result

FIELD, RECORD = "\x1f", "\x1e"
"""What fields and records end with: control characters, which no job's name or comment can hold."""

QUEUED, ACCOUNTED = 7, 8
"""Fields of a row of `queue`, and of one of `account`."""

NO_ACCOUNTING = "accounting storage is disabled"
"""What sacct says, in lower case, where there is no accounting."""

CLEAN = r"""
# What the account's profile sets for people's own jobs is not for these.
unset "${!SBATCH_@}" "${!SQUEUE_@}" "${!SACCT_@}" "${!SCANCEL_@}"
"""

SQUEUE = (
    CLEAN
    + r"""
export SLURM_TIME_FORMAT=%s
queue() {
    squeue --noheader --states=all "$@" --format=$'%i\037%j\037%T\037%r\037%S\037%e\037%N'
}
account() {
    sacct --allocations --noheader --parsable2 --noconvert --delimiter=$'\037' "$@" \
        --format=JobIDRaw,JobName,State,Reason,Start,End,NodeList,ExitCode 2>&1
}
"""
)
"""Two functions for a script: `queue` and `account`, which take options and print rows."""


def rows(text: str, fields: int) -> list[Row]:
    """The rows that have the right shape: a strange line costs no other job its state."""
    return [Row(*parts) for line in text.splitlines() if len(parts := line.split(FIELD)) == fields]


def answered(result: Result, what: str, where: str) -> None:
    """Raises Unavailable unless a command that only looks gave its whole answer."""
    # squeue can say `Socket timed out` and still exit with 0: a part of the queue is no answer.
    failed = result.code or "error:" in decoded(result.stderr)
    if failed or result.truncated:
        words = "its answer is too long" if result.truncated else reason(result.stderr)
        message = f"{what} does not answer on {where}: {words}"
        raise Unavailable(message, f"{what} does not answer on {where}")


def one_line(words: str) -> str:
    """sbatch's words in one line, without what it puts before them."""
    return "; ".join(
        re.sub(
            r"^(sbatch: |error: |fatal: |allocation failure: |Batch job submission failed: )*",
            "",
            line.strip(),
        )
        for line in words.splitlines()
        if line.strip()
    )


def decoded(data: bytes) -> str:
    return data.decode(errors="replace")


def reason(data: bytes) -> str:
    """The last lines of a command's stderr in one."""
    lines = [line.strip() for line in decoded(data).splitlines() if line.strip()]
    return "; ".join(lines[-3:])[:1000] or "no reason was given"
