"""Plans and their folders, without models: what is made, kept, made again, refused."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subjattn.digest import digest_of
from subjattn.errors import BadInput, StagesFailed, SubjattnError, WrongFields
from subjattn.run.events import Silent
from subjattn.run.folder import Folder, alone, replacing
from subjattn.run.plan import SCHEMA, Plan, Stage
from subjattn.run.schedule import execute
from subjattn.run.workers import workers


class Told(Silent):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.notes: list[str] = []

    def started(self, stage: Stage) -> None:
        self.made.append(stage.name)

    def note(self, text: str) -> None:
        self.notes.append(text)


def stage(name: str, *inputs: str, work: str = "add", **settings: Any) -> Stage:
    roles = {chr(97 + i): source if ":" in source else f"{source}:sum.txt" for i, source in enumerate(inputs)}
    return Stage(name, f"works:{work}", settings=settings, inputs=roles, cost=1.0, group=settings.get("group", ""))


def made(plan: Plan, root: Path, executors: Any = ()) -> list[str]:
    told = Told()
    execute(plan, Folder(root), told, executors)
    return told.made


def value(root: Path, name: str) -> int:
    return int((root / name / "sum.txt").read_text())


CHAIN = [stage("a", number=1), stage("b", "a", number=10), stage("c", "a", "b", number=100)]


def test_a_plan_is_made_once(tmp_path: Path) -> None:
    assert made(Plan(CHAIN), tmp_path) == ["a", "b", "c"]
    assert value(tmp_path, "c") == 112
    assert made(Plan(CHAIN), tmp_path) == []


def test_only_what_depends_on_a_change_is_made_again(tmp_path: Path) -> None:
    made(Plan(CHAIN), tmp_path)
    other = [CHAIN[0], stage("b", "a", number=11), CHAIN[2]]
    assert made(Plan(other), tmp_path) == ["b", "c"]
    assert value(tmp_path, "c") == 113


def test_what_comes_out_as_it_was_stops_the_change(tmp_path: Path) -> None:
    """The id of an input is its content: 1 and 3 are both odd."""

    def plan(number: int) -> Plan:
        return Plan([stage("a", number=number), stage("odd", "a", work="parity"), stage("z", "odd", number=5)])

    made(plan(1), tmp_path)
    states = Folder(tmp_path).states(plan(3))
    assert states == {"a": "to do", "odd": "waiting", "z": "waiting"}
    assert made(plan(3), tmp_path) == ["a", "odd"]
    assert made(plan(4), tmp_path) == ["a", "odd", "z"]


def test_one_file_of_a_stage_is_an_input_by_itself(tmp_path: Path) -> None:
    made(Plan([CHAIN[0], stage("b", "a:sum.txt")]), tmp_path)
    record = json.loads((tmp_path / "a" / "stage.json").read_text())
    assert json.loads((tmp_path / "b" / "stage.json").read_text())["inputs"] == {"a": record["files"]["sum.txt"]}


def test_where_something_lies_is_not_what_it_is() -> None:
    one, other = (Stage("a", "works:add", where={"model": place}) for place in ("/here", "/there"))
    assert one.recipe(1) == other.recipe(1)
    known = Stage("a", "works:add", external={"model": "abc"})
    assert known.recipe(1) != Stage("a", "works:add", external={"model": "abd"}).recipe(1)
    assert known.recipe(1) == known.recipe(2), "nothing is computed"
    computed = Stage("a", "works:add", device=True)
    assert computed.recipe(1) != computed.recipe(2), "sums differ with the number of threads"


def test_a_plan_is_read_back(tmp_path: Path) -> None:
    plan = Plan(CHAIN, threads=3)
    assert Plan.from_json(plan.to_json()) == Plan([*CHAIN], threads=3)
    newer = json.loads(plan.to_json()) | {"schema": SCHEMA + 1}
    with pytest.raises(BadInput, match=f"newer subjattn \\(schema {SCHEMA + 1}, this one reads {SCHEMA}\\): update"):
        Plan.from_json(json.dumps(newer))


def test_impossible_plans_are_refused() -> None:
    with pytest.raises(BadInput, match="two stages are called 'a'"):
        Plan([CHAIN[0], CHAIN[0]])
    with pytest.raises(BadInput, match="'b' is made from 'a', which does not come before it"):
        Plan([CHAIN[1], CHAIN[0]])


def test_a_failure_stops_only_what_needs_it(tmp_path: Path) -> None:
    plan = Plan([CHAIN[0], stage("bad", "a", work="refuse"), stage("after", "bad"), stage("other", "a", number=7)])
    with pytest.raises(StagesFailed, match="bad: this cannot be right: ask for something else; 1 more wait") as caught:
        made(plan, tmp_path)
    assert caught.value.reasons == {"bad": "this cannot be right: ask for something else"}
    assert value(tmp_path, "other") == 8 and not (tmp_path / "bad").exists()
    assert not list(tmp_path.rglob("*.unfinished"))
    mended = Plan([CHAIN[0], stage("bad", "a"), stage("after", "bad"), stage("other", "a", number=7)])
    assert made(mended, tmp_path) == ["bad", "after"]


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        (StagesFailed("a: no; 1 more waits", {"a": "no"}), {"reasons": {"a": "no"}}),
        (WrongFields(["a: no", "b: no"]), {"messages": ("a: no", "b: no")}),
        (BadInput("no", field="facts.where"), {"field": "facts.where"}),
    ],
)
def test_errors_cross_processes_whole(error: SubjattnError, kept: dict[str, object]) -> None:
    """One that cannot be read back breaks the pool that it came from, and its message is lost."""
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error)
    assert {name: getattr(found, name) for name in kept} == kept


def test_a_mistake_of_ours_keeps_its_trace(tmp_path: Path) -> None:
    with pytest.raises(StagesFailed, match=r"x/y: ZeroDivisionError: a mistake of ours \(trace in .*x-y\.txt\)"):
        made(Plan([stage("x/y", work="crash")]), tmp_path)
    assert "works.py" in (tmp_path / "failed" / "x-y.txt").read_text()
    made(Plan([stage("x/y", number=1)]), tmp_path)
    assert not (tmp_path / "failed").exists()


def test_a_failed_stage_leaves_the_finished_one(tmp_path: Path) -> None:
    made(Plan([stage("a", number=1)]), tmp_path)
    with pytest.raises(StagesFailed):
        made(Plan([stage("a", work="refuse")]), tmp_path)
    assert value(tmp_path, "a") == 1


def test_out_of_memory_halves_the_budget_once_and_says_so(tmp_path: Path) -> None:
    told = Told()
    execute(Plan([stage("a", work="hungry", fits=0.5)]), Folder(tmp_path), told)
    assert (tmp_path / "a" / "sum.txt").read_text() == "0.5"
    assert told.notes == ["a: the device ran out of memory; tried once more with half of the budget"]
    with pytest.raises(StagesFailed, match="a: OutOfMemoryError: CUDA out of memory"):
        execute(Plan([stage("a", work="hungry", fits=0.2)]), Folder(tmp_path), told)


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path: Path) -> None:
    made(Plan([CHAIN[0]]), tmp_path)
    with pytest.raises(StagesFailed, match=r"b: No space left on device: .*array\.nc"):
        made(Plan([CHAIN[0], stage("b", "a", work="full")]), tmp_path)
    assert made(Plan([CHAIN[0]]), tmp_path) == []


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root sees no read-only folder, the refusal is planted."""

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StagesFailed, match="a: Permission denied: "):
        made(Plan([CHAIN[0]]), tmp_path)


