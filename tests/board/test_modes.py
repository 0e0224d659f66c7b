"""Power mode and clocks for a run: set, made sure of, put back, whatever happens in between.

``nvpmodel`` and ``jetson_clocks`` are scripts that keep their state in the tree of an emulated board, as the real ones
keep it in the system's; ``trouble`` files make them fail, hang, or lie. Signals are sent to a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from board import REPOSITORY, make_tree, write

from cdkd_edge.board.doctor import OK, WARN, probe_restore
from cdkd_edge.board.jetson import PowerMode, clocks_held
from cdkd_edge.board.journal import Change, Journal
from cdkd_edge.board.modes import (
    BoardChange,
    RunTool,
    ToolAnswer,
    changed_board,
    find_mode,
    pending_restore,
    run_command,
)
from cdkd_edge.core.errors import BoardError

MAXN, LOW, COLD = PowerMode(0, "MAXN"), PowerMode(3, "MODE_25W"), PowerMode(4, "7W")
CONFIG = "".join(f"< POWER_MODEL ID={mode.id} NAME={mode.name} >\nGPU MAX_FREQ -1\n" for mode in (MAXN, LOW, COLD))
GPU = "sys/class/devfreq/17000000.gpu"
STATE = "var/lib/cdkd-edge"

NVPMODEL = """#!/bin/sh
cd "$BOARD"; echo "nvpmodel $*" >> calls
status=var/lib/nvpmodel/status
case "$1" in
-q) [ -e trouble/query ] && { echo 'NVPM ERROR: no'; exit 1; }
    id=$(sed 's/pmode:...\\(.\\).*/\\1/' $status)
    case $id in 0) name=MAXN;; 3) name=MODE_25W;; 4) name=7W;; esac
    printf 'NVPM WARN: fan mode is not set!\\nNV Power Mode: %s\\n%s\\n' $name $id ;;
-m) [ -e "trouble/fail-$2" ] && { echo 'NVPM ERROR: Error writing 0 to online: 22'; exit 255; }
    [ -e "trouble/hang-$2" ] && { sleep 60 & sleep 60; }
    [ -e "trouble/lie-$2" ] && exit 0
    [ -e "trouble/endless-$2" ] && exec yes 'enter YES/yes to confirm:'
    if [ "$2" = 4 ]; then
        printf 'NVPM WARN: Golden image context is already created\\n'
        printf 'NVPM WARN: Reboot required for changing to this power mode: 4\\n'
        printf 'NVPM WARN: DO YOU WANT TO REBOOT NOW? enter YES/yes to confirm: '
        read answer
        [ "$answer" = yes ] && touch rebooted
        echo 'NVPM ERROR: optMask is 1, no request for power mode'; exit 0
    fi
    [ -e "trouble/slow-$2" ] && { touch "in-mode-$2"; sleep 0.2; }
    printf 'pmode:000%s fmode:quiet\\n' "$2" > $status
    echo 306000000 > sys/class/devfreq/17000000.gpu/min_freq ;;
esac
"""
JETSON_CLOCKS = """#!/bin/sh
cd "$BOARD"; echo "jetson_clocks $1" >> calls
gpu=sys/class/devfreq/17000000.gpu/min_freq
case "$1" in
--store) [ -e "$2" ] && { echo 'File exists. Can I overwrite it? Y/N:'; read answer; exit 1; }
    [ -e trouble/store ] && { echo 'Error: Unknown GPU Type!'; exit 1; }
    echo "$gpu:$(cat $gpu)" > "$2" ;;
--restore) [ -e trouble/slow-restore ] && { touch in-restore; sleep 0.2; }
    [ -e "$2" ] || { echo "Error: $2 file not found !"; exit 1; }
    [ -e trouble/restore ] && { echo "Error: Failed to restore $gpu"; exit 0; }
    cut -f2 -d: "$2" > $gpu ;;
'') [ -e trouble/slow-clocks ] && { touch in-clocks; sleep 0.2; }
    [ -e trouble/clocks ] && { echo 'Error: Failed to max GPU frequency!'; exit 0; }
    echo 918000000 > $gpu ;;
