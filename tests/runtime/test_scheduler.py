"""`Scheduler`: the order of admission, which sequence is preempted, and its request and slots afterwards."""

from paged.runtime import PagePool
from paged.runtime._scheduler import Request, Scheduler


def build(lengths, num_pages=6, num_slots=3):
    """Requests of these prompt lengths over pages of 2 tokens."""
    pool = PagePool.init(num_pages, num_slots, pages_per_seq=6, page_size=2)
    requests = [Request(i, (1,) * n, max_new_tokens=8, known=[1] * n) for i, n in enumerate(lengths)]
    return Scheduler(pool, requests), requests


def running(scheduler):
    return [request.index for request in scheduler.running.values()]


def waiting(scheduler):
    return [request.index for request in scheduler.waiting]


def draw(scheduler):
    """A decode step: one more token for every sequence that goes on."""
    for slot in scheduler.extend_decoding():
        scheduler.running[slot].known.append(1)


def test_admission_is_in_order_while_pages_and_slots_last():
    scheduler, _ = build([4, 7, 1, 1])
    scheduler.admit()
    assert (running(scheduler), waiting(scheduler)) == ([0, 1], [2, 3]), "no page is left for request 2"
    scheduler, _ = build([1, 1, 1, 1])
    scheduler.admit()
    assert (running(scheduler), waiting(scheduler)) == ([0, 1, 2], [3]), "no slot is left for request 3"
    scheduler, _ = build([3, 11, 1])
    scheduler.admit()
    assert (running(scheduler), waiting(scheduler)) == ([0], [1, 2]), "nobody overtakes a request that does not fit"


def test_one_uncached_token_decodes_and_more_prefill():
    scheduler, requests = build([3, 1])
    scheduler.admit()
    assert scheduler.next_prefill() == 0 and scheduler.decoding() == [1]
    scheduler.extend_prefill(0, 2)
    assert scheduler.next_prefill() is None and scheduler.decoding() == [0, 1]
    assert scheduler.pool.lengths.tolist() == [2, 0, 0] and requests[0].num_generated == 0


def test_the_newest_gives_up_its_pages_and_heads_the_queue():
    scheduler, requests = build([2, 3, 2, 1], num_pages=4)
    scheduler.admit()
    for slot, request in scheduler.running.items():
        scheduler.extend_prefill(slot, len(request.prompt))
        request.known.append(1)
    assert int(scheduler.pool.num_free) == 0
    draw(scheduler)  # request 0 needs a second page, request 2 too
    assert running(scheduler) == [0, 1] and waiting(scheduler) == [2, 3]
    assert (requests[2].cached, requests[2].preemptions, len(requests[2].known)) == (0, 1, 3)
    assert scheduler.pool.lengths.tolist() == [3, 4, 0]
    scheduler.admit()
    assert running(scheduler) == [0, 1], "three tokens need two pages, and none is free"


def test_the_last_sequence_left_always_goes_on():
    scheduler, requests = build([1, 1, 1], num_pages=5)
    scheduler.admit()
    for _ in range(9):
        draw(scheduler)
    assert running(scheduler) == [0] and requests[0].cached == 9
    assert waiting(scheduler) == [1, 2] and requests[0].preemptions == 0


def test_release_frees_slot_and_pages():
    scheduler, _ = build([4, 4, 4], num_slots=2)
    scheduler.admit()
    scheduler.release([0])
    scheduler.admit()
    assert scheduler.running[0].index == 2 and running(scheduler) == [1, 2] and int(scheduler.pool.num_free) == 2
