"""Sample jobs: what templates are tried with before they are used, and what ``check`` asks a
scheduler about."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from pman.jobs import JobSpec
from pman.site import Site

_HOSTILE = (
    'it\'s "quoted"',
    "$(exit 3) `exit 4` ${HOME}",
    "two\nlines",
    "\\",
    "-n",
    "*",
    "#SBATCH --hold",
    "EOF",
    "",
    "é ☃",
)


@dataclass(frozen=True)
class Sample:
    """A job that nobody sent."""

    what: str
    """What is special about it, for messages."""
    spec: JobSpec
    rule: int = 0
    """The number of the rule of SITE_FILE that it fits; 0: it is for none."""
    template: str = ""
    """The template that it is for; empty: the one that is chosen for it."""
    extreme: bool = False
    """Whether it asks for more, or for stranger things, than jobs usually do."""

    @property
    def plain(self) -> bool:
        """Whether a template that refuses it can't be used at all."""
        return not self.rule and not self.extreme


def samples(spec: JobSpec, site: Site) -> list[Sample]:
    """Variants of ``spec``: a plain one and the extremes, one for each rule of SITE_FILE, and the
    extremes for each template that rules choose."""
    plain = Sample("a plain job", replace(spec, image=site.sample_image()))
    found = [plain, *_extremes(replace(plain, what="a job"))]
    for number, rule in enumerate(site.rules, 1):
        what = f"a job that fits rule {number} of SITE_FILE (line {rule.line})"
        fitting = Sample(what, rule.sample(plain.spec), number, rule.template)
        known = {sample.template for sample in found}
        found += [fitting, *(_extremes(fitting) if rule.template not in known else ())]
    return found


def _extremes(usual: Sample) -> Iterator[Sample]:
    plain = usual.spec
    hostile = replace(
        plain,
        auid=_HOSTILE[0],
        argv=(*plain.argv, *_HOSTILE),
        env={f"SAMPLE_{number}": text for number, text in enumerate(_HOSTILE)},
        labels={**plain.labels, "sample": " ".join(_HOSTILE[:2])},
    )
    folders = replace(
        plain,
        input_dir=f'{plain.input_dir} it\'s $(a) "b"',
        output_dir=f"{plain.output_dir}/100%",
    )
    without = replace(plain, cpu_limit=None, memory_limit=None, time_limit=None)
    for kind, spec in {
        "with 4 GPUs": replace(plain, gpu_limit=4),
        "with 8 workers": replace(plain, number_of_workers=8),
        "with no argument": replace(plain, argv=plain.argv[:1]),
        "without limits": without,
        "with hostile values": hostile,  # apart: a template may refuse such folders
        "with hostile folders": folders,
    }.items():
        yield replace(usual, what=f"{usual.what} {kind}", spec=spec, extreme=True)