@pytest.mark.parametrize("damage", ["torn", "emptied", "no record", "other content", "gone"])
def test_a_damaged_stage_is_named_and_made_anew(tmp_path: Path, damage: str) -> None:
    made(Plan(CHAIN), tmp_path)
    record, content = tmp_path / "b" / "stage.json", tmp_path / "b" / "sum.txt"
    if damage == "torn":
        record.write_text(record.read_text()[:40])
    elif damage == "emptied":
        record.write_text("")
    elif damage == "no record":
        record.unlink()
    elif damage == "gone":
        content.unlink()
    else:
        content.write_text("12")
    told = Told()
    execute(Plan(CHAIN), Folder(tmp_path), told)
    assert told.made == ["b"], "what it comes to is the same, so nothing else is made"
    assert value(tmp_path, "c") == 112
    named = [note for note in told.notes if "is damaged (not what was written): b is made anew" in note]
    assert len(named) == (damage in ("other content", "gone"))


def test_records_of_other_versions_are_refused(tmp_path: Path) -> None:
    made(Plan(CHAIN), tmp_path)
    record = tmp_path / "b" / "stage.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps({"key": "abc"}))
    with pytest.raises(BadInput, match=r"stage\.json' was written by subjattn 0\.3 or older, .*run the study anew"):
        made(Plan(CHAIN), tmp_path)
    record.write_text(json.dumps(content | {"schema": SCHEMA + 1}))
    with pytest.raises(BadInput, match="was written by a newer subjattn"):
        made(Plan(CHAIN), tmp_path)


