"""`make bench`: what rendering and reloading cost here. Figures for people; none is asserted."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pman.rendering import Renderer
from pman.settings import Settings, load
from pman.sources import Sources
from pman.templates import Templates, plain_spec
from pman.worker import Worker

TEMPLATE = """{% extends "shipped/apptainer.sbatch.j2" %}
{% block directives %}
#SBATCH --comment=NUMBER
{% endblock %}
"""


def median(action: Callable[[], object], times: int) -> float:
    """Milliseconds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        action()
        taken.append(1000 * (time.perf_counter() - began))
    return statistics.median(taken)


def rendering(settings: Settings) -> None:
    spec = plain_spec(settings)
    renderer = Renderer()
    with Worker(Sources()) as worker:

        def in_worker(check: bool) -> Callable[[], object]:
            return lambda: worker.render(spec, "sbatch", "apptainer", check=check)

        here = median(lambda: renderer.render(spec, "sbatch", "apptainer"), 200)
        there, checked = median(in_worker(False), 200), median(in_worker(True), 50)

    def start() -> None:
        with Worker(Sources()):
            pass

    print(f"a document, in this process            {here:8.1f} ms")
    print(f"a document, by the worker              {there:8.1f} ms ({there / here:.1f} times)")
    print(f"a document, by the worker, checked     {checked:8.1f} ms ({checked / here:.1f} times)")
    print(f"a worker's start and end               {median(start, 10):8.1f} ms")


def reloading(settings: Settings, file: Path) -> None:
    """From the end of the edit to the first document by the changed template."""
    templates = Templates(settings)
    templates.load()
    templates.watch()
    spec = plain_spec(settings)
    taken = []
    try:
        for number in range(1, 21):
            file.write_text(TEMPLATE.replace("NUMBER", str(number)))
            began = time.perf_counter()
            while f"--comment={number}\n" not in templates.render(spec).text:
                if time.perf_counter() - began > 60:
                    raise SystemExit("the change is not used")
                time.sleep(0.01)
            taken.append(time.perf_counter() - began)
    finally:
        templates.close()
    print(
        f"from an edit to its use                {1000 * statistics.median(taken):8.1f} ms "
        f"(the longest of {len(taken)}: {1000 * max(taken):.0f} ms)"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = folder / "templates" / "sbatch" / "mine.sbatch.j2"
        file.parent.mkdir(parents=True)
        file.write_text(TEMPLATE.replace("NUMBER", "0"))
        settings = load(
            container_env="slurm",
            storebase=folder,
            state_dir=folder / "state",
            templates_dir=folder / "templates",
            template={"": "mine"},
        )
        rendering(settings)
        reloading(settings, file)


if __name__ == "__main__":
    main()
