"""The job that compares the network with diffusers', and weights folders with the network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from longtake.jobs import check_parity
from longtake.model.parity import CASES
from longtake.model.refiner.parity import REFINER_CASES

pytestmark = pytest.mark.cpu

CASE = "head112_1x2x3"  # the smallest


def test_it_prints_the_error_and_the_tensors_accounted_for(small_weights, capsys):
    check_parity.main(["--cases", CASE, "--preset", "tiny", "--weights", str(small_weights)])
    official, *parts, error = capsys.readouterr().out.splitlines()
    assert official == "official file: 872 tensors, all accounted for"
    assert {Path(line.split(":")[0]).name for line in parts} == {"text_encoder", "vae", "transformer", "refiner"}
    name, value = error.split()
    assert name == CASE and float(value) < 1e-5


def test_a_larger_error_fails_and_names_the_case(monkeypatch):
    monkeypatch.setattr(check_parity, "relative_error", lambda case: float("nan") if case.name == CASE else 1e-6)
    monkeypatch.setattr(check_parity.measurements, "write", lambda *_: pytest.fail("written"))
    with pytest.raises(ValueError, match=f"1 of {len(CASES) + len(REFINER_CASES)} cases .*{CASE}"):
        check_parity.main([])


def changed(folder: Path, target: Path, part: str, change) -> list[str]:
    """The arguments for a copy of `folder` in which `change` was made to one part's tensors."""
    shutil.copytree(folder, target)
    file = target / part / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return ["--cases", CASE, "--preset", "tiny", "--weights", str(target)]


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("transformer", lambda t: t.pop("final_layer.linear.bias"), "transformer: tensor final_layer.* is missing"),
        ("vae", lambda t: t.update(stray=t["latents_mean"].clone()), "vae: tensor stray does not belong"),
        ("refiner", lambda t: t.update({"proj_out.bias": t["proj_out.bias"][:3]}), r"proj_out.bias has shape \(3,\)"),
    ],
)
def test_a_tensor_of_a_folder_that_does_not_fit_is_named(small_weights, tmp_path, part, change, says):
    with pytest.raises(ValueError, match=says):
        check_parity.main(changed(small_weights, tmp_path / "changed", part, change))


def test_a_dry_run_lists_the_cases(capsys):
    check_parity.main(["--dry-run"])
    assert json.loads(capsys.readouterr().out)["cases"] == [case.name for case in (*CASES, *REFINER_CASES)]
