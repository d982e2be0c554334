"""The README's Python and the walkthrough are run, and say what really comes out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nbformat
import pytest


ROOT = Path(__file__).parent.parent
COMMANDS = ("run", "plan", "check", "report", "facts", "finetune", "knowledge", "measure", "compare", "verify", "bench")
NOTEBOOK = ROOT / "experiments" / "walkthrough.ipynb"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_readme_python_prints_what_the_readme_shows(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, done: tuple[Path, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    first, run, styles, grids = blocks("python")
    shown, names = blocks("text")[0], dict[str, object]()
    exec(compile(first, "README.md", "exec"), names)
    printed = [float(number) for number in re.findall(r"-?\d+\.\d+", capsys.readouterr().out)]
    expected = [float(number) for number in re.findall(r"-?\d+\.\d+", shown)]
    assert printed == pytest.approx(expected, abs=0.002)
    assert expected, "the README shows numbers"
    assert (tmp_path / "attention.html").is_file()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cities").symlink_to(done[0])
    exec(compile(run, "README.md", "exec"), names)
    verdict = capsys.readouterr().out
    assert (
        verdict.startswith(("undecided", "supported", "contradicted", "no effect")) and "'quantity', 'part'" in verdict
    )
    exec(compile(styles, "README.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("containment (") for line in lines)
    exec(compile(grids, "README.md", "exec"), names)
    dims = "('fact', 'layer', 'head') ['logit_diff', 'kl', 'rank'] ('fact', 'route', 'layer') True"
    assert capsys.readouterr().out.strip() == dims


def test_readme_names_commands_and_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path
    for command in re.findall(r"^subjattn (\w+)", text, re.MULTILINE):
        assert command in COMMANDS, command


def test_walkthrough_is_executed() -> None:
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    shown = [output.data for cell in cells for output in cell.outputs if output.output_type == "display_data"]
    figures = [data for data in shown if "application/vnd.plotly.v1+json" in data]
    assert len(figures) >= 4 and all("image/png" in data for data in figures), "GitHub shows pictures alone"
    text = json.dumps([data for data in shown if data not in figures]) + "".join(cell.source for cell in cells)
    assert not re.search(r"/(work|root|home|tmp|Users)/", text), "a path of the machine that it was run on"


@pytest.mark.slow
def test_walkthrough_still_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_folders: dict[str, Path]) -> None:
    """Its code on a small random model, as the notebook has it otherwise."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "cities.yaml").write_text((ROOT / "experiments" / "cities.yaml").read_text())
    monkeypatch.chdir(tmp_path / "experiments")
    cells = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    code = "\n".join(cells).replace('"smollm2-135m"', repr(str(tiny_folders["llama"])))
    code = code.replace('["facts.pool=800"', f'["model={tiny_folders["llama"]}", "facts.pool=800"')
    code = code.replace("layer=slice(15, None)", "layer=slice(1, None)")
    exec(compile(code, str(NOTEBOOK), "exec"), {})
    assert (tmp_path / "runs" / "walkthrough" / "report.html").is_file()