def test_results_are_set_aside_when_a_stage_changes_and_not_before(tmp_path: Path) -> None:
    made(Plan(CHAIN), tmp_path)
    for name in ("summary.json", "report.html"):
        (tmp_path / name).write_text("old")
    with pytest.raises(StagesFailed):
        made(Plan([stage("a", work="refuse")]), tmp_path)
    assert (tmp_path / "summary.json").exists() and (tmp_path / "report.html").exists()
    made(Plan([stage("a", number=2)]), tmp_path)
    assert not (tmp_path / "summary.json").exists() and not (tmp_path / "report.html").exists()
    assert {path.name: path.read_text() for path in (tmp_path / "previous").iterdir()} == {
        "summary.json": "old",
        "report.html": "old",
    }
    assert Folder(tmp_path).has_results
    Folder(tmp_path).settle()
    assert not Folder(tmp_path).has_results


class Finalizer(Silent):
    """Loses the exception of a Ctrl-C that falls into it, as a finalizer does."""

    def started(self, stage: Stage) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as a terminal has it, also where the tests run in the background of a shell, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_that_is_lost_still_stops_the_run(tmp_path: Path) -> None:
    made = Plan([stage("a", number=1), stage("b", number=2)])
    with pytest.raises(KeyboardInterrupt):
        execute(made, Folder(tmp_path), Finalizer())
    assert Folder(tmp_path).record("b") is None
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    execute(made, Folder(tmp_path), Silent())
    assert Folder(tmp_path).record("b") is not None


def test_leftovers_are_swept(tmp_path: Path) -> None:
    left = tmp_path / "arms" / ".x.abcd.unfinished"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    (tmp_path / ".summary.json.unfinished").write_text("half")
    made(Plan([CHAIN[0]]), tmp_path)
    assert not left.exists() and not (tmp_path / ".summary.json.unfinished").exists()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "x.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


HOLD = "import sys, time; from pathlib import Path; from subjattn.run.folder import alone\n"


def test_a_lock_left_behind_is_taken_over(tmp_path: Path) -> None:
    code = HOLD + "with alone(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with (
        pytest.raises(BadInput, match=rf"another process is writing to .*process and host: {process.pid} "),
        alone(tmp_path),
    ):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / ".lock").exists(), "a killed process leaves it"
    with alone(tmp_path):
        pass


def test_of_two_that_find_a_lock_left_behind_one_gets_it(tmp_path: Path) -> None:
    """Twenty times two processes start at the same moment on a lock whose holder is dead."""
    code = HOLD + (
        "for line in sys.stdin:\n"
        "    try:\n"
        "        with alone(Path(line.strip())): print('held', flush=True); time.sleep(0.3)\n"
        "    except Exception as error: print(type(error).__name__, flush=True)\n"
    )
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    for number in range(20):
        folder = tmp_path / str(number)
        with alone(folder):
            lock = (folder / ".lock").read_text()
        folder.mkdir(exist_ok=True)
        (folder / ".lock").write_text(lock.replace(lock.split()[0], str(dead.pid), 1))
        for process in both:
            print(folder, file=process.stdin, flush=True)
        assert sorted(process.stdout.readline().strip() for process in both) == ["BadInput", "held"]
    for process in both:
        process.stdin.close()
        process.wait()


