"""A rank's tasks for scripts whose ranks need not all ask for them, as those of NVFlare's Client API."""

from __future__ import annotations

import threading
from typing import Any

from shoal.client.loop import TaskSource
from shoal.client.task import Task
from shoal.errors import WorkerError


class FlareTasks:
    """Takes tasks in a thread, because a site is given its next one only once all of its ranks wait for it.

    Rank 0 waits for the next when it has answered the last. The others do at once: what they do meanwhile is their
    script's affair, and a task that they have not looked at gives way to a newer one.

    Args:
        rank: This process's.
        model: What a script that runs by itself starts from.
        evaluate: Whether the script does tasks to evaluate, too.

    Raises:
        WorkerError: The server cannot be reached.
    """

    def __init__(self, rank: int, model: Any = None, *, evaluate: bool = False) -> None:
        self.rank = rank
        self._source = TaskSource(model, evaluate=evaluate)
        self._news = threading.Condition()
        self._newest: Task | None = None
        self._count = 0
        """How many tasks have come."""
        self._over = False
        """Whether no more will come."""
        self._left = False
        """Whether the script wants no more."""
        self._problem: Exception | None = None
        self._claimed: Task | None = None
        """The task that the script was told of."""
        self._claims = 0
        """How many tasks had come then."""
        self._given = False
        """Whether the script has the model of that."""
        threading.Thread(target=self._fetch, name="shoal-tasks", daemon=True).start()

    def ask(self, seconds: float | None) -> Task | None:
        """Tells whether there is a task, and waits for that.

        Args:
            seconds: How long; None until there is one, or no more will come.

        Raises:
            WorkerError: The server, or another rank, is gone.
        """
        if self.rank != 0 or self._claimed is None:
            self._claim(seconds)
        return self._claimed

    def take(self, seconds: float | None) -> Task | None:
        """Returns the task that :meth:`ask` has told of, else the next.

        Args:
            seconds: How long to wait for one; None until there is one, or no more will come.

        Raises:
            WorkerError: The server, or another rank, is gone.
        """
        if self._claimed is None or (self.rank != 0 and self._given):
            self._claim(seconds)
        self._given = self._claimed is not None
        return self._claimed

    def current(self) -> Task | None:
        """Returns the task that the script was told of and has not answered."""
        return self._claimed

    def answered(self) -> None:
        """Takes note that the task was."""
        with self._news:
            self._claimed = None
            self._news.notify_all()

    def leave(self) -> None:
        """Takes no more tasks."""
        with self._news:
            self._left = True
            self._news.notify_all()
        self._source.leave()

    def _claim(self, seconds: float | None) -> None:
        """Waits for a task that the script was not told of, and tells it of that; of none where none comes."""
        with self._news:
            self._claimed, self._given = None, False
            self._news.wait_for(self._told, seconds)
            if self._problem is not None:
                raise self._problem
            if not self._over and not self._left and self._count > self._claims:
                self._claimed, self._newest, self._claims = self._newest, None, self._count

    def _told(self) -> bool:
        return self._over or self._left or self._problem is not None or self._count > self._claims

    def _fetch(self) -> None:
        """Runs in the thread."""
        while True:
            try:
                task = self._source.next_task()
            except Exception as error:
                with self._news:
                    self._problem = error if isinstance(error, WorkerError) else WorkerError(str(error))
                    self._news.notify_all()
                return
            with self._news:
                self._over = task is None
                if task is not None:
                    self._newest, self._count = task, self._count + 1
                self._news.notify_all()
                if self._over:
                    return
                while self.rank == 0 and not self._left and task is not None and not task.replied:
                    self._news.wait()
