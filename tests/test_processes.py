"""Signals are noted, and the ranks share each batch; tests/test_ranks.py runs whole programs."""

import os
import signal

import pytest

from engine import ranks as processes


def test_stop_request_notes_the_first_signal_and_a_second_ctrl_c_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with processes.StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
