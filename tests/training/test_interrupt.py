"""Ctrl-C once stops after the current step; twice stops at once."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from qlora.training.interrupt import Interruption


def press_ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def test_the_first_signal_requests_a_stop():
    with Interruption() as interruption:
        assert not interruption.requested
        press_ctrl_c()
        assert interruption.requested


def test_the_second_signal_stops_at_once():
    with Interruption() as interruption:
        press_ctrl_c()
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()


@pytest.mark.parametrize("presses", [0, 1])
def test_afterwards_ctrl_c_is_what_it_was(presses):
    before = signal.getsignal(signal.SIGINT)
    with Interruption():
        assert signal.getsignal(signal.SIGINT) != before
        for _ in range(presses):
            press_ctrl_c()
    assert signal.getsignal(signal.SIGINT) == before


def test_afterwards_ctrl_c_is_what_it_was_even_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="on the way"), Interruption():
        raise ValueError("on the way")
    assert signal.getsignal(signal.SIGINT) == before


def test_sigusr1_requests_a_save_and_training_continues():
    before = signal.getsignal(signal.SIGUSR1)
    with Interruption() as interruption:
        assert not interruption.take_save_request()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.take_save_request()
        assert not interruption.take_save_request()
        assert not interruption.requested
        press_ctrl_c()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert interruption.take_save_request()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_sigterm_requests_a_stop_and_is_reported():
    before = signal.getsignal(signal.SIGTERM)
    with Interruption() as interruption:
        assert interruption.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
        assert interruption.signal is signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) == before  # a second one stops at once
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)

    def look():
        with Interruption() as interruption:
            return signal.getsignal(signal.SIGINT), interruption.requested, interruption.take_save_request()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(look).result() == (before, False, False)
