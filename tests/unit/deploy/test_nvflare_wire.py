from __future__ import annotations

import gc
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("nvflare")

from nvflare.apis.controller_spec import ClientTask, TaskCompletionStatus
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import make_reply
from nvflare.apis.signal import Signal

from shoal.deploy.nvflare_messages import REASON, WITHIN, packed, unpacked
from shoal.deploy.nvflare_wire import NvflareWire
from shoal.deploy.parcel import Parcel, raw
from shoal.errors import EngineError


class Controller:
    """Keeps what NVFlare would send, and answers when it is told to."""

    def __init__(self, *clients):
        self.clients = [SimpleNamespace(name=name) for name in clients]
        self.gone = {}
        self.sent = []

    def get_clients(self):
        return self.clients

    def get_client_disconnect_time(self, name):
        return self.gone.get(name)

    def send(self, task, fl_ctx, targets):
        self.sent.append((targets[0], task))

    def cancel_task(self, task):
        task.completion_status = TaskCompletionStatus.CANCELLED

    def cancel_all_tasks(self):
        for _, task in self.sent:
            self.cancel_task(task)

    def answer(self, index, message):
        name, task = self.sent[index]
        answered = ClientTask(SimpleNamespace(name=name), task)
        answered.result = message
        task.result_received_cb(client_task=answered, fl_ctx=None)
        assert answered.result is None
        task.completion_status = TaskCompletionStatus.OK
        task.task_done_cb(task=task, fl_ctx=None)

    def give_up(self, index, status):
        task = self.sent[index][1]
        task.completion_status = status
        task.task_done_cb(task=task, fl_ctx=None)


@pytest.fixture
def controller():
    return Controller("a", "b")


@pytest.fixture
def abort():
    return Signal()


@pytest.fixture
def wire(controller, abort):
    context = SimpleNamespace(get_engine=lambda: controller)
    return NvflareWire(controller, context, abort, within=50)


def parcel_of(number):
    return Parcel(meta={"number": number}, tensors={"w": raw(np.full(3, number, np.float32))})


def test_each_client_has_a_task_with_the_parcel_and_a_deadline(wire, controller):
    tickets = wire.send(["b", "a"], parcel_of(1))
    assert [name for name, _ in controller.sent] == ["b", "a"]
    assert len(set(tickets.values())) == 2
    for _, task in controller.sent:
        assert unpacked(task.data).meta == {"number": 1}
        assert task.timeout == task.data.get_header(WITHIN) == 50


def test_answers_come_with_their_tickets(wire, controller):
    tickets = wire.send(["a", "b"], parcel_of(1))
    assert list(wire.receive(0)) == []
    controller.answer(1, packed(parcel_of(7)))
    [(ticket, answer)] = wire.receive(1)
    assert ticket == tickets["b"]
    assert answer.meta == {"number": 7}
    assert np.frombuffer(answer.tensors["w"].data, np.float32).tolist() == [7, 7, 7]


def test_it_waits_for_the_first_answer_only(wire, controller):
    wire.send(["a", "b"], parcel_of(1))
    threading.Timer(0.1, controller.answer, (0, packed(parcel_of(2)))).start()
    begun = time.monotonic()
    assert len(list(wire.receive(30))) == 1
    assert time.monotonic() - begun < 10


def test_nobody_keeps_an_answer(wire, controller):
    class Data(np.ndarray):
        """An array that can be watched."""

    data = np.zeros(1 << 21, np.uint8).view(Data)
    wire.send(["a"], parcel_of(1))
    message = packed(Parcel(meta={}, tensors={"w": raw(np.zeros(1 << 21, np.uint8))}))
    seen = weakref.ref(data)
    message["shoal_tensors"] = [data]
    controller.answer(0, message)
    del message, data
    answers = wire.receive(1)
    _, answer = next(answers)
    assert seen() is not None
    del answer
    gc.collect()
    assert seen() is None
    assert list(answers) == []


