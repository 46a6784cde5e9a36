import time

import pytest

from llm_surgeon.stopwatch import listening, timed


def test_parts_are_told_to_who_listens_and_to_nobody_else():
    heard = []
    with timed("transfers"):
        pass
    with listening(lambda part, elapsed: heard.append((part, elapsed()))):
        with timed("factor sums"):
            time.sleep(0.01)
        with timed("decomposition"):
            pass
    with timed("transfers"):
        pass
    assert [part for part, _ in heard] == ["factor sums", "decomposition"]
    assert heard[0][1] >= 0.01


def test_a_part_that_fails_is_not_told_of():
    heard = []

    def fail():
        with listening(lambda part, _elapsed: heard.append(part)), timed("factor sums"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with timed("factor sums"):
        pass
    assert not heard