def parallel(tmp_path: Path) -> Plan:
    diary = str(tmp_path / "diary.txt")
    wide = [stage(f"w{i}", "a", number=i, seconds=0.05, diary=diary, group=f"g{i % 3}") for i in range(9)]
    return Plan([CHAIN[0], *wide, stage("z", *(one.name for one in wide))])


def test_any_executor_gives_the_same(tmp_path: Path) -> None:
    """In order here; in threads; in plain processes; in our workers: every file is the same."""
    content: dict[str, dict[str, str]] = {}
    context = multiprocessing.get_context("spawn")
    with ThreadPoolExecutor(3) as threads, ProcessPoolExecutor(2, context) as processes, workers(2) as own:
        for name, executors in {"here": (), "threads": [threads] * 3, "pool": [processes] * 2, "own": own}.items():
            root = tmp_path / name
            assert len(made(parallel(tmp_path), root, executors)) == 11
            content[name] = {
                str(path.relative_to(root)): path.read_text() for path in root.rglob("*.txt") if path.is_file()
            }
            assert not list(root.rglob("*.unfinished"))
    assert all(found == content["here"] for found in content.values())
    assert value(tmp_path / "own", "z") == 9 + 36


def test_threads_of_one_process_take_turns(tmp_path: Path) -> None:
    """They would share one model, and hooks in it."""
    with ThreadPoolExecutor(3) as threads:
        made(Plan([stage(f"s{i}", work="alone") for i in range(6)]), tmp_path, [threads] * 3)
    assert {value(tmp_path, f"s{i}") for i in range(6)} == {1}


def test_a_worker_keeps_to_its_group(tmp_path: Path) -> None:
    """Its model is loaded once: stages of one group are made by one process."""
    with workers(2) as own:
        made(parallel(tmp_path), tmp_path / "run", own)
    by: dict[int, set[str]] = {}
    for line in (tmp_path / "diary.txt").read_text().splitlines():
        process, total = line.split()
        by.setdefault((int(total) - 1) % 3, set()).add(process)
    assert len(set.union(*by.values())) == 2
    assert sum(len(processes) for processes in by.values()) <= 4, "three groups, one of them shared at the end"


def test_a_worker_that_dies_fails_its_stage_alone(tmp_path: Path) -> None:
    plan = Plan([stage("dead", work="die"), *(stage(f"w{i}", number=i, seconds=0.05) for i in range(4))])
    with workers(2) as own, pytest.raises(StagesFailed, match="dead: its worker died") as caught:
        made(plan, tmp_path, own)
    assert list(caught.value.reasons) == ["dead"]
    assert [value(tmp_path, f"w{i}") for i in range(4)] == [0, 1, 2, 3]


class Dead(ThreadPoolExecutor):
    """As an actor of Ray whose node is gone: every stage it is given fails at once."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        return super().submit(lambda: (_ for _ in ()).throw(RuntimeError("actor died")))


def test_a_dead_worker_is_given_one_stage_and_no_more(tmp_path: Path) -> None:
    plan = Plan([stage(f"s{i}", number=i, seconds=0.02) for i in range(8)])
    with Dead(1) as dead, ThreadPoolExecutor(1) as healthy, pytest.raises(StagesFailed, match="actor died") as caught:
        made(plan, tmp_path, [dead, healthy])
    assert len(caught.value.reasons) == 1 and len(list(tmp_path.glob("*/sum.txt"))) == 7
    with Dead(1) as dead, pytest.raises(StagesFailed, match="7 more are not made, for there is no worker left"):
        made(Plan([stage(f"t{i}", number=i) for i in range(8)]), tmp_path, [dead])


def test_a_worker_sees_the_gpu_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of those that this process may use, not the machine's second."""
    from subjattn.run.workers import _begin

    monkeypatch.setattr("signal.signal", lambda *_: None)
    for mine, seen in (("2,3", "3"), ("GPU-a, GPU-b", "GPU-b"), (None, "1")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if mine is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", mine)
        _begin(1)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == seen


def test_workers_end_with_their_driver(tmp_path: Path) -> None:
    """Planted: the driver is killed while a worker is busy; nothing may write into the folder any more."""
    code = (
        "import sys; from pathlib import Path; from test_run import *\n"
        "if __name__ == '__main__':\n"
        "    plan = Plan([stage('slow', number=1, seconds=20, diary=sys.argv[2])])\n"
        "    with workers(1) as own: execute(plan, Folder(Path(sys.argv[1])), Silent(), own)\n"
    )
    script, diary = tmp_path / "driver.py", tmp_path / "diary.txt"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "run"), str(diary)], env=environment)
    wait_for(lambda: diary.exists() and diary.read_text().endswith("\n"))
    worker = int(diary.read_text().split()[0])
    process.kill()
    process.wait()
    wait_for(lambda: not running(worker))


