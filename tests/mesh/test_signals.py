"""What signals ask for, on a made-up clock."""

from __future__ import annotations

import signal

import pytest

from megatron_ext.mesh.signals import REPEAT_S, SAVE_AND_LEAVE, Asked, Means, line, ours

INT, TERM, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
REPEATS = [number for number in SAVE_AND_LEAVE if number != INT]


def meanings(*events: tuple[int, float]) -> list[Means]:
    asked = Asked()
    return [asked.hear(number, 100 + at) for number, at in events]


@pytest.mark.parametrize("number", SAVE_AND_LEAVE)
def test_the_first_saves_and_gives_its_name(number):
    asked = Asked()
    assert asked.hear(number, 5.0) is Means.SAVE
    assert (asked.by, asked.at) == (number, 5.0)
    text = line(number, Means.SAVE, "forward of step 12", is_starting=False)
    assert text.startswith(f"{signal.Signals(number).name}: saving after this step (now forward of")
    assert "to stop now" in text


@pytest.mark.parametrize("number", REPEATS)
@pytest.mark.parametrize("after", [0.0, 0.3, 10, 120, REPEAT_S])
def test_sent_twice_is_meant_once(number, after):
    assert meanings((number, 0), (number, after)) == [Means.SAVE, Means.AGAIN]


@pytest.mark.parametrize("number", REPEATS)
def test_after_the_deadline_it_means_now(number):
    assert meanings((USR1, 0), (number, REPEAT_S + 1))[1] is Means.NOW


def test_a_key_that_is_held_down_is_one_press():
    held = [(INT, 0.0), (INT, 0.66), *((INT, 0.66 + k / 30) for k in range(1, 300))]
    assert meanings(*held)[1:] == [Means.SAME_PRESS] * 300
    assert meanings(*held, (INT, 12.0))[-1] is Means.NOW
    assert line(INT, Means.SAME_PRESS, "save", is_starting=False) == ""


def test_the_second_press_stops_now():
    assert meanings((INT, 0), (INT, 4)) == [Means.SAVE, Means.NOW]
    assert meanings((TERM, 0), (INT, 4), (TERM, 5), (INT, 6)) == [
        *(Means.SAVE, Means.AGAIN, Means.AGAIN, Means.NOW)
    ]


def test_lines_say_what_happens_now():
    starting = line(INT, Means.SAVE, "building the model", is_starting=True)
    assert "nothing to save yet (building the model)" in starting and "5 s" in starting
    assert line(TERM, Means.AGAIN, "save of step 3", False).startswith("SIGTERM, asked already: ")
    assert "stopped now, in save of step 3" in line(INT, Means.NOW, "save of step 3", False)


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in ours() and signal.SIGHUP in ours([signal.SIGHUP])
    finally:
        signal.signal(signal.SIGHUP, before)
    assert signal.SIGHUP in ours()
