import io
import threading
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from dpar.images import MAX_PIXELS
from pipeline.sources import decode
from pipeline.sources.pixel_budget import PixelBudget


class Counter:
    """The most pixels in use at once."""

    def __init__(self) -> None:
        self.now, self.most, self._lock = 0, 0, threading.Lock()

    def add(self, pixels: int) -> None:
        with self._lock:
            self.now += pixels
            self.most = max(self.most, self.now)


def test_threads_stay_within_the_budget_and_all_finish() -> None:
    budget, counter = PixelBudget(100), Counter()

    def work(i: int) -> None:
        pixels = (60, 30, 7)[i % 3]
        with budget.in_use():
            with budget.take(pixels):
                counter.add(pixels)
            counter.add(0)
            counter.add(-pixels)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(300)))
    assert counter.most <= 100
    assert budget._free == 100


def test_an_image_larger_than_the_budget_is_decoded_alone_and_released_after_an_error() -> None:
    budget = PixelBudget(10)
    for _ in range(2):
        try:
            with budget.in_use(), budget.take(1000):
                assert budget._free == 0
                raise ValueError
        except ValueError:
            assert budget._free == 10


def test_a_thread_that_acquires_a_second_image_releases_the_first() -> None:
    budget = PixelBudget(10)
    with budget.in_use():
        for _ in range(3):
            with budget.take(8):
                assert budget._free == 2
    assert budget._free == 10


def test_an_image_is_not_decoded_before_there_is_room_for_its_pixels() -> None:
    buffer = io.BytesIO()
    Image.new("L", (100, 100)).save(buffer, "PNG")
    with ThreadPoolExecutor(1) as pool:
        with decode.budget.in_use(), decode.budget.take(MAX_PIXELS - 9999):
            waiting = pool.submit(decode.decode_image, io.BytesIO(buffer.getvalue()))
            assert not threading.Event().wait(0.1)
            assert not waiting.done()
        assert waiting.result().size == (100, 100)
    assert decode.budget._free == MAX_PIXELS
