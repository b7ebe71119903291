import json

import pytest
import torch

from longtake.jobs import export_weights
from longtake.model import presets, weights
from longtake.model.checkpoint import load_safetensors
from longtake.model.pipeline import WorldPipeline

pytestmark = pytest.mark.cpu
TINY = str(weights.SHIPPED / "tiny")


def test_runs_become_one_folder_in_eight_bits(tmp_path, capsys):
    # A run, of which the refiner is wanted, and a folder that has the rest.
    run = tmp_path / "run" / "weights"
    export_weights.main(["--init", TINY, "--parts", "refiner", "--out", str(run)])
    capsys.readouterr()
    out = tmp_path / "small"
    given = ["--preset", "tiny-streaming", "--source", "tiny", "--init", TINY, str(run.parent)]
    export_weights.main([*given, "--parts", "text", "refiner", "--out", str(out), "--dtype", "int8"])
    assert "text_encoder, refiner: 1." in capsys.readouterr().out
    config = weights.config_for(presets.get("tiny-streaming"), out)
    assert config.name == "tiny-streaming" and not config.chunk_causal  # the weights' own
    for name in ("text_encoder", "refiner"):
        true, found = (load_safetensors(folder / name) for folder in (weights.SHIPPED / "tiny", out))
        assert found.keys() == true.keys()
        for key, tensor in true.items():
            error = float((found[key].float() - tensor.float()).norm() / tensor.float().norm().clamp(min=1e-6))
            assert error < 0.02, key
            assert tensor.ndim < 2 or found[key].dtype == torch.float32
    WorldPipeline.from_pretrained("tiny-streaming", out, parts=["text", "refiner"])


def test_nothing_is_written_over_and_what_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"none of --init has vae/"):
        export_weights.main(["--init", _text_alone(tmp_path), "--parts", "vae", "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="is a weights folder already"):
        export_weights.main(["--init", TINY, "--out", TINY])
    with pytest.raises(ValueError, match="not of 'tiny-streaming'"):
        export_weights.main(["--preset", "tiny-streaming", "--init", TINY, "--out", str(tmp_path / "out")])
    capsys.readouterr()
    export_weights.main(["--init", TINY, "--out", str(tmp_path / "out"), "--dry-run"])
    assert json.loads(capsys.readouterr().out)["parts"]["dit"] == TINY
    assert not (tmp_path / "out").exists()


def _text_alone(folder):
    export_weights.main(["--init", TINY, "--parts", "text", "--out", str(folder / "text")])
    return str(folder / "text")
