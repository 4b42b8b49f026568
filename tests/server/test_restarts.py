"""How soon a process that died is started again."""

from hypothesis import given
from hypothesis import strategies as st

from prenet4d_server.restarts import LONGEST_PAUSE_S, SOUND_S, Pauses


def test_pauses_double_while_a_process_dies_young_and_begin_anew_after_a_long_life():
    pauses = Pauses(0.5)
    assert [pauses.after(0.1) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert pauses.after(SOUND_S + 1) == 0.5
    assert pauses.after(0.1) == 1


@given(st.lists(st.floats(0, 1000)))
def test_no_pause_is_longer_than_the_longest_or_shorter_than_the_first(lives):
    pauses = Pauses(1.0)
    assert all(1.0 <= pauses.after(lived) <= LONGEST_PAUSE_S for lived in lives)
