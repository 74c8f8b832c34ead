"""What several checks find alike: free space, and clocks that are apart."""

from pman.jobs import Finding, Severity

APART = 5.0
"""Seconds that two clocks may be apart."""

LITTLE = 1 << 20
"""KiB of free space below which there is a warning."""


def space(free: int, subject: str, what: str, least: int = 1) -> Finding:
    """``free`` KiB of ``what``: a warning below 1 GiB, an error below ``least`` KiB."""
    text = f"{what} has {size(free)} free"
    if free >= LITTLE:
        return Finding(Severity.OK, subject, text)
    severity = Severity.ERROR if free < least else Severity.WARNING
    return Finding(severity, subject, text, "make room, or use another disk")


def size(kib: int) -> str:
    return f"{kib / LITTLE:.1f} GiB" if kib >= LITTLE else f"{kib / 1024:.0f} MiB"


def clock(whose: str, most: float, least: float) -> Finding:
    """A clock that is ``least`` to ``most`` seconds ahead of this machine's; negative: behind."""
    ahead = least if least > 0 else min(most, 0.0)
    if abs(ahead) <= APART:
        return Finding(Severity.OK, "clock", f"that of {whose} agrees with this machine's")
    words = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    remedy = "have both set by NTP: see `chronyc tracking`"
    return Finding(Severity.WARNING, "clock", f"that of {whose} is {words}", remedy)
