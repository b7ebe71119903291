"""The `longtake` command."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from longtake.platform import cli

pytestmark = pytest.mark.cpu


@pytest.fixture
def jobs(tmp_path, monkeypatch) -> Path:
    """A folder with one job, which prints the command line it sees, in place of the repository's own."""
    script = '"""Echo the command line.\n\nMore about it."""\nimport sys\nprint(__name__, sys.argv[1:])\n'
    (tmp_path / "echo_words.py").write_text(script)
    monkeypatch.setattr(cli, "jobs", lambda: {"echo-words": tmp_path / "echo_words.py"})
    monkeypatch.setattr(sys, "argv", ["longtake"])
    return tmp_path


def test_without_arguments_it_lists_jobs_with_their_descriptions(jobs, capsys):
    cli.main([])
    assert "  echo-words  Echo the command line.\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["echo-words", "echo_words"])
def test_a_job_runs_as_its_script_would(jobs, capsys, name):
    cli.main([name, "--preset", "tiny"])
    assert capsys.readouterr().out == "__main__ ['--preset', 'tiny']\n"


def test_an_unknown_job_names_the_nearest_and_ends_with_status_2(jobs, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["echo-word"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: no job is called 'echo-word'; did you mean 'echo-words'?\n"


def test_the_version_is_the_packages(capsys):
    cli.main(["--version"])
    assert capsys.readouterr().out == "longtake 0.1.0\n"


def test_every_script_in_jobs_is_a_job_and_so_is_the_server(root):
    scripts = {path.stem.replace("_", "-") for path in (root / "jobs").glob("*.py")}
    assert set(cli.jobs()) == scripts | {"serve"}
