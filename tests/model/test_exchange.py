"""What host and kernels tell each other, with the kernels' part played on the CPU."""

import threading
import time

import pytest
import torch

from lenvm.model.candidate_kernels import NO_ROW
from lenvm.model.exchange import NUM_STEPS, Exchange

NUMBERS = [[1, 2], [30, 40], [5, 6]]
NOT_A_TOKEN = "a candidate is not a token, or is over num_candidates"
NOT_PEEKED = "the committed token is not among its peeked candidates"


class Kernels:
    """An exchange with the steps that were launched, and what a kernel writes for one of them."""

    def __init__(self):
        self.shares = []
        self.exchange = Exchange(4, torch.device("cpu"), self.shares.append)
        self.told = {}

    def launch(self, num_slots=0):
        given, told, number = self.exchange.begin(NUMBERS)
        assert given.tolist() == [[1, 2, 0, 0], [30, 40, 0, 0], [5, 6, 0, 0]]
        assert not told.any(), "words of the step before that had the place"
        self.exchange.launched([f"{number} first", f"{number} second"], num_slots)
        assert self.exchange.told.data_ptr() == told.data_ptr()
        assert self.exchange.number == number
        self.told[number] = told
        return number

    def pack(self, number, total=3, row=NO_ROW):
        self.told[number][:2] = torch.tensor([total, row]) + number * 2**32

    def keep(self, number, row):
        self.told[number][2] = row + number * 2**32


def test_a_defect_is_named_once_when_it_has_arrived():
    k = Kernels()
    one, two = k.launch(), k.launch()
    assert k.exchange.find_defect() is None
    k.pack(one, row=1)
    assert k.exchange.find_defect() == f"request '1 second': {NOT_A_TOKEN}"
    assert k.exchange.find_defect() is None
    k.pack(two, row=1)
    k.keep(two, 0)
    assert k.exchange.find_defect() == f"request '2 second': {NOT_A_TOKEN}"
    assert k.exchange.find_defect() == f"request '2 first': {NOT_PEEKED}"
    assert k.exchange.find_defect() is None


def test_half_of_what_is_told_is_not_read():
    k = Kernels()
    k.launch(num_slots=10)
    k.told[1][0] = 2**32 + 5
    assert k.exchange.find_defect() is None
    assert k.shares == []
    k.pack(1, total=5)
    assert k.exchange.find_defect() is None
    assert k.shares == [0.5]


def test_shares_are_noted_of_uncounted_steps_in_their_order():
    k = Kernels()
    for _ in range(NUM_STEPS):
        k.launch(num_slots=8)
    for number in range(NUM_STEPS, 0, -1):
        k.pack(number, total=number)
    assert k.exchange.find_defect() is None
    assert k.shares == [number / 8 for number in range(1, NUM_STEPS + 1)]
    k.pack(k.launch())
    k.exchange.find_defect()
    assert len(k.shares) == NUM_STEPS


def test_a_step_that_was_not_launched_leaves_its_places_to_the_next():
    k = Kernels()
    k.pack(k.launch())
    _, _, number = k.exchange.begin(NUMBERS)
    assert k.launch() == number


@pytest.mark.parametrize("defect", [False, True])
def test_who_is_too_far_ahead_waits_and_loses_no_defect(defect):
    k = Kernels()
    for _ in range(NUM_STEPS):
        k.launch()
    if defect:
        k.keep(1, 1)

    def run_on():
        time.sleep(0.05)
        k.pack(1)
        k.pack(2)

    thread = threading.Thread(target=run_on)
    thread.start()
    assert k.launch() == NUM_STEPS + 1
    assert k.told[2][1] >> 32 == 2, "did not wait until the second step had begun"
    thread.join()
    found = k.exchange.find_defect()
    assert found == (f"request '1 second': {NOT_PEEKED}" if defect else None)
    for number in range(3, 40):  # round and round
        k.pack(number)
        k.launch()
        assert k.exchange.find_defect() is None
