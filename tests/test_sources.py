"""What is on disk, as one value; and what can't be read."""

import os
from pathlib import Path

import pytest

from pman.errors import SiteError, SourceError, TemplateError
from pman.sources import MAX_FILE, MAX_FILES, Sources, read


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "templates"
    (path / "sbatch" / "parts").mkdir(parents=True)
    (path / "sbatch" / "mine.sbatch.j2").write_text("é\n")
    return path


def test_templates_are_read_by_their_paths(folder: Path) -> None:
    (folder / "sbatch" / "parts" / "gpu.j2").write_text("x")
    (folder / "wdl").mkdir()
    (folder / "wdl" / "a.wdl.j2").write_text("y")
    assert read(folder, None).templates == {
        "sbatch/mine.sbatch.j2": "é\n",
        "sbatch/parts/gpu.j2": "x",
        "wdl/a.wdl.j2": "y",
    }


@pytest.mark.parametrize("name", [".mine.sbatch.j2", "mine.sbatch.j2~", "mine.sbatch.j2.swp", "R"])
def test_what_editors_leave_is_no_template(folder: Path, name: str) -> None:
    (folder / "sbatch" / name).write_bytes(b"\xff")
    assert [*read(folder, None).templates] == ["sbatch/mine.sbatch.j2"]


def test_a_configmap_of_kubernetes_is_read(folder: Path) -> None:
    """Its files are links to `..data/NAME`, and `..data` is one to a folder with a date."""
    (folder / "sbatch" / "..2026").mkdir()
    (folder / "sbatch" / "..data").symlink_to("..2026")
    (folder / "sbatch" / "..2026" / "a.sbatch.j2").write_text("x")
    (folder / "sbatch" / "a.sbatch.j2").symlink_to("..data/a.sbatch.j2")
    assert read(folder, None).templates["sbatch/a.sbatch.j2"] == "x"


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    assert read(tmp_path / "link", None) == read(folder, None)


def test_nothing_is_set_up(tmp_path: Path) -> None:
    assert read(None, None) == Sources()


def test_sources_survive_json(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("a: é\n")
    sources = read(folder, tmp_path / "site.yaml")
    assert sources.site == "a: é\n"
    assert Sources.from_json(sources.to_json()) == sources


def refused(folder: Path | None, site: Path | None, kind: type[SourceError]) -> SourceError:
    with pytest.raises(kind) as caught:
        read(folder, site)
    return caught.value


def test_a_template_that_is_no_utf_8_is_told_with_its_line(folder: Path) -> None:
    (folder / "sbatch" / "bad.sbatch.j2").write_bytes(b"a\nb\n\xe9\n")
    error = refused(folder, None, TemplateError)
    assert (error.file, error.line) == ("sbatch/bad.sbatch.j2", 3)
    assert str(error) == "sbatch/bad.sbatch.j2, line 3: it is no UTF-8: it has the byte 0xe9"


def test_a_template_that_a_link_leads_out_of_the_folder_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / "sbatch" / "bad.sbatch.j2").symlink_to(tmp_path / "secret")
    error = refused(folder, None, TemplateError)
    assert error.file == str(folder / "sbatch" / "bad.sbatch.j2")
    assert f"a link to {tmp_path}/secret, which is not in TEMPLATES_DIR" in str(error)


def test_a_link_to_nothing_is_told(folder: Path) -> None:
    (folder / "sbatch" / "bad.sbatch.j2").symlink_to("nothing")
    assert "bad.sbatch.j2: it can't be read" in str(refused(folder, None, TemplateError))


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "sbatch" / "bad.sbatch.j2")
    assert "bad.sbatch.j2: it is no file" in str(refused(folder, None, TemplateError))


def test_a_file_is_bounded(folder: Path) -> None:
    (folder / "sbatch" / "bad.sbatch.j2").write_text("x" * (MAX_FILE + 1))
    assert f"longer than {MAX_FILE} bytes" in str(refused(folder, None, TemplateError))


def test_the_number_of_files_is_bounded(folder: Path) -> None:
    for number in range(MAX_FILES):
        (folder / "sbatch" / f"{number}.j2").touch()
    assert f"more than {MAX_FILES} templates" in str(refused(folder, None, TemplateError))


def test_their_size_together_is_bounded(folder: Path) -> None:
    for number in range(9):
        (folder / "sbatch" / f"{number}.j2").write_text("x" * MAX_FILE)
    assert "more than 8 MiB" in str(refused(folder, None, TemplateError))


def test_folders_that_are_linked_are_read_once(folder: Path) -> None:
    (folder / "..data" / "wdl").mkdir(parents=True)
    (folder / "..data" / "wdl" / "a.wdl.j2").write_text("x")
    (folder / "wdl").symlink_to("..data/wdl")
    (folder / "sbatch" / "loop").symlink_to("..")
    assert read(folder, None).templates.keys() == {"sbatch/mine.sbatch.j2", "wdl/a.wdl.j2"}


def test_a_linked_folder_outside_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "wdl").symlink_to(tmp_path / "elsewhere")
    assert "which is not in TEMPLATES_DIR" in str(refused(folder, None, TemplateError))


@pytest.mark.parametrize("name", ["loop.j2", "loop"])
def test_a_link_to_itself_is_told_or_left_alone(folder: Path, name: str) -> None:
    (folder / "sbatch" / name).symlink_to(name)
    if name.endswith(".j2"):
        assert "can't be read" in str(refused(folder, None, TemplateError))
    else:
        assert [*read(folder, None).templates] == ["sbatch/mine.sbatch.j2"]


def test_a_byte_order_mark_is_no_part_of_the_text(folder: Path) -> None:
    (folder / "sbatch" / "mine.sbatch.j2").write_bytes(b"\xef\xbb\xbf#!/bin/sh\n")
    assert read(folder, None).templates["sbatch/mine.sbatch.j2"] == "#!/bin/sh\n"


def test_a_name_that_would_forge_a_line_of_the_log_is_refused(folder: Path) -> None:
    (folder / "sbatch" / "a\nERROR x.j2").touch()
    assert "'sbatch/a\\nERROR x.j2' is no name" in str(refused(folder, None, TemplateError))


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    error = refused(tmp_path / "nowhere", None, TemplateError)
    assert str(error) == f"TEMPLATES_DIR {tmp_path}/nowhere: it is not a folder"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "can't be read: No such file"), (b"\xff", "no UTF-8"), (b"x" * (MAX_FILE + 1), "long")],
)
def test_a_site_file_that_cannot_be_read_is_told(
    tmp_path: Path, content: bytes | None, words: str
) -> None:
    path = tmp_path / "site.yaml"
    if content is not None:
        path.write_bytes(content)
    error = refused(None, path, SiteError)
    assert str(error).startswith(str(path))
    assert words in str(error)
