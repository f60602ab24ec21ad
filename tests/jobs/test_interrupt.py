"""What ends a command: signals, in processes of their own."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

PROJECT = Path(__file__).resolve().parents[2]


def started(code: str) -> subprocess.Popen[str]:
    """A process that runs the code and has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def rest(process: subprocess.Popen[str]) -> str:
    """What it prints from now on, until it has ended."""
    assert process.stdout is not None
    output = process.stdout.read()
    process.wait(20)
    return output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
class TestSignals:
    def test_the_first_ends_in_order_and_the_second_at_once(self, number: signal.Signals) -> None:
        process = started(
            "import time\n"
            "from jobs.interrupt import Interrupted, end_in_order\n"
            "end_in_order()\n"
            "try:\n"
            "    print('ready', flush=True)\n"
            "    time.sleep(60)\n"
            "except Interrupted as interrupted:\n"
            "    print(interrupted, interrupted.exit_code, flush=True)\n"
            "    time.sleep(60)\n"
        )
        process.send_signal(number)
        assert process.stdout is not None
        assert process.stdout.readline() == f"{number.name} {128 + number}\n"
        process.send_signal(number)
        assert process.wait(10) == 128 + number

    def test_one_that_is_held_back_is_not_lost_whoever_takes_it_meanwhile(self, number: signal.Signals) -> None:
        process = started(
            "import signal, sys, time\n"
            "from jobs.interrupt import Interrupted, end_in_order, held_back\n"
            "end_in_order()\n"
            "try:\n"
            "    with held_back():\n"
            "        signal.signal(signal.SIGTERM, lambda number, frame: None)\n"
            "        print('ready', flush=True)\n"
            "        time.sleep(1)\n"
            "        print('whole', flush=True)\n"
            "except Interrupted as interrupted:\n"
            "    print(interrupted, flush=True)\n"
        )
        process.send_signal(number)
        assert rest(process).split() == ["whole", number.name]

    def test_an_import_that_is_cut_is_an_interruption(self, number: signal.Signals) -> None:
        """A compiled module that a signal cuts tells an ImportError of its own."""
        process = started(
            "import time\n"
            "from jobs import cli\n"
            "def app(**settings):\n"
            "    try:\n"
            "        print('ready', flush=True)\n"
            "        time.sleep(60)\n"
            "    except BaseException:\n"
            "        raise ImportError('initialization failed')\n"
            "cli.app = app\n"
            "cli.main()\n"
        )
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        told = f"interrupted ({number.name}). The same command goes on where this one stood.\n"
        assert (process.returncode, errors) == (128 + number, told)


def test_an_exit_that_a_foreign_handler_makes_of_a_signal_is_the_signal() -> None:
    process = started(
        "import signal, sys, time\n"
        "from jobs.interrupt import Interrupted, end_in_order, held_back\n"
        "end_in_order()\n"
        "try:\n"
        "    with held_back():\n"
        "        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))\n"
        "        print('ready', flush=True)\n"
        "        time.sleep(60)\n"
        "except Interrupted as interrupted:\n"
        "    print(interrupted, flush=True)\n"
    )
    process.send_signal(signal.SIGTERM)
    assert rest(process).split() == ["SIGTERM"]


def test_what_lost_its_parent_is_ended_too() -> None:
    process = started(
        "import subprocess\n"
        "from jobs.interrupt import end_descendants, end_in_order\n"
        "end_in_order()\n"
        "shell = subprocess.Popen(['sh', '-c', 'sleep 300 >/dev/null & echo $!'], stdout=subprocess.PIPE, text=True)\n"
        "orphan = shell.stdout.readline().strip()\n"
        "shell.wait()\n"
        "print('ready', flush=True)\n"
        "print(orphan, flush=True)\n"
        "end_descendants()\n"
    )
    output = rest(process)
    end = time.monotonic() + 5
    while psutil.pid_exists(int(output)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not psutil.pid_exists(int(output))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_what_comes_first_begins_before_anything_is_unwound(number: signal.Signals) -> None:
    process = started(
        "import time\n"
        "from jobs.interrupt import Interrupted, at_first_signal, end_in_order, held_back\n"
        "end_in_order()\n"
        "try:\n"
        "    with at_first_signal(lambda: print('first', flush=True), 10) as begin:\n"
        "        try:\n"
        "            with held_back():\n"
        "                print('ready', flush=True)\n"
        "                time.sleep(1)\n"
        "        finally:\n"
        "            time.sleep(1)\n"
        "            print('unwound', flush=True)\n"
        "            begin()\n"
        "except Interrupted as interrupted:\n"
        "    print(interrupted)\n"
    )
    process.send_signal(number)
    assert rest(process).split() == ["first", "unwound", number.name]


def test_without_a_signal_nothing_begins_and_the_signals_are_as_before() -> None:
    process = started(
        "import signal\n"
        "from jobs.interrupt import at_first_signal, end_in_order\n"
        "end_in_order()\n"
        "before = signal.getsignal(signal.SIGTERM)\n"
        "with at_first_signal(lambda: print('begun'), 10):\n"
        "    print('ready', flush=True)\n"
        "    assert signal.getsignal(signal.SIGTERM) is not before\n"
        "print(signal.getsignal(signal.SIGTERM) is before)\n"
    )
    assert rest(process) == "True\n"