def test_a_command_that_is_terminated_leaves_nothing_behind(tmp_path: Path) -> None:
    """SIGTERM, as schedulers send it, while a worker is busy: no semaphore leaks, no lock stays, no worker."""
    code = (
        "import sys; from pathlib import Path; from subjattn import cli; from test_run import *\n"
        "from subjattn.run.folder import alone\n"
        "def work(*_, **__):\n"
        "    plan = Plan([stage('slow', number=1, seconds=20, diary=sys.argv[2])])\n"
        "    folder = Path(sys.argv[1])\n"
        "    with alone(folder), workers(1) as own: execute(plan, Folder(folder), Silent(), own)\n"
        "if __name__ == '__main__':\n"
        "    cli.app = work\n"
        "    cli.main()\n"
    )
    script, diary = tmp_path / "driver.py", tmp_path / "diary.txt"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    command = [sys.executable, str(script), str(tmp_path / "run"), str(diary)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: diary.exists() and diary.read_text().endswith("\n"))
    worker = int(diary.read_text().split()[0])
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and said == "error: interrupted\n", said
    wait_for(lambda: not running(worker))
    assert not list((tmp_path / "run").glob(".lock*"))


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(condition: Any, seconds: float = 60) -> None:
    event = threading.Event()
    for _ in range(int(seconds / 0.1)):
        if condition():
            return
        event.wait(0.1)
    pytest.fail("waited in vain")


def test_an_interrupt_leaves_nothing_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(Plan([CHAIN[0]]), tmp_path)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("works.parity", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made(Plan([CHAIN[0], stage("odd", "a", work="parity")]), tmp_path)
    assert not (tmp_path / "odd").exists() and not list(tmp_path.rglob("*.unfinished"))
    monkeypatch.undo()
    assert made(Plan([CHAIN[0], stage("odd", "a", work="parity")]), tmp_path) == ["odd"]


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_change_of_any_plan_gives_what_a_fresh_folder_gives(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Random plans, changed at random and run into one folder, against the last one run into an empty folder."""
    root = tmp_path_factory.mktemp("reused")

    def draw() -> Plan:
        stages: list[Stage] = []
        for name in "abcdef"[: data.draw(st.integers(1, 6))]:
            above = data.draw(st.lists(st.sampled_from([one.name for one in stages]), unique=True)) if stages else []
            work = data.draw(st.sampled_from(["add", "parity"] if len(above) == 1 else ["add"]))
            stages.append(stage(name, *above, work=work, number=data.draw(st.integers(0, 2))))
        return Plan(stages)

    for plan in [draw() for _ in range(3)]:
        made(plan, root)
        fresh = tmp_path_factory.mktemp("fresh")
        made(plan, fresh)
        assert all(value(root, one.name) == value(fresh, one.name) for one in plan)
        shutil.rmtree(fresh)
    shutil.rmtree(root)


def test_digests_of_plain_data() -> None:
    assert digest_of({"a": 1, "b": [2]}) == digest_of({"b": [2], "a": 1}) != digest_of({"a": 1, "b": [3]})
    with pytest.raises(TypeError):
        digest_of({"a": object()})