def test_what_a_site_says_went_wrong_is_told(wire, controller):
    wire.send(["a", "b"], parcel_of(1))
    controller.answer(0, make_reply(ReturnCode.EXECUTION_EXCEPTION, {REASON: "a: no shoal site runs"}))
    controller.answer(1, make_reply(ReturnCode.TASK_ABORTED))
    first, second = [answer for _, answer in wire.receive(1)]
    assert isinstance(first, EngineError)
    assert str(first) == "a: no shoal site runs"
    assert "TASK_ABORTED" in str(second)


@pytest.mark.parametrize(
    ("status", "text"),
    [(TaskCompletionStatus.TIMEOUT, "a gave no answer in time"), (TaskCompletionStatus.CLIENT_DEAD, "a is gone")],
)
def test_a_task_that_nvflare_gives_up_is_an_error_of_its_ticket(wire, controller, status, text):
    tickets = wire.send(["a"], parcel_of(1))
    controller.give_up(0, status)
    [(ticket, error)] = wire.receive(1)
    assert ticket == tickets["a"]
    assert text in str(error)


def test_somebody_who_is_no_client_has_an_error(wire, controller):
    tickets = wire.send(["c"], parcel_of(1))
    [(ticket, error)] = wire.receive(1)
    assert ticket == tickets["c"]
    assert "not a client" in str(error)
    assert controller.sent == []


def test_who_is_disconnected_is_not_present(wire, controller):
    assert wire.present() == ["a", "b"]
    controller.gone["a"] = 1.0
    assert wire.present() == ["b"]


def test_forgotten_tasks_are_taken_back(wire, controller):
    wire.forget(wire.send(["a"], parcel_of(1)).values())
    assert list(wire.receive(0)) == []
    assert controller.sent[0][1].completion_status is TaskCompletionStatus.CANCELLED
    wire.forget(["never heard of"])


def test_a_forgotten_answer_is_thrown_away(wire, controller):
    tickets = wire.send(["a", "b"], parcel_of(1))
    controller.answer(0, packed(parcel_of(2)))
    controller.answer(1, packed(parcel_of(3)))
    wire.forget([tickets["a"]])
    assert [ticket for ticket, _ in wire.receive(1)] == [tickets["b"]]


def test_what_is_asked_again_at_once_is_not_sent_again(wire, controller):
    parcel = parcel_of(1)
    first = wire.send(["a"], parcel)
    wire.forget(first.values())
    second = wire.send(["a"], parcel)
    assert second["a"] != first["a"]
    assert len(controller.sent) == 1
    assert list(wire.receive(0)) == []
    assert controller.sent[0][1].completion_status is None
    controller.answer(0, packed(parcel_of(2)))
    assert [ticket for ticket, _ in wire.receive(1)] == [second["a"]]


def test_an_answer_that_had_come_meanwhile_is_that_of_the_new_ticket(wire, controller):
    parcel = parcel_of(1)
    first = wire.send(["a"], parcel)
    controller.answer(0, packed(parcel_of(2)))
    wire.forget(first.values())
    second = wire.send(["a"], parcel)
    assert [ticket for ticket, _ in wire.receive(1)] == [second["a"]]


def test_another_parcel_is_another_task(wire, controller):
    wire.forget(wire.send(["a"], parcel_of(1)).values())
    second = wire.send(["a"], parcel_of(1))
    assert len(controller.sent) == 2
    controller.answer(0, packed(parcel_of(2)))
    controller.answer(1, packed(parcel_of(3)))
    assert [(ticket, answer.meta["number"]) for ticket, answer in wire.receive(1)] == [(second["a"], 3)]
    assert controller.sent[0][1].completion_status is not None


@pytest.mark.parametrize(
    "call",
    [lambda wire: wire.present(), lambda wire: wire.send(["a"], parcel_of(1)), lambda wire: next(wire.receive(9))],
)
def test_an_aborted_job_is_an_error_at_once(wire, abort, call):
    abort.trigger(True)
    begun = time.monotonic()
    with pytest.raises(EngineError, match="aborted"):
        call(wire)
    assert time.monotonic() - begun < 5
