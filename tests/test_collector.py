"""The pause of the collector of cycles ends with what it was made for."""

import gc

import pytest

from photon_data.collector import paused


def test_the_collector_is_back_after_a_pause_also_of_a_function_that_failed_and_in_a_pause_within_a_pause():
    @paused()
    def fail():
        assert not gc.isenabled()
        with paused():
            pass
        assert not gc.isenabled()
        raise ValueError

    with pytest.raises(ValueError):
        fail()
    assert gc.isenabled()
