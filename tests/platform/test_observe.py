"""Errors in one line, progress lines, and measurement files."""

from __future__ import annotations

import io
import json
import sys

import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError

from longtake.platform.observe import measurements
from longtake.platform.observe.job import run_job, user_message
from longtake.platform.observe.progress import Progress

pytestmark = pytest.mark.cpu


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def raising(error: BaseException):
    def main(argv: list[str] | None) -> None:
        raise error

    return main


def test_a_users_mistake_ends_in_one_line_and_status_2(capsys):
    with pytest.raises(SystemExit) as end:
        run_job(raising(ValueError("frames 80 cannot be encoded:\n  give 8 k + 1")))
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: frames 80 cannot be encoded: give 8 k + 1\n"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes differ"):
        run_job(raising(RuntimeError("shapes differ")))


def test_debugging_shows_the_traceback_of_a_users_mistake(monkeypatch):
    monkeypatch.setenv("LONGTAKE_DEBUG", "1")
    with pytest.raises(ValueError, match="bad preset"):
        run_job(raising(ValueError("bad preset")))


def test_an_interrupt_ends_with_status_130():
    with pytest.raises(SystemExit) as end:
        run_job(raising(KeyboardInterrupt()))
    assert end.value.code == 130


def test_a_job_receives_its_arguments():
    received = []
    run_job(lambda argv: received.extend(argv or []), ["--preset", "tiny"])
    assert received == ["--preset", "tiny"]


def test_a_missing_file_is_named():
    assert user_message(FileNotFoundError(2, "No such file or directory", "clips/a.parquet")) == (
        "clips/a.parquet: No such file or directory"
    )


@pytest.mark.parametrize(
    "error",
    [
        ClientError({"Error": {"Code": "403", "Message": "Forbidden"}}, "HeadObject"),
        NoCredentialsError(),
        PermissionError("Access Denied"),
        OSError("When reading 'a' in bucket 'b': AWS Error ACCESS_DENIED during HeadObject operation"),
    ],
)
def test_a_refusal_of_the_object_store_names_the_credentials(error):
    message = user_message(error)
    assert message is not None
    assert "AWS_ACCESS_KEY_ID" in message
    assert "\n" not in message


def chained(error: Exception, reason: Exception) -> Exception:
    error.__cause__ = reason
    return error


def test_what_was_raised_from_another_error_has_the_word_unless_it_only_repeats_it():
    told = chained(ValueError("a.parquet is damaged: delete it"), OSError("unexpected end of stream"))
    assert user_message(told) == "a.parquet is damaged: delete it"
    refused = ClientError({"Error": {"Code": "403", "Message": "Forbidden"}}, "HeadObject")
    message = user_message(chained(PermissionError(13, "Forbidden"), refused)) or ""
    assert message.startswith("object store: An error occurred (403) when calling the HeadObject operation")


def test_an_object_store_that_does_not_answer_names_the_variable_that_leads_to_it():
    message = user_message(EndpointConnectionError(endpoint_url="http://127.0.0.1:9/bucket")) or ""
    assert "http://127.0.0.1:9/bucket" in message and "AWS_ENDPOINT_URL" in message


def test_a_local_files_permissions_have_nothing_to_do_with_the_object_store():
    message = user_message(PermissionError(13, "Permission denied", "runs/a"))
    assert message == "runs/a: Permission denied"


def test_progress_tells_count_speed_figures_and_time_left():
    progress = Progress(80, label="render", stream=io.StringIO())
    progress.update(20, loss=0.41234)
    assert progress.line(elapsed=10) == "render 20/80 clips  2 clips/s  loss 0.4123  0:30 left"


def test_resumed_work_counts_as_done_but_not_as_speed():
    progress = Progress(100, unit="frames", initial=60, stream=io.StringIO())
    progress.update(20)
    assert progress.line(elapsed=10) == "80/100 frames  2 frames/s  0:10 left"


def test_slow_work_is_told_in_seconds_a_unit():
    progress = Progress(None, label="train", stream=io.StringIO())
    progress.update(1)
    assert progress.line(elapsed=3700) == "train 1 clips  3.7e+03 s/clip  1:01:40"


def test_a_log_gets_few_lines_and_always_the_last():
    log = io.StringIO()
    with Progress(3, interval=3600, stream=log) as progress:
        for _ in range(3):
            progress.update()
    assert [line.split("  ")[0] for line in log.getvalue().splitlines()] == ["3/3 clips"]


def test_work_cut_short_shows_how_far_it_came():
    log = io.StringIO()
    with pytest.raises(ValueError, match="clip 2"), Progress(3, interval=3600, stream=log) as progress:
        progress.update()
        raise ValueError("clip 2 is broken")
    assert log.getvalue().startswith("1/3 clips")


def test_a_terminals_line_is_rewritten():
    terminal = Terminal()
    with Progress(2, stream=terminal) as progress:
        progress.update(2)
    assert terminal.getvalue().startswith("\r")
    assert terminal.getvalue().count("\n") == 1


def test_a_measurement_carries_its_command_and_versions(tmp_path, root, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(root / "jobs" / "render_worlds.py"), "--out", str(root / "runs" / "a b")])
    record = json.loads(measurements.write("render", {"clips_per_second": 3}, folder=tmp_path).read_text())
    assert sorted(record) == ["command", "commit", "date", "device", "figures", "versions"]
    assert record["command"] == "python jobs/render_worlds.py --out 'runs/a b'"
    assert record["figures"] == {"clips_per_second": 3}
    assert "torch" in record["versions"]


@pytest.mark.parametrize("figures", [{}, {"loss": float("nan")}, {"loss": "0.3"}, {"passed": True}])
def test_a_figure_is_a_finite_number(tmp_path, figures):
    with pytest.raises(ValueError, match="figure"):
        measurements.write("render", figures, folder=tmp_path)


def test_a_measurements_name_is_a_file_name(tmp_path):
    with pytest.raises(ValueError, match="lower-case"):
        measurements.write("../render", {"loss": 1.0}, folder=tmp_path)
