"""One timer for all deadlines: each item is due once, at its own time, unless it was removed."""

import asyncio

from builders.serving import run
from uni_instruct.serve.batching.deadlines import Deadlines


def test_items_are_due_in_the_order_of_their_deadlines() -> None:
    async def work() -> None:
        due: list[str] = []
        deadlines: Deadlines[str] = Deadlines(due.append)
        now = asyncio.get_running_loop().time()
        for name, after_s in (("late", 0.2), ("soon", 0.05), ("never", 0.06), ("at once", -1.0), ("later", 0.3)):
            deadlines.add(name, now + after_s)
        deadlines.remove("never")
        deadlines.remove("unknown")
        while len(due) < 4:
            await asyncio.sleep(0.01)
        assert due == ["at once", "soon", "late", "later"]
        deadlines.remove("late")

    run(work())


def test_what_is_due_may_add_and_remove() -> None:
    """As a request that times out does, whose client at once asks again."""

    async def work() -> None:
        due: list[int] = []

        def again(item: int) -> None:
            due.append(item)
            deadlines.remove(item)
            if item < 3:
                deadlines.add(item + 1, asyncio.get_running_loop().time() + 0.01)

        deadlines: Deadlines[int] = Deadlines(again)
        deadlines.add(0, asyncio.get_running_loop().time() + 0.01)
        while len(due) < 4:
            await asyncio.sleep(0.01)
        assert due == [0, 1, 2, 3]

    run(work())
