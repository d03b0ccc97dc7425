"""The code of docs/library.md, run from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from fastvim_jax.errors import UserError
from tests.support import ROOT

# The page as it stands but for a smaller model, because training is most of the time: (as written, as tested).
SMALLER = ("epochs=2,", "epochs=2, model=dataclasses.replace(config.model, embed_dim=16, depth=2),")


@pytest.mark.drawn("as a user types it")
@pytest.mark.slow
def test_the_page_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "library.md").read_text()
    assert text.count(SMALLER[0]) == 1
    text = text.replace(*SMALLER)
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(code, "docs/library.md", "exec"), names)
    assert names["scores"]["top1"] == names["result"].metrics[f"{names['run'].weights}_top1"]
    assert names["probabilities"].shape == (2, 10) and len(names["blocks"]) == 2
    assert set(names["report"].names("drawn")) == {"head.kernel", "head.bias"}
    assert names["longer"].metrics["raw_loss"] < names["result"].metrics["raw_loss"]
    with pytest.raises(UserError, match="8 x 8"):
        names["run"].preprocess(np.zeros((9, 8, 1), np.uint8))
