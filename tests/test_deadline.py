"""Searches end by the processor time that they took, not by the time that other programs took."""

import time

import torch

from pyro_flowkit.deadline import Deadline
from pyro_flowkit.guides.gaussian import Gaussian, best_gaussian


def work(seconds):
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(1000))


def test_waiting_costs_nothing_and_working_does():
    deadline = Deadline(0.05)
    time.sleep(0.1)
    assert not deadline.is_over
    work(0.06)
    assert deadline.is_over


def test_a_limit_of_the_user_is_one_of_the_wall():
    deadline = Deadline(100.0, wall_seconds=0.05)
    assert not deadline.part(0.5).is_over
    time.sleep(0.06)
    assert deadline.is_over and deadline.part(0.5).is_over
    assert not Deadline().is_over


def test_a_part_is_one_of_what_is_left():
    deadline = Deadline(0.2)
    part = deadline.part(0.25)
    work(0.07)
    assert part.is_over and not deadline.is_over


def test_a_search_on_a_busy_machine_finds_the_same():
    def density(points):
        return -0.5 * (points - 3.0).square().sum(-1)

    def busy(points):
        time.sleep(0.002)  # other programs have the processor
        return density(points)

    start = Gaussian(torch.zeros(2), torch.eye(2))
    found = [
        best_gaussian(each, start, deadline=Deadline(20.0)).loc.tolist() for each in (density, busy)
    ]
    assert found[0] == found[1]
