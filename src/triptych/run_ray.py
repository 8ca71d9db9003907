"""The same tasks on a Ray cluster: no logic of its own. Every node sees the same file system at the same paths, or the same URLs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .errors import MissingExtraError, OutputError
from .mover import Mover, Tick
from .output import Task
from .run import Engine, do

ENDING = 60.0
"""Seconds that are given to tasks to end, when one has failed."""
RETRIES = 5
"""How often a task is begun again when its worker dies. A file appears whole or not at all, and a part of one is written over."""


def on_ray(address: str | None = None, cpus: int | None = None) -> Engine:
    """An engine for `convert` and `run` that gives one file, or one part of a divided file, to one Ray task.

    Args:
        address: of a running cluster ("auto", "ray://host:10001"); None uses the cluster of this process, or starts one here.
        cpus: worker processes of a cluster that is started here; None is one a core.
    Raises MissingExtraError without ray; OutputError when a file could not be written after all tries.
    """

    def engine(tasks: Sequence[Task], progress: Tick) -> None:
        """Does all tasks on the cluster; one that was started here ends with them."""
        ray = _ray()
        ours = not ray.is_initialized()
        if ours:
            local = {"num_cpus": cpus, "include_dashboard": False} if address is None else {}
            ray.init(address=address, log_to_driver=False, logging_level="ERROR", **local)
        try:
            remote = ray.remote(num_cpus=1, max_retries=RETRIES)(_do)
            pending = {remote.remote(_absolute(task)): task for task in tasks}
            try:
                while pending:
                    done, _ = ray.wait(list(pending), num_returns=1)
                    task = pending.pop(done[0])
                    error = _outcome(ray, done[0], task)
                    if error is not None:
                        raise error
                    progress(task.size)
            except BaseException:  # nobody writes behind an error, or ctrl-C
                for rest in pending:
                    ray.cancel(rest, force=True)
                if pending:
                    ray.wait(list(pending), num_returns=len(pending), timeout=ENDING)
                raise
        finally:
            if ours:
                ray.shutdown()

    return engine


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    return ray


def _absolute(task: Task) -> Task:
    """Workers have another working directory; URLs are the same everywhere."""
    source, root = (place if isinstance(place, str) else place.resolve() for place in (task.source, task.root))
    return task._replace(source=source, root=root)


def _do(task: Task) -> BaseException | None:
    """In the worker. An error comes back as a value: it is the task's answer, and no reason to try again."""
    try:
        do(task, Mover(), lambda size: None)
    except Exception as error:
        return error
    return None


def _outcome(ray: Any, done: Any, task: Task) -> BaseException | None:
    try:
        found: BaseException | None = ray.get(done)
    except ray.exceptions.RayTaskError as error:  # not of the task, whose errors are values: of the worker that was to begin it
        return OutputError("a worker cannot do its work", file=task.name, found=(str(error).strip().splitlines() or ["-"])[-1][:200],
                           try_="the same version of this package on every machine")  # fmt: skip
    except ray.exceptions.RayError as error:
        what = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return OutputError("a worker was lost again and again", file=task.name, found=what[:200], expected=f"at most {RETRIES} times")
    return found