esac
"""
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
os.geteuid = lambda: 0
from cdkd_edge.board.modes import changed_board
from cdkd_edge.core.errors import BoardError
root, mode, clocks = Path(sys.argv[1]), sys.argv[2] or None, sys.argv[3] == "1"
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda received, _: sys.exit(128 + received))
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with changed_board(mode, clocks, root=root):
        (root / "in-block").touch()
        time.sleep(float(sys.argv[4]))
except KeyboardInterrupt:
    sys.exit(130)
except BoardError as error:
    print(error, "--", error.hint)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An Orin NX in MAXN, clocks not held, used by root."""
    root = tmp_path / "board"
    make_tree(root / "sys")
    for cpu in (root / "sys/devices/system/cpu").glob("cpu*"):
        write(cpu / "cpufreq/scaling_min_freq", 1_984_000)  # the scripts move the GPU's alone
    write(root / "proc/device-tree/compatible", "nvidia,tegra234")
    write(root / "proc/sys/kernel/random/boot_id", "first")
    write(root / "etc/nvpmodel.conf", CONFIG)
    write(root / "var/lib/nvpmodel/status", "pmode:0000 fmode:quiet")
    (root / "trouble").mkdir()
    for name, text in (("nvpmodel", NVPMODEL), ("jetson_clocks", JETSON_CLOCKS)):
        write(root / "bin" / name, text)
        (root / "bin" / name).chmod(0o755)
    monkeypatch.setenv("BOARD", str(root))
    monkeypatch.setenv("PATH", f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return root


def run(command: Sequence[str]) -> ToolAnswer:
    """As ``run_command``, without patience for tools that were told to hang."""
    trouble = Path(os.environ["BOARD"], "trouble")
    hangs = any((trouble / f"{how}-{command[-1]}").exists() for how in ("hang", "endless"))
    return run_command(command, timeout=1.0 if hangs else 30.0)


def mode_now(root: Path) -> int:
    return int((root / "var/lib/nvpmodel/status").read_text()[6:10])


def calls(root: Path) -> list[str]:
    path = root / "calls"
    return path.read_text().splitlines() if path.exists() else []


def as_before(root: Path, held: bool = False) -> bool:
    """Mode, clocks, and no trace left."""
    left = [path.name for path in (root / STATE).glob("*") if path.name != "board.lock"]
    return (mode_now(root), clocks_held(root), left) == (0, held, [])


def trouble(root: Path, name: str) -> None:
    (root / "trouble" / name).touch()


# --- set and put back -------------------------------------------------------------------------------


def test_nothing_asked_nothing_done(board: Path) -> None:
    with changed_board(None, False, root=board) as change:
        assert change == BoardChange()
    assert calls(board) == []
    assert not (board / STATE).exists()


@pytest.mark.parametrize("name", ["25W", "mode_25w", "3", " MODE_25W "])
def test_a_mode_by_name_or_number(board: Path, name: str) -> None:
    with changed_board(name, False, root=board) as change:
        assert change == BoardChange(MAXN, LOW)
        assert mode_now(board) == 3
    assert as_before(board)
    assert not [call for call in calls(board) if call.startswith("jetson_clocks")], "clocks were not touched"


def test_clocks(board: Path) -> None:
    with changed_board(None, True, root=board) as change:
        assert change == BoardChange(max_clocks=True)
        assert clocks_held(board) is True
    assert as_before(board)
    assert not [call for call in calls(board) if call.startswith("nvpmodel")], "the mode was not touched"


def test_both(board: Path) -> None:
    with changed_board("25W", True, root=board):
        assert (mode_now(board), clocks_held(board)) == (3, True)
    assert as_before(board)


def test_the_mode_that_it_has(board: Path) -> None:
    with changed_board("MAXN", False, root=board) as change:
        assert change == BoardChange(MAXN, MAXN)
        assert not (board / STATE / "board.json").exists()
    assert calls(board) == ["nvpmodel -q"]


def test_clocks_that_were_held_are_held_again(board: Path) -> None:
    """nvpmodel lets them go."""
    write(board / GPU / "min_freq", 918_000_000)
    with changed_board("25W", False, root=board):
        assert clocks_held(board) is False
    assert as_before(board, held=True)


def test_after_an_error(board: Path) -> None:
    with pytest.raises(ZeroDivisionError), changed_board("25W", True, root=board):
        _ = 1 / 0
    assert as_before(board)


def test_from_another_thread(board: Path) -> None:
    seen = []

    def work() -> None:
        with changed_board("25W", False, root=board):
            seen.append(mode_now(board))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [3]
    assert as_before(board)


def test_handlers_come_back(board: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with changed_board("25W", False, root=board):
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


# --- refusals ---------------------------------------------------------------------------------------


def refused(board: Path, mode: str | None = "25W", clocks: bool = False) -> BoardError:
    with pytest.raises(BoardError) as caught, changed_board(mode, clocks, root=board, run=run):
        pytest.fail("it was set")
    return caught.value


def test_not_root(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    error = refused(board)
    assert error.hint is not None
    assert error.hint.startswith("sudo $(command -v cdkd-edge) ...")
    assert error.exit_code == 17
    assert calls(board) == []


def test_no_jetson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "Jetson only" in refused(tmp_path).message
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_mode(board: Path) -> None:
    error = refused(board, "40W")
    assert error.hint == "this board has MAXN (id 0), MODE_25W (id 3), 7W (id 4)"
    assert calls(board) == []
    (board / "etc/nvpmodel.conf").unlink()
    assert "no power modes" in refused(board, "40W").message


def test_a_mode_that_needs_a_reboot(board: Path) -> None:
    error = refused(board, "7W")
    assert "only be entered by a reboot" in error.message
    assert not (board / "rebooted").exists()
    assert as_before(board)


@pytest.mark.parametrize(
    ("name", "clocks", "said"),
    [
        ("fail-3", False, "Error writing 0 to online: 22"),
        ("hang-3", False, "did not end"),
        ("endless-3", False, "did not end"),
        ("lie-3", False, "the board is in MAXN (id 0)"),
        ("query", False, "the present power mode is not known; nvpmodel -q: NVPM ERROR: no"),
        ("store", True, "cannot store the present clocks: Error: Unknown GPU Type!"),
        ("clocks", True, "does not hold the clocks at their maximum: Error: Failed to max"),
    ],
)
def test_tools_that_fail(board: Path, name: str, clocks: bool, said: str) -> None:
    trouble(board, name)
    began = time.monotonic()
    assert said in refused(board, clocks=clocks).message
    assert time.monotonic() - began < 15
    assert as_before(board)


def test_tools_that_are_missing(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "nvpmodel is not installed" in refused(board).message
    assert "jetson_clocks is not installed" in refused(board, None, True).message


def test_a_state_folder_that_cannot_be_written(board: Path) -> None:
    write(board / STATE, "a file in its place")
    assert STATE in refused(board).message
    assert mode_now(board) == 0


def test_a_journal_that_cannot_be_written(board: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "board.json")

    monkeypatch.setattr("cdkd_edge.board.journal.write_text", full)
    assert "No space left" in refused(board, "25W", True).message
    assert not [call for call in calls(board) if call in ("nvpmodel -m 3", "jetson_clocks ")]
    assert as_before(board)


def test_two_runs_at_a_time(board: Path) -> None:
    with changed_board("25W", False, root=board):
        assert pending_restore(board) is None, "the run is alive"
        assert "another run" in refused(board, None, True).message
    assert as_before(board)


def test_names() -> None:
    assert find_mode((PowerMode(0, "15W"), PowerMode(15, "MAXN")), "15W").id == 0
    with pytest.raises(BoardError):
        find_mode((MAXN,), "")


def test_maxn_of_a_super_board_is_maxn_super() -> None:
    modes = (PowerMode(0, "15W"), PowerMode(1, "25W"), PowerMode(2, "MAXN_SUPER"))
    assert find_mode(modes, "MAXN").id == find_mode(modes, "maxn_super").id == 2
    assert find_mode((*modes, PowerMode(3, "MAXN")), "MAXN").id == 3
    with pytest.raises(BoardError, match="there is no power mode MAXN_SUPER"):
        find_mode((MAXN,), "MAXN_SUPER")
    with pytest.raises(BoardError, match="there is no power mode 25W_SUPER"):
        find_mode(modes, "25W_SUPER")


# --- what cannot be put back ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [("fail-0", "Error writing 0 to online"), ("hang-0", "did not end"), ("lie-0", "the board is in MODE_25W (id 3)")],
)
def test_a_board_that_is_not_put_back(board: Path, name: str, said: str) -> None:
    with pytest.raises(BoardError) as caught, changed_board("25W", True, root=board, run=run):
        trouble(board, name)
    assert said in caught.value.message
    hint = caught.value.hint or ""
    assert hint.startswith("sudo nvpmodel -m 0 && sudo jetson_clocks --restore ")
    assert Path(hint.split()[-1]).is_file(), "what is to be typed works"
    left = pending_restore(board)
    assert left is not None
    assert " && ".join(left.commands) == hint
    (board / "trouble" / name).unlink()
    assert put_back(board, run) == str(left)
    assert as_before(board)
    assert put_back(board, run) is None


def test_clocks_that_are_not_put_back(board: Path) -> None:
    """jetson_clocks says so, and ends with 0."""
    with (
        pytest.raises(BoardError, match="still held at their maximum") as caught,
        changed_board(None, True, root=board),
    ):
        trouble(board, "restore")
    assert (caught.value.hint or "").startswith("sudo jetson_clocks --restore ")
    (board / "trouble/restore").unlink()
    with changed_board(None, True, root=board) as change:
        assert (change.restored or "").startswith("the clocks, changed by a run of ")
    assert as_before(board)


def test_everything_is_tried(board: Path) -> None:
    """A mode that cannot be put back does not keep the clocks from being."""
    with pytest.raises(BoardError), changed_board("25W", True, root=board, run=run):
        trouble(board, "fail-0")
    assert clocks_held(board) is False


# --- runs that are killed ---------------------------------------------------------------------------


@contextlib.contextmanager
def running(
    board: Path, mode: str = "25W", clocks: bool = True, seconds: float = 30
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(board), mode, str(int(clocks)), str(seconds)],
        stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def wait_for_tools(root: Path) -> None:
    """Until nvpmodel and jetson_clocks, in sessions of their own, have come to their end."""
    mark = b"BOARD=%s\0" % os.fsencode(root)
    deadline = time.monotonic() + 20
    while any(mark in environment for environment in environments()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def environments() -> Iterator[bytes]:
    """Of all other processes."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if path.parent.name != str(os.getpid()):
                yield path.read_bytes() + b"\0"


PHASES = {"set mode": "slow-3", "set clocks": "slow-clocks", "load": "", "put back": "slow-0"}
MARKS = {"set mode": "in-mode-3", "set clocks": "in-clocks", "load": "in-block", "put back": "in-mode-0"}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_signal_in_each_phase(board: Path, phase: str, number: int, code: int) -> None:
    """To the whole group, as a terminal does; again while it is put back."""
    for name in filter(None, (PHASES[phase], "slow-restore", "slow-0")):
        trouble(board, name)
    with running(board, seconds=0.1 if phase == "put back" else 30) as process:
        wait_until(board / MARKS[phase], process)
        os.killpg(process.pid, number)
        for mark in ("in-restore", "in-mode-0"):
            wait_until(board / mark, process)
            os.killpg(process.pid, signal.SIGINT)
        # Signals of the same moment come in the order of their numbers.
        assert process.wait(20) in ((code, 130) if phase == "put back" else (code,))
    assert as_before(board)


def test_a_lost_terminal_sends_more_than_one_signal(board: Path) -> None:
    with running(board) as process:
        wait_until(board / "in-block", process)
        for _ in range(3):
            os.killpg(process.pid, signal.SIGHUP)
        assert process.wait(20) == 129
    assert as_before(board)


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_run_is_noticed(board: Path, phase: str) -> None:
    if PHASES[phase]:
        trouble(board, PHASES[phase])
    with running(board, seconds=0.1 if phase == "put back" else 30) as process:
        wait_until(board / MARKS[phase], process)
        process.kill()
        process.wait()
    wait_for_tools(board)
    (board / "trouble" / PHASES[phase]).unlink() if PHASES[phase] else None
    left = pending_restore(board)
    assert left is not None
    assert left.mode == (None if phase == "put back" else MAXN)
    with changed_board("25W", False, root=board) as change:
        assert change.before == MAXN, "put back first"
        assert change.restored == str(left)
    assert as_before(board)
    assert pending_restore(board) is None


def put_back(board: Path, run: RunTool = run_command) -> str | None:
    """A run puts back first what an earlier one left; this one then asks for the mode that is there."""
    with changed_board("MAXN", False, root=board, run=run) as change:
        return change.restored


@pytest.fixture
def killed(board: Path) -> Path:
    """What a run leaves that is killed under load."""
    journal = Journal(board)
    journal.folder.mkdir()
    clocks = journal.new_clocks_file()
    run_command(("jetson_clocks", "--store", str(clocks)))
    journal.write(Change(MAXN, LOW, clocks, True, False))
    run_command(("nvpmodel", "-m", "3"))
    run_command(("jetson_clocks",))
    (board / "calls").unlink()
    return board


def test_what_is_left(killed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = pending_restore(killed)
    assert left is not None
    assert left.mode == MAXN
    assert "power mode MAXN (id 0) and the clocks" in str(left)
    assert left.commands[0] == "sudo nvpmodel -m 0"
    assert oct((killed / STATE / "board.json").stat().st_mode)[-3:] == "644", "for every user"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert pending_restore(killed) == left
    with pytest.raises(BoardError, match="only root"):
        put_back(killed)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert put_back(killed) == str(left)
    assert as_before(killed)


def test_what_is_typed_by_hand_leaves_nothing_to_do(killed: Path) -> None:
    left = pending_restore(killed)
    assert left is not None
    for command in left.commands:
        answer = run_command(tuple(command.removeprefix("sudo ").split()))
        assert answer.code == 0, command
    assert (mode_now(killed), clocks_held(killed)) == (0, False)
    assert pending_restore(killed) is None


def test_the_doctor_names_it(killed: Path) -> None:
    found = probe_restore(killed)
    assert (found.status, found.data["mode"]) == (WARN, {"id": 0, "name": "MAXN"})
    assert found.text.startswith("power mode MAXN (id 0) and the clocks, changed by a run of ")
    left = pending_restore(killed)
    assert left is not None
    assert found.mend == " && ".join(left.commands)
    with Journal(killed).locked():
        assert probe_restore(killed).status == OK, "the run is alive"
    (killed / STATE / "board.json").write_text("{")
    found = probe_restore(killed)
    assert (found.status, "sudo rm" in (found.mend or "")) == (WARN, True)
    (killed / STATE / "board.json").unlink()
    assert (probe_restore(killed).status, probe_restore(killed).text) == (OK, "nothing")


def test_a_reboot_since_lets_clocks_go(killed: Path) -> None:
    write(killed / "proc/sys/kernel/random/boot_id", "second")
    write(killed / GPU / "min_freq", 306_000_000)
    left = pending_restore(killed)
    assert left is not None
    assert (left.mode, left.clocks) == (MAXN, None)
    assert put_back(killed) == str(left)
    assert "jetson_clocks --restore" not in calls(killed)
    assert as_before(killed)


def test_a_mode_that_somebody_has_set_since_stays(killed: Path) -> None:
    write(killed / "proc/sys/kernel/random/boot_id", "second")
    write(killed / "var/lib/nvpmodel/status", "pmode:0004 fmode:quiet")
    assert pending_restore(killed) is None


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "[" * 100_000, '{"version": 2}', '{"version": 1, "clocks": "../../etc/passwd"}',
        '{"version": 1, "clocks": ".."}', '{"version": 1, "before": {"id": 1e999, "name": "clocks"}}',
    ],
)  # fmt: skip
def test_a_damaged_journal(killed: Path, text: str) -> None:
    data = json.loads((killed / STATE / "board.json").read_text())
    changed = {**data, **json.loads(text)} if "clocks" in text else None
    write(killed / STATE / "board.json", json.dumps(changed) if changed else text)
    with pytest.raises(BoardError, match="does not say what an earlier run changed") as caught:
        pending_restore(killed)
    assert "sudo rm" in (caught.value.hint or "")
    assert mode_now(killed) == 3
    refused(killed)


# --- running tools ----------------------------------------------------------------------------------


def test_a_tool_gets_no_answer_and_leaves_nothing_behind(tmp_path: Path) -> None:
    assert run_command(("sh", "-c", "read x; echo got $?")) == ToolAnswer(0, "got 1\n")
    assert run_command(("sh", "-c", "echo a; echo b >&2; exit 3")) == ToolAnswer(3, "a\nb\n")
    began = time.monotonic()
    mark = tmp_path / "late"
    answer = run_command(("sh", "-c", f"(sleep 0.6; touch {mark}) & sleep 50"), timeout=0.3)
    assert answer.code is None
    assert time.monotonic() - began < 5
    time.sleep(0.6)
    assert not mark.exists(), "what it started is gone as well"


def test_a_signal_to_the_group_while_a_tool_starts(tmp_path: Path) -> None:
    """It ends the child that has no session of its own yet; the tool runs all the same."""
    once = f"if mkdir {tmp_path}/once 2>/dev/null; then kill -TERM $$; fi; echo here"
    assert run_command(("sh", "-c", once)) == ToolAnswer(0, "here\n")
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        pytest.skip("the tests run under nohup, and so does what they start")
    assert run_command(("sh", "-c", "kill -HUP $$")).code == -signal.SIGHUP, "not for ever"


def test_new_names_for_clocks(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.new_clocks_file() != journal.new_clocks_file()
