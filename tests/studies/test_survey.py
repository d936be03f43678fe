"""Every model of the survey: its gates found, nothing else, the model unchanged, the gradient exact."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from spectral_router import Gate, find_gates
from studies.gates import CASES, GROUPS, NEGATIVES, TRANSFORMERS
from studies.gates.__main__ import examine, main
from studies.gates.renamed import anonymous

ROOT = Path(__file__).parents[2]
# of other people's modules
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*PEP 585.*"),
]


@pytest.mark.parametrize(
    ("group", "case"), [(g, c) for g, cases in GROUPS.items() for c in cases], ids=lambda x: getattr(x, "name", x)
)
def test_gates_are_found_and_read(group: str, case) -> None:
    finding = examine(group, case)
    assert (finding.found, finding.extra) == (len(case.expected), 0)
    assert finding.unchanged is not False
    assert finding.error is None or finding.error <= 1e-5
    assert (finding.error is not None) == (bool(case.expected) and case.runs)


@pytest.mark.slow
@pytest.mark.parametrize("renamed", [False, True], ids=["named", "renamed"])
@pytest.mark.parametrize(
    ("group", "case"),
    [(g, c) for g, cases in GROUPS.items() for c in cases if c.runs],
    ids=lambda x: getattr(x, "name", x),
)
def test_gates_are_found_by_what_one_forward_computes(
    group: str, case, renamed: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Also where modules, parameters, counts and classes are called at random and no source is to be had; or it is told."""
    if renamed:
        monkeypatch.setattr("spectral_router.gates.scoring._source_of_class", lambda kind: "")
        case = anonymous(case)
    finding = examine(group, case, with_example=True)
    assert finding.extra == 0
    assert finding.unchanged is not False
    if finding.found == len(case.expected):
        assert finding.error is None or finding.error <= 1e-5
    else:
        told = {str(one.message) for one in recwarn if "cannot be had again" in str(one.message)}
        assert renamed
        assert len(told) >= len({gate.parameter for gate in case.expected}) - finding.found


def test_all_families_of_transformers_are_there() -> None:
    assert len({case.name for case in TRANSFORMERS} - {"diffusion_gemma_tied"}) == 72
    assert sum(not case.runs for case in TRANSFORMERS) <= 1
    assert len(NEGATIVES) >= 9


def test_a_wrong_reading_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The survey can fail: with the other scoring, or with probabilities taken for logits, its gradients differ."""
    (case,) = [case for case in CASES if case.name == "mixtral"]
    read = Gate.read
    monkeypatch.setattr("spectral_router.wrap.observed._watchable", lambda model: False)  # else the forward puts it right
    monkeypatch.setattr(Gate, "read", lambda self, *call: read(self, *call).softmax(-1))
    finding = examine("transformers", case)
    assert finding.error is not None
    assert finding.error > 1e-3
    assert not finding.good


def test_the_table_in_the_documentation_is_of_these_models() -> None:
    rows = re.findall(r"^\| (\S+) \| .* \| (\d+) / (\d+) \| (\d+) \|", (ROOT / "docs/gates_found.md").read_text(), re.MULTILINE)
    assert [(name, int(expected)) for name, _, expected, _ in rows] == [(case.name, len(case.expected)) for case in CASES]
    assert all(found == expected and extra == "0" for _, found, expected, extra in rows)


@pytest.mark.slow
def test_command_prints_the_table_and_names_unknown_models(capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "studies.gates", "linear_gate"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "| linear_gate | built like | 2 / 2 | 0 | yes |" in done.stdout
    with pytest.raises(SystemExit) as ended:
        main(["linear_gate", "nonesuch"])
    assert ended.value.code == 2
    assert "no such model: nonesuch" in capsys.readouterr().err


def test_gates_alike_are_tried_once_with_equal_results() -> None:
    (case,) = [case for case in CASES if case.name == "laguna"]
    gates = find_gates(case.build()[0])
    assert len(gates) > 1
    assert {(gate.reads, gate.position, gate.scoring, gate.num_experts) for gate in gates} == {("logits", 0, "sigmoid", 8)}
